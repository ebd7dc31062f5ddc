//! Maps errors to gRPC statuses with details. No other module does this.

use std::time::Duration;

use tonic::codegen::http::HeaderMap;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::domain::reason::Reason;
use crate::domain::violation::{Violations, shortened};
use crate::service::error::ServiceError;

/// Domain in every ErrorInfo.
pub const DOMAIN: &str = "bradley.dev";

// A status is sent in headers, and many clients accept only 8 KiB of headers. With these limits a
// status has at most 4 KiB. The message is sent twice (once in the details), and the details are
// encoded as base64.
/// Maximum size of a message in the header, in bytes: if the status also has violations or a
/// resource's name (`.0`), and otherwise (`.1`).
const MAX_MESSAGE: (usize, usize) = (640, 1400);
/// Maximum size of all violations of a status, in bytes.
const MAX_VIOLATIONS: usize = 1664;
/// Maximum length of a violation's field (`.0`) and of its description (`.1`), in characters.
const MAX_VIOLATION: (usize, usize) = (100, 400);
/// Bytes that protobuf's encoding adds to each violation.
const PER_VIOLATION: usize = 8;
/// Time after which a client whose unanswered requests fill its quota sends the next one again.
const QUOTA_RETRY: Duration = Duration::from_secs(1);
/// Maximum length of a resource's name, in characters.
const MAX_NAME: usize = 300;

/// Maps an error to its status: code, message, and details (ErrorInfo, and depending on the error
/// BadRequest, ResourceInfo, RetryInfo or QuotaFailure).
pub fn status(e: ServiceError) -> Status {
    let has_other_texts = matches!(
        e,
        ServiceError::InvalidArgument(_) | ServiceError::NotFound { .. }
    );
    let mut message = shorten_for_header(
        e.to_string(),
        if has_other_texts {
            MAX_MESSAGE.0
        } else {
            MAX_MESSAGE.1
        },
    );
    let mut details = ErrorDetails::new();
    let (code, reason) = match &e {
        ServiceError::InvalidArgument(v) => {
            add_violations(&mut details, v);
            (Code::InvalidArgument, Reason::InvalidArgument)
        }
        ServiceError::NotFound { kind, name } => {
            details.set_resource_info(*kind, shortened(name, MAX_NAME), "", "does not exist");
            (Code::NotFound, Reason::NotFound)
        }
        ServiceError::PermissionDenied { .. } => (Code::PermissionDenied, Reason::PermissionDenied),
        ServiceError::Unauthenticated { .. } => (Code::Unauthenticated, Reason::Unauthenticated),
        ServiceError::FailedPrecondition { reason, .. } => (Code::FailedPrecondition, *reason),
        ServiceError::AlreadyExists { .. } => (Code::AlreadyExists, Reason::RequestIdReused),
        ServiceError::Aborted { reason, .. } => (Code::Aborted, *reason),
        ServiceError::Unavailable {
            reason,
            retry_after,
            ..
        } => {
            details.set_retry_info(Some(*retry_after));
            (Code::Unavailable, *reason)
        }
        ServiceError::ResourceExhausted { reason, .. } => {
            if reason.is_quota() {
                details.add_quota_failure_violation("client", &message);
            }
            if *reason == Reason::TooManyTokens {
                details.set_retry_info(Some(QUOTA_RETRY));
            }
            (Code::ResourceExhausted, *reason)
        }
        ServiceError::OutOfRange { .. } => (Code::OutOfRange, Reason::CursorOutOfRange),
        ServiceError::DeadlineExceeded => (Code::DeadlineExceeded, Reason::DeadlineExceeded),
        ServiceError::Internal { .. } => {
            // Only the operator may see paths and SQL statements. The log line is found by the
            // answer's x-request-id.
            tracing::error!(error = %e, "internal error");
            message = "an internal error, which the server's log describes".to_owned();
            (Code::Internal, Reason::Internal)
        }
    };
    details.set_error_info(reason.name(), DOMAIN, std::collections::HashMap::new());
    Status::with_error_details(code, message, details)
}

