//! Stable reason names for refused calls and failed jobs.
//!
//! Clients dispatch on the names, so a name never changes. The code dispatches on [`Reason`], never
//! on a name: [`Reason::name`] is for the API, the store and metrics.

use serde::{Deserialize, Serialize};

/// google.rpc code of a failed job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureCode {
    /// FAILED_PRECONDITION.
    FailedPrecondition,
    /// RESOURCE_EXHAUSTED.
    ResourceExhausted,
    /// NOT_FOUND.
    NotFound,
    /// ABORTED.
    Aborted,
    /// INTERNAL.
    Internal,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal => $code:ident,)+) => {
        /// Reason for which a call was refused or a job failed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[$doc])* $variant,)+
        }

        impl Reason {
            /// All reasons.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)+];

            /// Returns the name that clients, the store and metrics see.
            pub fn name(self) -> &'static str {
                match self {
                    $(Reason::$variant => $name,)+
                }
            }

            /// Returns the code of a job that failed for this reason. The code of a refused call
            /// follows from its kind of error.
            pub fn failure_code(self) -> FailureCode {
                match self {
                    $(Reason::$variant => FailureCode::$code,)+
                }
            }
        }
    };
}

// The single table of names and codes.
reasons! {
    // Refusals of a request or of its caller.
    /// A field cannot be accepted.
    InvalidArgument = "INVALID_ARGUMENT" => Internal,
    /// The message is not the method's protobuf message.
    MalformedMessage = "MALFORMED_MESSAGE" => Internal,
    /// There is no such resource.
    NotFound = "NOT_FOUND" => NotFound,
    /// The caller does not have the required permission.
    PermissionDenied = "PERMISSION_DENIED" => Internal,
    /// The caller could not be authenticated.
    Unauthenticated = "UNAUTHENTICATED" => Internal,
    /// The request_id was already used with another request body.
    RequestIdReused = "REQUEST_ID_REUSED" => Internal,
    /// An event cursor lies outside of the stored events.
    CursorOutOfRange = "CURSOR_OUT_OF_RANGE" => Internal,
    /// The caller's deadline has passed.
    DeadlineExceeded = "DEADLINE_EXCEEDED" => Internal,
    /// A defect of the server or a broken disk.
    Internal = "INTERNAL" => Internal,

    // Limits.
    /// The client has reached its limit of unfinished jobs.
    TooManyJobs = "TOO_MANY_JOBS" => Internal,
    /// The client has reached its limit of tokens that wait for scores or texts.
    TooManyTokens = "TOO_MANY_TOKENS" => Internal,
    /// The client's datasets have reached the limit of bytes.
    TooManyBytes = "TOO_MANY_BYTES" => Internal,
    /// The upload exceeds the server's limit.
    UploadTooLarge = "UPLOAD_TOO_LARGE" => Internal,
    /// The dataset has more text than a job may hold in memory.
    DatasetTooLarge = "DATASET_TOO_LARGE" => Internal,
    /// There is not enough memory.
    OutOfMemory = "OUT_OF_MEMORY" => ResourceExhausted,
    /// The disk is full.
    StorageFull = "STORAGE_FULL" => Internal,

    // Conditions that may be temporary.
    /// The server is stopping.
    Draining = "DRAINING" => Internal,
    /// The scoring queue is full, too many generation requests or training runs wait for a device,
    /// or a training run needs the memory of a generation request.
    QueueFull = "QUEUE_FULL" => Internal,
    /// The database does not answer.
    StoreUnavailable = "STORE_UNAVAILABLE" => Internal,
    /// The artifact store does not answer.
    ArtifactsUnavailable = "ARTIFACTS_UNAVAILABLE" => Internal,
    /// The issuer of OIDC tokens does not answer, so its keys are not known.
    IssuerUnavailable = "ISSUER_UNAVAILABLE" => Internal,
    /// A file cannot be read, decoded or written at the moment.
    StorageUnavailable = "STORAGE_UNAVAILABLE" => Internal,
    /// The caller does not read an answer that holds memory.
    AnswerNotRead = "ANSWER_NOT_READ" => Internal,

    // The state of a job.
    /// The job is being cancelled.
    Cancelling = "CANCELLING" => Internal,
    /// The job is being paused.
    Pausing = "PAUSING" => Internal,
    /// The job is not paused.
    NotPaused = "NOT_PAUSED" => Internal,
    /// The job has not ended.
    NotEnded = "NOT_ENDED" => Internal,
    /// The job has ended.
    AlreadyEnded = "ALREADY_ENDED" => Internal,
    /// The job is not running on this server.
    NotRunning = "NOT_RUNNING" => Internal,
    /// The job cannot change from its state to the other one.
    IllegalTransition = "ILLEGAL_TRANSITION" => Internal,
    /// The job has changed since its etag was read.
    EtagStale = "ETAG_STALE" => Internal,
    /// Another version of the server wrote the job.
    JobUnreadable = "JOB_UNREADABLE" => Internal,
    /// Another worker holds the job's lease.
    LeaseLost = "LEASE_LOST" => Internal,
    /// The job's worker died repeatedly.
    WorkerLost = "WORKER_LOST" => Aborted,

    // Inputs of a job, and resources that a job needs.
    /// A job needs the resource, so it cannot be deleted.
    InUse = "IN_USE" => Internal,
    /// The job has no such checkpoint.
    NoCheckpoint = "NO_CHECKPOINT" => Internal,
    /// The checkpoint lacks the reference that it should hold.
    NoReference = "NO_REFERENCE" => Internal,
    /// The checkpoint has no adapter.
    NoAdapter = "NO_ADAPTER" => Internal,
    /// LoRA cannot start from a checkpoint of full weights.
    FullCheckpoint = "FULL_CHECKPOINT" => Internal,
    /// Rows of the dataset cannot be used.
    DatasetInvalid = "DATASET_INVALID" => FailedPrecondition,
    /// The dataset differs from the one that the job was created with.
    DatasetChanged = "DATASET_CHANGED" => FailedPrecondition,
    /// The tokens of the rows differ from those that the run started with.
    RowsChanged = "ROWS_CHANGED" => FailedPrecondition,
    /// The model differs from the one that the job was created with.
    ModelChanged = "MODEL_CHANGED" => FailedPrecondition,
    /// The model's files differ from those that were loaded.
    ModelFilesChanged = "MODEL_FILES_CHANGED" => FailedPrecondition,
    /// Weights cannot be loaded.
    WeightsUnusable = "WEIGHTS_UNUSABLE" => Internal,
    /// A run's weights cannot be loaded.
    WeightsUnavailable = "WEIGHTS_UNAVAILABLE" => FailedPrecondition,
    /// Files are missing.
    ArtifactMissing = "ARTIFACT_MISSING" => FailedPrecondition,
    /// Files differ from what was written.
    ArtifactDamaged = "ARTIFACT_DAMAGED" => FailedPrecondition,
    /// The checkpoint has a format that another version of the server wrote.
    CheckpointFormat = "CHECKPOINT_FORMAT" => FailedPrecondition,

    // Failures of a run.
    /// The loss is not finite.
    NonFiniteLoss = "NON_FINITE_LOSS" => FailedPrecondition,
    /// A checkpoint cannot be written.
    CheckpointFailed = "CHECKPOINT_FAILED" => Internal,
    /// The device failed.
    DeviceFailed = "DEVICE_FAILED" => Internal,

    // Reasons why the server does not start.
    /// Another process uses the data directory, or a restore into it was interrupted.
    DataDirInUse = "DATA_DIR_IN_USE" => Internal,
    /// The artifact store belongs to another database, or the database to another artifact store.
    WrongArtifactStore = "WRONG_ARTIFACT_STORE" => Internal,
    /// A newer version has migrated the database so that this version may not use it.
    SchemaTooNew = "SCHEMA_TOO_NEW" => Internal,
    /// The SQLite database was moved to PostgreSQL.
    DatabaseMoved = "DATABASE_MOVED" => Internal,
}

