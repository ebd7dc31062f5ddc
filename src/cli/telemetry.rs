//! Sets up the logs and traces of the process.

use std::fmt;
use std::fs::OpenOptions;
use std::io::IsTerminal as _;
use std::path::Path;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{self, Sampler, SdkTracerProvider, SpanData};
use tracing::field::{Field, Visit};
use tracing_subscriber::field::{RecordFields, VisitOutput as _};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{DefaultVisitor, Writer};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::service::audit::AUDIT;

/// Time limit for sending a batch of spans to the collector.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Shortest time between two warnings that spans cannot be sent.
const EXPORT_WARNING_INTERVAL: Duration = Duration::from_secs(600);

/// Starts sending spans by OTLP over gRPC, in batches and from a separate thread. Of the traces
/// that begin in this process, the share `ratio` (0 to 1) is exported; for other traces the caller
/// decides. The library reads OTEL_EXPORTER_OTLP_HEADERS and OTEL_RESOURCE_ATTRIBUTES.
///
/// # Errors
/// Returns an error if `endpoint` is not a URL.
pub fn traces(endpoint: &str, ratio: f64) -> anyhow::Result<SdkTracerProvider> {
    let mut exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(EXPORT_TIMEOUT);
    if endpoint.starts_with("https://") {
        exporter = exporter.with_tls_config(ClientTlsConfig::new().with_enabled_roots());
    }
    let exporter = exporter.build()?;
    let about = [KeyValue::new("service.version", env!("CARGO_PKG_VERSION"))];
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(WarningExporter::new(exporter))
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
            ratio,
        ))))
        .with_resource(
            Resource::builder()
                .with_service_name("bradley")
                .with_attributes(about)
                .build(),
        )
        .build();
    opentelemetry::global::set_tracer_provider(provider.clone());
    Ok(provider)
}

/// Exporter that logs when spans cannot be sent. The library drops them without a word.
#[derive(Debug)]
struct WarningExporter<E> {
    inner: E,
    /// Time of the last warning; `None` before the first.
    warned: Mutex<Option<Instant>>,
}

impl<E> WarningExporter<E> {
    fn new(inner: E) -> Self {
        WarningExporter {
            inner,
            warned: Mutex::new(None),
        }
    }

    /// Returns true if a warning is due at `now`, and then notes that it was given.
    fn is_warning_due(&self, now: Instant) -> bool {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        let is_recent = |last: Instant| now.duration_since(last) < EXPORT_WARNING_INTERVAL;
        if warned.is_some_and(is_recent) {
            return false;
        }
        *warned = Some(now);
        true
    }
}

impl<E: trace::SpanExporter> trace::SpanExporter for WarningExporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.inner.export(batch).await;
        if let Err(e) = &result
            && self.is_warning_due(Instant::now())
        {
            tracing::warn!(
                error = %e,
                "spans cannot be sent and are lost: check otlp_endpoint, and that the collector \
                 runs"
            );
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Formats the fields of text lines without those that are meant for exported spans: `otel.name`
/// only repeats the method, and `otel.kind` is the same in every line.
struct WithoutExportFields;

impl<'writer> FormatFields<'writer> for WithoutExportFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = SkipExportFields(DefaultVisitor::new(writer, true));
        fields.record(&mut visitor);
        visitor.0.finish()
    }
}

struct SkipExportFields<'a>(DefaultVisitor<'a>);

impl SkipExportFields<'_> {
    fn shows(field: &Field) -> bool {
        !field.name().starts_with("otel.")
    }
}

impl Visit for SkipExportFields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if Self::shows(field) {
            self.0.record_str(field, value);
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        if Self::shows(field) {
            self.0.record_error(field, value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if Self::shows(field) {
            self.0.record_debug(field, value);
        }
    }
}

/// Starts logging to standard error. Lines of the audit log also go to the file `audit`, and this
/// program's spans to `traces`. A second call has no effect.
///
/// # Errors
/// Returns an error if the audit log cannot be written.
pub fn log(
    filter: &str,
    json: bool,
    audit: Option<&Path>,
    traces: Option<&SdkTracerProvider>,
) -> anyhow::Result<()> {
    let filter = EnvFilter::from_str(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let mut lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    if !std::io::stderr().is_terminal() {
        // Files and pipes get no colours. On a terminal, NO_COLOR has the same effect.
        lines = lines.with_ansi(false);
    }
    let lines = if json {
        lines.json().boxed()
    } else {
        lines.fmt_fields(WithoutExportFields).boxed()
    };
    let audit = match audit {
        None => None,
        Some(path) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("audit_log {}", path.display()))?;
            let lines = tracing_subscriber::fmt::layer()
                .json()
                .with_writer(Mutex::new(file));
            // Spans pass the filter, too, because a line gets the call's fields from the span
            // around it.
            Some(lines.with_filter(filter_fn(|m| m.target() == AUDIT || m.is_span())))
        }
    };
    let spans = traces.map(|provider| {
        let layer = tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("bradley"))
            .with_location(false)
            .with_threads(false);
        // Only this program's spans are exported, because the exporter's own libraries create
        // spans, too.
        layer.with_filter(filter_fn(|m| {
            m.is_span() && m.target().starts_with("bradley")
        }))
    });
    let _ = tracing_subscriber::registry()
        .with(spans)
        .with(audit)
        .with(lines.with_filter(filter))
        .try_init();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_spans_are_logged_once_in_ten_minutes() {
        let (exporter, start) = (WarningExporter::new(()), Instant::now());
        let due_after = |seconds| exporter.is_warning_due(start + Duration::from_secs(seconds));
        assert_eq!(
            [0, 5, 599, 600, 601].map(due_after),
            [true, false, false, true, false]
        );
    }
}
