//! Datasets: upload, queries and deletion. An upload is written to a temporary file, validated,
//! renamed, and stored as a row. It is acknowledged only after all four steps.

use std::sync::Arc;
use std::time::Duration;

use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;

use super::artifacts::{Artifacts, Temporary};
use super::audit::{AUDIT, audit};
use super::auth::access::own_dataset;
use super::blocking::blocking;
use super::detached::DetachedWork;
use super::error::{Result, ServiceError, failed, unreadable};
use super::in_use::{DependentJobs, Needed, check};
use super::limiter::Limiter;
use super::shutdown::Shutdown;
use super::store::{Page, Store, now};
use super::template_date::TemplateDate;
use crate::domain::access::{Caller, Whose};
use crate::domain::dataset::{
    Dataset, DatasetFormat, IssueReason, LengthCheck, RowIssue, Severity, ValidationReport,
};
use crate::domain::reason::Reason;
use crate::domain::training::Truncation;
use crate::engine::Engine;
use crate::formats::tokenizer::ChatTokenizer;
use crate::infer::encode::PairEncoder;
use crate::train::rows::detect_format;
use crate::train::validate::validate_rows;

/// Maximum time for which an upload that failed waits for the removal of its object from the
/// artifact store.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);

/// Metadata of an upload.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UploadMeta {
    /// Display name, at most 256 characters.
    pub display_name: String,
    /// Format of the file; detected from its first bytes if absent.
    pub format: Option<DatasetFormat>,
    /// Id of a model; if given, the lengths of the rows are checked with its tokenizer.
    pub model: Option<String>,
    /// Maximum number of tokens of prompt + answer for this check.
    pub max_length: usize,
    /// Hash that the file must have, if the client knows it.
    pub content_hash: Option<blake3::Hash>,
}

/// Limits on uploads.
#[derive(Clone, Copy, Debug)]
pub(super) struct DatasetLimits {
    /// Largest upload, in bytes.
    pub max_upload_bytes: u64,
    /// Maximum total size of one client's datasets, in bytes. An upload that would exceed it is
    /// refused at its beginning, on the way, or at its end.
    pub max_bytes_per_client: Option<u64>,
    /// Maximum text in one dataset, in bytes. It is limited because a job holds all its tokens in
    /// memory.
    pub max_text_bytes: u64,
}

/// Receives, reads and deletes datasets.
#[derive(Clone)]
pub struct DatasetService {
    pub(super) store: Store,
    pub(super) artifacts: Artifacts,
    pub(super) engine: Engine,
    /// Shared limit on slow tasks; validating a dataset counts as one.
    pub(super) slow_tasks: Limiter,
    /// Stores and deletes datasets, which must not end half done.
    pub(super) detached: DetachedWork,
    pub(super) shutdown: Shutdown,
    pub(super) template_date: TemplateDate,
    pub(super) limits: DatasetLimits,
}

/// An upload in progress. Dropping it removes the temporary file.
pub struct DatasetUpload {
    service: DatasetService,
    owner: String,
    meta: UploadMeta,
    /// Tokenizer and vocabulary size of the model used to check lengths.
    checked: Option<(Arc<ChatTokenizer>, usize)>,
    file: File,
    temporary: Temporary,
    hash: blake3::Hasher,
    size: u64,
    /// Number of bytes that the client's datasets may still have, counted when the upload began.
    room: u64,
    /// The first 4 bytes, from which the format is detected.
    start: Vec<u8>,
}

impl DatasetService {
    /// Returns one dataset.
    ///
    /// # Errors
    /// `PermissionDenied` if the dataset does not exist or belongs to another client; `NotFound`
    /// for administrators.
    pub async fn get_dataset(&self, caller: &Caller, id: &str) -> Result<Dataset> {
        own_dataset(&self.store, caller, id).await
    }

    /// Returns a page of `whose` datasets, newest first. With a content hash, the page has only the
    /// caller's own datasets, and of these only the ones whose files have this hash.
    ///
    /// # Errors
    /// `InvalidArgument` for a page token that this list did not return.
    pub async fn list_datasets(
        &self,
        caller: &Caller,
        whose: Whose,
        content_hash: Option<blake3::Hash>,
        page_size: usize,
        page_token: &str,
    ) -> Result<Page<Dataset>> {
        // A caller who asks for a hash wants to use the dataset. Other owners may delete theirs, so
        // an administrator does not get those either.
        let owner = match content_hash {
            Some(_) => Some(caller.owner.as_str()),
            None => caller.listed_owner(whose),
        };
        self.store
            .datasets(owner, content_hash, page_size, page_token)
            .await
    }

