//! Tests of the precision in which a batch is scored, of batches that run out of device memory, and
//! of the turns that scoring and generation take.

use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use metrics_exporter_prometheus::PrometheusBuilder;
use opentelemetry::Context;
use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::engine::api::{GenerationRequest, ScoreItem};
use crate::engine::generation::GenerationEntry;
use crate::formats::loader::load_model;
use crate::formats::source::HubOptions;
use crate::infer::generate::{LogProbOptions, SamplingOptions};
use crate::infer::pair::EncodedPair;
use crate::model::device::ComputeDevice;

const JOB: &str = "job";

/// Returns a tiny model, as loaded by a server with this precision.
pub(in crate::engine) fn base_models(precision: Precision) -> Arc<BaseModels> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models/llama");
    let model = load_model(
        Some("tiny"),
        folder.to_str().unwrap(),
        &HubOptions::default(),
    )
    .unwrap();
    Arc::new(BaseModels::load(vec![model], ComputeDevice::Cpu, "cpu", precision).unwrap())
}

pub(in crate::engine) fn base() -> WeightsRef {
    WeightsRef::Base {
        model: "tiny".into(),
    }
}

/// Returns a pair of `tokens` packed tokens.
pub(in crate::engine) fn pair(tokens: usize) -> EncodedPair {
    EncodedPair {
        row: 1,
        id: None,
        weight: 1.0,
        prompt: vec![10; tokens - 2],
        chosen: vec![30],
        rejected_prompt: None,
        rejected: vec![90],
        chosen_truncated: false,
        rejected_truncated: false,
        logged: None,
    }
}

fn groups_of_a_pair() -> Vec<SequenceGroup> {
    let completions = vec![
        (0..20).map(|i| 30 + i).collect(),
        (0..20).map(|i| 90 - i).collect(),
    ];
    vec![SequenceGroup {
        prompt: (10..30).collect(),
        completions,
    }]
}

fn entry(policy: WeightsRef) -> (Entry, oneshot::Receiver<Result<ScoredItem, EngineError>>) {
    let (reply, answer) = oneshot::channel();
    let item = ScoreItem {
        groups: groups_of_a_pair(),
    };
    let entry = Entry {
        item,
        policy,
        reference: Some(base()),
        enqueued: Instant::now(),
        trace: Context::new(),
        reply,
    };
    (entry, answer)
}

/// Returns true if the base model's log-probs in this precision are cached, that is, if no block
/// runs. They are cached afterwards in any case.
fn is_cached(cache: &ReferenceCache, base_models: &BaseModels, precision: Precision) -> bool {
    let policy = base_models.open(&base()).unwrap().with_precision(precision);
    let (identity, groups) = (base_models.identity(&base()).unwrap(), groups_of_a_pair());
    let mut blocks = 0;
    cache
        .score(&policy, &identity, &[&groups], ROW_TOKENS, &mut || {
            blocks += 1
        })
        .unwrap();
    blocks == 0
}

#[test]
fn the_policy_is_not_scored_for_a_caller_that_has_left_since_the_reference_was() {
    let (of_job, answer) = entry(WeightsRef::Live { job: JOB.into() });
    assert!(needs_policy_pass(&of_job));
    drop(answer);
    assert!(!needs_policy_pass(&of_job));
    let (of_base, _answer) = entry(base());
    assert!(!needs_policy_pass(&of_base));
}