/// Adds violations as long as there is room. If some are left out, the last one says how many.
fn add_violations(details: &mut ErrorDetails, violations: &Violations) {
    let mut left = MAX_VIOLATIONS;
    for (i, violation) in violations.listed().iter().enumerate() {
        let field = shortened(&violation.field, MAX_VIOLATION.0);
        let description = shortened(&violation.description, MAX_VIOLATION.1);
        let bytes = field.len() + description.len() + PER_VIOLATION;
        if bytes > left {
            let more = violations.listed().len() - i + violations.more();
            details.add_bad_request_violation("", format!("and {more} more"));
            return;
        }
        left -= bytes;
        details.add_bad_request_violation(field, description);
    }
    if violations.more() > 0 {
        details.add_bad_request_violation("", format!("and {} more", violations.more()));
    }
}

/// Returns the size of a character in the header, in bytes. Some characters are percent-encoded,
/// with three bytes for each byte of the character.
fn header_bytes(c: char) -> usize {
    if c.is_ascii_graphic() && !"\"#%<>`?{}".contains(c) {
        1
    } else {
        3 * c.len_utf8()
    }
}

/// Shortens a message to `limit` bytes in the header.
fn shorten_for_header(message: String, limit: usize) -> String {
    let mut left = limit;
    for (i, c) in message.char_indices() {
        let bytes = header_bytes(c);
        if bytes > left {
            return format!("{}…", &message[..i]);
        }
        left -= bytes;
    }
    message
}

/// Returns the status for bad fields.
pub fn bad_request(v: Violations) -> Status {
    status(ServiceError::InvalidArgument(v))
}

/// Returns the google.rpc.Status for the error of a job.
pub fn job_error(code: Code, reason: &str, text: String) -> tonic_types::Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, std::collections::HashMap::new());
    to_rpc_status(Status::with_error_details(code, text, details))
}

/// Converts an error to a google.rpc.Status, which is sent inside an answer.
pub fn message(e: ServiceError) -> tonic_types::Status {
    to_rpc_status(status(e))
}

/// Converts a gRPC status with details to a google.rpc.Status.
pub fn to_rpc_status(status: Status) -> tonic_types::Status {
    use prost::Message;
    // The details header is the encoded google.rpc.Status itself.
    tonic_types::Status::decode(status.details()).unwrap_or(tonic_types::Status {
        code: status.code() as i32,
        message: status.message().to_owned(),
        details: Vec::new(),
    })
}

/// Converts a google.rpc.Status, which was sent inside an answer, to a gRPC status with details.
pub fn from_rpc_status(status: &tonic_types::Status) -> Status {
    use prost::Message;
    Status::with_details(
        Code::from_i32(status.code),
        status.message.clone(),
        status.encode_to_vec().into(),
    )
}

/// Returns an INVALID_ARGUMENT status with details for a call that the transport ended because it
/// could not read the message. Such a call is recognised by the code INTERNAL without details,
/// because the statuses of this module always have details. Returns `None` for every other call.
pub fn of_malformed_message(headers: &HeaderMap) -> Option<Status> {
    let given = Status::from_header_map(headers)
        .filter(|s| s.code() == Code::Internal && s.details().is_empty())?;
    let mut details = ErrorDetails::new();
    details.set_error_info(
        Reason::MalformedMessage.name(),
        DOMAIN,
        std::collections::HashMap::new(),
    );
    let message = format!(
        "the request cannot be read as its protobuf message ({}): check it against the protos",
        given.message()
    );
    Some(Status::with_error_details(
        Code::InvalidArgument,
        message,
        details,
    ))
}

/// Returns the status for a stream in which a message is missing or unexpected. `needed` completes
/// a sentence that begins with the field's name, `part`.
pub fn incomplete(needed: &str) -> Status {
    status(ServiceError::invalid("part", needed))
}