    /// Deletes a dataset.
    ///
    /// # Errors
    /// `PermissionDenied` or `NotFound` if the caller has no such dataset; `FailedPrecondition`
    /// (`IN_USE`) if an unfinished job uses it; `Unavailable` if the artifact store is not the
    /// database's or does not answer.
    pub async fn delete_dataset(&self, caller: &Caller, id: &str) -> Result<()> {
        own_dataset(&self.store, caller, id).await?;
        self.artifacts.check_artifact_store().await?;
        let (service, caller, id) = (self.clone(), caller.clone(), id.to_owned());
        let removing = async move {
            let refuse = |users: &DependentJobs| check(&caller, users, Needed::Dataset(&id));
            service.store.delete_dataset(&id, refuse).await?;
            audit(&caller, "delete", &format!("datasets/{id}"));
            service.artifacts.remove_dataset(&id).await
        };
        self.detached.to_its_end(removing).await
    }

    /// Begins an upload.
    ///
    /// # Errors
    /// `InvalidArgument` for bad metadata; `NotFound` if the server does not have the named model;
    /// `ResourceExhausted` if the client's datasets have reached their limit; `Unavailable` if the
    /// server is shutting down.
    pub async fn begin_upload(&self, caller: &Caller, meta: UploadMeta) -> Result<DatasetUpload> {
        self.shutdown.refuse_new_work()?;
        if meta.display_name.chars().count() > 256 || meta.display_name.contains('\0') {
            return Err(ServiceError::invalid(
                "metadata.display_name",
                "must have at most 256 characters, none of them NUL",
            ));
        }
        if meta.max_length < 2 {
            return Err(ServiceError::invalid(
                "metadata.max_length",
                format!("is {}: it must be at least 2", meta.max_length),
            ));
        }
        let room = self.room(&caller.owner, 1).await?;
        let checked = match meta.model.as_deref() {
            Some(model) => Some((
                self.engine.tokenizer(model)?,
                self.engine.model(model)?.vocab_size,
            )),
            None => None,
        };
        let temporary = Temporary(self.artifacts.temporary());
        let file = File::create_new(&temporary.0)
            .await
            .map_err(|e| failed(&temporary.0, e))?;
        let (service, owner) = (self.clone(), caller.owner.clone());
        Ok(DatasetUpload {
            service,
            owner,
            meta,
            checked,
            file,
            temporary,
            hash: blake3::Hasher::new(),
            size: 0,
            room,
            start: Vec::new(),
        })
    }

    /// Returns the number of bytes that a client's further datasets may have, at least `needed`.
    ///
    /// # Errors
    /// `ResourceExhausted` if it would be less than `needed`.
    async fn room(&self, owner: &str, needed: u64) -> Result<u64> {
        let Some(limit) = self.limits.max_bytes_per_client else {
            return Ok(u64::MAX);
        };
        room_within(limit, self.store.dataset_bytes(owner).await?, needed)
    }
}

