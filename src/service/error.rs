//! The closed set of errors that the service returns; `rpc` maps each to one gRPC status.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::domain::reason::Reason;
use crate::domain::violation::Violations;
use crate::engine::api::EngineError;
use crate::train::rows::DataError;

/// Reason why a request could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// All fields of the request that are invalid.
    #[error("{0}")]
    InvalidArgument(Violations),
    /// The resource does not exist.
    #[error("{kind} {name:?} does not exist")]
    NotFound {
        /// Kind of resource: job, dataset, checkpoint, model, token, artifact or path of REST.
        kind: &'static str,
        /// Name of the resource.
        name: String,
    },
    /// The caller may not do this, or may not learn whether the resource exists.
    #[error("{message}")]
    PermissionDenied {
        /// Message for the client: the problem and its remedy.
        message: String,
    },
    /// The caller could not be authenticated.
    #[error("{message}")]
    Unauthenticated {
        /// Message for the client: the problem and its remedy.
        message: String,
        /// Reason for the log, if it says more than the message. A caller must not learn from it
        /// which tokens exist.
        log_reason: Option<String>,
    },
    /// The state of the resource does not allow the operation.
    #[error("{message}")]
    FailedPrecondition {
        /// Stable reason code.
        reason: Reason,
        /// Message for the client: the problem and its remedy.
        message: String,
    },
    /// The request_id has already been used for a different request.
    #[error("{message}")]
    AlreadyExists {
        /// Message for the client: the problem and its remedy.
        message: String,
    },
    /// A concurrent change won: the resource changed since it was read, or another worker holds the
    /// lease of the job. Also the end of an answer that its caller does not read.
    #[error("{message}")]
    Aborted {
        /// Stable reason code.
        reason: Reason,
        /// Message for the client: the problem and its remedy.
        message: String,
    },
    /// Temporarily not possible; the client should retry.
    #[error("{message}")]
    Unavailable {
        /// Stable reason code.
        reason: Reason,
        /// Message for the client: the problem and its remedy.
        message: String,
        /// Delay before the next attempt.
        retry_after: Duration,
    },
    /// A limit of the caller, the memory or the disk is reached. A retry helps only after something
    /// has been freed or the limit has been raised.
    #[error("{message}")]
    ResourceExhausted {
        /// Stable reason code.
        reason: Reason,
        /// Message for the client: the problem and its remedy.
        message: String,
    },
    /// A cursor is outside the existing range.
    #[error("{message}")]
    OutOfRange {
        /// Message for the client: the problem and its remedy.
        message: String,
    },
    /// The caller's deadline has passed, or the caller has disconnected.
    #[error("the deadline has passed")]
    DeadlineExceeded,
    /// A defect of the server or a broken disk.
    #[error("{message}")]
    Internal {
        /// Description of the failure, for the log.
        message: String,
    },
}

/// Result of every service call. Besides the errors that a call lists, it can fail with
/// `Unavailable`, `ResourceExhausted` or `Internal` if the database, the disk or the artifact store
/// fails. A call that names a job or a dataset that the caller may not see fails with
/// `PermissionDenied`, for an administrator with `NotFound` if it does not exist.
pub type Result<T> = std::result::Result<T, ServiceError>;

impl ServiceError {
    /// Returns the error for one invalid field.
    pub fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        ServiceError::InvalidArgument(Violations::one(field, description))
    }

    /// Returns the error for a missing resource.
    pub fn not_found(kind: &'static str, name: impl Into<String>) -> Self {
        ServiceError::NotFound {
            kind,
            name: name.into(),
        }
    }

    /// Returns the error for a defect or a broken disk.
    pub fn internal(message: impl std::fmt::Display) -> Self {
        ServiceError::Internal {
            message: message.to_string(),
        }
    }

    /// Returns true if the error says that the server is shutting down.
    pub fn is_draining(&self) -> bool {
        matches!(
            self,
            ServiceError::Unavailable {
                reason: Reason::Draining,
                ..
            }
        )
    }

    /// Returns the error for a server that is shutting down.
    pub fn draining() -> Self {
        ServiceError::Unavailable {
            reason: Reason::Draining,
            message: "the server is shutting down: retry, another replica or the restarted server \
                      will answer"
                .into(),
            retry_after: Duration::from_secs(5),
        }
    }
}

impl From<Violations> for ServiceError {
    fn from(v: Violations) -> Self {
        ServiceError::InvalidArgument(v)
    }
}

impl From<sqlx::Error> for ServiceError {
    fn from(e: sqlx::Error) -> Self {
        // Only a server that ends closes its connections.
        if matches!(e, sqlx::Error::PoolClosed) {
            return ServiceError::draining();
        }
        let message = match &e {
            sqlx::Error::PoolTimedOut => super::store::acquire::no_connection("the database"),
            e => format!("the database failed: {e}"),
        };
        if is_stale_statement(&e) {
            super::store::stale::note_refused();
        }
        match may_succeed_later(&e) {
            true => ServiceError::Unavailable {
                reason: Reason::StoreUnavailable,
                message,
                retry_after: Duration::from_secs(1),
            },
            false => ServiceError::Internal { message },
        }
    }
}

