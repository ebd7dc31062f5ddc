//! The closed set of errors the service answers with; `rpc` maps each to one status.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::domain::reason::Reason;
use crate::domain::violation::Violations;
use crate::engine::api::EngineError;
use crate::train::rows::DataError;

/// Why a request could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Fields that cannot be accepted, all of them.
    #[error("{0}")]
    InvalidArgument(Violations),
    /// No such resource.
    #[error("{kind} {name:?} does not exist")]
    NotFound {
        /// job, dataset, checkpoint or model.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The caller may not do it, or may not know whether there is such a thing.
    #[error("{message}")]
    PermissionDenied {
        /// What and why.
        message: String,
    },
    /// Nobody knows who the caller is.
    #[error("{message}")]
    Unauthenticated {
        /// What and why.
        message: String,
    },
    /// The resource's state forbids it.
    #[error("{message}")]
    FailedPrecondition {
        /// The stable word for it.
        reason: Reason,
        /// What and why.
        message: String,
    },
    /// The request_id was used with another body.
    #[error("{message}")]
    AlreadyExists {
        /// What and why.
        message: String,
    },
    /// Somebody else was faster: the resource changed since it was read, or another worker carries
    /// it on.
    #[error("{message}")]
    Aborted {
        /// The stable word for it.
        reason: Reason,
        /// What and why.
        message: String,
    },
    /// Not now; try again.
    #[error("{message}")]
    Unavailable {
        /// The stable word for it.
        reason: Reason,
        /// What and why.
        message: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// Over a limit that waiting does not lift.
    #[error("{message}")]
    ResourceExhausted {
        /// The stable word for it.
        reason: Reason,
        /// What and why.
        message: String,
    },
    /// A cursor outside what exists.
    #[error("{message}")]
    OutOfRange {
        /// What and why.
        message: String,
    },
    /// The caller's deadline has passed.
    #[error("the deadline has passed")]
    DeadlineExceeded,
    /// A defect or a broken disk.
    #[error("{message}")]
    Internal {
        /// What happened.
        message: String,
    },
}

/// The result of every service call.
pub type Result<T> = std::result::Result<T, ServiceError>;

impl ServiceError {
    /// One bad field.
    pub fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        ServiceError::InvalidArgument(Violations::one(field, description))
    }

    /// A missing resource.
    pub fn not_found(kind: &'static str, name: impl Into<String>) -> Self {
        ServiceError::NotFound { kind, name: name.into() }
    }

    /// Something that is a defect or a broken disk.
    pub fn internal(message: impl std::fmt::Display) -> Self {
        ServiceError::Internal { message: message.to_string() }
    }

    /// Whether it says that the server is stopping.
    pub fn is_draining(&self) -> bool {
        matches!(self, ServiceError::Unavailable { reason: Reason::Draining, .. })
    }

    /// The server is stopping.
    pub fn draining() -> Self {
        ServiceError::Unavailable {
            reason: Reason::Draining,
            message: "the server is shutting down: retry, another replica or the restarted server will answer".into(),
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
        let message = format!("the database failed: {e}");
        if is_stale_statement(&e) {
            super::store::stale::note_refused();
        }
        match may_answer_later(&e) {
            true => ServiceError::Unavailable {
                reason: Reason::StoreUnavailable,
                message,
                retry_after: Duration::from_secs(1),
            },
            false => ServiceError::Internal { message },
        }
    }
}

/// Whether the database is away, full or busy, rather than the statement wrong.
fn may_answer_later(e: &sqlx::Error) -> bool {
    use sqlx::Error::{Database, Io, PoolClosed, PoolTimedOut, Protocol, Tls, WorkerCrashed};
    match e {
        Io(_) | Tls(_) | Protocol(_) | PoolTimedOut | PoolClosed | WorkerCrashed => true,
        Database(e) => match e.code().as_deref() {
            // PostgreSQL: lost connections, a schema that changed under a prepared statement,
            // conflicts, no resources, locks, operator intervention, system errors, read-only
            // standby, an idle session ended.
            Some(code) if code.len() == 5 => {
                ["08", "0A", "40", "53", "55", "57", "58"]
                    .iter()
                    .any(|class| code.starts_with(class))
                    || matches!(code, "25006" | "25P03")
            }
            // SQLite: busy, locked, I/O error, full, cannot open.
            Some(code) => {
                code.parse::<i32>().is_ok_and(|c| matches!(c & 0xff, 5 | 6 | 10 | 13 | 14))
            }
            None => false,
        },
        _ => false,
    }
}

/// Whether PostgreSQL refused a prepared statement because the schema has changed since it was
/// prepared.
fn is_stale_statement(e: &sqlx::Error) -> bool {
    matches!(e, sqlx::Error::Database(e) if e.code().is_some_and(|code| code.len() == 5 && code.starts_with("0A")))
}

impl From<EngineError> for ServiceError {
    fn from(e: EngineError) -> Self {
        let message = e.to_string();
        match e {
            EngineError::UnknownModel(name) => {
                ServiceError::not_found("model", format!("models/{name}"))
            }
            EngineError::QueueFull { retry_after, .. } => {
                ServiceError::Unavailable { reason: Reason::QueueFull, message, retry_after }
            }
            EngineError::RowTooLong { .. } => ServiceError::invalid("pairs", message),
            EngineError::NotResident(_) => {
                ServiceError::FailedPrecondition { reason: Reason::NotRunning, message }
            }
            EngineError::Draining => ServiceError::draining(),
            EngineError::OutOfMemory { .. }
            | EngineError::NoRoom { .. }
            | EngineError::DeviceFull(_) => {
                ServiceError::ResourceExhausted { reason: Reason::OutOfMemory, message }
            }
            EngineError::FilesChanged(_) => {
                ServiceError::FailedPrecondition { reason: Reason::ModelFilesChanged, message }
            }
            EngineError::Weights(_) => {
                ServiceError::FailedPrecondition { reason: Reason::WeightsUnusable, message }
            }
            EngineError::Device(_) => ServiceError::Internal { message },
        }
    }
}

/// A file-system failure; a full disk is told apart, because it has a remedy.
pub(super) fn failed(path: &Path, e: io::Error) -> ServiceError {
    let message = format!("{}: {e}", path.display());
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            // Clients learn what to ask for, the log says where.
            tracing::warn!(error = message, "no space is left");
            ServiceError::ResourceExhausted {
                reason: Reason::StorageFull,
                message: format!("{e}: free space under the server's data directory"),
            }
        }
        _ => ServiceError::Internal { message },
    }
}

/// What is wrong with a dataset's file, without the server's path in it.
pub(super) fn unreadable(e: &DataError) -> ServiceError {
    match e {
        DataError::BadFile { reason, .. } => ServiceError::invalid("chunk", reason.clone()),
        DataError::TooLarge { .. } => ServiceError::ResourceExhausted { reason: Reason::DatasetTooLarge, message: e.to_string() },
        DataError::Interrupted { .. } => ServiceError::Unavailable {
            reason: Reason::StorageUnavailable,
            message: "the process that decodes the file was killed, perhaps because the machine has no memory left: retry later".to_owned(),
            retry_after: Duration::from_secs(5),
        },
        DataError::Io { .. } => ServiceError::internal(e),
    }
}
