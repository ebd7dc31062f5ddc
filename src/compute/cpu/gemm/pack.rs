//! Packs B into panels: for each unit of depth, [`NR`] columns side by side. A unit is one f32, or
//! the bf16 of two neighbouring k.

use std::cell::RefCell;

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::kernel::Kernel;
use super::panel::NR;
use super::view::{Elements, View};

thread_local! {
    /// Scratch memory in which a panel is converted to the kernel's element type before packing.
    static F32: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static BF16: RefCell<Vec<bf16>> = const { RefCell::new(Vec::new()) };
}

/// Packs `k` elements of depth from `k0` on and `n ≤ NR` columns from `n0` on into `dst`. The
/// length of `dst` is the padded depth in units times [`NR`]; positions outside the matrix become
/// zero.
pub(crate) fn pack_panel(
    kernel: Kernel,
    b: View,
    k0: usize,
    k: usize,
    n0: usize,
    n: usize,
    dst: &mut [u32],
) {
    debug_assert!(n <= NR && k > 0 && n > 0);
    debug_assert!(b.covers(k0 + k, n0 + n));
    let start = k0 * b.row_stride + n0 * b.col_stride;
    // True if the source is contiguous along k, false if along n. If it is contiguous along both, B
    // has one row or one column.
    let along_k = b.row_stride == 1 && (b.col_stride != 1 || k == 1);
    let (lines, width, stride) = if along_k {
        (n, k, b.col_stride)
    } else {
        (k, n, b.row_stride)
    };
    let end = start + (lines - 1) * stride + width;
    match (kernel.is_bf16(), b.elements) {
        (false, Elements::F32(v)) => pack_f32(&v[start..end], stride, along_k, k, n, dst),
        (true, Elements::Bf16(v)) => pack_bf16(kernel, &v[start..end], stride, along_k, k, n, dst),
        (false, Elements::Bf16(v)) => F32.with_borrow_mut(|line| {
            line.resize(lines * width, 0.0);
            for (to, from) in line.chunks_mut(width).zip(v[start..end].chunks(stride)) {
                from[..width].convert_to_f32_slice(to);
            }
            pack_f32(line, width, along_k, k, n, dst);
        }),
        (true, Elements::F32(v)) => BF16.with_borrow_mut(|line| {
            line.resize(lines * width, bf16::ZERO);
            for (to, from) in line.chunks_mut(width).zip(v[start..end].chunks(stride)) {
                round(kernel, &from[..width], to);
            }
            pack_bf16(kernel, line, width, along_k, k, n, dst);
        }),
    }
}

/// Rounds f32 to the nearest bf16, ties to even.
pub(crate) fn round(kernel: Kernel, src: &[f32], dst: &mut [bf16]) {
    debug_assert_eq!(src.len(), dst.len());
    #[cfg(target_arch = "x86_64")]
    if kernel.is_bf16() {
        // SAFETY: bf16 kernels are selected only if the processor has AVX512_BF16.
        unsafe { x86::round(src, dst) };
        return;
    }
    let _ = kernel;
    dst.convert_from_f32_slice(src);
}

/// Writes `rows` rows of `width` values from a tile with row stride [`NR`] as units, rounded for
/// bf16 kernels. Output rows lie `stride` units apart; each is filled with zeros up to `units`
/// units.
///
/// # Safety
/// `dst` is valid for `units` units in each of the rows, and no other thread touches them.
pub(super) unsafe fn round_rows(
    kernel: Kernel,
    tile: &[f32],
    rows: usize,
    width: usize,
    dst: *mut u32,
    stride: usize,
    units: usize,
) {
    assert!(
        width <= NR
            && units >= kernel.depth(width)
            && (rows == 0 || tile.len() >= (rows - 1) * NR + width)
    );
    #[cfg(target_arch = "x86_64")]
    if kernel.is_bf16() && width == NR && units == NR / 2 {
        // SAFETY: guaranteed by the assertion and the caller; bf16 kernels are selected only if the
        // processor has AVX512_BF16.
        return unsafe { x86::round_tile(tile.as_ptr(), rows, dst, stride) };
    }
    for (i, values) in tile.chunks(NR).enumerate().take(rows) {
        // SAFETY: guaranteed by the caller.
        let to = unsafe { std::slice::from_raw_parts_mut(dst.add(i * stride), units) };
        if kernel.is_bf16() {
            // SAFETY: a unit has the size of two bf16, and every bit pattern is valid for both
            // types.
            let to: &mut [bf16] =
                unsafe { std::slice::from_raw_parts_mut(to.as_mut_ptr().cast(), 2 * units) };
            round(kernel, &values[..width], &mut to[..width]);
            to[width..].fill(bf16::ZERO);
        } else {
            to.iter_mut()
                .zip(&values[..width])
                .for_each(|(unit, x)| *unit = x.to_bits());
            to[width..].fill(0);
        }
    }
}

