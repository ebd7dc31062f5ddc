//! NVIDIA GPU through the driver API: memory from an arena, kernels by name, GEMM by cuBLAS. The
//! driver and cuBLAS are loaded when a GPU is opened, so the same program also starts on machines
//! without them.
//!
//! All work runs in the order of one stream. Freed memory may therefore be allocated again at once.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Result, bail};
use cudarc::cublas::{result as blas, sys as blas_sys};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result as driver, sys as driver_sys};

use super::arena::DeviceArena;
use super::kernels::{self, Arg, Kind, Launch};
use super::staging::Staging;
use crate::compute::out_of_memory::OutOfMemory;

/// Size in bytes of cuBLAS's workspace, which is allocated once. With a fixed workspace, a result
/// does not depend on what ran before. NVIDIA recommends this size for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// The GPU's memory divided by this number is left to the driver, which loads code when it is first
/// used.
const RESERVE_DIVISOR: usize = 64;

/// An opened GPU with compiled kernels.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Locked while a GEMM is enqueued, because all of them share the workspace.
    blas: Mutex<Blas>,
    module: driver_sys::CUmodule,
    functions: HashMap<(&'static str, Option<Kind>), driver_sys::CUfunction>,
    arena: Mutex<DeviceArena>,
    staging: Mutex<Staging>,
    lost: AtomicBool,
    name: String,
    blas_version: i32,
}

/// Handle of cuBLAS and its workspace.
struct Blas {
    handle: blas_sys::cublasHandle_t,
    workspace: u64,
}

// SAFETY: the handles may be used from any thread that has the context bound, and callers bind it.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} ({})", self.context.ordinal(), self.name)
    }
}

/// Address in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub(super) u64);

/// Device memory. Dropping it returns it to the arena.
pub struct Memory {
    gpu: Arc<Gpu>,
    address: u64,
    /// Bytes allocated from the arena.
    size: usize,
    kind: Kind,
    len: usize,
}

/// Matrix on the device, row-major with rows `stride` elements apart, or the transpose of one.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    address: Address,
    kind: Kind,
    stride: usize,
    transposed: bool,
}

impl Matrix {
    /// Returns the transpose, without a copy.
    pub fn t(self) -> Self {
        Matrix {
            transposed: !self.transposed,
            ..self
        }
    }

    /// Returns the matrix without its first `row` rows, counted after any transposition.
    fn rows_from(self, row: usize) -> Self {
        self.from(row * if self.transposed { 1 } else { self.stride })
    }

    /// Returns the matrix without its first `column` columns, counted after any transposition.
    fn columns_from(self, column: usize) -> Self {
        self.from(column * if self.transposed { self.stride } else { 1 })
    }

    fn from(self, element: usize) -> Self {
        Matrix {
            address: Address(self.address.0 + (element * self.kind.bytes()) as u64),
            ..self
        }
    }
}

/// Maximum number of elements from the first to the last element of an operand. cuBLAS counts them
/// in 32 bits.
const MAX_ELEMENTS: usize = i32::MAX as usize;

/// One call of cuBLAS, for a part of a GEMM.
struct GemmPart {
    shape: [usize; 3],
    a: Matrix,
    b: Matrix,
    c: Matrix,
    /// True if an earlier part has written C and this one accumulates.
    accumulate: bool,
}

