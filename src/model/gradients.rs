//! Where the backward pass puts gradients.

use super::params::ParamId;

/// Takes gradients in.
pub trait GradientSink {
    /// The sum so far for a tensor, row-major; `None` when it is not trained.
    fn slot(&mut self, id: ParamId) -> Option<&mut [f32]>;
}