#[test]
fn a_running_jobs_reference_is_scored_in_the_jobs_precision_and_others_in_the_servers() {
    let precisions = [Precision::F32, Precision::Bf16];
    for (server, job) in [precisions, [precisions[1], precisions[0]]].map(|[a, b]| (a, b)) {
        let base_models = base_models(server);
        let options = EngineOptions {
            precision: server,
            ..Default::default()
        };
        let mut scoring = PolicyScorer::new(
            0,
            Arc::new(ScoringQueue::new(1 << 20, 1)),
            base_models.clone(),
            &options,
        );
        let policy = base_models.open(&base()).unwrap().with_precision(job);
        let live = Live {
            job: JOB.into(),
            policy,
            reference: None,
            step: 0,
        };

        let cache = ReferenceCache::new(1 << 20);
        let (of_job, mut answer) = entry(WeightsRef::Live { job: JOB.into() });
        scoring.score_batch(vec![of_job], &cache, Some(&live));
        let scored = answer.try_recv().unwrap().unwrap();
        for completion in scored.completions {
            // The weights and the precision are those of the reference, so all bits are equal.
            assert_eq!(Some(completion.policy), completion.reference);
        }
        assert!(
            is_cached(&cache, &base_models, job),
            "the reference is not scored in {job:?}, the job's precision"
        );
        assert!(
            !is_cached(&cache, &base_models, server),
            "the reference is scored in {server:?}, the server's precision"
        );

        // Entries of one batch are each compared with the reference in their own precision.
        let cache = ReferenceCache::new(1 << 20);
        let (of_job, mut answer) = entry(WeightsRef::Live { job: JOB.into() });
        let (of_base, mut other_answer) = entry(base());
        scoring.score_batch(vec![of_job, of_base], &cache, Some(&live));
        assert!(answer.try_recv().unwrap().is_ok() && other_answer.try_recv().unwrap().is_ok());
        assert!(is_cached(&cache, &base_models, job) && is_cached(&cache, &base_models, server));

        // Another job's weights are not on this worker: scoring fails, and its reference is scored
        // in the server's precision.
        let cache = ReferenceCache::new(1 << 20);
        let (of_other, mut answer) = entry(WeightsRef::Live {
            job: "other".into(),
        });
        scoring.score_batch(vec![of_other], &cache, Some(&live));
        assert!(answer.try_recv().unwrap().is_err());
        assert!(is_cached(&cache, &base_models, server) && !is_cached(&cache, &base_models, job));
    }
}

/// Returns a scorer with a cached full checkpoint that is not in use.
fn scoring_with_a_checkpoint() -> (PolicyScorer, WeightsRef) {
    let base_models = base_models(Precision::F32);
    let queue = Arc::new(ScoringQueue::new(1 << 20, 1));
    let mut scoring = PolicyScorer::new(0, queue, base_models.clone(), &EngineOptions::default());
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models/llama");
    let checkpoint = WeightsRef::Full {
        model: "tiny".into(),
        dir,
        content: "hash".into(),
    };
    scoring.policies.get(&base_models, &checkpoint).unwrap();
    (scoring, checkpoint)
}

#[test]
fn a_pass_without_memory_is_repeated_once_without_the_weights_that_nothing_uses() {
    let (mut scoring, _) = scoring_with_a_checkpoint();
    let (batch, _answers): (Vec<Entry>, Vec<_>) =
        [entry(base()), entry(base())].into_iter().unzip();
    let (calls, mut results) = (Cell::new(0), vec_of_none(2));
    scoring.pass(&batch, vec![0, 1], &mut results, |scoring, entries| {
        calls.set(calls.get() + 1);
        // Memory becomes free when the checkpoint is evicted.
        match scoring.policies.is_empty() {
            true => Ok(vec![Logps::default(); entries.len()]),
            false => Err(EngineError::DeviceFull("the GPU is out of memory".into())),
        }
    });
    assert_eq!(calls.get(), 2, "both items together, twice");
    assert!(results.iter().all(|r| matches!(r, Some(Ok(_)))));

    // Entries that still do not fit fail one by one, and are not retried forever.
    let (calls, mut results) = (Cell::new(0), vec_of_none(2));
    scoring.pass(&batch, vec![0, 1], &mut results, |_, _| {
        calls.set(calls.get() + 1);
        Err(EngineError::DeviceFull("the GPU is out of memory".into()))
    });
    assert_eq!(calls.get(), 6, "together and each alone, each twice");
    assert!(
        results
            .iter()
            .all(|r| matches!(r, Some(Err(EngineError::DeviceFull(_)))))
    );
}

