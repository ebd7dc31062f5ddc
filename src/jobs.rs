//! The store, the queue, the event feed, datasets and artifacts.
//!
//! **What was acknowledged is on disk; what is delivered was stored first.**

pub mod access;
pub mod artifacts;
pub mod audit;
mod blocking;
pub mod checkpoints;
pub mod counted;
pub mod datasets;
pub mod error;
pub mod estimate;
mod feed;
mod held;
mod housekeeping;
pub mod lifecycle;
mod policies;
mod postponed;
mod remote;
mod resume;
mod runner;
pub mod scoring;
pub mod service;
mod shares;
pub mod store;
pub mod tokens;
mod uses;
