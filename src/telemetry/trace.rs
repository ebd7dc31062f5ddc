//! OpenTelemetry spans for work that is measured where it happens and recorded after it has ended:
//! queues, batches, stages of a run. The trace context travels between processes, and is stored
//! with a job, as a W3C `traceparent`.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    Link, Span as _, SpanBuilder, SpanContext, TraceContextExt as _, Tracer as _,
};
use opentelemetry::{Context, KeyValue, global};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Name of the W3C Trace Context header, whose value a job stores, too.
pub const TRACEPARENT: &str = "traceparent";

/// Returns the trace context of the current span.
pub fn current() -> Context {
    tracing::Span::current().context()
}

/// Parses a `traceparent`; returns an empty context if it is absent or not valid W3C Trace Context.
/// `tracestate` is ignored: it may be long, and every span would carry it.
pub fn parse(traceparent: Option<&str>) -> Context {
    let fields: HashMap<String, String> = traceparent
        .map(|t| (TRACEPARENT.to_owned(), t.to_owned()))
        .into_iter()
        .collect();
    TraceContextPropagator::new().extract_with_context(&Context::new(), &fields)
}

/// Formats a context as `traceparent`; `None` if it is not part of a trace.
pub fn format(context: &Context) -> Option<String> {
    let mut fields = HashMap::new();
    TraceContextPropagator::new().inject_context(context, &mut fields);
    fields.remove(TRACEPARENT)
}

/// Returns the trace id, for log lines.
pub fn id(context: &Context) -> Option<String> {
    let span = context.span();
    span.span_context()
        .is_valid()
        .then(|| span.span_context().trace_id().to_string())
}

/// Records a finished child span of `parent` that began at `start` and lasted `took`. Returns its
/// context, to which other spans can link, or `None` if the trace is not sampled.
pub fn record(
    name: &'static str,
    parent: &Context,
    start: SystemTime,
    took: Duration,
    attributes: Vec<KeyValue>,
) -> Option<SpanContext> {
    parent
        .span()
        .span_context()
        .is_sampled()
        .then(|| emit(name, parent, start, took, attributes, Vec::new()))
}

/// Records a finished span of work that was done for several callers at once. It is the root of a
/// trace of its own and links to the span of each sampled caller. Returns `None` if no caller is
/// sampled.
pub fn shared<'a>(
    name: &'static str,
    callers: impl Iterator<Item = &'a Context>,
    start: SystemTime,
    took: Duration,
    attributes: Vec<KeyValue>,
) -> Option<SpanContext> {
    let linked = callers
        .map(|c| c.span().span_context().clone())
        .filter(SpanContext::is_sampled);
    let links: Vec<Link> = linked.map(|c| Link::new(c, Vec::new(), 0)).collect();
    (!links.is_empty()).then(|| emit(name, &Context::new(), start, took, attributes, links))
}

/// Records a finished child span of `parent` with a link to the span `to`, for example to the batch
/// in which the work was done.
pub fn linked(
    name: &'static str,
    parent: &Context,
    start: SystemTime,
    took: Duration,
    to: &SpanContext,
) {
    if parent.span().span_context().is_sampled() {
        emit(
            name,
            parent,
            start,
            took,
            Vec::new(),
            vec![Link::new(to.clone(), Vec::new(), 0)],
        );
    }
}

fn emit(
    name: &'static str,
    parent: &Context,
    start: SystemTime,
    took: Duration,
    attributes: Vec<KeyValue>,
    links: Vec<Link>,
) -> SpanContext {
    let builder = SpanBuilder::from_name(name)
        .with_start_time(start)
        .with_attributes(attributes)
        .with_links(links);
    let mut span = global::tracer("bradley").build_with_context(builder, parent);
    span.end_with_timestamp(start + took);
    span.span_context().clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_traceparent_is_read_and_written_and_nonsense_is_none() {
        let context = parse(Some(PARENT));
        assert_eq!(format(&context).as_deref(), Some(PARENT));
        assert_eq!(
            id(&context).as_deref(),
            Some("0af7651916cd43dd8448eb211c80319c")
        );
        for wrong in [
            None,
            Some(""),
            Some("00-0-0-0"),
            Some("00-00000000000000000000000000000000-b7ad6b7169203331-01"),
        ] {
            let context = parse(wrong);
            assert_eq!((format(&context), id(&context)), (None, None), "{wrong:?}");
        }
    }

    #[test]
    fn what_is_not_recorded_costs_no_span() {
        let unsampled = parse(Some(
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        ));
        assert!(
            record(
                "x",
                &unsampled,
                SystemTime::now(),
                Duration::ZERO,
                Vec::new()
            )
            .is_none()
        );
        assert!(
            shared(
                "x",
                [&unsampled, &Context::new()].into_iter(),
                SystemTime::now(),
                Duration::ZERO,
                Vec::new()
            )
            .is_none()
        );
    }
}
