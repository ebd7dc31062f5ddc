//! Spans in OpenTelemetry's sense, of work that is measured where it happens and told when it is
//! over: queues, batches, stages of a run. A trace is carried between processes and kept with a job
//! as W3C's `traceparent`.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    Link, Span as _, SpanBuilder, SpanContext, TraceContextExt as _, Tracer as _,
};
use opentelemetry::{Context, KeyValue, global};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// The header, and its value's name.
pub const TRACEPARENT: &str = "traceparent";

/// The trace that the calling code is part of.
pub fn current() -> Context {
    tracing::Span::current().context()
}

/// What a `traceparent` says; nothing when it is not what W3C's Trace Context allows. A
/// `tracestate` is not taken: it may be long, and would be part of every span.
pub fn parse(traceparent: Option<&str>) -> Context {
    let fields: HashMap<String, String> =
        traceparent.map(|t| (TRACEPARENT.to_owned(), t.to_owned())).into_iter().collect();
    TraceContextPropagator::new().extract_with_context(&Context::new(), &fields)
}

/// A context as `traceparent`, if it is part of a trace.
pub fn format(context: &Context) -> Option<String> {
    let mut fields = HashMap::new();
    TraceContextPropagator::new().inject_context(context, &mut fields);
    fields.remove(TRACEPARENT)
}

/// The trace's id, for logs.
pub fn id(context: &Context) -> Option<String> {
    let span = context.span();
    span.span_context().is_valid().then(|| span.span_context().trace_id().to_string())
}

/// A span that is over: `parent` had it from `start`, for `took`. Returns what others may link to;
/// `None` when the trace is not recorded.
pub fn record(
    name: &'static str,
    parent: &Context,
    start: SystemTime,
    took: Duration,
    about: Vec<KeyValue>,
) -> Option<SpanContext> {
    parent
        .span()
        .span_context()
        .is_sampled()
        .then(|| emit(name, parent, start, took, about, Vec::new()))
}

/// A span for many callers, linked to each that is recorded; it begins a trace of its own.
pub fn shared<'a>(
    name: &'static str,
    callers: impl Iterator<Item = &'a Context>,
    start: SystemTime,
    took: Duration,
    about: Vec<KeyValue>,
) -> Option<SpanContext> {
    let linked = callers.map(|c| c.span().span_context().clone()).filter(SpanContext::is_sampled);
    let links: Vec<Link> = linked.map(|c| Link::new(c, Vec::new(), 0)).collect();
    (!links.is_empty()).then(|| emit(name, &Context::new(), start, took, about, links))
}

/// [`record`], with a link to what it was done together with.
pub fn linked(
    name: &'static str,
    parent: &Context,
    start: SystemTime,
    took: Duration,
    to: &SpanContext,
) {
    if parent.span().span_context().is_sampled() {
        emit(name, parent, start, took, Vec::new(), vec![Link::new(to.clone(), Vec::new(), 0)]);
    }
}

fn emit(
    name: &'static str,
    parent: &Context,
    start: SystemTime,
    took: Duration,
    about: Vec<KeyValue>,
    links: Vec<Link>,
) -> SpanContext {
    let builder = SpanBuilder::from_name(name)
        .with_start_time(start)
        .with_attributes(about)
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
        assert_eq!(id(&context).as_deref(), Some("0af7651916cd43dd8448eb211c80319c"));
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
        let unsampled = parse(Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"));
        assert!(record("x", &unsampled, SystemTime::now(), Duration::ZERO, Vec::new()).is_none());
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
