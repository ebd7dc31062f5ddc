//! Readers for llama.cpp's GGUF files: metadata, configuration, weights and tokenizer.

pub(super) mod config;
pub(super) mod reader;
pub(super) mod tokenizer;
pub(super) mod weights;
