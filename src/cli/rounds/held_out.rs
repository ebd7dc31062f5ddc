//! The dataset with the pairs of `--eval-data`.

use std::time::Duration;

use crate::cli::data::DataFiles;
use crate::cli::failure::{Failure, Outcome};
use crate::cli::progress::{self, warn};
use crate::cli::short_names::own_datasets;
use crate::rpc::client::{Client, is_not_found};
use crate::rpc::pb;

/// Maximum time for the removal of the dataset.
const REMOVAL_LIMIT: Duration = Duration::from_secs(10);

/// Uploads the pairs of `--eval-data`, and deletes them when the command ends. Every run has a
/// dataset of its own: another run with the same file may end earlier, and would delete a shared
/// one.
pub(super) struct EvalUpload {
    client: Client,
    data: DataFiles,
    /// Hash of the bytes that are uploaded.
    hash: String,
    /// Title of the dataset. It has the id of the run, so that the next start finds a dataset that
    /// a killed one has left.
    title: String,
    /// Name of the dataset that was used last.
    used: Option<String>,
}

impl EvalUpload {
    pub fn new(client: &Client, run: &str, data: DataFiles, hash: String) -> Self {
        EvalUpload {
            client: client.clone(),
            data,
            hash,
            title: format!("rounds {run}: pairs of --eval-data"),
            used: None,
        }
    }

    /// Returns true if there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Returns the name of the dataset, which is uploaded unless the server has it.
    ///
    /// # Errors
    /// Returns a failure if a file cannot be read, or the server refuses a call.
    pub async fn dataset(&mut self) -> Result<String, Failure> {
        let stored = self.stored().await?;
        let same = stored.into_iter().find(|d| d.content_hash == self.hash);
        let name = match same {
            Some(dataset) => dataset.name,
            None => self.upload().await?,
        };
        self.used = Some(name.clone());
        Ok(name)
    }

    /// Deletes the dataset, also one of an earlier start. Returns a sentence if it remains.
    pub async fn remove(self) -> Option<String> {
        if self.is_empty() {
            return None;
        }
        let removal = tokio::time::timeout(REMOVAL_LIMIT, self.remove_all()).await;
        let is_removed = matches!(removal, Ok(Ok(())));
        let name = self.used.filter(|_| !is_removed)?;
        Some(format!(
            "{name} remains on the server; the same command deletes it"
        ))
    }

    async fn remove_all(&self) -> Outcome {
        for dataset in self.stored().await? {
            let request = pb::DeleteDatasetRequest { name: dataset.name };
            match self.client.datasets().delete_dataset(request).await {
                Ok(_) => {}
                Err(status) if is_not_found(&status) => {}
                Err(status) => return Err(status.into()),
            }
        }
        Ok(())
    }

    /// Returns the datasets of the run.
    async fn stored(&self) -> Result<Vec<pb::Dataset>, Failure> {
        let mut own = own_datasets(&self.client).await?;
        own.retain(|dataset| dataset.display_name == self.title);
        Ok(own)
    }

    async fn upload(&self) -> Result<String, Failure> {
        let metadata = pb::UploadMetadata {
            display_name: self.title.clone(),
            content_hash: self.hash.clone(),
            ..Default::default()
        };
        let uploaded = progress::upload(&self.client, &self.data, metadata).await;
        let uploaded = uploaded.map_err(of_eval_data)?;
        for warning in uploaded.warnings() {
            warn(&warning.replace(COLUMNS_FLAG, EVAL_COLUMNS_FLAG));
        }
        Ok(uploaded.dataset.name)
    }
}

/// The flag for the columns of other files, and that for those of these files.
const COLUMNS_FLAG: &str = "--columns";
const EVAL_COLUMNS_FLAG: &str = "--eval-columns";

/// Names the flag for the columns of these files in a failure about them.
pub(super) fn of_eval_data(failure: Failure) -> Failure {
    failure.replacing(COLUMNS_FLAG, EVAL_COLUMNS_FLAG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_flag_for_the_columns_of_the_evaluation() {
        let said = "pairs.csv: has no column \"good\", which --columns chosen=good names";
        let failure = of_eval_data(Failure::Failed(said.to_owned()));
        assert_eq!(
            failure.message(),
            "pairs.csv: has no column \"good\", which --eval-columns chosen=good names"
        );
    }
}
