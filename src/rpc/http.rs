//! The HTTP port without TLS: metrics and probes.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;

use super::listener::HttpListener;
use crate::service::server::Server;

/// Maximum number of connections to the HTTP port. Probes and scrapes need few, and each takes a
/// file descriptor.
pub const MAX_CONNECTIONS: usize = 32;

/// Serves `/metrics`, `/livez` (the process answers) and `/readyz` (the server is not draining;
/// with `?verbose`, also the state of its parts) until `shutdown`.
///
/// # Errors
/// Returns the error with which the port failed.
pub async fn serve_http(
    listener: TcpListener,
    server: Arc<Server>,
    metrics: PrometheusHandle,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let process = metrics_process::Collector::default();
    process.describe();
    let gauge_source = server.clone();
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready).with_state(server))
        .route(
            "/metrics",
            get(|| async move {
                process.collect();
                metrics.render() + &render_run_gauges(&gauge_source.run_gauges())
            }),
        );
    axum::serve(HttpListener::new(listener, MAX_CONNECTIONS), router)
        .with_graceful_shutdown(shutdown)
        .await
}

/// Help text of the gauges of a run.
const HELP: &str =
    "Value at the last logged step of a job that runs in this process; removed when the job ends.";

/// Renders the gauges of the current runs, given as (job id, gauge name, value). They are not in
/// the metrics recorder, because it would report the last value of every ended job forever.
fn render_run_gauges(values: &[(String, &'static str, f64)]) -> String {
    let mut lines_by_gauge: BTreeMap<&str, String> = BTreeMap::new();
    for (job, gauge, value) in values {
        let lines = lines_by_gauge
            .entry(gauge)
            .or_insert_with(|| format!("# HELP {gauge} {HELP}\n# TYPE {gauge} gauge\n"));
        *lines += &format!("{gauge}{{training_job=\"{job}\"}} {value}\n");
    }
    lines_by_gauge.into_values().collect()
}

/// Answers with the state in one line. With `?verbose`, a line for each part comes before it.
async fn ready(
    State(server): State<Arc<Server>>,
    RawQuery(query): RawQuery,
) -> (StatusCode, String) {
    let is_verbose = query.is_some_and(|q| {
        q.split('&')
            .any(|part| part == "verbose" || part.starts_with("verbose="))
    });
    let parts = async {
        match is_verbose {
            true => server.parts().await,
            false => Vec::new(),
        }
    };
    // At one time, because each may wait for the database.
    let (parts, ready) = tokio::join!(parts, server.ready());
    let mut text = String::new();
    for (part, state) in parts {
        text += &match state {
            Ok(state) => format!("[+] {part}: {state}\n"),
            Err(problem) => format!("[-] {part}: {problem}\n"),
        };
    }
    match ready {
        Ok(state) => (StatusCode::OK, format!("{text}{state}\n")),
        Err(e) => (StatusCode::SERVICE_UNAVAILABLE, format!("{text}{e}\n")),
    }
}
