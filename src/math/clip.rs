//! Gradient clipping by the global norm.

/// Returns the factor on every gradient: min(1, max_norm / (norm + 1e-6)), as in
/// `torch.nn.utils.clip_grad_norm_`.
pub fn clip_coefficient(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_gradients_shrink_to_the_limit_and_short_ones_stay() {
        assert_eq!(clip_coefficient(0.5, 1.0), 1.0);
        assert!((clip_coefficient(4.0, 1.0) * 4.0 - 1.0).abs() < 1e-6);
    }
}