impl Reason {
    /// Returns the reason with a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|reason| reason.name() == name)
    }

    /// Returns true if the caller has reached a limit for one client.
    pub fn is_quota(self) -> bool {
        matches!(
            self,
            Reason::TooManyJobs | Reason::TooManyTokens | Reason::TooManyBytes
        )
    }
}

/// Reason in a stored record, which another version of the server may have written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum StoredReason {
    /// A reason that this version knows.
    Known(Reason),
    /// Name of a reason of another version.
    Unknown(String),
}

impl StoredReason {
    /// Returns the name as it is stored.
    pub fn name(&self) -> &str {
        match self {
            StoredReason::Known(reason) => reason.name(),
            StoredReason::Unknown(name) => name,
        }
    }

    /// Returns the code of a job that failed for this reason.
    pub fn failure_code(&self) -> FailureCode {
        match self {
            StoredReason::Known(reason) => reason.failure_code(),
            StoredReason::Unknown(_) => FailureCode::Internal,
        }
    }
}

impl PartialEq<Reason> for StoredReason {
    fn eq(&self, other: &Reason) -> bool {
        matches!(self, StoredReason::Known(reason) if reason == other)
    }
}

impl From<Reason> for StoredReason {
    fn from(reason: Reason) -> Self {
        StoredReason::Known(reason)
    }
}

impl From<String> for StoredReason {
    fn from(name: String) -> Self {
        Reason::parse(&name).map_or(StoredReason::Unknown(name), StoredReason::Known)
    }
}

