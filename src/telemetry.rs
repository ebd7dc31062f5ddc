//! Telemetry of the process: trace spans, gauges, and the description of every metric.

pub mod gauge_guard;
pub mod metrics;
pub mod trace;
