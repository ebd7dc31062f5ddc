//! A GPU through the driver's API: memory from a pool, kernels by name, matrix products by cuBLAS. Both libraries are looked for when a GPU is asked
//! for, so that one program starts with and without them.
//!
//! One stream, in whose order everything happens: memory that was given back may be taken again at once.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Result, bail};
use cudarc::cublas::{result as blas, sys as blas_sys};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result as driver, sys as driver_sys};

use super::kernels::{self, Arg, Kind, Launch};
use super::pool::Pool;

/// Workspace that cuBLAS gets, once: with it a product's result does not depend on what ran before. The size is what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// The part of the GPU's memory that is left to the driver, which loads code when it is first used.
const RESERVE: usize = 64;

/// A GPU, ready for work.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// One product is started at a time: the workspace is of all of them.
    blas: Mutex<Blas>,
    module: driver_sys::CUmodule,
    functions: HashMap<(&'static str, Option<Kind>), driver_sys::CUfunction>,
    pool: Mutex<Pool>,
    out_of_memory: AtomicBool,
    lost: AtomicBool,
    name: String,
    blas_version: i32,
}

/// cuBLAS's handle and its workspace.
struct Blas {
    handle: blas_sys::cublasHandle_t,
    workspace: u64,
}

// SAFETY: the handles may be used from any thread that has the context bound, which every entry point does.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} ({})", self.context.ordinal(), self.name)
    }
}

/// An address on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub(super) u64);

/// Memory on the device; goes back to the pool when dropped.
pub struct Memory {
    gpu: Arc<Gpu>,
    address: u64,
    /// What was taken from the pool.
    size: usize,
    kind: Kind,
    len: usize,
}

/// A matrix on the device, row-major with rows `stride` elements apart, or the transpose of one.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    address: Address,
    kind: Kind,
    stride: usize,
    transposed: bool,
}

impl Matrix {
    /// The transpose, without a copy.
    pub fn t(self) -> Self {
        Matrix { transposed: !self.transposed, ..self }
    }
}

fn failed(what: &str, e: DriverError) -> candle_core::Error {
    let name = e.error_string().ok().and_then(|s| s.to_str().ok()).unwrap_or("unknown error");
    candle_core::Error::Msg(format!("CUDA: {what}: {name} ({:?})", e.0))
}

fn blas_failed(what: &str, e: blas::CublasError) -> candle_core::Error {
    candle_core::Error::Msg(format!("cuBLAS: {what}: {:?}", e.0))
}