/// Packs f32 lines that lie `stride` elements apart: n lines along k, or k lines along n.
fn pack_f32(src: &[f32], stride: usize, along_k: bool, k: usize, n: usize, dst: &mut [u32]) {
    // SAFETY: same size and alignment, and every bit pattern is valid for both.
    let src: &[u32] = unsafe { std::slice::from_raw_parts(src.as_ptr().cast(), src.len()) };
    if along_k {
        // SAFETY: pointer and length come from the same slice.
        unsafe { transpose(src.as_ptr(), src.len(), stride, n, k, dst, NR) };
        clear_columns(&mut dst[..k * NR], n);
    } else {
        for (row, from) in dst.chunks_exact_mut(NR).zip(src.chunks(stride)).take(k) {
            // A copy of a length known at compile time is a few vector moves.
            match (row.as_mut_array::<NR>(), from.first_chunk::<NR>()) {
                (Some(row), Some(from)) if n == NR => *row = *from,
                _ => {
                    row[..n].copy_from_slice(&from[..n]);
                    row[n..].fill(0);
                }
            }
        }
    }
    dst[k * NR..].fill(0);
}

/// Packs bf16 lines as [`pack_f32`] does, two neighbouring k in a unit.
fn pack_bf16(
    kernel: Kernel,
    src: &[bf16],
    stride: usize,
    along_k: bool,
    k: usize,
    n: usize,
    dst: &mut [u32],
) {
    let pairs = k / 2;
    if along_k && stride.is_multiple_of(2) {
        if pairs > 0 {
            // SAFETY: pairs of bf16 are read as unaligned u32 inside the slice.
            unsafe {
                transpose(
                    src.as_ptr().cast(),
                    src.len() / 2,
                    stride / 2,
                    n,
                    pairs,
                    dst,
                    NR,
                )
            };
            clear_columns(&mut dst[..pairs * NR], n);
        }
        if k % 2 == 1 {
            let last = &mut dst[pairs * NR..(pairs + 1) * NR];
            for (j, unit) in last.iter_mut().enumerate() {
                *unit = if j < n {
                    u32::from(src[j * stride + k - 1].to_bits())
                } else {
                    0
                };
            }
        }
    } else if along_k {
        let at = |j: usize, i: usize| {
            if i < k {
                u32::from(src[j * stride + i].to_bits())
            } else {
                0
            }
        };
        for (p, row) in dst.chunks_mut(NR).enumerate().take(k.div_ceil(2)) {
            for (j, unit) in row.iter_mut().enumerate() {
                *unit = if j < n {
                    at(j, 2 * p) | at(j, 2 * p + 1) << 16
                } else {
                    0
                };
            }
        }
    } else {
        let done = interleave_panel(kernel, src, stride, pairs, n, dst);
        for (p, row) in dst
            .chunks_mut(NR)
            .enumerate()
            .take(k.div_ceil(2))
            .skip(done)
        {
            let low = &src[2 * p * stride..][..n];
            let high = if 2 * p + 1 < k {
                Some(&src[(2 * p + 1) * stride..][..n])
            } else {
                None
            };
            interleave(kernel, low, high, &mut row[..n]);
            row[n..].fill(0);
        }
    }
    dst[k.div_ceil(2) * NR..].fill(0);
}

/// Sets the columns from `n` on to zero.
fn clear_columns(dst: &mut [u32], n: usize) {
    if n < NR {
        dst.chunks_mut(NR).for_each(|row| row[n..].fill(0));
    }
}

/// Runs [`interleave`] for `pairs` pairs of rows of a full-width panel, if the processor has a
/// vector version. Returns the number of pairs done.
fn interleave_panel(
    kernel: Kernel,
    src: &[bf16],
    stride: usize,
    pairs: usize,
    n: usize,
    dst: &mut [u32],
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if kernel.is_bf16() && n == NR && pairs > 0 {
        assert!((2 * pairs - 1) * stride + NR <= src.len() && pairs * NR <= dst.len());
        // SAFETY: the assertion bounds both sides; bf16 kernels are selected only if the processor
        // has AVX512_BF16, hence AVX512BW.
        unsafe { x86::interleave_panel(src.as_ptr(), stride, pairs, dst.as_mut_ptr()) };
        return pairs;
    }
    let _ = (kernel, src, stride, pairs, n, dst);
    0
}

