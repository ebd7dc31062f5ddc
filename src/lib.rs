//! Bradley trains language models with Direct Preference Optimization over gRPC and scores
//! preference pairs with them.
//!
//! The layers, lowest first; imports go down only (`tests/it/layers.rs` enforces it): [`domain`] ←
//! [`math`] ← [`compute`] ← [`model`] ← [`formats`] ← [`infer`] ← [`train`] ← [`engine`] ←
//! [`service`] ← [`rpc`] ← [`cli`]; [`telemetry`] stands beside [`domain`].

pub mod cli;
pub mod compute;
pub mod domain;
pub mod engine;
pub mod formats;
pub mod infer;
pub mod math;
pub mod model;
pub mod rpc;
pub mod service;
pub mod telemetry;
pub mod train;