/// Splits a GEMM until no operand spans more than `limit` elements from its first to its last row.
/// To shorten an operand, it halves the dimension (m, n or k) that counts the operand's rows in
/// memory.
fn parts([m, n, k]: [usize; 3], a: Matrix, b: Matrix, c: Matrix, limit: usize) -> Vec<GemmPart> {
    let mut todo = vec![GemmPart {
        shape: [m, n, k],
        a,
        b,
        c,
        accumulate: false,
    }];
    let mut parts = Vec::new();
    while let Some(part) = todo.pop() {
        let [m, n, k] = part.shape;
        let rows_of_a = if part.a.transposed { k } else { m };
        let rows_of_b = if part.b.transposed { n } else { k };
        let long = |rows: usize, of: Matrix| rows > 1 && rows * of.stride > limit;
        // The stack gets the later half first, so that the parts of a sum are computed in order.
        if long(m, part.c) || (long(rows_of_a, part.a) && !part.a.transposed) {
            let half = m / 2;
            todo.push(GemmPart {
                shape: [m - half, n, k],
                a: part.a.rows_from(half),
                c: part.c.rows_from(half),
                ..part
            });
            todo.push(GemmPart {
                shape: [half, n, k],
                ..part
            });
        } else if long(rows_of_a, part.a) || (long(rows_of_b, part.b) && !part.b.transposed) {
            let half = k / 2;
            todo.push(GemmPart {
                shape: [m, n, k - half],
                a: part.a.columns_from(half),
                b: part.b.rows_from(half),
                accumulate: true,
                ..part
            });
            todo.push(GemmPart {
                shape: [m, n, half],
                ..part
            });
        } else if long(rows_of_b, part.b) {
            let half = n / 2;
            todo.push(GemmPart {
                shape: [m, n - half, k],
                b: part.b.columns_from(half),
                c: part.c.columns_from(half),
                ..part
            });
            todo.push(GemmPart {
                shape: [m, half, k],
                ..part
            });
        } else {
            parts.push(part);
        }
    }
    parts
}

fn failed(what: &str, e: DriverError) -> candle_core::Error {
    let name = e
        .error_string()
        .ok()
        .and_then(|s| s.to_str().ok())
        .unwrap_or("unknown error");
    candle_core::Error::Msg(format!("CUDA: {what}: {name} ({:?})", e.0))
}

fn out_of_memory(message: String) -> candle_core::Error {
    candle_core::Error::Cuda(Box::new(OutOfMemory(message)))
}

fn blas_failed(what: &str, e: blas::CublasError) -> candle_core::Error {
    candle_core::Error::Msg(format!("cuBLAS: {what}: {:?}", e.0))
}

