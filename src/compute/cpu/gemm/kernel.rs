//! Inner GEMM kernels: multiply a few rows of A with a packed panel of B and accumulate in
//! registers.

use std::sync::OnceLock;

use super::amx;
use super::panel::{NR, OutputTile, Product};
use crate::domain::training::Precision;

/// Instruction set of the GEMM kernels, detected at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// f32, with 256-bit vectors (AVX2 and FMA) if the processor has them, otherwise with the
    /// compiler's target features.
    Portable,
    /// f32 with 512-bit vectors.
    Avx512,
    /// Pairs of bf16 with f32 accumulation (`vdpbf16ps`).
    Avx512Bf16,
    /// Pairs of bf16 with f32 accumulation, in AMX tiles (`tdpbf16ps`).
    Amx,
}

impl Kernel {
    /// Returns the fastest kernel of this processor for a precision. bf16 falls back to f32 if the
    /// processor has no bf16 instructions.
    pub fn best(precision: Precision) -> Kernel {
        static BEST: OnceLock<(Kernel, Kernel)> = OnceLock::new();
        let (f32, bf16) = *BEST.get_or_init(detect);
        match precision {
            Precision::F32 => f32,
            Precision::Bf16 => bf16,
        }
    }

    /// Returns the name of the kernel and the architecture, and on x86-64 "fused" if the kernel
    /// runs with the processor's FMA instructions. Results are comparable bit for bit only if this
    /// text is equal.
    pub fn arithmetic(self) -> String {
        #[cfg(target_arch = "x86_64")]
        let is_fused = self != Kernel::Portable || x86::has_avx2();
        #[cfg(not(target_arch = "x86_64"))]
        let is_fused = false;
        format!(
            "{self:?} {}{}",
            std::env::consts::ARCH,
            if is_fused { " fused" } else { "" }
        )
    }

    /// Returns the kernels that this processor supports.
    pub fn available() -> Vec<Kernel> {
        let mut all = vec![Kernel::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = std::arch::is_x86_feature_detected!("avx512f")
                && std::arch::is_x86_feature_detected!("avx512bw")
                && std::arch::is_x86_feature_detected!("avx512vl");
            if avx512 {
                all.push(Kernel::Avx512);
                if std::arch::is_x86_feature_detected!("avx512bf16") {
                    all.push(Kernel::Avx512Bf16);
                    if amx::available() {
                        all.push(Kernel::Amx);
                    }
                }
            }
        }
        all
    }

    /// Returns true if a unit of depth is a pair of bf16.
    pub(crate) fn is_bf16(self) -> bool {
        matches!(self, Kernel::Avx512Bf16 | Kernel::Amx)
    }

    /// Returns the number of units for `k` elements, padded to the kernel's step.
    pub(crate) fn depth(self, k: usize) -> usize {
        match self {
            Kernel::Portable | Kernel::Avx512 => k,
            Kernel::Avx512Bf16 => k.div_ceil(2),
            Kernel::Amx => k.div_ceil(32) * 16,
        }
    }

    /// Returns the number of elements in `units` units.
    pub(super) fn elements(self, units: usize) -> usize {
        if self.is_bf16() { 2 * units } else { units }
    }

    /// Returns the number of units before element `k`. For bf16 pairs, `k` must be even.
    pub(crate) fn units(self, k: usize) -> usize {
        if self.is_bf16() { k / 2 } else { k }
    }

    /// Returns the number of rows that the kernel computes at a time.
    pub(crate) fn rows(self) -> usize {
        if self == Kernel::Amx { 32 } else { MR }
    }
}

fn detect() -> (Kernel, Kernel) {
    let available = Kernel::available();
    let best = |preferred: &[Kernel]| {
        preferred
            .iter()
            .copied()
            .find(|k| available.contains(k))
            .unwrap_or(Kernel::Portable)
    };
    let f32 = best(&[Kernel::Avx512]);
    (f32, best(&[Kernel::Amx, Kernel::Avx512Bf16, f32]))
}

/// Units of depth after which the accumulators are written to C. This much of a panel takes 36 KiB.
const CHUNK_DEPTH: usize = 288;
/// Pieces start at multiples of this many units, which is the largest step of the kernels.
const CHUNK_STEP: usize = 16;
/// Maximum number of products in a chunk.
const CHUNK_PRODUCTS: usize = 8;
/// Number of rows of C whose accumulators the 512-bit kernels hold in registers at a time. The AVX2
/// kernel divides them further.
const MR: usize = 14;

