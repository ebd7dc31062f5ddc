//! What the process tells of itself: spans, gauges, and the description of every metric.

pub mod counted;
pub mod metrics;
pub mod trace;