impl Gpu {
    /// Opens GPU `ordinal`, compiles the kernels for it and starts cuBLAS.
    ///
    /// # Errors
    /// Fails if there is no driver, no cuBLAS or no such GPU, if the GPU's compute capability is
    /// below 8.0, which the kernels need, if f32 GEMMs are rounded to TF32, and if a call of the
    /// driver or of cuBLAS fails.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        // SAFETY: loading a library runs its initialisers, and these are NVIDIA's.
        if !unsafe { driver_sys::is_culib_present() } {
            bail!("no NVIDIA driver (libcuda.so.1) on this machine");
        }
        // SAFETY: as above.
        if !unsafe { blas_sys::is_culib_present() } {
            bail!(
                "cuBLAS (libcublas.so.13 or .12) was not found: install it, or add its folder to \
                 LD_LIBRARY_PATH"
            );
        }
        let count = CudaContext::device_count().map_err(|e| failed("counting GPUs", e))?;
        if ordinal >= count as usize {
            bail!("there is no GPU {ordinal}: the driver sees {count}");
        }
        let context = CudaContext::new(ordinal).map_err(|e| failed("opening the GPU", e))?;
        let (major, minor) = context
            .compute_capability()
            .map_err(|e| failed("reading its compute capability", e))?;
        let name = context.name().map_err(|e| failed("reading its name", e))?;
        if major < 8 {
            bail!("{name} has compute capability {major}.{minor}; the kernels need 8.0 or newer");
        }
        let stream = context
            .new_stream()
            .map_err(|e| failed("creating a stream", e))?;
        // SAFETY: the image is a NUL-terminated string.
        let module = unsafe { driver::module::load_data(kernels::image()?.as_ptr().cast()) }
            .map_err(|e| failed("compiling the kernels", e))?;
        let functions = functions(module)?;
        let blas = Blas::start(&stream)?;
        let blas_version = blas.version()?;
        let blas = Mutex::new(blas);
        let total = context
            .total_mem()
            .map_err(|e| failed("reading its memory size", e))?;
        use driver_sys::CUdevice_attribute as Attribute;
        let can_map = context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED)
            .is_ok_and(|supported| supported != 0);
        let arena = DeviceArena::open(ordinal, total, total / RESERVE_DIVISOR, can_map);
        let staging =
            Mutex::new(Staging::open().map_err(|e| failed("allocating page-locked memory", e))?);
        tracing::info!(
            gpu = name,
            ordinal,
            capability = format!("{major}.{minor}"),
            "GPU opened"
        );
        let (arena, lost) = (Mutex::new(arena), AtomicBool::new(false));
        let gpu = Arc::new(Gpu {
            context,
            stream,
            blas,
            module,
            functions,
            arena,
            staging,
            lost,
            name,
            blas_version,
        });
        gpu.refuse_reduced_precision()?;
        Ok(gpu)
    }

    /// Returns the number of GPUs that the driver sees; 0 without a driver.
    pub fn count() -> usize {
        // SAFETY: as in `open`.
        if !unsafe { driver_sys::is_culib_present() } {
            return 0;
        }
        CudaContext::device_count().map_or(0, |count| count as usize)
    }

    /// Returns the model name of the GPU.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the version of cuBLAS, e.g. 130100. Another version may sum in another order.
    pub fn blas_version(&self) -> i32 {
        self.blas_version
    }

    /// Returns the index of the GPU.
    pub fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// Returns the free bytes, including free memory of the arena, and the total bytes.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let (free, total) = self
            .context
            .mem_get_info()
            .map_err(|e| self.record_error("reading the free memory", e))?;
        Ok(((free + self.arena().free_bytes()) as u64, total as u64))
    }

    /// Returns the peak number of bytes in use since the last trim.
    pub fn peak_bytes(&self) -> u64 {
        self.arena().peak_bytes() as u64
    }

    /// Returns true after a failure that makes every later call fail too. Only a new process can
    /// use the GPU again.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Makes this GPU's context current on the calling thread.
    pub fn bind(&self) -> Result<()> {
        self.context
            .bind_to_thread()
            .map_err(|e| self.record_error("binding the GPU's context", e))
    }

    fn arena(&self) -> MutexGuard<'_, DeviceArena> {
        self.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the stream and returns all free memory to the driver.
    pub fn trim(&self) -> Result<()> {
        self.bind()?;
        // The lock is taken first, so that nothing is freed between the wait and the trim.
        let mut arena = self.arena();
        self.synchronize()?;
        arena
            .trim()
            .map_err(|e| self.record_error("freeing memory", e))
    }

    /// Waits until the stream has finished.
    pub fn synchronize(&self) -> Result<()> {
        self.stream
            .synchronize()
            .map_err(|e| self.record_error("waiting for the GPU", e))
    }

    /// Allocates `len` elements with **unspecified contents**.
    pub fn uninit(self: &Arc<Self>, kind: Kind, len: usize) -> Result<Memory> {
        let bytes = len * kind.bytes();
        let found = self.arena().allocate(bytes);
        let (address, size) = match found {
            Some(found) => found,
            None => self.allocate_after_trim(bytes)?,
        };
        Ok(Memory {
            gpu: self.clone(),
            address,
            size,
            kind,
            len,
        })
    }

    /// Returns all free memory of the arena to the driver and tries to allocate once more.
    fn allocate_after_trim(&self, bytes: usize) -> Result<(u64, usize)> {
        self.trim()?;
        let found = self.arena().allocate(bytes);
        found.ok_or_else(|| {
            let free = driver::mem_get_info().map_or(0, |(free, _)| free);
            out_of_memory(format!(
                "the GPU is out of memory: {} MiB are wanted, {} MiB are free",
                bytes >> 20,
                free >> 20
            ))
        })
    }

    /// Converts an error of the driver and records if the GPU is lost.
    fn record_error(&self, what: &str, e: DriverError) -> candle_core::Error {
        use driver_sys::cudaError_enum as Code;
        match e.0 {
            Code::CUDA_ERROR_OUT_OF_MEMORY => return out_of_memory(failed(what, e).to_string()),
            Code::CUDA_ERROR_ILLEGAL_ADDRESS
            | Code::CUDA_ERROR_MISALIGNED_ADDRESS
            | Code::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | Code::CUDA_ERROR_LAUNCH_FAILED
            | Code::CUDA_ERROR_LAUNCH_TIMEOUT
            | Code::CUDA_ERROR_ASSERT
            | Code::CUDA_ERROR_UNKNOWN
            | Code::CUDA_ERROR_HARDWARE_STACK_ERROR
            | Code::CUDA_ERROR_INVALID_PC
            | Code::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | Code::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | Code::CUDA_ERROR_CONTAINED
            | Code::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | Code::CUDA_ERROR_MPS_CLIENT_TERMINATED
            | Code::CUDA_ERROR_MPS_RPC_FAILURE
            | Code::CUDA_ERROR_ECC_UNCORRECTABLE => self.lost.store(true, Ordering::Release),
            _ => {}
        }
        failed(what, e)
    }

    /// Allocates `len` zeros.
    pub fn zeros(self: &Arc<Self>, kind: Kind, len: usize) -> Result<Memory> {
        let memory = self.uninit(kind, len)?;
        self.clear(&memory)?;
        Ok(memory)
    }

    /// Sets all elements to zero.
    pub fn clear(&self, memory: &Memory) -> Result<()> {
        let bytes = memory.len * memory.kind.bytes();
        // SAFETY: the memory is that long.
        unsafe { driver::memset_d8_async(memory.address, 0, bytes, self.stream.cu_stream()) }
            .map_err(|e| self.record_error("clearing memory", e))
    }

    /// Copies host values to new device memory. `T` must be as wide as an element.
    pub fn upload<T: Copy>(self: &Arc<Self>, kind: Kind, values: &[T]) -> Result<Memory> {
        debug_assert_eq!(size_of::<T>(), kind.bytes());
        let memory = self.uninit(kind, values.len())?;
        self.write(&memory, 0, values)?;
        Ok(memory)
    }

    /// Overwrites the elements from `offset` on with host values.
    pub fn write<T: Copy>(&self, memory: &Memory, offset: usize, values: &[T]) -> Result<()> {
        assert!(
            offset + values.len() <= memory.len,
            "write: {} elements at {offset} of {}",
            values.len(),
            memory.len
        );
        // SAFETY: `T` is a plain number, which may be read as bytes.
        let bytes = unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values))
        };
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the memory is long enough, as asserted.
        unsafe { staging.copy(memory.at(offset).0, bytes, self.stream.cu_stream()) }
            .map_err(|e| self.record_error("copying to the GPU", e))
    }

    /// Copies the first elements to the host and waits until they have arrived.
    pub fn download<T: Copy>(&self, memory: &Memory, to: &mut [T]) -> Result<()> {
        assert!(
            size_of_val(to) <= memory.size,
            "download: {} bytes of {}",
            size_of_val(to),
            memory.size
        );
        // SAFETY: the memory is large enough, and the function waits for the copy before it
        // returns.
        unsafe { driver::memcpy_dtoh_async(to, memory.address, self.stream.cu_stream()) }
            .map_err(|e| self.record_error("copying from the GPU", e))?;
        self.synchronize()
    }

    /// Copies the memory on the device.
    fn copy(self: &Arc<Self>, from: &Memory) -> Result<Memory> {
        let to = self.uninit(from.kind, from.len)?;
        let bytes = from.len * from.kind.bytes();
        // SAFETY: both are that long.
        unsafe {
            driver::memcpy_dtod_async(to.address, from.address, bytes, self.stream.cu_stream())
        }
        .map_err(|e| self.record_error("copying on the GPU", e))?;
        Ok(to)
    }

    /// Returns an error if f32 GEMMs on this GPU round their operands to TF32. The environment
    /// variable `NVIDIA_TF32_OVERRIDE` can make cuBLAS do that.
    fn refuse_reduced_precision(self: &Arc<Self>) -> Result<()> {
        const N: usize = 256;
        // TF32 has 10 fraction bits and would round this to 1.
        let value = 1.0 + 2f32.powi(-20);
        let a = self.upload(Kind::F32, &vec![value; N * N])?;
        let mut identity = vec![0f32; N * N];
        identity.iter_mut().step_by(N + 1).for_each(|x| *x = 1.0);
        let (b, c) = (
            self.upload(Kind::F32, &identity)?,
            self.zeros(Kind::F32, N * N)?,
        );
        self.matmul([N, N, N], a.matrix(N), b.matrix(N), c.matrix(N), 1.0, 0.0)?;
        let mut product = vec![0f32; N * N];
        self.download(&c, &mut product)?;
        if product.iter().any(|x| *x != value) {
            bail!(
                "f32 matrix multiplications on {} are not exact: unset NVIDIA_TF32_OVERRIDE and \
                 other settings that enable TF32",
                self.name
            );
        }
        Ok(())
    }

    /// Enqueues a kernel. Only the typed functions of [`super::ops`] call this, because the
    /// arguments are not checked here.
    pub(super) fn launch(
        &self,
        name: &'static str,
        kind: Option<Kind>,
        launch: Launch,
        args: &[Arg],
    ) -> Result<()> {
        let Some(&function) = self.functions.get(&(name, kind)) else {
            bail!("there is no kernel {name} for {kind:?}")
        };
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let mut slots: Vec<u64> = args.iter().map(|a| a.bits()).collect();
        let mut pointers: Vec<*mut c_void> = slots
            .iter_mut()
            .map(|slot| std::ptr::from_mut(slot).cast())
            .collect();
        let ([x, y, z], stream) = (launch.grid, self.stream.cu_stream());
        // SAFETY: the kernel's module stays loaded. The arguments are in the kernel's order, each
        // at the start of 8 bytes (little-endian). They point to memory that stays until the stream
        // has passed the kernel.
        let launched = unsafe {
            driver::launch_kernel(
                function,
                (x, y, z),
                (launch.threads.0, launch.threads.1, 1),
                launch.shared,
                stream,
                &mut pointers,
            )
        };
        launched.map_err(|e| self.record_error(name, e))
    }

    /// Computes c = β·c + α·a·b with f32 accumulation, for row-major c `[m, n]`, a `[m, k]`
    /// and b `[k, n]`. Operands of more than `MAX_ELEMENTS` elements are multiplied in parts. If m,
    /// n or k is 0, c stays as it is, whatever β is.
    pub fn matmul(
        &self,
        shape: [usize; 3],
        a: Matrix,
        b: Matrix,
        c: Matrix,
        alpha: f32,
        beta: f32,
    ) -> Result<()> {
        for part in parts(shape, a, b, c, MAX_ELEMENTS) {
            self.multiply(
                part.shape,
                part.a,
                part.b,
                part.c,
                alpha,
                if part.accumulate { 1.0 } else { beta },
            )?;
        }
        Ok(())
    }

    /// Calls cuBLAS for one part of [`Gpu::matmul`].
    fn multiply(
        &self,
        [m, n, k]: [usize; 3],
        a: Matrix,
        b: Matrix,
        c: Matrix,
        alpha: f32,
        beta: f32,
    ) -> Result<()> {
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        debug_assert!(!c.transposed);
        let blas = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        let operation = |m: Matrix| {
            if m.transposed {
                blas_sys::cublasOperation_t::CUBLAS_OP_T
            } else {
                blas_sys::cublasOperation_t::CUBLAS_OP_N
            }
        };
        let pointer = |m: Matrix| m.address.0 as *mut c_void;
        // cuBLAS is column-major. It sees each row-major matrix as its transpose, so this computes
        // cᵀ = bᵀ·aᵀ.
        // SAFETY: the caller's matrices lie inside their memory.
        let multiplied = unsafe {
            blas::gemm_ex(
                blas.handle,
                operation(b),
                operation(a),
                n as i32,
                m as i32,
                k as i32,
                std::ptr::from_ref(&alpha).cast(),
                pointer(b),
                b.kind.cuda_type(),
                b.stride as i32,
                pointer(a),
                a.kind.cuda_type(),
                a.stride as i32,
                std::ptr::from_ref(&beta).cast(),
                pointer(c),
                c.kind.cuda_type(),
                c.stride as i32,
                blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DFALT,
            )
        };
        multiplied.map_err(|e| {
            let error = blas_failed(&format!("a GEMM of {m}x{k}x{n}"), e);
            if e.0 == blas_sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED {
                return out_of_memory(error.to_string());
            }
            // An earlier failure on the device is reported by the driver; `synchronize` records it.
            drop(self.synchronize());
            error
        })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.trim().is_err() {
            return;
        }
        self.staging
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .close();
        let blas = self.blas.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nothing uses these any more, because all memory holds a reference to the GPU.
        unsafe {
            let _ = blas::destroy_handle(blas.handle);
            let _ = driver::free_sync(blas.workspace);
            let _ = driver::module::unload(self.module);
        }
    }
}

