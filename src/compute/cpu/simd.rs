//! Element-wise kernels, compiled for the widest vectors that the processor has (detected at run
//! time). The order of summation is explicit, so results do not depend on the instruction set.

/// Number of interleaved partial sums; a power of two.
const LANES: usize = 16;

/// Runs `f` compiled for the processor's vector instructions. `f` and everything it calls must be
/// `#[inline(always)]`.
#[inline(always)]
pub(crate) fn dispatch<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Returns e^x with an error of about 2 ulp. x is clamped to [−87, 88].
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let (y, power) = reduced_exp(x);
    (y + 1.0) * power
}

/// Returns y = e^r − 1 and 2ⁿ, where x = n·ln 2 + r and |r| is at most about ln 2 / 2. x is
/// clamped to [−87, 88]. Uses Cody–Waite reduction and a degree-6 polynomial (Cephes `expf`).
#[inline(always)]
fn reduced_exp(x: f32) -> (f32, f32) {
    // Adding and subtracting 1.5·2²³ rounds to the nearest integer without a call.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HI - n * LN2_LO;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    // The last bits of `rounded` are n: shifted into the exponent they make 2ⁿ.
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    (p * r * r + r, power)
}

/// Returns tanh x = t / (t + 2), where t = e^(2x) − 1, with an error of at most 3 ulp.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    // In f32, tanh x is ±1 beyond ±10.
    let (y, power) = reduced_exp(2.0 * x.clamp(-10.0, 10.0));
    // Near 0 the power is 1, so t is y and keeps its relative precision.
    let t = y * power + (power - 1.0);
    t / (t + 2.0)
}

/// Replaces every x by cap·tanh(scale·x / cap), which is between −cap and cap (soft-cap,
/// arXiv:2408.00118, §2).
#[inline(always)]
pub(crate) fn soft_cap(xs: &mut [f32], scale: f32, cap: f32) {
    let factor = scale / cap;
    for x in xs {
        *x = cap * tanh(*x * factor);
    }
}

/// Returns the derivative of cap·tanh(x / cap), given its value y: 1 − (y / cap)².
#[inline(always)]
pub(crate) fn soft_cap_slope(y: f32, cap: f32) -> f32 {
    let t = y / cap;
    1.0 - t * t
}

/// Returns 1 / (1 + e^(−x)).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Returns Σ f(i) over `0..n`. Uses [`LANES`] interleaved partial sums, which are then added
/// pairwise.
#[inline(always)]
pub(crate) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut acc = [0f32; LANES];
    let whole = n - n % LANES;
    let mut i = 0;
    while i < whole {
        for (lane, a) in acc.iter_mut().enumerate() {
            *a += f(i + lane);
        }
        i += LANES;
    }
    for (lane, a) in acc.iter_mut().enumerate().take(n - whole) {
        *a += f(whole + lane);
    }
    fold(acc)
}

/// Replaces every x by e^(scale·x − m) and returns their sum, in the order of [`sum`].
#[inline(always)]
pub(crate) fn exp_sum(xs: &mut [f32], scale: f32, m: f32) -> f32 {
    let mut acc = [0f32; LANES];
    let mut chunks = xs.chunks_exact_mut(LANES);
    for c in &mut chunks {
        for (a, x) in acc.iter_mut().zip(c) {
            *x = exp(*x * scale - m);
            *a += *x;
        }
    }
    for (a, x) in acc.iter_mut().zip(chunks.into_remainder()) {
        *x = exp(*x * scale - m);
        *a += *x;
    }
    fold(acc)
}

/// Adds the lanes pairwise.
#[inline(always)]
fn fold(mut acc: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            acc[lane] += acc[lane + width];
        }
        width /= 2;
    }
    acc[0]
}

/// Replaces every x by e = e^(x − m) and returns (Σ e, Σ (x − m)·e, Σ e²), each in the order of
/// [`sum`].
#[inline(always)]
pub(crate) fn exp_moments(xs: &mut [f32], m: f32) -> (f32, f32, f32) {
    let (mut sums, mut weighted, mut squares) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
    let mut step = |c: &mut [f32]| {
        for (lane, x) in c.iter_mut().enumerate() {
            let t = *x - m;
            let e = exp(t);
            *x = e;
            sums[lane] += e;
            weighted[lane] += t * e;
            squares[lane] += e * e;
        }
    };
    let mut chunks = xs.chunks_exact_mut(LANES);
    for c in &mut chunks {
        step(c);
    }
    step(chunks.into_remainder());
    (fold(sums), fold(weighted), fold(squares))
}

/// Returns the largest value; −∞ for an empty slice.
#[inline(always)]
pub(crate) fn max(xs: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let chunks = xs.chunks_exact(LANES);
    let tail = chunks.remainder();
    for c in chunks {
        for (a, x) in acc.iter_mut().zip(c) {
            *a = if *x > *a { *x } else { *a };
        }
    }
    acc.iter()
        .chain(tail)
        .fold(f32::NEG_INFINITY, |a, x| if *x > a { *x } else { a })
}

/// Returns Σ aᵢ·bᵢ over the shorter length, in the order of [`sum`].
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    sum(n, |i| a[i] * b[i])
}
