//! Telemetry of the process: trace spans, gauges, and the help texts of the metrics.

pub mod gauge_guard;
pub mod metrics;
pub mod trace;