impl Blas {
    fn start(stream: &CudaStream) -> Result<Self> {
        let handle = blas::create_handle().map_err(|e| blas_failed("starting", e))?;
        // Accumulation is in f32 for bf16 operands, and f32 operands are not rounded to TF32.
        let mode = blas_sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle and the stream are valid; the workspace is freed after the handle.
        unsafe {
            blas::set_stream(handle, stream.cu_stream().cast())
                .map_err(|e| blas_failed("setting its stream", e))?;
            let workspace = driver::malloc_sync(WORKSPACE_BYTES)
                .map_err(|e| failed("allocating cuBLAS's workspace", e))?;
            let set =
                blas_sys::cublasSetWorkspace_v2(handle, workspace as *mut c_void, WORKSPACE_BYTES)
                    .result();
            set.and_then(|()| blas_sys::cublasSetMathMode(handle, mode).result())
                .map_err(|e| blas_failed("setting its workspace and math mode", e))?;
            Ok(Blas { handle, workspace })
        }
    }

    fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: the handle is valid, and the number is written before the call returns.
        let asked = unsafe { blas_sys::cublasGetVersion_v2(self.handle, &mut version) };
        asked
            .result()
            .map_err(|e| blas_failed("reading its version", e))?;
        Ok(version)
    }
}

