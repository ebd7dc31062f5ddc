//! Losses, their gradients with respect to log-probs, metrics, calibration, schedules and seeded
//! random numbers.
//! Everything here is pure: no input or output, no device.

pub mod calibration;
pub mod clip;
pub mod evaluation;
pub mod loss;
pub mod metrics;
pub mod rng;
pub mod schedule;
pub mod score;

/// Returns log σ(x), without overflow.
pub fn log_sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        -(-x).exp().ln_1p()
    } else {
        x - x.exp().ln_1p()
    }
}

/// Returns σ(x) = 1 / (1 + e^(−x)), without overflow.
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}