impl Gpu {
    /// Opens GPU `ordinal`, compiles the kernels for it and makes ready to multiply.
    ///
    /// # Errors
    /// When there is no driver, no cuBLAS or no such GPU, or it is older than what the kernels need (compute capability 8.0).
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        // SAFETY: loading a library runs its initialisers; NVIDIA's are what is asked for.
        if !unsafe { driver_sys::is_culib_present() } {
            bail!("no NVIDIA driver (libcuda.so.1) on this machine");
        }
        // SAFETY: as above.
        if !unsafe { blas_sys::is_culib_present() } {
            bail!("cuBLAS (libcublas.so.13 or .12) was not found: install it, or name its folder in LD_LIBRARY_PATH");
        }
        let count = CudaContext::device_count().map_err(|e| failed("counting GPUs", e))?;
        if ordinal >= count as usize {
            bail!("there is no GPU {ordinal}: the driver sees {count}");
        }
        let context = CudaContext::new(ordinal).map_err(|e| failed("opening the GPU", e))?;
        let (major, minor) = context.compute_capability().map_err(|e| failed("asking for its capability", e))?;
        let name = context.name().map_err(|e| failed("asking for its name", e))?;
        if major < 8 {
            bail!("{name} has compute capability {major}.{minor}; the kernels need 8.0 or newer");
        }
        let stream = context.new_stream().map_err(|e| failed("making a stream", e))?;
        // SAFETY: the image is a NUL-terminated text.
        let module =
            unsafe { driver::module::load_data(kernels::image()?.as_ptr().cast()) }.map_err(|e| failed("compiling the kernels", e))?;
        let functions = functions(module)?;
        let blas = Blas::start(&stream)?;
        let blas_version = blas.version()?;
        let blas = Mutex::new(blas);
        let total = context.total_mem().map_err(|e| failed("asking for its memory", e))?;
        let maps = driver_sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED;
        let can_map = context.attribute(maps).is_ok_and(|supported| supported != 0);
        let pool = Pool::open(ordinal, total, total / RESERVE, can_map);
        tracing::info!(gpu = name, ordinal, capability = format!("{major}.{minor}"), "GPU opened");
        let (pool, out_of_memory, lost) = (Mutex::new(pool), AtomicBool::new(false), AtomicBool::new(false));
        Ok(Arc::new(Gpu { context, stream, blas, module, functions, pool, out_of_memory, lost, name, blas_version }))
    }

    /// How many the driver sees; 0 without a driver.
    pub fn count() -> usize {
        // SAFETY: as in `open`.
        if !unsafe { driver_sys::is_culib_present() } {
            return 0;
        }
        CudaContext::device_count().map_or(0, |count| count as usize)
    }

    /// What the maker calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version of cuBLAS, e.g. 130100: another one may multiply in another order.
    pub fn blas_version(&self) -> i32 {
        self.blas_version
    }

    /// Its index.
    pub fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// Bytes that are free (what the pool could give back included), and all bytes.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let (free, total) = self.context.mem_get_info().map_err(|e| failed("asking for free memory", e))?;
        Ok(((free + self.pool().free_bytes()) as u64, total as u64))
    }

    /// The most bytes that were in use at one time.
    pub fn peak_bytes(&self) -> u64 {
        self.pool().peak_bytes() as u64
    }

    /// Whether an allocation failed since this was asked last.
    pub fn take_out_of_memory(&self) -> bool {
        self.out_of_memory.swap(false, Ordering::AcqRel)
    }

    /// Whether it failed in a way that every later call fails, too: only a new process can use it again.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Makes the calling thread use this GPU.
    pub fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| failed("choosing the GPU", e))
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives all free memory back to the driver.
    pub fn trim(&self) -> Result<()> {
        self.bind()?;
        // Nothing is given back between the wait and the trim.
        let mut pool = self.pool();
        self.synchronize()?;
        pool.trim().map_err(|e| self.noted("freeing memory", e))
    }

    /// Waits until the stream is done.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(|e| self.noted("waiting for the GPU", e))
    }

    /// `len` elements with any content.
    pub fn dirty(self: &Arc<Self>, kind: Kind, len: usize) -> Result<Memory> {
        let bytes = len * kind.bytes();
        let found = self.pool().take(bytes);
        let (address, size) = match found {
            Some(found) => found,
            None => self.take_after_trim(bytes)?,
        };
        Ok(Memory { gpu: self.clone(), address, size, kind, len })
    }

    /// What the pool keeps elsewhere may be enough.
    fn take_after_trim(&self, bytes: usize) -> Result<(u64, usize)> {
        self.trim()?;
        let found = self.pool().take(bytes);
        found.ok_or_else(|| {
            self.out_of_memory.store(true, Ordering::Release);
            let free = driver::mem_get_info().map_or(0, |(free, _)| free);
            candle_core::Error::Msg(format!("the GPU is out of memory: {} MiB are wanted, {} MiB are free", bytes >> 20, free >> 20))
        })
    }

    /// The error of a driver's call; remembers when the GPU is lost or out of memory.
    fn noted(&self, what: &str, e: DriverError) -> candle_core::Error {
        use driver_sys::cudaError_enum as Code;
        match e.0 {
            Code::CUDA_ERROR_OUT_OF_MEMORY => self.out_of_memory.store(true, Ordering::Release),
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
            | Code::CUDA_ERROR_ECC_UNCORRECTABLE => self.lost.store(true, Ordering::Release),
            _ => {}
        }
        failed(what, e)
    }

    /// `len` zeros.
    pub fn zeros(self: &Arc<Self>, kind: Kind, len: usize) -> Result<Memory> {
        let memory = self.dirty(kind, len)?;
        self.clear(&memory)?;
        Ok(memory)
    }

    /// Sets all elements to zero.
    pub fn clear(&self, memory: &Memory) -> Result<()> {
        let bytes = memory.len * memory.kind.bytes();
        // SAFETY: the memory is that long.
        unsafe { driver::memset_d8_async(memory.address, 0, bytes, self.stream.cu_stream()) }.map_err(|e| self.noted("clearing memory", e))
    }

    /// A copy of host values. `T` is as wide as an element.
    pub fn upload<T: Copy>(self: &Arc<Self>, kind: Kind, values: &[T]) -> Result<Memory> {
        debug_assert_eq!(size_of::<T>(), kind.bytes());
        let memory = self.dirty(kind, values.len())?;
        self.write(&memory, 0, values)?;
        Ok(memory)
    }

    /// Overwrites elements from `offset` on with host values.
    pub fn write<T: Copy>(&self, memory: &Memory, offset: usize, values: &[T]) -> Result<()> {
        assert!(offset + values.len() <= memory.len, "write: {} elements at {offset} of {}", values.len(), memory.len);
        // SAFETY: the memory is large enough. From pageable memory the driver copies into its own before it returns.
        unsafe { driver::memcpy_htod_async(memory.at(offset).0, values, self.stream.cu_stream()) }
            .map_err(|e| self.noted("copying to the GPU", e))
    }

    /// Waits for the stream and copies the first elements to the host.
    pub fn download<T: Copy>(&self, memory: &Memory, to: &mut [T]) -> Result<()> {
        assert!(size_of_val(to) <= memory.size, "download: {} bytes of {}", size_of_val(to), memory.size);
        // SAFETY: the memory is large enough, and the wait makes sure that `to` is written before it is used.
        unsafe { driver::memcpy_dtoh_async(to, memory.address, self.stream.cu_stream()) }
            .map_err(|e| self.noted("copying from the GPU", e))?;
        self.synchronize()
    }

    /// A copy on the device.
    pub fn copy(self: &Arc<Self>, from: &Memory) -> Result<Memory> {
        let to = self.dirty(from.kind, from.len)?;
        let bytes = from.len * from.kind.bytes();
        // SAFETY: both are that long.
        unsafe { driver::memcpy_dtod_async(to.address, from.address, bytes, self.stream.cu_stream()) }
            .map_err(|e| self.noted("copying on the GPU", e))?;
        Ok(to)
    }

    /// Starts a kernel.
    pub fn launch(&self, name: &'static str, kind: Option<Kind>, launch: Launch, args: &[Arg]) -> Result<()> {
        let Some(&function) = self.functions.get(&(name, kind)) else { bail!("there is no kernel {name} for {kind:?}") };
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let mut slots: Vec<u64> = args.iter().map(|a| a.bits()).collect();
        let mut pointers: Vec<*mut c_void> = slots.iter_mut().map(|slot| std::ptr::from_mut(slot).cast()).collect();
        let ([x, y, z], stream) = (launch.grid, self.stream.cu_stream());
        // SAFETY: the kernel belongs to a module that stays loaded; arguments are in its order, each at the start of 8 bytes (little-endian), and
        // name memory that stays until the stream is past the kernel.
        let launched = unsafe {
            driver::launch_kernel(function, (x, y, z), (launch.threads.0, launch.threads.1, 1), launch.shared, stream, &mut pointers)
        };
        launched.map_err(|e| self.noted(name, e))
    }

    /// `c` `[m, n]` = β·c + α·a·b with a `[m, k]`, b `[k, n]` and f32 sums, `c` row-major.
    pub fn matmul(&self, [m, n, k]: [usize; 3], a: Matrix, b: Matrix, c: Matrix, alpha: f32, beta: f32) -> Result<()> {
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        debug_assert!(!c.transposed);
        let blas = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        let operation =
            |m: Matrix| if m.transposed { blas_sys::cublasOperation_t::CUBLAS_OP_T } else { blas_sys::cublasOperation_t::CUBLAS_OP_N };
        let pointer = |m: Matrix| m.address.0 as *mut c_void;
        // cuBLAS counts by columns: a row-major matrix is its transpose, and cᵀ = bᵀ·aᵀ.
        // SAFETY: the callers' matrices lie inside their memory.
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
            match e.0 {
                blas_sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => self.out_of_memory.store(true, Ordering::Release),
                // What failed before on the device is told by the driver, which notes it.
                _ => drop(self.synchronize()),
            }
            blas_failed(&format!("a product of {m}x{k}x{n}"), e)
        })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.trim().is_err() {
            return;
        }
        let blas = self.blas.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nothing of these is used any more: all memory holds a reference to this.
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
        // Sums of bf16 products are f32 throughout; those of f32 use no TF32.
        let mode = blas_sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle and the stream are valid; the workspace is freed after the handle.
        unsafe {
            blas::set_stream(handle, stream.cu_stream().cast()).map_err(|e| blas_failed("choosing the stream", e))?;
            let workspace = driver::malloc_sync(WORKSPACE).map_err(|e| failed("allocating cuBLAS's workspace", e))?;
            let set = blas_sys::cublasSetWorkspace_v2(handle, workspace as *mut c_void, WORKSPACE).result();
            set.and_then(|()| blas_sys::cublasSetMathMode(handle, mode).result()).map_err(|e| blas_failed("configuring it", e))?;
            Ok(Blas { handle, workspace })
        }
    }

    fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: the handle is valid, and the number is written before the call returns.
        let asked = unsafe { blas_sys::cublasGetVersion_v2(self.handle, &mut version) };
        asked.result().map_err(|e| blas_failed("asking for its version", e))?;
        Ok(version)
    }
}

