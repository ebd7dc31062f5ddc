//! Metrics recorder, and the help texts that `/metrics` shows. The gauges of training runs are not
//! in the recorder: `rpc` writes them with their help text.

use metrics::{counter, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::domain::job::JobState;

/// Upper bounds of duration histograms, in seconds.
const DURATION_BUCKETS: [f64; 14] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
];
/// Upper bounds of token-count histograms.
const TOKEN_BUCKETS: [f64; 10] = [
    32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
/// Upper bounds of histograms of items per batch.
const ITEM_BUCKETS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Counters without labels. They are registered with the value 0 at the start: Prometheus computes
/// an increase only for a series that already exists.
const PLAIN_COUNTERS: [(&str, &str); 16] = [
    (
        "bradley_refused_total",
        "Calls refused for their bearer token or its roles.",
    ),
    (
        "bradley_tls_reloads_total",
        "Times that changed TLS certificates were loaded.",
    ),
    (
        "bradley_scoring_rejected_total",
        "Scoring items refused because the queue was full.",
    ),
    (
        "bradley_scoring_abandoned_total",
        "Scoring items dropped before they ran, because their clients had left.",
    ),
    (
        "bradley_scored_tokens_total",
        "Tokens scored; a prompt counts once for all answers of its item.",
    ),
    (
        "bradley_generation_prompt_tokens_total",
        "Tokens of prompts that were continued.",
    ),
    (
        "bradley_generated_tokens_total",
        "Tokens generated, of all samples.",
    ),
    (
        "bradley_generation_rejected_total",
        "Generation requests refused because too many waited.",
    ),
    (
        "bradley_generation_abandoned_total",
        "Generation requests that ended because their clients had left.",
    ),
    ("bradley_scored_pairs_total", "Preference pairs scored."),
    (
        "bradley_reference_cache_hits_total",
        "Training pairs and scoring items whose reference log-probs were in the cache.",
    ),
    (
        "bradley_reference_cache_misses_total",
        "Training pairs and scoring items whose reference log-probs had to be computed.",
    ),
    ("bradley_training_steps_total", "Optimizer steps taken."),
    (
        "bradley_training_tokens_total",
        "Tokens trained on; each sequence counts its prompt.",
    ),
    (
        "bradley_training_pairs_total",
        "Preference pairs trained on.",
    ),
    (
        "bradley_jobs_recovered_total",
        "Jobs requeued, or paused as requested, because their worker was gone.",
    ),
];

/// Counters with labels; their series appear when they are first incremented, except for those that
/// [`install`] registers.
const COUNTERS: [(&str, &str); 8] = [
    (
        "bradley_jobs_ended_total",
        "Jobs that this process moved to a final state, by state.",
    ),
    (
        "bradley_jobs_waiting_total",
        "Times that a job could not start because an input was missing or had changed, or too many \
         runs waited, by reason.",
    ),
    (
        "bradley_requests_total",
        "Calls by method and code, counted when their answer begins: a stream that fails later is \
         Ok, and a call that its client gave up before is Cancelled.",
    ),
    (
        "bradley_scoring_saved_tokens_total",
        "Additional tokens avoided by packing: padding, and copies of the prompt per answer.",
    ),
    (
        "bradley_oidc_refused_total",
        "Tokens of the OIDC issuer that were refused, by reason.",
    ),
    (
        "bradley_oidc_fetches_total",
        "Fetches of the OIDC issuer's keys, by result (ok, failed).",
    ),
    (
        "bradley_token_file_reloads_total",
        "Changes of the file that declares tokens, by result (ok, failed).",
    ),
    (
        "bradley_store_retries_total",
        "Retries after a failure of the database, the artifact store or the disk, by reason, \
         without those of writing a checkpoint to the disk.",
    ),
];

const GAUGES: [(&str, &str); 23] = [
    ("bradley_build_info", "1; the version is a label."),
    ("bradley_connections", "Open connections to the gRPC port."),
    ("bradley_event_streams", "Open streams of training events."),
    (
        "bradley_scoring_queue_tokens",
        "Tokens in the scoring queue.",
    ),
    ("bradley_scoring_queue_items", "Items in the scoring queue."),
    (
        "bradley_scoring_queue_limit_tokens",
        "Maximum number of tokens in the scoring queue.",
    ),
    (
        "bradley_generation_queue_items",
        "Generation requests that wait for a device.",
    ),
    (
        "bradley_generation_sequences",
        "Samples in progress, by device.",
    ),
    (
        "bradley_generation_cache_tokens",
        "Tokens for which samples in progress reserve the cache of keys and values, by device.",
    ),
    (
        "bradley_resident_policies",
        "Adapters and full weights in memory, without the base models.",
    ),
    (
        "bradley_device_free_bytes",
        "GPU memory in bytes that is free or cached for the next passes.",
    ),
    (
        "bradley_device_memory_bytes",
        "Total memory of a GPU in bytes.",
    ),
    (
        "bradley_device_training",
        "1 while a run trains on a device, or waits for its weights; 0 otherwise.",
    ),
    (
        "bradley_data_volume_free_bytes",
        "Free space in bytes of the volume of the data directory.",
    ),
    (
        "bradley_data_volume_bytes",
        "Size in bytes of the volume of the data directory.",
    ),
    (
        "bradley_memory_limit_bytes",
        "Limit on the estimated host memory of models and jobs, in bytes.",
    ),
    (
        "bradley_device_memory_limit_bytes",
        "Limit on the estimated memory of models and a job on a GPU, in bytes.",
    ),
    (
        "bradley_jobs",
        "Jobs in the database, by state; every replica shows the same.",
    ),
    (
        "bradley_declared_tokens",
        "Tokens that the token file declares.",
    ),
    (
        "bradley_oidc_keys",
        "Keys of the OIDC issuer that can check tokens.",
    ),
    (
        "bradley_oidc_up",
        "1 when the last fetch of the OIDC issuer's keys succeeded, or there is no issuer.",
    ),
    ("bradley_store_up", "1 when the database answers."),
    (
        "bradley_unreadable_jobs",
        "Unfinished jobs in the database that this version of the server cannot read.",
    ),
];

const HISTOGRAMS: [(&str, &str); 15] = [
    (
        "bradley_request_seconds",
        "Time from a call's arrival to the head of its answer, by method.",
    ),
    (
        "bradley_scoring_queue_seconds",
        "Time that an item waited for the device.",
    ),
    (
        "bradley_scoring_tokenize_seconds",
        "Time to render and tokenise an item.",
    ),
    (
        "bradley_scoring_compute_seconds",
        "Device time of a scoring batch.",
    ),
    ("bradley_scoring_batch_tokens", "Tokens per scoring batch."),
    ("bradley_scoring_batch_items", "Items per scoring batch."),
    (
        "bradley_generation_queue_seconds",
        "Time that a generation request waited for the device.",
    ),
    (
        "bradley_generation_first_token_seconds",
        "Time from a generation request's arrival at the engine to its first tokens.",
    ),
    (
        "bradley_generation_token_seconds",
        "Time between two tokens of a sample.",
    ),
    (
        "bradley_generation_step_seconds",
        "Device time of a pass that computes one token of each sample in progress.",
    ),
    (
        "bradley_generation_step_items",
        "Samples per pass that computes one token of each.",
    ),
    (
        "bradley_training_unit_seconds",
        "Device time of a micro-batch, an evaluation batch or a checkpoint, by device.",
    ),
    (
        "bradley_training_step_seconds",
        "Wall-clock time of an optimizer step, including scoring in between.",
    ),
    (
        "bradley_checkpoint_seconds",
        "Time to write a checkpoint to disk (phase write) and to upload it to the artifact store \
         (phase keep).",
    ),
    (
        "bradley_event_lag_seconds",
        "Time from the creation of a training event until it is stored.",
    ),
];

/// Installs the metrics recorder of the process and describes every metric in it.
///
/// # Errors
/// Fails if a recorder is already installed.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &DURATION_BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_tokens".into()), &TOKEN_BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_items".into()), &ITEM_BUCKETS)?
        .install_recorder()?;
    for (name, help) in PLAIN_COUNTERS {
        describe_counter!(name, help);
        counter!(name).increment(0);
    }
    for reason in [
        "artifact_missing",
        "checkpoint_format",
        "dataset_changed",
        "model_changed",
        "model_files_changed",
        "queue_full",
        "rows_changed",
    ] {
        counter!("bradley_jobs_waiting_total", "reason" => reason).increment(0);
    }
    for state in JobState::ALL.into_iter().filter(|s| s.is_final()) {
        counter!("bradley_jobs_ended_total", "state" => state.name()).increment(0);
    }
    COUNTERS
        .iter()
        .for_each(|(name, help)| describe_counter!(*name, *help));
    GAUGES
        .iter()
        .for_each(|(name, help)| describe_gauge!(*name, *help));
    HISTOGRAMS
        .iter()
        .for_each(|(name, help)| describe_histogram!(*name, *help));
    metrics::gauge!("bradley_oidc_up").set(1.0);
    metrics::gauge!("bradley_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    Ok(handle)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// Collects the metric names in the source files below `dir`, except in this file.
    fn used(dir: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                used(&path, found);
            } else if !path.ends_with("telemetry/metrics.rs") {
                let source = std::fs::read_to_string(&path).unwrap_or_default();
                let names = source
                    .split("\"bradley_")
                    .skip(1)
                    .filter_map(|rest| rest.split_once('"'));
                found.extend(names.map(|(name, _)| format!("bradley_{name}")));
            }
        }
    }

    #[test]
    fn every_metric_is_described_and_every_description_is_of_a_metric() {
        let mut found = BTreeSet::from(["bradley_build_info".to_owned()]);
        used(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
            &mut found,
        );
        // The gauges of a training run are described in `rpc`, where they are written.
        found.retain(|name| {
            !["loss", "margin", "accuracy", "progress_ratio"]
                .iter()
                .any(|g| *name == format!("bradley_training_{g}"))
        });
        let described: BTreeSet<String> = PLAIN_COUNTERS
            .iter()
            .chain(&COUNTERS)
            .chain(&GAUGES)
            .chain(&HISTOGRAMS)
            .map(|(name, _)| (*name).to_owned())
            .collect();
        assert_eq!(found, described);
    }
}
