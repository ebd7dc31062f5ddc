//! Puts the rows of a job on the server: uploads files, unless the server has their rows already.

use std::time::Duration;

use super::args::Output;
use super::data::{ContentHash, DataFiles, Uploaded};
use super::failure::Failure;
use super::{output, progress};
use crate::domain::dataset::IssueReason;
use crate::domain::logged::REFERENCE_COLUMNS;
use crate::domain::violation::counted;
use crate::rpc::client::Client;
use crate::rpc::pb;

/// Maximum number of datasets with the same content that are compared with the job's needs.
const MAX_CANDIDATES: i32 = 100;
/// Maximum number of findings that are printed.
const MAX_PRINTED: usize = 10;

/// Maximum time for the removal of a dataset.
const REMOVAL_LIMIT: Duration = Duration::from_secs(10);

/// Model and maximum length with which the server checks the rows of uploaded files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RowLimits {
    /// `models/{id}`; empty leaves lengths unchecked.
    pub model: String,
    /// Tokens of prompt and answer; 0 is the server's default.
    pub max_length: u32,
}

/// Uploads files for jobs, and removes them again if no job is made.
pub(super) struct JobRows {
    client: Client,
    output: Output,
    /// Datasets that were found or uploaded, with their files and the limits that they were checked
    /// with.
    ready: Vec<(DataFiles, RowLimits, Uploaded)>,
    /// Names of the datasets that were uploaded.
    uploaded: Vec<String>,
    /// Title of uploaded datasets; `None` for the names of their files.
    title: Option<String>,
    /// True if a job uses the reference log-probs of these rows.
    uses_logged: bool,
}

impl JobRows {
    pub(super) fn new(client: &Client, output: Output) -> Self {
        JobRows {
            client: client.clone(),
            output,
            ready: Vec::new(),
            uploaded: Vec::new(),
            title: None,
            uses_logged: false,
        }
    }

    /// Gives datasets that are uploaded a title.
    pub(super) fn with_title(self, title: String) -> Self {
        JobRows {
            title: Some(title),
            ..self
        }
    }

    /// Leaves out the findings that say that reference log-probs are not used, if `uses_logged`.
    pub(super) fn with_logged(self, uses_logged: bool) -> Self {
        JobRows {
            uses_logged,
            ..self
        }
    }

    /// Returns the name of a dataset with the files' rows, which were checked with `limits`.
    ///
    /// # Errors
    /// Returns a failure if the server would refuse the job because of these rows.
    pub(super) async fn dataset(
        &mut self,
        data: &DataFiles,
        limits: &RowLimits,
        skips_bad_rows: bool,
    ) -> Result<String, Failure> {
        let same_files = || self.ready.iter().filter(|(files, _, _)| files == data);
        let is_ready = |(_, with, _): &&(DataFiles, RowLimits, Uploaded)| with == limits;
        let rows = match same_files().find(is_ready) {
            Some((_, _, rows)) => rows.clone(),
            None if !data.is_rereadable() && same_files().next().is_some() => {
                return Err(Failure::Usage(format!(
                    "{} can be read once, and the sweep's jobs need its rows checked with \
                     different models or lengths: write them to a file first",
                    data.title()
                )));
            }
            None => {
                let rows = self.find_or_upload(data, limits).await?;
                self.ready
                    .push((data.clone(), limits.clone(), rows.clone()));
                rows
            }
        };
        if !skips_bad_rows {
            self.refuse_bad_rows(data, &rows)?;
        }
        Ok(rows.dataset.name)
    }

    /// Deletes the datasets that were uploaded. Returns a sentence about those that remain.
    pub(super) async fn remove_uploads(self) -> Option<String> {
        let mut remaining = Vec::new();
        for name in self.uploaded {
            let request = pb::DeleteDatasetRequest { name: name.clone() };
            let mut datasets = self.client.datasets();
            let removal = datasets.delete_dataset(request);
            match tokio::time::timeout(REMOVAL_LIMIT, removal).await {
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => remaining.push(name),
            }
        }
        let names = remaining.join(", ");
        (!names.is_empty()).then(|| format!("{names} remains on the server"))
    }