/// The functions of the module, all of them, so that a missing one is found at the start.
fn functions(module: driver_sys::CUmodule) -> Result<HashMap<(&'static str, Option<Kind>), driver_sys::CUfunction>> {
    let mut functions = HashMap::new();
    for (name, kind, shared) in kernels::all() {
        let full = CString::new(match kind {
            Some(kind) => format!("{name}_{}", kind.suffix()),
            None => name.to_owned(),
        })
        .map_err(candle_core::Error::wrap)?;
        // SAFETY: the module stays loaded as long as the process.
        let function = unsafe { driver::module::get_function(module, full) }.map_err(|e| failed(name, e))?;
        if shared > 0 {
            let attribute = driver_sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is valid.
            unsafe { driver::function::set_function_attribute(function, attribute, shared as i32) }.map_err(|e| failed(name, e))?;
        }
        functions.insert((name, kind), function);
    }
    Ok(functions)
}

impl Memory {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Its first element.
    pub fn address(&self) -> Address {
        Address(self.address)
    }

    /// Element `offset`.
    pub fn at(&self, offset: usize) -> Address {
        debug_assert!(offset <= self.len);
        Address(self.address + (offset * self.kind.bytes()) as u64)
    }

    /// As a matrix with rows `stride` elements apart.
    pub fn matrix(&self, stride: usize) -> Matrix {
        self.matrix_at(0, stride)
    }

    /// The same from element `offset` on.
    pub fn matrix_at(&self, offset: usize, stride: usize) -> Matrix {
        Matrix { address: self.at(offset), kind: self.kind, stride, transposed: false }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.gpu.pool().give(self.address, self.size);
    }
}
