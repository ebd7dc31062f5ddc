//! Bradley trains language models with Direct Preference Optimization over gRPC and scores
//! preference pairs with them.
//!
//! Layers, lowest first. A layer imports only layers below it (`tests/it/layers.rs` checks this):
//! [`domain`] ← [`math`] ← [`compute`] ← [`model`] ← [`formats`] ← [`infer`] ←
//! [`train`] ← [`engine`] ← [`service`] ← [`rpc`] ← [`cli`]. [`telemetry`] is
//! between [`domain`] and [`math`].

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