impl DatasetUpload {
    /// Appends the next bytes.
    ///
    /// # Errors
    /// `ResourceExhausted` if the upload exceeds its limit or that of the client's datasets, or the
    /// disk is full.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let limit = self.service.limits.max_upload_bytes;
        self.size += bytes.len() as u64;
        if self.size > limit {
            let message = format!(
                "the upload is larger than {limit} bytes: split it, or raise max_upload_bytes"
            );
            return Err(ServiceError::ResourceExhausted {
                reason: Reason::UploadTooLarge,
                message,
            });
        }
        if self.size > self.room {
            let limit = self.service.limits.max_bytes_per_client.unwrap_or(u64::MAX);
            return Err(too_many_bytes(self.size, limit - self.room, limit));
        }
        if self.start.len() < 4 {
            self.start.extend(bytes.iter().take(4 - self.start.len()));
        }
        self.hash.update(bytes);
        self.file
            .write_all(bytes)
            .await
            .map_err(|e| failed(&self.temporary.0, e))
    }

    /// Validates and stores the dataset. When this returns, the dataset survives a crash.
    ///
    /// # Errors
    /// `InvalidArgument` with the first findings if no row can be used, or if the file cannot be
    /// decoded or has another hash than its metadata says; `ResourceExhausted` if its rows have too
    /// much text (`DATASET_TOO_LARGE`) or the client's datasets are too large together
    /// (`TOO_MANY_BYTES`).
    pub async fn finish(mut self) -> Result<Dataset> {
        self.file
            .flush()
            .await
            .map_err(|e| failed(&self.temporary.0, e))?;
        let hash = self.hash.finalize();
        if let Some(expected) = self.meta.content_hash.filter(|expected| *expected != hash) {
            let message = format!(
                "is {}, but the bytes that arrived have {}: send the file again",
                expected.to_hex(),
                hash.to_hex()
            );
            return Err(ServiceError::invalid("metadata.content_hash", message));
        }
        let format = self
            .meta
            .format
            .unwrap_or_else(|| detect_format(&self.start));
        let (path, checked, max_length) = (
            self.temporary.0.clone(),
            self.checked.clone(),
            self.meta.max_length,
        );
        let date = self.service.template_date.of(None);
        let permit = self.service.slow_tasks.acquire().await?;
        let limit = self.service.limits.max_text_bytes;
        let mut report = blocking(move || {
            let _permit = permit;
            let lengths = checked.as_ref().map(|(tokenizer, vocab_size)| {
                PairEncoder::new(tokenizer, max_length, Truncation::KeepStart)
                    .with_date(date)
                    .with_vocab_size(*vocab_size)
            });
            validate_rows(&path, format, lengths, limit).map_err(|e| unreadable(&e))
        })
        .await??;
        if report.valid_rows == 0 && report.pairs == 0 {
            return Err(ServiceError::invalid(
                "chunk",
                no_usable_row_message(&report),
            ));
        }
        report.length_check = self.meta.model.clone().map(|model| LengthCheck {
            model,
            max_length: self.meta.max_length,
        });
        // Other uploads of the client may have ended meanwhile. The insert checks this again.
        self.service.room(&self.owner, self.size).await?;
        let dataset = Dataset {
            id: uuid::Uuid::now_v7().to_string(),
            display_name: self.meta.display_name.clone(),
            format,
            size_bytes: self.size,
            content_hash: hash.to_hex().to_string(),
            report,
            create_time: now(),
            owner: self.owner.clone(),
        };
        // Dropped when this returns or its caller leaves.
        let caller_left = CancellationToken::new();
        let _here = caller_left.clone().drop_guard();
        let (service, temporary) = (self.service.clone(), self.temporary);
        let storing = async move { service.store_upload(temporary, dataset, &caller_left).await };
        self.service.detached.to_its_end(storing).await
    }
}

impl DatasetService {
    /// Publishes the file of a dataset, here and in the artifact store, and stores its row, unless
    /// the caller has left meanwhile. This runs to its end without a caller, too: otherwise the row
    /// could be stored after its file was removed, or the file left without a row.
    ///
    /// # Errors
    /// The errors of the file system, the artifact store and the database; `DeadlineExceeded` if
    /// the caller has left; `ResourceExhausted` if the client's datasets would be too large. The
    /// file is then removed, unless the row may be there.
    async fn store_upload(
        &self,
        temporary: Temporary,
        dataset: Dataset,
        caller_left: &CancellationToken,
    ) -> Result<Dataset> {
        let ready = match self.publish(temporary, &dataset.id).await {
            Ok(()) if caller_left.is_cancelled() => Err(ServiceError::DeadlineExceeded),
            published => published,
        };
        if let Err(e) = ready {
            self.discard(&dataset.id).await;
            return Err(e);
        }
        // Other uploads of the client may have ended meanwhile.
        let limit = self.limits.max_bytes_per_client.unwrap_or(u64::MAX);
        let needed = dataset.size_bytes;
        let refuse = |used: u64| room_within(limit, used, needed).map(|_| ());
        if let Err(e) = self.store.insert_dataset(&dataset, refuse).await {
            if self.is_absent(&dataset.id, &e).await {
                self.discard(&dataset.id).await;
            }
            return Err(e);
        }
        tracing::info!(
            target: AUDIT,
            owner = dataset.owner,
            action = "upload",
            resource = format!("datasets/{}", dataset.id),
            "done"
        );
        tracing::info!(
            dataset = dataset.id,
            rows = dataset.report.rows,
            valid = dataset.report.valid_rows,
            "dataset stored"
        );
        Ok(dataset)
    }

