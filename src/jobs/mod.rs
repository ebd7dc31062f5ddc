//! The store, the queue, the event feed, datasets and artifacts.
//!
//! **What was acknowledged is on disk; what is delivered was stored first.**

pub mod artifacts;
pub mod datasets;
pub mod error;
mod feed;
pub mod lifecycle;
mod policies;
mod runner;
pub mod scoring;
pub mod service;
pub mod store;