/// Computes `dst[j] = low[j] | high[j] << 16`.
pub(super) fn interleave(kernel: Kernel, low: &[bf16], high: Option<&[bf16]>, dst: &mut [u32]) {
    match high {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: bf16 kernels are selected only if the processor has AVX512_BF16, hence AVX512BW.
        Some(high) if kernel.is_bf16() => unsafe { x86::interleave(low, high, dst) },
        Some(high) => {
            for ((unit, l), h) in dst.iter_mut().zip(low).zip(high) {
                *unit = u32::from(l.to_bits()) | u32::from(h.to_bits()) << 16;
            }
        }
        None => {
            let _ = kernel;
            for (unit, l) in dst.iter_mut().zip(low) {
                *unit = u32::from(l.to_bits());
            }
        }
    }
}

/// Transposes: `dst[c·dst_stride + r] = src[r·stride + c]` for r < rows, c < cols.
///
/// # Safety
/// `src` is valid for reads of `len` units, which may be unaligned.
pub(super) unsafe fn transpose(
    src: *const u32,
    len: usize,
    stride: usize,
    rows: usize,
    cols: usize,
    dst: &mut [u32],
    dst_stride: usize,
) {
    assert!(
        rows == 0
            || cols == 0
            || ((rows - 1) * stride + cols <= len && (cols - 1) * dst_stride + rows <= dst.len())
    );
    let (mut whole_rows, mut whole_cols) = (0, 0);
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        (whole_rows, whole_cols) = (rows - rows % 16, cols - cols % 16);
        for r in (0..whole_rows).step_by(16) {
            for c in (0..whole_cols).step_by(16) {
                // SAFETY: the assertion bounds both sides; the processor has the instructions.
                unsafe {
                    x86::transpose16(
                        src.add(r * stride + c),
                        stride,
                        dst.as_mut_ptr().add(c * dst_stride + r),
                        dst_stride,
                    )
                };
            }
        }
    }
    for r in 0..rows {
        let first = if r < whole_rows { whole_cols } else { 0 };
        for c in first..cols {
            // SAFETY: inside `len` by the assertion.
            dst[c * dst_stride + r] = unsafe { src.add(r * stride + c).read_unaligned() };
        }
    }
}

