//! Integration tests, one binary.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod attacks;
mod backends;
mod campaign;
mod clients;
mod command_line;
mod corpus;
mod crash;
#[cfg(feature = "cuda")]
mod cuda;
mod datasets;
mod devices;
mod gateway;
mod gguf;
mod golden_losses;
mod golden_models;
mod golden_tokens;
mod golden_training;
mod hostile;
mod hub;
mod layers;
mod lifecycle;
mod pins;
mod replicas;
mod security;
mod server;
mod service;
mod smollm2;
mod soak;
mod store_safety;
mod store_versions;
mod support;
mod templates;
mod tokenizers;