/// Computes `m` rows of C as Σ products, or adds to C if `out.accumulate` is set. The depth is
/// processed in chunks; between two chunks the accumulators go to C and come back, which is exact.
/// The part of the panel that a chunk uses stays in the L1 cache for all rows.
///
/// # Safety
/// The products cover `m` rows and their depth. For bf16 pairs, [`super::panel::ROW_PADDING`] more
/// rows are readable. `out` is valid for `m` rows and no other thread touches them.
pub(crate) unsafe fn panel_product(
    kernel: Kernel,
    m: usize,
    products: &[Product],
    out: OutputTile,
) {
    debug_assert!(out.columns <= NR);
    let mut chunk = [Product::EMPTY; CHUNK_PRODUCTS];
    let (mut count, mut depth, mut out) = (0, 0, out);
    for piece in products.iter().flat_map(pieces) {
        if count > 0 && (depth + piece.depth > CHUNK_DEPTH + CHUNK_STEP || count == CHUNK_PRODUCTS)
        {
            // SAFETY: guaranteed by the caller.
            unsafe { chunk_product(kernel, m, &chunk[..count], out) };
            (count, depth, out.accumulate) = (0, 0, true);
        }
        chunk[count] = piece;
        (count, depth) = (count + 1, depth + piece.depth);
    }
    // SAFETY: guaranteed by the caller.
    unsafe { chunk_product(kernel, m, &chunk[..count], out) };
}

/// Splits a product along its depth into pieces of about equal size.
fn pieces(p: &Product) -> impl Iterator<Item = Product> + use<> {
    let p = *p;
    let parts = p.depth.div_ceil(CHUNK_DEPTH);
    let cut = move |i: usize| {
        if i == parts {
            p.depth
        } else {
            p.depth * i / parts / CHUNK_STEP * CHUNK_STEP
        }
    };
    (0..parts).map(move |i| {
        // SAFETY: both offsets stay inside the product.
        let (a, b) = unsafe { (p.a.add(cut(i)), p.b.add(cut(i) * NR)) };
        Product {
            a,
            b,
            depth: cut(i + 1) - cut(i),
            ..p
        }
    })
}

/// Computes one chunk of the sum with the kernel's instructions.
///
/// # Safety
/// As [`panel_product`].
unsafe fn chunk_product(kernel: Kernel, m: usize, products: &[Product], out: OutputTile) {
    #[cfg(target_arch = "x86_64")]
    match kernel {
        // The AVX2 kernel sums in the same order as the portable one, so the results have the same
        // bits.
        Kernel::Portable if x86::has_avx2() => {
            // SAFETY: guaranteed by the caller; the processor has the instructions.
            return unsafe { by_rows(m, |rows, i| x86::avx2(rows, i, products, out)) };
        }
        Kernel::Portable => {}
        // SAFETY: guaranteed by the caller; the kernel is selected only if the processor has its
        // instructions.
        Kernel::Amx => return unsafe { amx::panel_product(m, products, out) },
        Kernel::Avx512 => {
            // SAFETY: as above.
            return unsafe { by_rows(m, |rows, i| x86::strip(false, rows, i, products, out)) };
        }
        Kernel::Avx512Bf16 => {
            // SAFETY: as above.
            return unsafe { by_rows(m, |rows, i| x86::strip(true, rows, i, products, out)) };
        }
    }
    let _ = kernel;
    by_rows(m, |rows, i| {
        super::super::simd::dispatch(
            #[inline(always)]
            // SAFETY: guaranteed by the caller.
            || unsafe { portable(rows, i, products, out) },
        )
    });
}

/// Calls `strip(rows, first)` for strips of at most [`MR`] rows.
#[inline(always)]
fn by_rows(m: usize, mut strip: impl FnMut(usize, usize)) {
    let mut i = 0;
    while i < m {
        let rows = MR.min(m - i);
        strip(rows, i);
        i += rows;
    }
}

