//! Inputs of a job: resolved weights and tokenised rows.

use std::path::Path;
use std::sync::Arc;

use jiff::civil::DateTime;

use crate::domain::dataset::{Dataset, PreferenceRow};
use crate::domain::job::{Evaluation, Job, JobRequest, RowPolicy};
use crate::domain::logged::{LOGGED_REFERENCE, LoggedSums};
use crate::domain::message::TemplateArguments;
use crate::domain::reason::Reason;
use crate::engine::Engine;
use crate::engine::api::WeightsRef;
use crate::formats::tokenizer::ChatTokenizer;
use crate::infer::encode::PairEncoder;
use crate::infer::pair::{EncodedPair, digest, split_rows};
use crate::service::artifacts::Artifacts;
use crate::service::blocking::blocking;
use crate::service::error::{Result, ServiceError, unreadable};
use crate::service::policies::PolicyResolver;
use crate::service::store::Store;
use crate::service::template_date::TemplateDate;
use crate::train::logged::with_logged;
use crate::train::validate::{BadRows, load_rows};

/// Inputs of a job, ready for the device.
pub(in crate::service) struct JobInputs {
    /// Id of the base model.
    pub model: String,
    pub start: WeightsRef,
    /// `None` if the job computes no reference.
    pub reference: Option<WeightsRef>,
    pub train: Vec<EncodedPair>,
    pub eval: Vec<EncodedPair>,
    /// Digest of the training and evaluation pairs.
    pub digest: String,
    /// Description of the first data in the rows that version 0.2.0 ignored or could not read;
    /// `None` if there is none.
    pub new_since_0_2_0: Option<String>,
    pub skipped: BadRows,
    /// Number of rows with reference log-probs that the job does not use.
    pub unused_logged: u64,
}

/// Loads the inputs of jobs.
#[derive(Clone)]
pub(in crate::service) struct InputLoader {
    pub store: Store,
    pub artifacts: Artifacts,
    pub engine: Engine,
    pub policies: PolicyResolver,
    pub template_date: TemplateDate,
}

impl InputLoader {
    /// Resolves a job's weights and tokenises its rows.
    ///
    /// # Errors
    /// `FailedPrecondition` if an input has changed since the job was created, or if the rows
    /// cannot be used. `InvalidArgument` if no row is left to train on.
    pub async fn load(&self, job: &Job) -> Result<JobInputs> {
        let start = self.policies.start_weights(job).await?;
        let reference = match job.request.spec.logged_reference {
            Some(_) => None,
            None => self.policies.reference_weights(job).await?,
        };
        let reference = reference.map(|r| r.weights);
        let tokenizer = self.engine.tokenizer(&start.model)?;
        let dataset = self.store.dataset(&job.request.dataset).await?;
        let eval_dataset = match &job.request.evaluation {
            Evaluation::Dataset(id) => Some(self.store.dataset(id).await?),
            _ => None,
        };
        let (artifacts, pinned) = (
            &self.artifacts,
            job.request
                .pins
                .as_ref()
                .and_then(|pins| pins.contents.as_ref()),
        );
        let expected = pinned.map_or(&dataset.content_hash, |contents| &contents.dataset);
        let file = artifacts.fetch_dataset(&dataset, expected).await?;
        let eval_file = match eval_dataset {
            Some(d) => {
                let expected = pinned
                    .and_then(|contents| contents.eval_dataset.as_ref())
                    .unwrap_or(&d.content_hash);
                let path = artifacts.fetch_dataset(&d, expected).await?;
                Some((d, path))
            }
            None => None,
        };
        let request = job.request.clone();
        let context = RowContext {
            model: start.model.clone(),
            tokenizer,
            arguments: job.template_arguments(),
            date: self.template_date.of(Some(job)),
            vocab_size: self.engine.model(&start.model)?.vocab_size,
        };
        let (train, eval, digest, new_since_0_2_0, bad) = blocking(move || {
            let EncodedDataset {
                pairs: mut train,
                bad: mut skipped,
                mut new_since_0_2_0,
                mut unused_logged,
            } = encode_dataset(&file, &dataset, &context, &request)?;
            let mut eval = Vec::new();
            match (&request.evaluation, &eval_file) {
                (_, Some((d, path))) => {
                    let more = encode_dataset(path, d, &context, &request)?;
                    eval = more.pairs;
                    skipped.extend(more.bad);
                    new_since_0_2_0 = new_since_0_2_0.or(more.new_since_0_2_0);
                    unused_logged += more.unused_logged;
                }
                (Evaluation::Fraction(f), None) => {
                    (train, eval) = split_rows(&train, *f, request.spec.seed.0);
                }
                _ => {}
            }
            let digest = digest(&train, &eval);
            let bad = (skipped, unused_logged);
            Ok::<_, ServiceError>((train, eval, digest, new_since_0_2_0, bad))
        })
        .await??;
        let (skipped, unused_logged) = bad;
        if train.is_empty() {
            // The job fails before the skipped rows are stored, so its error names the first one.
            let lines = skipped.lines();
            let first = lines.first().map(String::as_str).unwrap_or_default();
            return Err(ServiceError::invalid(
                "training_job.dataset",
                format!("has no row left to train on: all have errors; the first: {first}"),
            ));
        }
        Ok(JobInputs {
            model: start.model,
            start: start.weights,
            reference,
            train,
            eval,
            digest,
            new_since_0_2_0,
            skipped,
            unused_logged,
        })
    }
}

