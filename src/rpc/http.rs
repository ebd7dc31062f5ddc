//! The plain HTTP port: metrics and probes.

use std::future::Future;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;

use crate::jobs::service::Service;

/// Serves `/metrics`, `/livez` (the process answers) and `/readyz` (the server is not draining) until `shutdown`.
pub async fn serve_http(
    listener: TcpListener,
    service: Service,
    metrics: PrometheusHandle,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready).with_state(service))
        .route("/metrics", get(|| async move { metrics.render() }));
    axum::serve(listener, router).with_graceful_shutdown(shutdown).await
}

async fn ready(State(service): State<Service>) -> (StatusCode, String) {
    match service.ready().await {
        Ok(state) => (StatusCode::OK, format!("{state}\n")),
        Err(e) => (StatusCode::SERVICE_UNAVAILABLE, format!("{e}\n")),
    }
}
