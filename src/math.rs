//! Losses, their gradients with respect to log-probs, metrics and schedules. Pure functions on
//! numbers.

pub mod clip;
pub mod loss;
pub mod metrics;
pub mod rng;
pub mod schedule;
pub mod score;

/// log σ(x), without overflow.
pub fn log_sigmoid(x: f64) -> f64 {
    if x >= 0.0 { -(-x).exp().ln_1p() } else { x - x.exp().ln_1p() }
}

/// σ(x) = 1 / (1 + e^(−x)), without overflow.
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}
