//! What a folder of Hugging Face files holds: weights in safetensors, and the tokenizer.

pub(super) mod safetensors;
pub(super) mod tokenizer;
