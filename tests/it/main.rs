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
mod documents;
mod exports;
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
mod memory;
mod model_files;
mod pinned_inputs;
mod pins;
mod random_specs;
mod reference_model;
mod references;
mod replicas;
mod review;
mod rewards;
mod security;
mod server;
mod service;
mod shapes;
mod smollm2;
mod soak;
mod store_safety;
mod store_versions;
mod support;
mod swaps;
mod templates;
mod tokenizers;
