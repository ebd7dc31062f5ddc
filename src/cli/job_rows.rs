//! Puts the rows of a job on the server: uploads a file, unless the server has it already.

use std::path::{Path, PathBuf};

use super::args::Output;
use super::failure::Failure;
use super::{output, progress};
use crate::domain::dataset::IssueReason;
use crate::rpc::client::Client;
use crate::rpc::pb;

/// Number of datasets with the same content that are compared with the job's needs.
const MAX_CANDIDATES: i32 = 100;
/// Number of findings that are printed.
const MAX_PRINTED: usize = 10;

/// Model and maximum length with which the server checks the rows of an uploaded file.
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
    /// Datasets of this call, with their files and the limits that they were checked with.
    ready: Vec<(PathBuf, RowLimits, pb::Dataset)>,
    /// Names of the datasets that this call uploaded.
    uploaded: Vec<String>,
}

impl JobRows {
    pub(super) fn new(client: &Client, output: Output) -> Self {
        JobRows {
            client: client.clone(),
            output,
            ready: Vec::new(),
            uploaded: Vec::new(),
        }
    }

    /// Returns the name of a dataset with the file's content whose rows were checked with `limits`.
    ///
    /// # Errors
    /// Returns a failure if the server would refuse the job because of these rows.
    pub(super) async fn dataset(
        &mut self,
        path: &Path,
        limits: &RowLimits,
        skips_bad_rows: bool,
    ) -> Result<String, Failure> {
        let is_ready =
            |(of, with, _): &&(PathBuf, RowLimits, pb::Dataset)| of == path && with == limits;
        let dataset = match self.ready.iter().find(is_ready) {
            Some((_, _, dataset)) => dataset.clone(),
            None => {
                let dataset = self.find_or_upload(path, limits).await?;
                let entry = (path.to_owned(), limits.clone(), dataset.clone());
                self.ready.push(entry);
                dataset
            }
        };
        if !skips_bad_rows {
            refuse_bad_rows(path, &dataset)?;
        }
        Ok(dataset.name)
    }

    /// Deletes the datasets that this call uploaded. Returns a sentence about those that remain.
    pub(super) async fn remove_uploads(self) -> Option<String> {
        let mut remaining = Vec::new();
        for name in self.uploaded {
            let request = pb::DeleteDatasetRequest { name: name.clone() };
            if self
                .client
                .datasets()
                .delete_dataset(request)
                .await
                .is_err()
            {
                remaining.push(name);
            }
        }
        let names = remaining.join(", ");
        (!names.is_empty()).then(|| format!("{names} remains on the server"))
    }

    async fn find_or_upload(
        &mut self,
        path: &Path,
        limits: &RowLimits,
    ) -> Result<pb::Dataset, Failure> {
        let hash = hash_of(path).await?;
        if let Some(dataset) = self.find(&hash, limits).await? {
            self.describe(&dataset, &format!("{} is already stored: ", path.display()));
            return Ok(dataset);
        }
        let display_name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        let metadata = pb::UploadMetadata {
            display_name,
            model: limits.model.clone(),
            max_length: limits.max_length,
            content_hash: hash,
            ..Default::default()
        };
        let dataset = progress::upload(&self.client, path, metadata).await?;
        self.uploaded.push(dataset.name.clone());
        self.describe(&dataset, "");
        Ok(dataset)
    }

    /// Finds a dataset with this content. Its lengths must have been checked as the job needs them,
    /// so that its report is the one that an upload would get.
    async fn find(&self, hash: &str, limits: &RowLimits) -> Result<Option<pb::Dataset>, Failure> {
        let request = pb::ListDatasetsRequest {
            page_size: MAX_CANDIDATES,
            content_hash: hash.to_owned(),
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
            // Servers before this field send every dataset.
            d.content_hash == hash
                && report.is_some_and(|r| r.model == limits.model && r.max_length == max_length)
        });
        let Some(found) = found else {
            return Ok(None);
        };
        let request = pb::GetDatasetRequest { name: found.name };
        // Lists have no findings.
        match self.client.datasets().get_dataset(request).await {
            Ok(dataset) => Ok(Some(dataset.into_inner())),
            // It was deleted meanwhile.
            Err(_) => Ok(None),
        }
    }

    fn describe(&self, dataset: &pb::Dataset, before: &str) {
        if self.output != Output::Table {
            return;
        }
        let r = dataset.report.clone().unwrap_or_default();
        output::line(&format!(
            "{before}{} holds {} rows, {} of them usable",
            dataset.name, r.rows, r.valid_rows
        ));
        if let Some(shapes) = output::shapes(&r) {
            output::line(&format!("  {shapes}"));
        }
        for i in r.issues.iter().take(MAX_PRINTED) {
            output::line(&format!(
                "  row {}: {} {}: {}",
                i.row, i.field, i.reason, i.message
            ));
        }
    }
}

/// The server's maximum length of rows if an upload names none.
const DEFAULT_MAX_LENGTH: u32 = 1024;

/// Returns the BLAKE3 hash of a file in hex.
async fn hash_of(path: &Path) -> Result<String, Failure> {
    let path = path.to_owned();
    let named = path.display().to_string();
    let hash = move || -> std::io::Result<String> {
        let mut hasher = blake3::Hasher::new();
        std::io::copy(&mut std::fs::File::open(path)?, &mut hasher)?;
        Ok(hasher.finalize().to_hex().to_string())
    };
    tokio::task::spawn_blocking(hash)
        .await
        .map_err(|e| Failure::Failed(e.to_string()))?
        .map_err(|e| Failure::Failed(format!("{named}: {e}")))
}

/// Returns a failure if the dataset has rows that a job cannot use.
fn refuse_bad_rows(path: &Path, dataset: &pb::Dataset) -> Result<(), Failure> {
    let report = dataset.report.clone().unwrap_or_default();
    let bad = report.rows - report.valid_rows;
    if bad == 0 {
        return Ok(());
    }
    let is_error = |i: &&pb::RowIssue| i.severity() == pb::IssueSeverity::Error;
    let example = report
        .issues
        .iter()
        .find(is_error)
        .map(|i| format!(" (row {}, {}: {})", i.row, i.reason, i.message));
    let remedy = match report
        .counts
        .contains_key(IssueReason::PromptFillsMaxLength.name())
    {
        true => {
            "give them more room with --max-length, correct the file, \
             or leave them out with --skip-bad-rows"
        }
        false => "correct the file, or leave them out with --skip-bad-rows",
    };
    let (file, example) = (path.display(), example.unwrap_or_default());
    Err(Failure::Failed(format!(
        "{bad} of the {} rows of {file} cannot be used{example}: {remedy}",
        report.rows
    )))
}
