//! Tests of an engine on the CPU. The event channel of a run has room for one event, so a run
//! blocks at the next event until the test reads one.

use std::path::{Path, PathBuf};

use tokio::sync::mpsc::{Receiver, channel};

use super::*;
use crate::domain::dpo::ReferenceSync;
use crate::domain::reason::Reason;
use crate::domain::training::{
    BatchConfig, Method, OptimizerConfig, Precision, ScheduleKind, TrainingSpec,
};
use crate::engine::api::ScoreItem;
use crate::engine::{Engine, start};
use crate::formats::export;
use crate::formats::loader::load_model;
use crate::formats::source::HubOptions;
use crate::formats::weights::ElementType;
use crate::infer::pair::{EncodedPair, SequenceGroup};

const PATIENCE: Duration = Duration::from_secs(60);

/// Copies a tiny model's files, so that a test may change them.
fn copied_model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in
        std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models/llama"))
            .unwrap()
    {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

fn engine(model: &Path, precision: Precision) -> Engine {
    let model = load_model(
        Some("tiny"),
        model.to_str().unwrap(),
        &HubOptions::default(),
    )
    .unwrap();
    start(
        vec![model],
        EngineOptions {
            precision,
            ..Default::default()
        },
    )
    .unwrap()
}

fn base() -> WeightsRef {
    WeightsRef::Base {
        model: "tiny".into(),
    }
}

fn pair() -> EncodedPair {
    EncodedPair {
        row: 1,
        id: None,
        weight: 1.0,
        prompt: (10..30).collect(),
        chosen: (0..20).map(|i| 30 + i).collect(),
        rejected_prompt: None,
        rejected: (0..20).map(|i| 90 - i).collect(),
        chosen_truncated: false,
        rejected_truncated: false,
        logged: None,
    }
}

fn groups() -> Vec<SequenceGroup> {
    pair().groups()
}

/// Returns a run with room for one event, and the receiver of its events.
fn run(method: Method, checkpoints: PathBuf) -> (TrainingRun, Receiver<Report>) {
    let (events, receiver) = channel(1);
    let spec = TrainingSpec {
        method,
        batch: BatchConfig {
            batch_size: 1,
            max_steps: Some(10),
            ..Default::default()
        },
        optimizer: OptimizerConfig {
            learning_rate: 1e-3,
            schedule: ScheduleKind::Constant,
            ..Default::default()
        },
        ..Default::default()
    };
    let run = TrainingRun {
        job: "job".into(),
        model: "tiny".into(),
        start: base(),
        reference: Some(base()),
        spec,
        train: vec![pair()],
        eval: Vec::new(),
        checkpoints,
        resume: None,
        events,
        control: Arc::default(),
    };
    (run, receiver)
}

/// Returns a run that needs only weights that are in memory.
fn run_lora(checkpoints: PathBuf) -> (TrainingRun, Receiver<Report>) {
    run(Method::default(), checkpoints)
}

/// Waits for the next event of a run.
async fn next(events: &mut Receiver<Report>) -> RunEvent {
    tokio::time::timeout(PATIENCE, events.recv())
        .await
        .expect("no event comes")
        .expect("the run ended without a further event")
        .event
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_models_files_are_gone_or_changed_ends_with_its_input_missing() {
    let (model, dir) = (copied_model(), tempfile::tempdir().unwrap());
    let engine = engine(model.path(), Precision::Bf16);
    let weights = model.path().join(export::WEIGHTS_FILE);
    let original = std::fs::read(&weights).unwrap();
    let mut changed = original.clone();
    *changed.last_mut().unwrap() ^= 1;
    let told = |message: &str| {
        assert!(
            message.contains("models/tiny") && message.contains("model.safetensors"),
            "{message}"
        );
        assert!(
            !message.contains(model.path().to_str().unwrap()),
            "{message}"
        );
    };
    for contents in [None, Some(&changed)] {
        match contents {
            None => std::fs::remove_file(&weights).unwrap(),
            Some(bytes) => std::fs::write(&weights, bytes).unwrap(),
        }
        let (run, mut events) = run(Method::Full, dir.path().join("failed"));
        engine.train(run).unwrap();
        match next(&mut events).await {
            RunEvent::Ended(RunEnd::InputMissing(e)) => {
                assert_eq!(e.reason, Reason::ModelFilesChanged);
                told(&e.message);
            }
            other => panic!("{other:?}"),
        }
        let out = tempfile::tempdir().unwrap();
        match engine.export_merged(&base(), ElementType::F32, out.path()) {
            Err(EngineError::FilesChanged(message)) => told(&message),
            other => panic!("{other:?}"),
        }
        // The weights in memory are sufficient for a run in bf16.
        let (run, mut events) = run_lora(dir.path().join("lora"));
        let control = run.control.clone();
        engine.train(run).unwrap();
        let begun = next(&mut events).await;
        assert!(matches!(begun, RunEvent::Running { .. }), "{begun:?}");
        control.cancel();
    }
    std::fs::write(&weights, original).unwrap();
    let (run, mut events) = run(Method::Full, dir.path().join("full"));
    let control = run.control.clone();
    engine.train(run).unwrap();
    let begun = next(&mut events).await;
    assert!(matches!(begun, RunEvent::Running { .. }), "{begun:?}");
    control.cancel();
    engine.drain();
    drop(events);
    assert!(engine.wait_for_end(PATIENCE));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_device_scores_while_the_files_of_a_run_are_read() {
    let (model, dir) = (copied_model(), tempfile::tempdir().unwrap());
    let engine = engine(model.path(), Precision::Bf16);
    let weights = model.path().join(export::WEIGHTS_FILE);
    std::fs::remove_file(&weights).unwrap();
    // Opening a named pipe blocks until the other end is opened.
    let path = std::ffi::CString::new(weights.to_str().unwrap()).unwrap();
    // SAFETY: the path is a string that ends in 0.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    let (first, mut first_events) = run(Method::Full, dir.path().join("1"));
    let control = first.control.clone();
    engine.train(first).unwrap();
    let policy = base();
    let scored = engine.score(&policy, None, ScoreItem { groups: groups() });
    tokio::time::timeout(PATIENCE, scored)
        .await
        .expect("scoring waits for the files")
        .unwrap();
    // Stopping the run does not wait for the files either.
    control.cancel();
    let ended = next(&mut first_events).await;
    assert!(
        matches!(ended, RunEvent::Ended(RunEnd::Cancelled)),
        "{ended:?}"
    );
    // The next run reads from the pipe and gets an empty file.
    let (second, mut second_events) = run(Method::Full, dir.path().join("2"));
    engine.train(second).unwrap();
    let other_end = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&weights)
        .unwrap();
    match next(&mut second_events).await {
        RunEvent::Ended(RunEnd::InputMissing(e)) => assert_eq!(e.reason, Reason::ModelFilesChanged),
        other => panic!("{other:?}"),
    }
    drop(other_end);
    engine.drain();
    assert!(engine.wait_for_end(PATIENCE));
}

/// Without a store that answers, a run waits at an event, and its device scores.
#[tokio::test(flavor = "multi_thread")]
async fn the_wait_for_a_full_channel_is_no_device_time() {
    let (model, dir) = (copied_model(), tempfile::tempdir().unwrap());
    let engine = engine(model.path(), Precision::F32);
    let (run, mut events) = run_lora(dir.path().into());
    let control = run.control.clone();
    let began = Instant::now();
    engine.train(run).unwrap();
    let live = WeightsRef::Live { job: "job".into() };
    loop {
        assert!(
            began.elapsed() < PATIENCE,
            "the run does not take its first step"
        );
        let item = ScoreItem { groups: groups() };
        match engine.score(&live, Some(&base()), item).await {
            // The channel is full, so the run waits at the event of its first step.
            Ok(scored) if scored.live_step == Some(1) => break,
            Ok(_) | Err(EngineError::NotResident(_)) => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(e) => panic!("{e}"),
        }
    }
    let wait = Duration::from_millis(900);
    tokio::time::sleep(wait).await;
    control.cancel();
    loop {
        if let RunEvent::Ended(end) = next(&mut events).await {
            break assert_eq!(end, RunEnd::Cancelled);
        }
    }
    let (worked, all) = (control.take_device_us(), began.elapsed());
    assert!(worked > 0);
    assert!(
        Duration::from_micros(worked) + wait <= all,
        "{worked} µs of work and {wait:?} of waiting in {all:?}"
    );
    engine.drain();
    assert!(engine.wait_for_end(PATIENCE));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moving_reference_is_scored_as_it_is_at_the_policys_step() {
    let (model, dir) = (copied_model(), tempfile::tempdir().unwrap());
    let engine = engine(model.path(), Precision::F32);
    let (mut run, events) = run(Method::Full, dir.path().into());
    // After each step the reference equals the policy.
    run.spec.dpo.reference_sync = Some(ReferenceSync {
        alpha: 1.0,
        every_steps: 1,
    });
    let control = run.control.clone();
    engine.train(run).unwrap();
    let (policy, reference) = (
        WeightsRef::Live { job: "job".into() },
        WeightsRef::LiveReference { job: "job".into() },
    );
    let began = Instant::now();
    let trained = loop {
        assert!(
            began.elapsed() < PATIENCE,
            "the run does not take its first step"
        );
        match engine
            .score(&policy, Some(&reference), ScoreItem { groups: groups() })
            .await
        {
            Ok(scored) => {
                for completion in &scored.completions {
                    assert_eq!(
                        Some(&completion.policy),
                        completion.reference.as_ref(),
                        "step {:?}",
                        scored.live_step
                    );
                }
                // The channel is full, so the run blocks at the event of its first step.
                if scored.live_step == Some(1) {
                    break scored;
                }
            }
            Err(EngineError::NotResident(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(e) => panic!("{e}"),
        }
    };
    let start = engine
        .score(&policy, Some(&base()), ScoreItem { groups: groups() })
        .await
        .unwrap();
    assert_ne!(
        start.completions[0].reference, trained.completions[0].reference,
        "the reference has not moved"
    );
    assert_eq!(
        (start.live_step, &start.completions[0].policy),
        (Some(1), &trained.completions[0].policy)
    );
    // Both end with the run: later requests fail, and the caller can request the stored weights.
    control.cancel();
    drop(events);
    loop {
        assert!(began.elapsed() < PATIENCE, "the run does not end");
        match engine
            .score(&policy, Some(&reference), ScoreItem { groups: groups() })
            .await
        {
            Ok(_) => {}
            Err(EngineError::NotResident(job)) => break assert_eq!(job, "job"),
            Err(e) => panic!("{e}"),
        }
    }
    engine.drain();
    assert!(engine.wait_for_end(PATIENCE));
}