impl From<StoredReason> for String {
    fn from(reason: StoredReason) -> Self {
        reason.name().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_one_reason_in_capitals() {
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.name()), Some(*reason));
            assert!(
                reason
                    .name()
                    .chars()
                    .all(|c| c.is_ascii_uppercase() || c == '_')
            );
        }
        assert_eq!(Reason::parse("in_use"), None);
    }

    /// Clients and stores know reasons by their names: one may be added, but none changes.
    #[test]
    fn names_and_codes_are_what_clients_and_stores_know() {
        let known = [
            ("INVALID_ARGUMENT", FailureCode::Internal),
            ("MALFORMED_MESSAGE", FailureCode::Internal),
            ("NOT_FOUND", FailureCode::NotFound),
            ("PERMISSION_DENIED", FailureCode::Internal),
            ("UNAUTHENTICATED", FailureCode::Internal),
            ("REQUEST_ID_REUSED", FailureCode::Internal),
            ("CURSOR_OUT_OF_RANGE", FailureCode::Internal),
            ("DEADLINE_EXCEEDED", FailureCode::Internal),
            ("INTERNAL", FailureCode::Internal),
            ("TOO_MANY_JOBS", FailureCode::Internal),
            ("TOO_MANY_TOKENS", FailureCode::Internal),
            ("TOO_MANY_BYTES", FailureCode::Internal),
            ("UPLOAD_TOO_LARGE", FailureCode::Internal),
            ("DATASET_TOO_LARGE", FailureCode::Internal),
            ("OUT_OF_MEMORY", FailureCode::ResourceExhausted),
            ("STORAGE_FULL", FailureCode::Internal),
            ("DRAINING", FailureCode::Internal),
            ("QUEUE_FULL", FailureCode::Internal),
            ("STORE_UNAVAILABLE", FailureCode::Internal),
            ("ARTIFACTS_UNAVAILABLE", FailureCode::Internal),
            ("ISSUER_UNAVAILABLE", FailureCode::Internal),
            ("STORAGE_UNAVAILABLE", FailureCode::Internal),
            ("ANSWER_NOT_READ", FailureCode::Internal),
            ("CANCELLING", FailureCode::Internal),
            ("PAUSING", FailureCode::Internal),
            ("NOT_PAUSED", FailureCode::Internal),
            ("NOT_ENDED", FailureCode::Internal),
            ("ALREADY_ENDED", FailureCode::Internal),
            ("NOT_RUNNING", FailureCode::Internal),
            ("ILLEGAL_TRANSITION", FailureCode::Internal),
            ("ETAG_STALE", FailureCode::Internal),
            ("JOB_UNREADABLE", FailureCode::Internal),
            ("LEASE_LOST", FailureCode::Internal),
            ("WORKER_LOST", FailureCode::Aborted),
            ("IN_USE", FailureCode::Internal),
            ("NO_CHECKPOINT", FailureCode::Internal),
            ("NO_REFERENCE", FailureCode::Internal),
            ("NO_ADAPTER", FailureCode::Internal),
            ("FULL_CHECKPOINT", FailureCode::Internal),
            ("DATASET_INVALID", FailureCode::FailedPrecondition),
            ("DATASET_CHANGED", FailureCode::FailedPrecondition),
            ("ROWS_CHANGED", FailureCode::FailedPrecondition),
            ("MODEL_CHANGED", FailureCode::FailedPrecondition),
            ("MODEL_FILES_CHANGED", FailureCode::FailedPrecondition),
            ("WEIGHTS_UNUSABLE", FailureCode::Internal),
            ("WEIGHTS_UNAVAILABLE", FailureCode::FailedPrecondition),
            ("ARTIFACT_MISSING", FailureCode::FailedPrecondition),
            ("ARTIFACT_DAMAGED", FailureCode::FailedPrecondition),
            ("CHECKPOINT_FORMAT", FailureCode::FailedPrecondition),
            ("NON_FINITE_LOSS", FailureCode::FailedPrecondition),
            ("CHECKPOINT_FAILED", FailureCode::Internal),
            ("DEVICE_FAILED", FailureCode::Internal),
            ("DATA_DIR_IN_USE", FailureCode::Internal),
            ("WRONG_ARTIFACT_STORE", FailureCode::Internal),
            ("SCHEMA_TOO_NEW", FailureCode::Internal),
            ("DATABASE_MOVED", FailureCode::Internal),
        ];
        let now: Vec<(&str, FailureCode)> = Reason::ALL
            .iter()
            .map(|r| (r.name(), r.failure_code()))
            .collect();
        assert_eq!(now, known);
    }

    #[test]
    fn a_stored_reason_is_its_name_known_or_not() {
        for (stored, expected) in [
            (
                "\"OUT_OF_MEMORY\"",
                StoredReason::Known(Reason::OutOfMemory),
            ),
            (
                "\"OF_A_LATER_VERSION\"",
                StoredReason::Unknown("OF_A_LATER_VERSION".into()),
            ),
        ] {
            let read: StoredReason = serde_json::from_str(stored).unwrap();
            assert_eq!(read, expected);
            assert_eq!(serde_json::to_string(&read).unwrap(), stored);
        }
        assert_eq!(
            StoredReason::Known(Reason::OutOfMemory).failure_code(),
            FailureCode::ResourceExhausted
        );
        assert_eq!(
            StoredReason::Unknown("X".into()).failure_code(),
            FailureCode::Internal
        );
    }
}
