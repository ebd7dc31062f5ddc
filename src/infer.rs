//! Inference, from text to log-probs: encoding, packing into rows, scoring, generation, and the
//! cache of the reference model's log-probs.

pub mod data_parallel;
pub mod detokenize;
pub mod encode;
pub mod generate;
pub mod pack;
pub mod pair;
pub mod reference_cache;
pub mod scorer;