/// Computes `rows` rows of C from row `first` on, in plain Rust.
///
/// # Safety
/// As [`panel_product`].
#[inline(always)]
unsafe fn portable(rows: usize, first: usize, products: &[Product], out: OutputTile) {
    const W: usize = 16;
    let OutputTile {
        c,
        stride,
        columns: n,
        accumulate,
    } = out;
    for column in (0..n).step_by(W) {
        let width = W.min(n - column);
        let mut acc = [[0f32; W]; MR];
        // SAFETY: rows and columns are bounded by the caller; panels are NR wide.
        unsafe {
            if accumulate {
                for (i, acc) in acc.iter_mut().enumerate().take(rows) {
                    let from = c.add((first + i) * stride + column);
                    for (j, x) in acc.iter_mut().enumerate().take(width) {
                        *x = *from.add(j);
                    }
                }
            }
            for p in products {
                for k in 0..p.depth {
                    let b: &[f32; W] = &*p.b.add(k * NR + column).cast();
                    for (i, acc) in acc.iter_mut().enumerate().take(rows) {
                        let a = f32::from_bits(*p.a.add((first + i) * p.stride + k));
                        for (x, b) in acc.iter_mut().zip(b) {
                            *x = a.mul_add(*b, *x);
                        }
                    }
                }
            }
            for (i, acc) in acc.iter().enumerate().take(rows) {
                let to = c.add((first + i) * stride + column);
                for (j, x) in acc.iter().enumerate().take(width) {
                    *to.add(j) = *x;
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{NR, OutputTile, Product};

    /// Vectors per row of C. The accumulators of 14 rows leave registers for B and for A. With more
    /// vectors per row fewer rows would fit, and B would be streamed more often. Half as many are
    /// used if they suffice, e.g. for a low LoRA rank.
    const V: usize = NR / 16;
    /// Prefetch distance in B, in units of depth.
    const AHEAD: usize = 8;

    /// Computes `rows` rows of C from row `first` on, with 512-bit vectors.
    ///
    /// # Safety
    /// As [`super::panel_product`]; the processor has the kernel's instructions.
    #[inline]
    pub unsafe fn strip(
        is_bf16: bool,
        rows: usize,
        first: usize,
        products: &[Product],
        out: OutputTile,
    ) {
        let OutputTile {
            c,
            stride,
            columns: n,
            accumulate,
        } = out;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let c = c.add(first * stride);
            macro_rules! rows {
                ($($m:literal)*) => {
                    match (rows, is_bf16, n > NR / 2) {
                        $(($m, false, true) => {
                            f32_strip::<$m, V>(first, n, products, c, stride, accumulate)
                        }
                        ($m, false, false) => {
                            f32_strip::<$m, { V / 2 }>(first, n, products, c, stride, accumulate)
                        }
                        ($m, true, true) => {
                            bf16_strip::<$m, V>(first, n, products, c, stride, accumulate)
                        }
                        ($m, true, false) => {
                            bf16_strip::<$m, { V / 2 }>(first, n, products, c, stride, accumulate)
                        })*
                        _ => {}
                    }
                };
            }
            rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
        }
    }

    /// Returns true if the processor has AVX2 and FMA.
    pub fn has_avx2() -> bool {
        std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
    }

    /// Rows of C at a time with 256-bit vectors: twelve accumulators, two vectors of B and one of A
    /// use fifteen of the sixteen registers.
    const ROWS: usize = 6;
    /// Columns at a time: two 256-bit vectors.
    const WIDTH: usize = 16;

    /// Computes `rows` rows of C from row `first` on, with 256-bit vectors.
    ///
    /// # Safety
    /// As [`super::panel_product`]; the processor has AVX2 and FMA.
    #[inline]
    pub unsafe fn avx2(rows: usize, first: usize, products: &[Product], out: OutputTile) {
        let OutputTile {
            c,
            stride,
            columns: n,
            accumulate,
        } = out;
        let mut i = 0;
        while i < rows {
            let m = ROWS.min(rows - i);
            for column in (0..n).step_by(WIDTH) {
                let width = WIDTH.min(n - column);
                // SAFETY: guaranteed by the caller; rows and columns are in bounds, and panels are
                // NR wide.
                unsafe {
                    let to = c.add((first + i) * stride + column);
                    match m {
                        6 => avx2_strip::<6>(
                            first + i,
                            column,
                            width,
                            products,
                            to,
                            stride,
                            accumulate,
                        ),
                        5 => avx2_strip::<5>(
                            first + i,
                            column,
                            width,
                            products,
                            to,
                            stride,
                            accumulate,
                        ),
                        4 => avx2_strip::<4>(
                            first + i,
                            column,
                            width,
                            products,
                            to,
                            stride,
                            accumulate,
                        ),
                        3 => avx2_strip::<3>(
                            first + i,
                            column,
                            width,
                            products,
                            to,
                            stride,
                            accumulate,
                        ),
                        2 => avx2_strip::<2>(
                            first + i,
                            column,
                            width,
                            products,
                            to,
                            stride,
                            accumulate,
                        ),
                        _ => avx2_strip::<1>(
                            first + i,
                            column,
                            width,
                            products,
                            to,
                            stride,
                            accumulate,
                        ),
                    }
                }
            }
            i += m;
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_strip<const M: usize>(
        first: usize,
        column: usize,
        width: usize,
        products: &[Product],
        c: *mut f32,
        stride: usize,
        accumulate: bool,
    ) {
        // SAFETY: guaranteed by the caller; a row of C narrower than WIDTH is copied through a
        // buffer.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 2]; M];
            let mut buffer = [0f32; WIDTH];
            if accumulate {
                for (i, acc) in acc.iter_mut().enumerate() {
                    let mut from = c.add(i * stride).cast_const();
                    if width < WIDTH {
                        std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), width);
                        from = buffer.as_ptr();
                    }
                    *acc = [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))];
                }
            }
            for p in products {
                let (mut a, mut b) = (p.a.add(first * p.stride), p.b.add(column));
                let end = a.add(p.depth);
                while a != end {
                    let row = [_mm256_loadu_ps(b.cast()), _mm256_loadu_ps(b.add(8).cast())];
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let x = _mm256_set1_ps(f32::from_bits(a.add(i * p.stride).read()));
                        acc[0] = _mm256_fmadd_ps(x, row[0], acc[0]);
                        acc[1] = _mm256_fmadd_ps(x, row[1], acc[1]);
                    }
                    a = a.add(1);
                    b = b.add(NR);
                }
            }
            for (i, acc) in acc.iter().enumerate() {
                let to = c.add(i * stride);
                let target = if width < WIDTH {
                    buffer.as_mut_ptr()
                } else {
                    to
                };
                _mm256_storeu_ps(target, acc[0]);
                _mm256_storeu_ps(target.add(8), acc[1]);
                if width < WIDTH {
                    std::ptr::copy_nonoverlapping(buffer.as_ptr(), to, width);
                }
            }
        }
    }

    macro_rules! strip {
        ($name:ident, $features:literal, $step:expr) => {
            #[target_feature(enable = $features)]
            unsafe fn $name<const M: usize, const V: usize>(
                first: usize,
                n: usize,
                products: &[Product],
                c: *mut f32,
                stride: usize,
                accumulate: bool,
            ) {
                // SAFETY: guaranteed by the caller; columns beyond n are masked.
                unsafe {
                    let mask = |v: usize| -> u16 {
                        match n.saturating_sub(16 * v) {
                            left if left >= 16 => u16::MAX,
                            left => (1u16 << left) - 1,
                        }
                    };
                    let mut acc = [[_mm512_setzero_ps(); V]; M];
                    if accumulate {
                        for i in 0..M {
                            for v in 0..V {
                                acc[i][v] =
                                    _mm512_maskz_loadu_ps(mask(v), c.add(i * stride + 16 * v));
                            }
                        }
                    }
                    for p in products {
                        let (mut a, mut b) = (p.a.add(first * p.stride), p.b);
                        let end = a.add(p.depth);
                        while a != end {
                            let mut row = [_mm512_setzero_si512(); V];
                            for v in 0..V {
                                row[v] = _mm512_loadu_si512(b.add(16 * v).cast());
                                _mm_prefetch::<_MM_HINT_T0>(
                                    b.wrapping_add(AHEAD * NR + 16 * v).cast(),
                                );
                            }
                            for i in 0..M {
                                let x = _mm512_set1_epi32(
                                    a.add(i * p.stride).cast::<i32>().read_unaligned(),
                                );
                                for v in 0..V {
                                    acc[i][v] = $step(acc[i][v], x, row[v]);
                                }
                            }
                            a = a.add(1);
                            b = b.add(NR);
                        }
                    }
                    for i in 0..M {
                        for v in 0..V {
                            _mm512_mask_storeu_ps(c.add(i * stride + 16 * v), mask(v), acc[i][v]);
                        }
                    }
                }
            }
        };
    }

    strip!(f32_strip, "avx512f", |acc, x, row| _mm512_fmadd_ps(
        _mm512_castsi512_ps(x),
        _mm512_castsi512_ps(row),
        acc
    ));
    strip!(bf16_strip, "avx512f,avx512bw,avx512bf16", |acc, x, row| {
        _mm512_dpbf16_ps(
            acc,
            std::mem::transmute::<__m512i, __m512bh>(x),
            std::mem::transmute::<__m512i, __m512bh>(row),
        )
    });
}