/// Returns true if the database is unreachable, full or busy, so that the same statement may
/// succeed later.
fn may_succeed_later(e: &sqlx::Error) -> bool {
    use sqlx::Error::{Database, Io, PoolTimedOut, Protocol, Tls, WorkerCrashed};
    match e {
        Io(_) | Tls(_) | Protocol(_) | PoolTimedOut | WorkerCrashed => true,
        Database(e) => match e.code().as_deref() {
            // PostgreSQL SQLSTATE classes and codes: 08 lost connection, 0A schema changed under a
            // prepared statement, 40 conflict, 53 no resources, 55 locked, 57 operator
            // intervention, 58 system error, 25006 read-only standby, 25P03 idle session ended.
            Some(code) if code.len() == 5 => {
                ["08", "0A", "40", "53", "55", "57", "58"]
                    .iter()
                    .any(|class| code.starts_with(class))
                    || matches!(code, "25006" | "25P03")
            }
            // SQLite result codes: 5 busy, 6 locked, 10 I/O error, 13 full, 14 cannot open.
            Some(code) => code
                .parse::<i32>()
                .is_ok_and(|c| matches!(c & 0xff, 5 | 6 | 10 | 13 | 14)),
            None => false,
        },
        _ => false,
    }
}

/// Returns true if PostgreSQL refused a prepared statement because the schema has changed since it
/// was prepared.
fn is_stale_statement(e: &sqlx::Error) -> bool {
    matches!(
        e,
        sqlx::Error::Database(e)
            if e.code().is_some_and(|code| code.len() == 5 && code.starts_with("0A"))
    )
}

impl From<EngineError> for ServiceError {
    fn from(e: EngineError) -> Self {
        let message = e.to_string();
        match e {
            EngineError::UnknownModel(name) => {
                ServiceError::not_found("model", format!("models/{name}"))
            }
            EngineError::QueueFull { retry_after, .. }
            | EngineError::TooManyRuns { retry_after, .. }
            | EngineError::TooManyGenerations { retry_after, .. }
            | EngineError::GenerationDisplaced { retry_after } => ServiceError::Unavailable {
                reason: Reason::QueueFull,
                message,
                retry_after,
            },
            EngineError::RowTooLong { .. } => ServiceError::invalid("", message),
            EngineError::PromptTooLong { .. } => {
                ServiceError::invalid("prompt", format!("is too long: {message}"))
            }
            EngineError::SampleTooLong { .. } | EngineError::SamplesTooLong { .. } => {
                ServiceError::invalid("max_tokens", format!("is too large: {message}"))
            }
            EngineError::AnswerNotRead { .. } => ServiceError::Aborted {
                reason: Reason::AnswerNotRead,
                message,
            },
            EngineError::NotResident(_) => ServiceError::FailedPrecondition {
                reason: Reason::NotRunning,
                message,
            },
            EngineError::Draining => ServiceError::draining(),
            EngineError::OutOfMemory { .. }
            | EngineError::NoRoom { .. }
            | EngineError::NoRoomToGenerate { .. }
            | EngineError::DeviceFull(_) => ServiceError::ResourceExhausted {
                reason: Reason::OutOfMemory,
                message,
            },
            EngineError::FilesChanged(_) => ServiceError::FailedPrecondition {
                reason: Reason::ModelFilesChanged,
                message,
            },
            EngineError::Weights(_) => ServiceError::FailedPrecondition {
                reason: Reason::WeightsUnusable,
                message,
            },
            EngineError::Device(_) => ServiceError::Internal { message },
        }
    }
}

/// Converts a file-system failure. A full disk has its own error, because clients and operators can
/// remedy it.
pub(super) fn failed(path: &Path, e: io::Error) -> ServiceError {
    let message = format!("{}: {e}", path.display());
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            // Clients are told the remedy; the path is only logged.
            tracing::warn!(error = message, "no space is left");
            ServiceError::ResourceExhausted {
                reason: Reason::StorageFull,
                message: format!("{e}: free space under the server's data directory"),
            }
        }
        _ => ServiceError::Internal { message },
    }
}

/// Converts a failure to read a dataset's file, without the server's path in the message.
pub(super) fn unreadable(e: &DataError) -> ServiceError {
    match e {
        DataError::BadFile { reason, .. } => ServiceError::invalid("chunk", reason.clone()),
        DataError::TooLarge { .. } => ServiceError::ResourceExhausted {
            reason: Reason::DatasetTooLarge,
            message: e.to_string(),
        },
        DataError::Interrupted { .. } => ServiceError::Unavailable {
            reason: Reason::StorageUnavailable,
            message: "the process that decodes the file was killed, perhaps because the machine \
                      has no memory left: retry later"
                .to_owned(),
            retry_after: Duration::from_secs(5),
        },
        DataError::Io { .. } => ServiceError::internal(e),
    }
}