/// Looks up all functions of the module at the start, so that a missing one is reported at once.
fn functions(
    module: driver_sys::CUmodule,
) -> Result<HashMap<(&'static str, Option<Kind>), driver_sys::CUfunction>> {
    let mut functions = HashMap::new();
    for (name, kind, shared) in kernels::all() {
        let full = CString::new(match kind {
            Some(kind) => format!("{name}_{}", kind.suffix()),
            None => name.to_owned(),
        })
        .map_err(candle_core::Error::wrap)?;
        // SAFETY: the module stays loaded until the GPU is dropped.
        let function =
            unsafe { driver::module::get_function(module, full) }.map_err(|e| failed(name, e))?;
        if shared > 0 {
            let attribute =
                driver_sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is valid.
            unsafe { driver::function::set_function_attribute(function, attribute, shared as i32) }
                .map_err(|e| failed(name, e))?;
        }
        functions.insert((name, kind), function);
    }
    Ok(functions)
}

impl Memory {
    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns the type of the elements.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the address of the first element.
    pub fn address(&self) -> Address {
        Address(self.address)
    }

    /// Returns the address of element `offset`.
    pub fn at(&self, offset: usize) -> Address {
        debug_assert!(offset <= self.len);
        Address(self.address + (offset * self.kind.bytes()) as u64)
    }