/// Returns an error as the transport makes it, for tests.
#[cfg(test)]
pub fn without_details(code: Code, text: &str) -> Status {
    Status::new(code, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_its_code_and_a_stable_reason() {
        let retry_after = Duration::from_secs(2);
        let cases = [
            (
                ServiceError::invalid("training_job.dpo.beta", "is 0"),
                Code::InvalidArgument,
                "INVALID_ARGUMENT",
            ),
            (
                ServiceError::not_found("job", "trainingJobs/x"),
                Code::NotFound,
                "NOT_FOUND",
            ),
            (
                ServiceError::PermissionDenied {
                    message: "m".into(),
                },
                Code::PermissionDenied,
                "PERMISSION_DENIED",
            ),
            (
                ServiceError::Unauthenticated {
                    message: "m".into(),
                    log_reason: Some("for the log".into()),
                },
                Code::Unauthenticated,
                "UNAUTHENTICATED",
            ),
            (
                ServiceError::FailedPrecondition {
                    reason: Reason::InUse,
                    message: "m".into(),
                },
                Code::FailedPrecondition,
                "IN_USE",
            ),
            (
                ServiceError::AlreadyExists {
                    message: "m".into(),
                },
                Code::AlreadyExists,
                "REQUEST_ID_REUSED",
            ),
            (
                ServiceError::Aborted {
                    reason: Reason::EtagStale,
                    message: "m".into(),
                },
                Code::Aborted,
                "ETAG_STALE",
            ),
            (
                ServiceError::Unavailable {
                    reason: Reason::QueueFull,
                    message: "m".into(),
                    retry_after,
                },
                Code::Unavailable,
                "QUEUE_FULL",
            ),
            (
                ServiceError::ResourceExhausted {
                    reason: Reason::OutOfMemory,
                    message: "m".into(),
                },
                Code::ResourceExhausted,
                "OUT_OF_MEMORY",
            ),
            (
                ServiceError::ResourceExhausted {
                    reason: Reason::TooManyTokens,
                    message: "m".into(),
                },
                Code::ResourceExhausted,
                "TOO_MANY_TOKENS",
            ),
            (
                ServiceError::OutOfRange {
                    message: "m".into(),
                },
                Code::OutOfRange,
                "CURSOR_OUT_OF_RANGE",
            ),
            (
                ServiceError::DeadlineExceeded,
                Code::DeadlineExceeded,
                "DEADLINE_EXCEEDED",
            ),
            (ServiceError::internal("m"), Code::Internal, "INTERNAL"),
        ];
        for (e, code, reason) in cases {
            let s = status(e);
            assert_eq!(s.code(), code);
            let info = s.get_details_error_info().unwrap();
            assert_eq!(
                (info.reason.as_str(), info.domain.as_str()),
                (reason, DOMAIN)
            );
            assert_eq!(
                s.get_details_retry_info().is_some(),
                code == Code::Unavailable || reason == "TOO_MANY_TOKENS"
            );
        }
    }

    #[test]
    fn a_status_fits_the_headers_that_clients_accept() {
        let on_the_wire = |s: &Status| {
            let headers = s.clone().into_http::<()>().into_parts().0.headers;
            ["grpc-message", "grpc-status-details-bin"]
                .iter()
                .map(|name| headers[*name].len())
                .sum::<usize>()
        };
        for text in ["x", " ", "é", "%"] {
            let mut bad = Violations::default();
            for i in 0..1000 {
                bad.push(
                    format!("training_job.dpo.losses[{i}].loss_type"),
                    text.repeat(if i == 0 { 100_000 } else { 300 }),
                );
            }
            let s = bad_request(bad);
            assert!(on_the_wire(&s) <= 4096, "{} bytes", on_the_wire(&s));
            let listed = s.get_details_bad_request().unwrap().field_violations;
            let left_out = 1000 - (listed.len() - 1);
            assert_eq!(
                listed.last().unwrap().description,
                format!("and {left_out} more")
            );
            for e in [
                ServiceError::not_found("job", text.repeat(100_000)),
                ServiceError::FailedPrecondition {
                    reason: Reason::DatasetInvalid,
                    message: text.repeat(100_000),
                },
            ] {
                let s = status(e);
                assert!(on_the_wire(&s) <= 4096, "{} bytes", on_the_wire(&s));
            }
        }
    }

    #[test]
    fn an_error_inside_an_answer_keeps_its_details() {
        let m = message(ServiceError::invalid("pair.a", "is empty"));
        assert_eq!(m.code, Code::InvalidArgument as i32);
        assert_eq!(m.details.len(), 2);
        let status = from_rpc_status(&m);
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.get_details_bad_request().is_some());
        assert_eq!(to_rpc_status(status), m);
    }
}
