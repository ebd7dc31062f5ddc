//! Readers for a folder of Hugging Face files: weights in safetensors, and the tokenizer.

pub(super) mod safetensors;
pub(super) mod tokenizer;
