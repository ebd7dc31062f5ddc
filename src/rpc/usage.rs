//! Implements the gRPC UsageService.

use jiff::civil::Date;
use tonic::{Request, Response, Status};

use super::auth::split_caller;
use super::convert::invalid;
use super::pb::{self, usage_service_server::UsageService};
use super::status::status;
use crate::domain::usage::{OwnerUsage, date_of, day_number, day_text};
use crate::domain::violation::quoted;
use crate::service::usage::{UsageMeter, UsageQuery, today};

/// The gRPC service for usage.
pub(super) struct UsageRpc(pub UsageMeter);

#[tonic::async_trait]
impl UsageService for UsageRpc {
    async fn get_usage(
        &self,
        request: Request<pb::GetUsageRequest>,
    ) -> Result<Response<pb::GetUsageResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        let last = day("end_date", &r.end_date)?.unwrap_or_else(today);
        let first = match day("start_date", &r.start_date)? {
            Some(first) => first,
            None => date_of(last).map_or(last, |d| day_number(d.first_of_month())),
        };
        let query = UsageQuery {
            owner: (!r.owner.is_empty()).then_some(r.owner),
            first,
            last,
            by_day: r.by_day,
        };
        let found = self.0.report(&caller, &query).await.map_err(status)?;
        Ok(Response::new(pb::GetUsageResponse {
            usage: found.into_iter().map(message).collect(),
            start_date: day_text(first),
            end_date: day_text(last),
        }))
    }
}

/// Returns the number of a day since 1970; `None` for an empty text.
fn day(field: &str, text: &str) -> Result<Option<i64>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    let parsed: Option<Date> = text.parse().ok().filter(|_| text.len() == 10);
    let Some(date) = parsed else {
        return Err(invalid(
            field,
            format!("is {}: it must be a day such as 2026-07-26", quoted(text)),
        ));
    };
    Ok(Some(day_number(date)))
}

fn message(record: OwnerUsage) -> pb::OwnerUsage {
    pb::OwnerUsage {
        owner: record.owner,
        date: record.day.map_or_else(String::new, day_text),
        scored_pairs: record.usage.scored_pairs,
        scored_completions: record.usage.scored_completions,
        scored_tokens: record.usage.scored_tokens,
        training_device_seconds: record.usage.training_device_us as f64 / 1e6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_from_1970() {
        for (text_of, expected) in [
            ("1970-01-01", 0),
            ("1970-03-01", 59),
            ("2000-02-29", 11_016),
            ("2026-11-29", 20_786),
        ] {
            assert_eq!(day("d", text_of).unwrap(), Some(expected), "{text_of}");
            assert_eq!(day_text(expected), text_of);
        }
        assert_eq!(day("d", "").unwrap(), None);
        for bad in ["2026-02-30", "today", "20261129", "2026-11-29T00:00"] {
            assert!(day("d", bad).is_err(), "{bad}");
        }
    }
}