    /// Renames an upload's file to that of the dataset, and copies it to the artifact store.
    async fn publish(&self, temporary: Temporary, id: &str) -> Result<()> {
        let (artifacts, target) = (self.artifacts.clone(), self.artifacts.dataset(id));
        blocking(move || artifacts.publish(&temporary.0, &target)).await??;
        self.artifacts.upload_dataset(id).await
    }

    /// Returns true if the row of a dataset, whose insert failed with `e`, is certainly not stored
    /// and will not be. The insert may have succeeded although its answer was lost.
    async fn is_absent(&self, id: &str, e: &ServiceError) -> bool {
        !self.store.may_still_insert(e)
            && matches!(
                self.store.dataset(id).await,
                Err(ServiceError::NotFound { .. })
            )
    }

    /// Removes the files of a dataset without a row, here and in the artifact store.
    async fn discard(&self, id: &str) {
        // First the local one, because the store may be what failed.
        let here = self.artifacts.drop_local_dataset(id).await;
        let everywhere = self.artifacts.remove_dataset(id);
        let everywhere = match tokio::time::timeout(DISCARD_TIMEOUT, everywhere).await {
            Ok(removed) => removed,
            Err(_) => Err(ServiceError::DeadlineExceeded),
        };
        if let Err(e) = here.and(everywhere) {
            tracing::warn!(
                dataset = id,
                error = %e,
                "the file of an upload that was not stored cannot be removed"
            );
        }
    }
}

/// Returns the number of bytes that fit into `limit` besides the `used` ones. `used` is above the
/// limit if the limit was lowered.
///
/// # Errors
/// `ResourceExhausted` if it would be less than `needed`.
fn room_within(limit: u64, used: u64, needed: u64) -> Result<u64> {
    let room = limit.saturating_sub(used);
    match needed <= room {
        true => Ok(room),
        false => Err(too_many_bytes(needed, used, limit)),
    }
}

fn too_many_bytes(needed: u64, used: u64, limit: u64) -> ServiceError {
    let message = format!(
        "your datasets have {used} bytes, so that {needed} more do not fit the {limit} that are \
         allowed: delete one"
    );
    ServiceError::ResourceExhausted {
        reason: Reason::TooManyBytes,
        message,
    }
}

fn no_usable_row_message(report: &ValidationReport) -> String {
    if report.rows == 0 {
        return "the file holds no row: send one JSON object a line, or a Parquet file".into();
    }
    // Rows of one file often have the same error, which is said once.
    let mut different: Vec<(&RowIssue, u64)> = Vec::new();
    let errors = |i: &&RowIssue| i.reason.severity() == Severity::Error;
    for issue in report.issues.iter().filter(errors) {
        let is_same = |(other, _): &(&RowIssue, u64)| {
            (&other.field, other.reason, &other.message)
                == (&issue.field, issue.reason, &issue.message)
        };
        match different.iter().position(is_same) {
            Some(i) => different[i].1 += 1,
            None if different.len() < 5 => different.push((issue, 1)),
            None => {}
        }
    }
    let first: Vec<String> = different
        .into_iter()
        .map(|(i, rows)| {
            let rows = if rows == 1 {
                format!("row {}", i.row)
            } else {
                format!("{rows} rows from row {}", i.row)
            };
            match i.message.starts_with(&i.field) {
                true => format!("{rows}: {}", i.message),
                false => format!("{rows}: {}: {}", i.field, i.message),
            }
        })
        .collect();
    let mut message = format!(
        "none of the {} rows can be used; {}",
        report.rows,
        first.join("; ")
    );
    let is_json_error = |i: &RowIssue| i.reason == IssueReason::InvalidJson;
    if report.issues.iter().filter(errors).all(is_json_error) {
        message.push_str(
            "; the server takes JSON lines and Parquet, and the command line converts CSV, JSON \
             arrays and Arrow",
        );
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_hears_how_much_it_has_also_above_a_lowered_limit() {
        assert_eq!(room_within(100, 40, 60).unwrap(), 60);
        for (used, needed) in [(40, 61), (100, 1), (500, 1)] {
            let refused = room_within(100, used, needed).unwrap_err().to_string();
            let expected = format!("have {used} bytes, so that {needed} more do not fit the 100");
            assert!(refused.contains(&expected), "{refused}");
        }
    }
}