    async fn find_or_upload(
        &mut self,
        data: &DataFiles,
        limits: &RowLimits,
    ) -> Result<Uploaded, Failure> {
        let hash = data.content_hash().await?;
        if let Some(hash) = &hash
            && let Some(stored) = self.find(hash, limits).await?
        {
            self.describe(&stored, &format!("{} is already stored: ", data.title()));
            return Ok(stored);
        }
        let metadata = pb::UploadMetadata {
            display_name: self.title.clone().unwrap_or_else(|| data.title()),
            model: limits.model.clone(),
            max_length: limits.max_length,
            content_hash: hash.map(|hash| hash.hex).unwrap_or_default(),
            ..Default::default()
        };
        let uploaded = progress::upload(&self.client, data, metadata).await?;
        self.uploaded.push(uploaded.dataset.name.clone());
        self.describe(&uploaded, "");
        Ok(uploaded)
    }

    /// Finds a dataset with this content. Its lengths must have been checked as the job needs them,
    /// so that its report is the one that an upload would get.
    async fn find(
        &self,
        hash: &ContentHash,
        limits: &RowLimits,
    ) -> Result<Option<Uploaded>, Failure> {
        let request = pb::ListDatasetsRequest {
            page_size: MAX_CANDIDATES,
            content_hash: hash.hex.clone(),
            ..Default::default()
        };
        let page = self.client.datasets().list_datasets(request).await?;
        let max_length = match (limits.max_length, limits.model.as_str()) {
            (_, "") => 0,
            (0, _) => DEFAULT_MAX_LENGTH,
            (n, _) => n,
        };
        let found = page.into_inner().datasets.into_iter().find(|d| {
            let report = d.report.as_ref();
            // Older servers do not know the filter `content_hash` and send every dataset.
            d.content_hash == hash.hex
                && report.is_some_and(|r| r.model == limits.model && r.max_length == max_length)
        });
        let Some(found) = found else {
            return Ok(None);
        };
        let request = pb::GetDatasetRequest { name: found.name };
        // Lists have no findings.
        match self.client.datasets().get_dataset(request).await {
            Ok(dataset) => Ok(Some(hash.stored(dataset.into_inner()))),
            // It was deleted meanwhile.
            Err(_) => Ok(None),
        }
    }

    /// Prints the number of rows and the first findings.
    fn describe(&self, rows: &Uploaded, before: &str) {
        if self.output != Output::Table {
            for warning in rows.warnings() {
                progress::warn(&warning);
            }
            return;
        }
        let r = rows.dataset.report.clone().unwrap_or_default();
        output::line(&format!(
            "{before}{} holds {}, {} of them usable",
            rows.dataset.name,
            counted(r.rows, "row"),
            r.valid_rows
        ));
        if let Some(shapes) = output::shapes(&r) {
            output::line(&format!("  {shapes}"));
        }
        let is_unused_logprob = |issue: &pb::RowIssue| {
            issue.reason == IssueReason::IgnoredField.name()
                && REFERENCE_COLUMNS.contains(&issue.field.as_str())
        };
        let is_of_use = |issue: &pb::RowIssue| !(self.uses_logged && is_unused_logprob(issue));
        for finding in rows.findings(MAX_PRINTED, is_of_use) {
            output::line(&format!("  {finding}"));
        }
        for warning in rows.warnings() {
            output::line(&format!("  {warning}"));
        }
    }

    /// Returns a failure if there are rows that a job cannot use.
    fn refuse_bad_rows(&self, data: &DataFiles, rows: &Uploaded) -> Result<(), Failure> {
        let Some(refusal) = rows.refusal() else {
            return Ok(());
        };
        let example = match self.output {
            // The findings have been printed.
            Output::Table => None,
            _ => rows.first_error(),
        };
        let example = example.map(|e| format!(" ({e})")).unwrap_or_default();
        Err(Failure::Failed(format!(
            "{} of {} cannot be used{example}: {}",
            refusal.rows,
            data.title(),
            refusal.remedy
        )))
    }
}

/// The server's maximum length of rows if an upload names none.
const DEFAULT_MAX_LENGTH: u32 = 1024;