/// Transposes pairs of rows for bf16 kernels, for c < cols and 2p < rows:
/// `dst[c·dst_stride + p] = src[2p·stride + c] | src[(2p + 1)·stride + c] << 16`.
/// The rest of each output row becomes 0.
pub(super) fn transpose_pairs(
    src: &[bf16],
    stride: usize,
    rows: usize,
    cols: usize,
    dst: &mut [u32],
    dst_stride: usize,
) {
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(
        (rows - 1) * stride + cols <= src.len()
            && cols * dst_stride <= dst.len()
            && rows.div_ceil(2) <= dst_stride
    );
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512vl")
    {
        for c in (0..cols).step_by(16) {
            for p in (0..dst_stride).step_by(16) {
                let (rows, cols) = (rows.saturating_sub(2 * p).min(32), (cols - c).min(16));
                // SAFETY: the assertion bounds both sides, and only `rows`, `cols` and the given
                // number of units are touched; the processor has the instructions.
                unsafe {
                    let from = src.as_ptr().add((2 * p * stride + c).min(src.len()));
                    let to = dst.as_mut_ptr().add(c * dst_stride + p);
                    x86::transpose_pairs16(
                        from,
                        stride,
                        rows,
                        cols,
                        to,
                        dst_stride,
                        (dst_stride - p).min(16),
                    );
                }
            }
        }
        return;
    }
    let at = |r: usize, c: usize| {
        if r < rows {
            u32::from(src[r * stride + c].to_bits())
        } else {
            0
        }
    };
    for (c, line) in dst.chunks_mut(dst_stride).enumerate().take(cols) {
        line.iter_mut()
            .enumerate()
            .for_each(|(p, unit)| *unit = at(2 * p, c) | at(2 * p + 1, c) << 16);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::NR;

    /// Prefetch distance in pairs of rows. Rows lie far apart in memory, so the hardware prefetcher
    /// does not predict them.
    const AHEAD: usize = 8;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub fn round(src: &[f32], dst: &mut [bf16]) {
        let n = src.len().min(dst.len());
        let mut i = 0;
        while i + 16 <= n {
            // SAFETY: sixteen elements from i on are inside both slices; bf16 is a 16-bit integer
            // in memory.
            unsafe {
                let v = _mm512_cvtneps_pbh(_mm512_loadu_ps(src.as_ptr().add(i)));
                _mm256_storeu_si256(
                    dst.as_mut_ptr().add(i).cast(),
                    std::mem::transmute::<__m256bh, __m256i>(v),
                );
            }
            i += 16;
        }
        if i < n {
            let mask = (1u16 << (n - i)) - 1;
            // SAFETY: masked to the remaining elements.
            unsafe {
                let v = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, src.as_ptr().add(i)));
                _mm256_mask_storeu_epi16(
                    dst.as_mut_ptr().add(i).cast(),
                    mask,
                    std::mem::transmute::<__m256bh, __m256i>(v),
                );
            }
        }
    }

    /// Rounds rows of [`NR`] values into rows `stride` units apart.
    ///
    /// # Safety
    /// Both sides are valid for the rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn round_tile(src: *const f32, rows: usize, dst: *mut u32, stride: usize) {
        for i in 0..rows {
            for v in 0..NR / 16 {
                // SAFETY: guaranteed by the caller; bf16 is a 16-bit integer in memory.
                unsafe {
                    let x = _mm512_cvtneps_pbh(_mm512_loadu_ps(src.add(i * NR + 16 * v)));
                    _mm256_storeu_si256(
                        dst.add(i * stride + 8 * v).cast(),
                        std::mem::transmute::<__m256bh, __m256i>(x),
                    );
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub fn interleave(low: &[bf16], high: &[bf16], dst: &mut [u32]) {
        let n = low.len().min(high.len()).min(dst.len());
        let mut i = 0;
        while i < n {
            let mask = if n - i >= 16 {
                u16::MAX
            } else {
                (1u16 << (n - i)) - 1
            };
            // SAFETY: masked to the elements from i to n, which are inside all three.
            unsafe {
                let l = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
                    mask,
                    low.as_ptr().add(i).cast(),
                ));
                let h = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
                    mask,
                    high.as_ptr().add(i).cast(),
                ));
                let pair = _mm512_or_si512(l, _mm512_slli_epi32::<16>(h));
                _mm512_mask_storeu_epi32(dst.as_mut_ptr().add(i).cast(), mask, pair);
            }
            i += 16;
        }
    }

    /// Interleaves `pairs` pairs of consecutive rows, [`NR`] wide and `stride` apart.
    ///
    /// # Safety
    /// `src` is valid for the rows and `dst` for `pairs` times [`NR`] units.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn interleave_panel(src: *const bf16, stride: usize, pairs: usize, dst: *mut u32) {
        // Indices for the permutation. Each pair selects element j of the lower row and element j
        // of the upper row (index 32 + j): j = 0…15 in `first`, j = 16…31 in `second`.
        let counted = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let first = _mm512_add_epi32(
            _mm512_mullo_epi32(counted, _mm512_set1_epi32(0x1_0001)),
            _mm512_set1_epi32(32 << 16),
        );
        let second = _mm512_add_epi32(first, _mm512_set1_epi32(16 * 0x1_0001));
        // SAFETY: guaranteed by the caller; a prefetch of an invalid address has no effect.
        unsafe {
            for p in 0..pairs {
                let low = src.add(2 * p * stride);
                let high = low.add(stride);
                let ahead = low.wrapping_add(2 * AHEAD * stride);
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(stride).cast());
                let (l, h) = (
                    _mm512_loadu_si512(low.cast()),
                    _mm512_loadu_si512(high.cast()),
                );
                _mm512_storeu_si512(
                    dst.add(p * NR).cast(),
                    _mm512_permutex2var_epi16(l, first, h),
                );
                _mm512_storeu_si512(
                    dst.add(p * NR + NR / 2).cast(),
                    _mm512_permutex2var_epi16(l, second, h),
                );
            }
        }
    }

    /// Transposes a block of 16 × 16 units.
    ///
    /// # Safety
    /// Both sides are valid for 16 × 16 units with their strides.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn transpose16(src: *const u32, stride: usize, dst: *mut u32, dst_stride: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let mut r = [_mm512_setzero_si512(); 16];
            for (i, row) in r.iter_mut().enumerate() {
                *row = _mm512_loadu_si512(src.add(i * stride).cast());
            }
            for (i, column) in columns(r).into_iter().enumerate() {
                _mm512_storeu_si512(dst.add(i * dst_stride).cast(), column);
            }
        }
    }

    /// Transposes a block of up to 32 rows and 16 columns as pairs of rows: `pairs` units per
    /// column, zeros beyond the last row.
    ///
    /// # Safety
    /// `src` is valid for `rows` rows of `cols` elements, `dst` for `cols` rows of `pairs` units.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn transpose_pairs16(
        src: *const bf16,
        stride: usize,
        rows: usize,
        cols: usize,
        dst: *mut u32,
        dst_stride: usize,
        pairs: usize,
    ) {
        let mask = |n: usize| if n >= 16 { u16::MAX } else { (1u16 << n) - 1 };
        let mut r = [_mm512_setzero_si512(); 16];
        for (i, pair) in r.iter_mut().enumerate().take(rows.div_ceil(2)) {
            let high = if 2 * i + 1 < rows { mask(cols) } else { 0 };
            // SAFETY: masked to rows and columns inside the caller's matrix.
            unsafe {
                let l = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
                    mask(cols),
                    src.add(2 * i * stride).cast(),
                ));
                let h = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
                    high,
                    src.wrapping_add((2 * i + 1) * stride).cast(),
                ));
                *pair = _mm512_or_si512(l, _mm512_slli_epi32::<16>(h));
            }
        }
        for (i, column) in columns(r).into_iter().enumerate().take(cols) {
            // SAFETY: as above.
            unsafe {
                _mm512_mask_storeu_epi32(dst.add(i * dst_stride).cast(), mask(pairs), column)
            };
        }
    }

    /// Returns the columns of a block of 16 × 16 units.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn columns(mut r: [__m512i; 16]) -> [__m512i; 16] {
        let mut t = r;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            t[i] = _mm512_shuffle_i32x4::<0x88>(r[i], r[4 + i]);
            t[4 + i] = _mm512_shuffle_i32x4::<0xdd>(r[i], r[4 + i]);
            t[8 + i] = _mm512_shuffle_i32x4::<0x88>(r[8 + i], r[12 + i]);
            t[12 + i] = _mm512_shuffle_i32x4::<0xdd>(r[8 + i], r[12 + i]);
        }
        for i in 0..4 {
            r[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[8 + i]);
            r[4 + i] = _mm512_shuffle_i32x4::<0x88>(t[4 + i], t[12 + i]);
            r[8 + i] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[8 + i]);
            r[12 + i] = _mm512_shuffle_i32x4::<0xdd>(t[4 + i], t[12 + i]);
        }
        r
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_pairs_puts_neighbouring_rows_side_by_side() {
        for (rows, cols, beyond) in [
            (64, 32, 0),
            (33, 47, 3),
            (1, 5, 1),
            (64, 352, 0),
            (31, 16, 0),
        ] {
            let (stride, depth) = (cols + 3, usize::div_ceil(rows, 2) + beyond);
            let src: Vec<bf16> = (0..rows * stride)
                .map(|i| bf16::from_bits(i as u16 + 1))
                .collect();
            let mut dst = vec![u32::MAX; cols * depth];
            transpose_pairs(
                &src[..(rows - 1) * stride + cols],
                stride,
                rows,
                cols,
                &mut dst,
                depth,
            );
            let at = |r: usize, c: usize| {
                if r < rows {
                    u32::from(src[r * stride + c].to_bits())
                } else {
                    0
                }
            };
            for c in 0..cols {
                for p in 0..depth {
                    assert_eq!(
                        dst[c * depth + p],
                        at(2 * p, c) | at(2 * p + 1, c) << 16,
                        "({p}, {c}) of {rows}x{cols}"
                    );
                }
            }
        }
    }

    #[test]
    fn transposing_moves_every_unit_to_its_place() {
        for (rows, cols) in [(16, 16), (33, 47), (5, 64), (64, 3)] {
            let src: Vec<u32> = (0..rows * (cols + 2)).map(|i| i as u32).collect();
            let mut dst = vec![u32::MAX; cols * 70];
            // SAFETY: the vector's own pointer.
            unsafe { transpose(src.as_ptr(), src.len(), cols + 2, rows, cols, &mut dst, 70) };
            for r in 0..rows {
                for c in 0..cols {
                    assert_eq!(
                        dst[c * 70 + r],
                        src[r * (cols + 2) + c],
                        "({r}, {c}) of {rows}x{cols}"
                    );
                }
            }
        }
    }
}