    /// Copies the memory on the device.
    pub fn copy(&self) -> Result<Memory> {
        self.gpu.copy(self)
    }

    /// Returns the memory as a matrix with rows `stride` elements apart.
    pub fn matrix(&self, stride: usize) -> Matrix {
        self.matrix_at(0, stride)
    }

    /// Returns the memory from element `offset` on as a matrix with rows `stride` elements apart.
    pub fn matrix_at(&self, offset: usize, stride: usize) -> Matrix {
        Matrix {
            address: self.at(offset),
            kind: self.kind,
            stride,
            transposed: false,
        }
    }
}

impl From<&Memory> for Arg {
    fn from(m: &Memory) -> Self {
        Arg::Pointer(m.address().0)
    }
}

impl From<Address> for Arg {
    fn from(a: Address) -> Self {
        Arg::Pointer(a.0)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // In debug builds, a read after free sees NaN.
        if cfg!(debug_assertions) {
            // SAFETY: the memory has `size` bytes. On a thread without the context the call fails
            // and changes nothing.
            let _ = unsafe {
                driver::memset_d8_async(self.address, 0xff, self.size, self.gpu.stream.cu_stream())
            };
        }
        self.gpu.arena().release(self.address, self.size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(stride: usize) -> Matrix {
        Matrix {
            address: Address(0),
            kind: Kind::F32,
            stride,
            transposed: false,
        }
    }

    /// Computes the parts of a GEMM on the host. Addresses are offsets into the operands.
    fn multiply(
        [m, n, k]: [usize; 3],
        a: (Matrix, &[f64]),
        b: (Matrix, &[f64]),
        c: Matrix,
        limit: usize,
    ) -> (usize, Vec<f64>) {
        let at = |m: Matrix, row: usize, column: usize| {
            let (row, column) = if m.transposed {
                (column, row)
            } else {
                (row, column)
            };
            m.address.0 as usize / 4 + row * m.stride + column
        };
        // Elements that no part writes stay NaN, and so do elements that a part accumulates into
        // before they were written.
        let mut out = vec![f64::NAN; m * c.stride];
        let parts = parts([m, n, k], a.0, b.0, c, limit);
        for part in &parts {
            let [m, n, k] = part.shape;
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let sum: f64 = (0..k)
                    .map(|l| a.1[at(part.a, i, l)] * b.1[at(part.b, l, j)])
                    .sum();
                let to = &mut out[at(part.c, i, j)];
                *to = if part.accumulate { *to + sum } else { sum };
            }
        }
        (parts.len(), out)
    }

    #[test]
    fn products_of_long_operands_are_divided_and_give_the_same() {
        let values = |n: usize| {
            (0..n)
                .map(|i| ((i * 7919) % 23) as f64 - 11.0)
                .collect::<Vec<f64>>()
        };
        let [m, n, k] = [37, 12, 29];
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let stored = |rows: usize, columns: usize, transposed: bool| match transposed {
                true => (matrix(rows + 3).t(), columns * (rows + 3)),
                false => (matrix(columns + 3), rows * (columns + 3)),
            };
            let ((a, a_len), (b, b_len)) = (stored(m, k, ta), stored(k, n, tb));
            let (a_values, b_values, c) = (values(a_len), values(b_len), matrix(n + 2));
            let run = |limit| multiply([m, n, k], (a, &a_values), (b, &b_values), c, limit);
            let (one, whole) = run(MAX_ELEMENTS);
            assert_eq!(one, 1);
            for limit in [50, 100, 300] {
                let (parts, divided) = run(limit);
                assert!(parts > 1);
                let same = whole
                    .iter()
                    .zip(&divided)
                    .all(|(x, y)| x == y || (x.is_nan() && y.is_nan()));
                assert!(
                    same,
                    "a transposed {ta}, b transposed {tb}, at most {limit} elements"
                );
            }
        }
    }
}