#[test]
fn other_errors_evict_nothing_and_weights_in_use_stay() {
    let (mut scoring, checkpoint) = scoring_with_a_checkpoint();
    let (one, _answer) = entry(base());
    let (calls, mut results) = (Cell::new(0), vec_of_none(1));
    scoring.pass(&[one], vec![0], &mut results, |_, _| {
        calls.set(calls.get() + 1);
        Err(EngineError::Device("an illegal address".into()))
    });
    assert!(calls.get() == 1 && !scoring.policies.is_empty());
    let base_models = scoring.base_models.clone();
    let held = scoring.policies.get(&base_models, &checkpoint).unwrap();
    scoring.free_memory();
    assert!(!scoring.policies.is_empty());
    drop(held);
    scoring.free_memory();
    assert!(scoring.policies.is_empty());
}

#[test]
fn the_gauge_of_cached_weights_names_the_worker_and_falls_when_they_leave() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    let assert_gauge = |number: usize| {
        let (text, gauge) = (handle.render(), "resident_policies{device=\"cpu:1\"}");
        assert!(text.contains(&format!("{gauge} {number}\n")), "{text}");
    };
    metrics::with_local_recorder(&recorder, || {
        let (first, checkpoint) = scoring_with_a_checkpoint();
        let base_models = Arc::new(first.base_models.on(ComputeDevice::Cpu, "cpu:1".into()));
        let (queue, options) = (first.queue.clone(), EngineOptions::default());
        let mut second = PolicyScorer::new(0, queue, base_models.clone(), &options);
        second.policies.get(&base_models, &checkpoint).unwrap();
        assert_gauge(1);
        second.free_memory();
        second.evict_requested();
        assert_gauge(0);
    });
}

#[test]
fn the_arithmetic_names_the_precision_and_each_kind_of_device_once() {
    let alone = base_models(Precision::F32).open(&base()).unwrap();
    let helped = Policy {
        helpers: Arc::new([ComputeDevice::Cpu]),
        ..alone.clone()
    };
    assert_eq!(
        alone.arithmetic(),
        helped.arithmetic(),
        "the helper computes alike"
    );
    let bf16 = alone.with_precision(Precision::Bf16);
    assert_ne!(alone.arithmetic(), bf16.arithmetic());
}

#[test]
fn generation_between_units_takes_turns_with_scoring_inside_them() {
    let base_models = base_models(Precision::F32);
    let queue = Arc::new(ScoringQueue::new(1 << 20, 1));
    let options = EngineOptions::default();
    let mut scoring = PolicyScorer::new(0, queue.clone(), base_models.clone(), &options);
    let live = Live {
        job: JOB.into(),
        policy: base_models.open(&base()).unwrap(),
        reference: None,
        step: 0,
    };
    let (events, _tokens) = mpsc::channel(100);
    let request = GenerationRequest {
        prompt: vec![5, 6, 7],
        samples: 1,
        max_tokens: 50,
        sampling: SamplingOptions {
            temperature: 0.0,
            top_p: None,
            top_k: None,
            seed: 0,
        },
        stop_tokens: Vec::new(),
        log_probs: LogProbOptions::default(),
    };
    let text = GenerationEntry {
        request,
        policy: base(),
        enqueued: Instant::now(),
        stopped: [AtomicBool::new(false)].into(),
        events,
    };
    queue.push_generation(text).unwrap();
    let (item, mut answer) = entry(base());
    queue.push(item).unwrap();

    // Generation has had the time between two units, so the time inside the next is for scoring.
    assert!(scoring.may_generate(Some(JOB)));
    scoring.generate(Some(&live));
    scoring.fair_share.reset();
    scoring.yield_to_scoring(&ReferenceCache::new(1 << 20), &live);
    assert!(answer.try_recv().is_ok());
    // And the other way round.
    assert!(scoring.may_generate(Some(JOB)));
    scoring.generate(Some(&live));
    assert!(!scoring.may_generate(Some(JOB)));
    // Without a run, each pass of the worker's loop does both.
    scoring.generate(None);
    assert!(scoring.may_generate(None) && scoring.may_generate(None));
}
