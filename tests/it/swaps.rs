//! The files of a served model are replaced by another model's, part by part, and an adapter folder
//! is overwritten: between restarts of one server, and between two replicas on one PostgreSQL. Work
//! that began with the first model does not continue with the second.
//!
//! pins.rs tests jobs on an overwritten adapter when one server is restarted.

use std::path::Path;
use std::time::Duration;

use bradley::rpc::client::{Client, Status};
use bradley::rpc::pb;
use tempfile::TempDir;

use crate::backends::Shared;
use crate::pins::{Adapters, STEPS, UNDECIDED};
use crate::server::{
    Server, assert_refused, assert_waits, became, events, finish, get, is_step, job, latest, pairs,
    pause, resume, score, score_with, scored, state, submit, succeed, until_event, upload,
};
use crate::support::{copy_files, golden, perturb_weights, replace};

/// Parts of a model, as errors name them.
const PARTS: [&str; 4] = ["weights", "config", "tokenizer", "chat template"];
/// Maximum time for a server to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Changes a part of the model in a folder.
fn change(model: &Path, part: &str) {
    match part {
        "weights" => perturb_weights(model.join("model.safetensors")),
        "config" => replace(
            model.join("config.json"),
            "\"rope_theta\": 10000.0",
            "\"rope_theta\": 20000.0",
        ),
        // Renamed in the vocabulary and among the added tokens, so that the template's header is
        // split into other tokens.
        "tokenizer" => replace(
            model.join("tokenizer.json"),
            "<|end_header_id|>",
            "<|end_of_header|>",
        ),
        "chat template" => replace(
            model.join("chat_template.jinja"),
            "message['content'] | trim",
            "message['content']",
        ),
        other => panic!("a model has no {other}"),
    }
}

/// Returns a copy of the tiny Llama.
fn copy_of_model() -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_files(&golden("models/llama"), copy.path());
    copy
}

fn models(folder: &Path) -> String {
    format!("tiny={}", folder.display())
}

async fn export(client: &Client, name: &str) -> Result<(), Status> {
    let format = pb::ExportFormat::Merged.into();
    let request = pb::ExportCheckpointRequest {
        name: latest(name),
        format,
        ..Default::default()
    };
    client
        .checkpoints()
        .export_checkpoint(request)
        .await
        .map(|_| ())
}

async fn score_checkpoint(client: &Client, name: &str) -> Result<(), Status> {
    let options = pb::ScoringOptions {
        policy: latest(name),
        ..Default::default()
    };
    score_with(client, options).await.map(|_| ())
}

/// Jobs that were created with a model before another one replaces it: one has ended, one is paused
/// and one is running.
struct EarlierJobs {
    dataset: String,
    ended: String,
    paused: String,
    running: String,
    /// Scores of the ended job's checkpoint.
    scores: pb::ScorePairsResponse,
}

impl EarlierJobs {
    async fn create(client: &Client) -> Self {
        let dataset = upload(client, "pairs.jsonl").await.name;
        let ended = submit(client, job(&dataset, 3)).await;
        succeed(client, &ended).await;
        let scores = score(client, &latest(&ended), pairs()).await;
        let paused = submit(client, job(&dataset, STEPS)).await;
        pause(client, &paused).await;
        let running = submit(client, job(&dataset, 100_000)).await;
        until_event(client, &running, |e| is_step(e, 1)).await;
        EarlierJobs {
            dataset,
            ended,
            paused,
            running,
            scores,
        }
    }

    /// Creates a job that waits for the device.
    async fn queue(&self, client: &Client) -> String {
        submit(client, job(&self.dataset, 2)).await
    }

    /// Checks that a server refuses these jobs because the `part` of its model has changed.
    async fn assert_refused(&self, client: &Client, part: &str) {
        assert_refused("scoring", score_checkpoint(client, &self.ended).await, part);
        assert_refused("a merged export", export(client, &self.ended).await, part);
        assert_refused("going on", resume(client, &self.paused).await, part);
        assert_eq!(state(client, &self.paused).await, pb::JobState::Paused);
    }

    /// Runs a new job with the server's model, which must succeed, and returns its name.
    async fn train_new(&self, client: &Client) -> String {
        let new = submit(client, job(&self.dataset, 2)).await;
        succeed(client, &new).await;
        score(client, &latest(&new), pairs()).await;
        export(client, &new).await.unwrap();
        new
    }

    /// Cancels the endless job, whether it runs or waits.
    async fn cancel_running(&self, client: &Client) {
        let request = pb::CancelTrainingJobRequest {
            name: self.running.clone(),
        };
        client
            .training()
            .cancel_training_job(request)
            .await
            .unwrap();
        finish(client, &self.running).await;
        assert_eq!(state(client, &self.running).await, pb::JobState::Cancelled);
    }

    /// Checks that a server with the first model continues all jobs, the `queued` ones by itself.
    async fn assert_continue(&self, client: &Client, queued: &[String]) {
        let scores = score(client, &latest(&self.ended), pairs()).await;
        for (before, after) in self.scores.results.iter().zip(&scores.results) {
            assert_eq!(scored(before), scored(after), "the scores have changed");
        }
        export(client, &self.ended).await.unwrap();
        for name in queued {
            assert_eq!(succeed(client, name).await.len(), 2);
            assert_eq!(get(client, name).await.error, None);
        }
        resume(client, &self.paused).await.unwrap();
        assert_eq!(succeed(client, &self.paused).await.len() as u64, STEPS);
    }
}