/// Settings for tokenising the rows of a job.
struct RowContext {
    /// Id of the base model.
    model: String,
    tokenizer: Arc<ChatTokenizer>,
    arguments: TemplateArguments,
    date: DateTime,
    vocab_size: usize,
}

/// Tokenised pairs of a dataset.
struct EncodedDataset {
    pairs: Vec<EncodedPair>,
    /// Skipped rows.
    bad: BadRows,
    /// Description of the first data in the rows that version 0.2.0 ignored or could not read.
    new_since_0_2_0: Option<String>,
    /// Number of rows with reference log-probs that the job does not use.
    unused_logged: u64,
}

/// Tokenises a dataset under the job's row policy.
fn encode_dataset(
    path: &Path,
    dataset: &Dataset,
    context: &RowContext,
    request: &JobRequest,
) -> Result<EncodedDataset> {
    let loaded = load_rows(path, dataset.format).map_err(|e| unreadable(&e))?;
    // Decoding has limits that depend on the machine. If decoding stops earlier now than at the
    // upload, the job must not train on a part of the dataset.
    let (now, uploaded) = (loaded.report.rows, dataset.report.rows);
    if now != uploaded {
        let message = format!(
            "datasets/{} has {now} rows that can be read now, {uploaded} at its upload: upload it \
             again",
            dataset.id
        );
        return Err(ServiceError::FailedPrecondition {
            reason: Reason::DatasetInvalid,
            message,
        });
    }
    if request.spec.dpo.compares_pairs()
        && let Some(row) = loaded.rows.iter().find(|row| row.weight != 1.0)
    {
        let message = format!(
            "row {} of datasets/{} has the weight {}, but aot and aot_unpaired compare sorted \
             log-ratios across pairs and cannot weigh them: remove the weights (a row with several \
             rejected answers has its weight divided among them), or choose another loss",
            row.row, dataset.id, row.weight
        );
        return Err(ServiceError::FailedPrecondition {
            reason: Reason::DatasetInvalid,
            message,
        });
    }
    let encoder = PairEncoder::new(
        &context.tokenizer,
        request.spec.batch.max_length,
        request.spec.batch.truncation,
    )
    .with_arguments(&context.arguments)
    .with_date(context.date)
    .with_vocab_size(context.vocab_size);
    let uses_logged = request.spec.logged_reference.is_some();
    let mut bad = loaded.bad;
    let mut pairs = Vec::with_capacity(loaded.rows.len());
    for row in &loaded.rows {
        let encoded = encoder.encode_row(row).and_then(|pair| match uses_logged {
            true => with_logged(pair, row),
            false => Ok(pair),
        });
        match encoded {
            Ok(pair) => pairs.push(pair),
            Err(issue) => bad.add(issue),
        }
    }
    if request.row_policy == RowPolicy::Reject
        && let Some(first) = bad.first()
    {
        let with_reference = match uses_logged {
            true => format!("reference {LOGGED_REFERENCE}, "),
            false => String::new(),
        };
        // The upload may have named no model, or another one.
        let checked = dataset.report.length_check.as_ref();
        let checked = match checked.filter(|check| check.model != context.model) {
            Some(check) => format!(" (the upload was checked with models/{})", check.model),
            None => String::new(),
        };
        let remedy = match pairs.is_empty() {
            true => "Fix them: no other row is left",
            false => "Fix them, or set row_policy to SKIP",
        };
        let message = format!(
            "datasets/{} has {} rows that cannot be used with {with_reference}models/{} and \
             at most {} tokens for a prompt with its answer{checked}; row {}, {} {}: {}. {remedy}",
            dataset.id,
            bad.rows(),
            context.model,
            request.spec.batch.max_length,
            first.row,
            first.field,
            first.reason.name(),
            first.message
        );
        return Err(ServiceError::FailedPrecondition {
            reason: Reason::DatasetInvalid,
            message,
        });
    }
    let ignored_by_0_2_0 = |row: &PreferenceRow| {
        Some(format!(
            "{} of row {} of datasets/{}",
            row.new_since_0_2_0()?,
            row.row,
            dataset.id
        ))
    };
    let has_logged = |row: &&PreferenceRow| row.logged.reference != LoggedSums::Absent;
    let logged_pairs = loaded.rows.iter().filter(has_logged);
    // The pairs of a row with several answers follow each other.
    let mut logged_rows: Vec<u64> = logged_pairs.map(|pair| pair.row).collect();
    logged_rows.dedup();
    Ok(EncodedDataset {
        pairs,
        bad,
        unused_logged: match uses_logged {
            true => 0,
            false => logged_rows.len() as u64,
        },
        new_since_0_2_0: loaded.rows.iter().find_map(ignored_by_0_2_0),
    })
}
