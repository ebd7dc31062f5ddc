//! The one place where an error becomes a gRPC status, details included.

use tonic::codegen::http::HeaderMap;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::domain::violation::Violations;
use crate::jobs::error::ServiceError;

/// The domain of every ErrorInfo.
pub const DOMAIN: &str = "bradley.dev";

/// Maps an error to its status: code, message, and BadRequest, ErrorInfo, RetryInfo or ResourceInfo details.
pub fn status(e: ServiceError) -> Status {
    let mut message = e.to_string();
    let mut details = ErrorDetails::new();
    let (code, reason) = match &e {
        ServiceError::InvalidArgument(v) => {
            for violation in &v.0 {
                details.add_bad_request_violation(&violation.field, &violation.description);
            }
            (Code::InvalidArgument, "INVALID_ARGUMENT")
        }
        ServiceError::NotFound { kind, name } => {
            details.set_resource_info(*kind, name, "", "does not exist");
            (Code::NotFound, "NOT_FOUND")
        }
        ServiceError::PermissionDenied { .. } => (Code::PermissionDenied, "PERMISSION_DENIED"),
        ServiceError::Unauthenticated { .. } => (Code::Unauthenticated, "UNAUTHENTICATED"),
        ServiceError::FailedPrecondition { reason, .. } => (Code::FailedPrecondition, *reason),
        ServiceError::AlreadyExists { .. } => (Code::AlreadyExists, "REQUEST_ID_REUSED"),
        ServiceError::Aborted { reason, .. } => (Code::Aborted, *reason),
        ServiceError::Unavailable { reason, retry_after, .. } => {
            details.set_retry_info(Some(*retry_after));
            (Code::Unavailable, *reason)
        }
        ServiceError::ResourceExhausted { reason, .. } => {
            if reason.starts_with("TOO_MANY") {
                details.add_quota_failure_violation("client", &message);
            }
            (Code::ResourceExhausted, *reason)
        }
        ServiceError::OutOfRange { .. } => (Code::OutOfRange, "CURSOR_OUT_OF_RANGE"),
        ServiceError::DeadlineExceeded => (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        ServiceError::Internal { .. } => {
            // Paths and statements are the operator's to read; the answer's x-request-id finds them.
            tracing::error!(error = message, "internal error");
            message = "an internal error, which the server's log describes".to_owned();
            (Code::Internal, "INTERNAL")
        }
    };
    details.set_error_info(reason, DOMAIN, std::collections::HashMap::new());
    Status::with_error_details(code, message, details)
}

/// The status of bad fields.
pub fn bad_request(v: Violations) -> Status {
    status(ServiceError::InvalidArgument(v))
}

/// Why a job failed, as a message.
pub fn job_error(code: Code, reason: &str, text: String) -> tonic_types::Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, std::collections::HashMap::new());
    decoded(Status::with_error_details(code, text, details))
}

/// The same as a message that travels inside an answer.
pub fn message(e: ServiceError) -> tonic_types::Status {
    decoded(status(e))
}

fn decoded(status: Status) -> tonic_types::Status {
    use prost::Message;
    // The details header is the encoded google.rpc.Status itself.
    tonic_types::Status::decode(status.details()).unwrap_or(tonic_types::Status {
        code: status.code() as i32,
        message: status.message().to_owned(),
        details: Vec::new(),
    })
}

/// What a call's headers must say when the transport ended it without a reason: it could not read the message. Ours always have one.
pub fn explained(headers: &HeaderMap) -> Option<Status> {
    let given = Status::from_header_map(headers).filter(|s| s.code() == Code::Internal && s.details().is_empty())?;
    let mut details = ErrorDetails::new();
    details.set_error_info("MALFORMED_MESSAGE", DOMAIN, std::collections::HashMap::new());
    let message = format!("the request cannot be read as its protobuf message ({}): check it against the protos", given.message());
    Some(Status::with_error_details(Code::InvalidArgument, message, details))
}

/// A stream that a client left half-way.
pub fn incomplete(what: &str) -> Status {
    status(ServiceError::invalid("part", what))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_error_has_its_code_and_a_stable_reason() {
        let retry_after = Duration::from_secs(2);
        let cases = [
            (ServiceError::invalid("training_job.dpo.beta", "is 0"), Code::InvalidArgument, "INVALID_ARGUMENT"),
            (ServiceError::not_found("job", "trainingJobs/x"), Code::NotFound, "NOT_FOUND"),
            (ServiceError::PermissionDenied { message: "m".into() }, Code::PermissionDenied, "PERMISSION_DENIED"),
            (ServiceError::Unauthenticated { message: "m".into() }, Code::Unauthenticated, "UNAUTHENTICATED"),
            (ServiceError::FailedPrecondition { reason: "IN_USE", message: "m".into() }, Code::FailedPrecondition, "IN_USE"),
            (ServiceError::AlreadyExists { message: "m".into() }, Code::AlreadyExists, "REQUEST_ID_REUSED"),
            (ServiceError::Aborted { reason: "ETAG_STALE", message: "m".into() }, Code::Aborted, "ETAG_STALE"),
            (ServiceError::Unavailable { reason: "QUEUE_FULL", message: "m".into(), retry_after }, Code::Unavailable, "QUEUE_FULL"),
            (ServiceError::ResourceExhausted { reason: "OUT_OF_MEMORY", message: "m".into() }, Code::ResourceExhausted, "OUT_OF_MEMORY"),
            (ServiceError::OutOfRange { message: "m".into() }, Code::OutOfRange, "CURSOR_OUT_OF_RANGE"),
            (ServiceError::DeadlineExceeded, Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
            (ServiceError::internal("m"), Code::Internal, "INTERNAL"),
        ];
        for (e, code, reason) in cases {
            let s = status(e);
            assert_eq!(s.code(), code);
            let info = s.get_details_error_info().unwrap();
            assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason, DOMAIN));
            assert_eq!(s.get_details_retry_info().is_some(), code == Code::Unavailable);
        }
    }

    #[test]
    fn an_error_inside_an_answer_keeps_its_details() {
        let m = message(ServiceError::invalid("pair.a", "is empty"));
        assert_eq!(m.code, Code::InvalidArgument as i32);
        assert_eq!(m.details.len(), 2);
    }
}
