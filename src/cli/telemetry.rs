//! Logs and metrics of the process.

use std::fs::OpenOptions;
use std::path::Path;
use std::str::FromStr;
use std::sync::Mutex;

use anyhow::Context as _;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::jobs::access::AUDIT;

/// Upper bounds of duration histograms, in seconds.
const SECONDS: [f64; 14] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
/// Upper bounds of token-count histograms.
const TOKENS: [f64; 10] = [32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Starts logging to standard error, and the audit log's lines to `audit`, too; a second call changes nothing.
///
/// # Errors
/// When the audit log cannot be written.
pub fn log(filter: &str, json: bool, audit: Option<&Path>) -> anyhow::Result<()> {
    let filter = EnvFilter::from_str(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = if json { lines.json().boxed() } else { lines.boxed() };
    let audit = match audit {
        None => None,
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path).with_context(|| format!("audit_log {}", path.display()))?;
            let lines = tracing_subscriber::fmt::layer().json().with_writer(Mutex::new(file));
            // A line tells of its call by the span that it lies in.
            Some(lines.with_filter(filter_fn(|m| m.target() == AUDIT || m.is_span())))
        }
    };
    let _ = tracing_subscriber::registry().with(audit).with(lines.with_filter(filter)).try_init();
    Ok(())
}

/// Installs the process's metrics recorder.
///
/// # Errors
/// When there is one already.
pub fn metrics() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_tokens".into()), &TOKENS)?
        .install_recorder()?;
    metrics::gauge!("bradley_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    Ok(handle)
}