/// Checks that no server has begun to run a job.
async fn assert_never_ran(client: &Client, name: &str) {
    let events = events(client, name).await;
    let ran = |e: &pb::TrainingEvent| {
        e.event
            .as_ref()
            .is_some_and(|e| is_step(e, 0) || became(e, pb::JobState::Running))
    };
    assert!(!events.iter().any(ran), "{events:?}");
}

// ---- base models

/// Kills a server and restarts it with a model whose `part` differs, then again with the first one.
async fn assert_waits_after_a_restart_with_another(part: &str) {
    let (data, model) = (tempfile::tempdir().unwrap(), copy_of_model());
    let serve = || Server::start_with(data.path(), &models(model.path()), &["--lease", "2"]);
    let mut server = serve();
    let client = server.client().await;
    let jobs = EarlierJobs::create(&client).await;
    let queued = jobs.queue(&client).await;
    assert_eq!(state(&client, &queued).await, pb::JobState::Queued);
    server.kill();

    change(model.path(), part);
    let mut server = serve();
    let client = server.client().await;
    jobs.assert_refused(&client, part).await;
    for waiting in [&jobs.running, &queued] {
        assert_waits(&client, waiting, part).await;
    }
    jobs.train_new(&client).await;
    // A waiting job can be cancelled, and has not run meanwhile.
    jobs.cancel_running(&client).await;
    assert_waits(&client, &queued, part).await;
    assert_never_ran(&client, &queued).await;
    server.kill();

    copy_files(&golden("models/llama"), model.path());
    let server = serve();
    jobs.assert_continue(&server.client().await, &[queued])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_job_continues_after_a_restart_with_other_weights() {
    assert_waits_after_a_restart_with_another("weights").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_job_continues_after_a_restart_with_another_configuration() {
    assert_waits_after_a_restart_with_another("config").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_job_continues_after_a_restart_with_another_tokenizer() {
    assert_waits_after_a_restart_with_another("tokenizer").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_job_continues_after_a_restart_with_another_chat_template() {
    assert_waits_after_a_restart_with_another("chat template").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn no_job_continues_on_a_replica_with_another_part_of_the_model() {
    let shared = Shared::start();
    let data = tempfile::tempdir().unwrap();
    let first = shared.replica(data.path(), &models(&golden("models/llama")), &[]);
    let client = first.client().await;
    let jobs = EarlierJobs::create(&client).await;
    let mut queued = Vec::new();
    for part in PARTS {
        let (data, model) = (tempfile::tempdir().unwrap(), copy_of_model());
        change(model.path(), part);
        let mut second = shared.replica(data.path(), &models(model.path()), &[]);
        let other = second.client().await;
        jobs.assert_refused(&other, part).await;
        // The first replica is busy; the second one is free, takes the job and requeues it.
        let waiting = jobs.queue(&client).await;
        assert_waits(&other, &waiting, part).await;
        let new = jobs.train_new(&other).await;
        // The first replica refuses checkpoints that the second one made.
        assert_refused(
            "scoring on the first replica",
            score_checkpoint(&client, &new).await,
            part,
        );
        assert_never_ran(&client, &waiting).await;
        assert!(second.terminate(PATIENCE).success());
        queued.push(waiting);
    }
    assert_eq!(state(&client, &jobs.running).await, pb::JobState::Running);
    jobs.cancel_running(&client).await;
    jobs.assert_continue(&client, &queued).await;
}

// ---- adapters

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn an_adapter_that_is_overwritten_between_replicas_does_not_change_earlier_jobs() {
    let shared = Shared::start();
    let start =
        move |data: &Path, models: &str, flags: &[&str]| shared.replica(data, models, flags);
    let mut it = Adapters::start_as(Box::new(start)).await;
    let undisturbed = submit(&it.client, it.job(STEPS)).await;
    let expected = succeed(&it.client, &undisturbed).await;
    let before = score(&it.client, &latest(&undisturbed), pairs()).await;
    let paused = submit(&it.client, it.job(STEPS)).await;
    pause(&it.client, &paused).await;
    it.overwrite();
    let data = tempfile::tempdir().unwrap();
    let second = it.start_server(data.path());
    let client = second.client().await;
    // The first replica still has the adapter in memory, so the second one must continue without
    // it.
    assert!(it.server.terminate(PATIENCE).success());
    let after = score(&client, &latest(&undisturbed), pairs()).await;
    for (a, b) in before.results.iter().zip(&after.results) {
        assert_eq!(
            scored(a).margin.to_bits(),
            scored(b).margin.to_bits(),
            "{}",
            a.id
        );
    }
    resume(&client, &paused).await.unwrap();
    assert_eq!(
        succeed(&client, &paused).await,
        expected,
        "the losses are not those of the undisturbed run"
    );
    let new = submit(&client, it.job(3)).await;
    let first = f64::from_bits(succeed(&client, &new).await[&1]);
    assert!(
        (first - UNDECIDED).abs() < 1e-6,
        "a new job is not measured against the new adapter: {first}"
    );
}
