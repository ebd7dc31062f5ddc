//! File formats: reads and writes configurations, weights, tokenizers and adapters.

pub mod chat_template;
pub mod export;
mod gguf;
mod hf;
pub mod hub_dataset;
pub mod loader;
pub mod peft;
pub mod source;
pub mod tokenizer;
pub mod weights;
