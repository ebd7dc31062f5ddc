//! Where the backward pass puts gradients: one slot per tensor that can be trained.

/// A tensor of a decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// RMSNorm before attention.
    InputNorm,
    /// RMSNorm before the feed-forward part.
    PostNorm,
    /// RMSNorm on queries.
    QueryNorm,
    /// RMSNorm on keys.
    KeyNorm,
    /// W of a projection.
    Weight(usize),
    /// b of a projection.
    Bias(usize),
    /// LoRA's A of a projection.
    LoraA(usize),
    /// LoRA's B of a projection.
    LoraB(usize),
}

/// A tensor of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The embedding, and the head when it is tied.
    Embedding,
    /// The head, when it is not tied.
    Head,
    /// The last RMSNorm.
    Norm,
    /// In a block.
    Block(usize, Slot),
}

/// Takes gradients in.
pub trait GradientSink {
    /// The sum so far for a tensor, row-major; `None` when it is not trained.
    fn slot(&mut self, place: Place) -> Option<&mut [f32]>;
}
