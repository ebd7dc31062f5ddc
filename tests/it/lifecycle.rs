//! Pause, resume, priorities, updates, damaged checkpoints and expired cursors, on the real server.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bradley::domain::job::JobState;
use bradley::math::rng::kaiming_uniform;
use bradley::rpc::client::Client;
use bradley::rpc::pb::{self, training_event::Event};
use tonic::Code;
use tonic_types::StatusExt;

use crate::server::{
    Server, became, checkpoints_folder, finish, get, id, is_audited, is_final, is_step, job,
    losses, resume, state, steps, submit, try_get, until_event, upload,
};
use crate::wait::until;

/// Steps of a job that is paused or preempted. It must last for seconds, because a busy machine may
/// do that late. The number is a multiple of three, because a job that logs every third step also
/// logs the last one.
const STEPS: u64 = 390;
/// Limit for what a server does within seconds, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Returns a job that saves every five steps.
fn checkpointing(dataset: &str) -> pb::TrainingJob {
    let mut wanted = job(dataset, STEPS);
    wanted.run = Some(pb::RunConfig {
        save_steps: Some(5),
        ..Default::default()
    });
    wanted
}

/// Returns a job that logs every third step and computes a step in three micro-batches, so that a
/// pause can fall between two log lines and within a step.
fn accumulating(dataset: &str) -> pb::TrainingJob {
    let mut wanted = checkpointing(dataset);
    wanted.run = Some(pb::RunConfig {
        save_steps: Some(5),
        logging_steps: Some(3),
        ..Default::default()
    });
    wanted.batch = wanted.batch.map(|b| pb::BatchConfig {
        gradient_accumulation_steps: Some(3),
        ..b
    });
    wanted
}

fn checkpoint(data_dir: &Path, name: &str, step: u64) -> PathBuf {
    checkpoints_folder(data_dir, name).join(step.to_string())
}

/// Losses by step (as bits) and final adapter of a run, which must not depend on interruptions.
#[derive(PartialEq)]
struct Outcome {
    losses: BTreeMap<u64, u64>,
    weights: Vec<u8>,
}

fn outcome(data_dir: &Path, name: &str, events: &[pb::TrainingEvent]) -> Outcome {
    let weights =
        std::fs::read(checkpoint(data_dir, name, STEPS).join("adapter_model.safetensors")).unwrap();
    Outcome {
        losses: losses(events),
        weights,
    }
}

/// Returns the outcome of a job that nothing interrupts.
async fn undisturbed(wanted: impl Fn(&str) -> pb::TrainingJob) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(&client, wanted(&dataset.name)).await;
    let events = finish(&client, &name).await;
    outcome(dir.path(), &name, &events)
}

async fn pause(client: &Client, name: &str) -> Result<pb::TrainingJob, tonic::Status> {
    client
        .training()
        .pause_training_job(pb::PauseTrainingJobRequest { name: name.into() })
        .await
        .map(|r| r.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_job_continues_bit_for_bit_after_a_restart() {
    let expected = undisturbed(accumulating).await;
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(&client, accumulating(&dataset.name)).await;
    until_event(&client, &name, |e| is_step(e, 7)).await;
    assert_eq!(
        pause(&client, &name).await.unwrap().state(),
        pb::JobState::Pausing
    );
    until_event(&client, &name, |e| became(e, pb::JobState::Paused)).await;
    assert_eq!(
        pause(&client, &name).await.unwrap().state(),
        pb::JobState::Paused,
        "pausing twice changes nothing"
    );

    // It stays paused across a restart, while other jobs run.
    server.kill();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let other = submit(&client, job(&dataset.name, 2)).await;
    finish(&client, &other).await;
    assert_eq!(state(&client, &name).await, pb::JobState::Paused);
    assert_eq!(
        resume(&client, &name).await.unwrap().state(),
        pb::JobState::Queued
    );
    let events = finish(&client, &name).await;
    assert_eq!(
        steps(&events),
        (3..=STEPS).step_by(3).collect::<Vec<_>>(),
        "a log line is lost or repeated"
    );
    assert!(
        outcome(dir.path(), &name, &events) == expected,
        "the losses or the weights differ from those of an uninterrupted run"
    );
    let e = resume(&client, &name).await.unwrap_err();
    assert_eq!(
        (
            e.code(),
            e.get_details_error_info().unwrap().reason.as_str()
        ),
        (Code::FailedPrecondition, "NOT_PAUSED")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_a_higher_priority_preempts_one_that_then_continues_bit_for_bit() {
    let expected = undisturbed(checkpointing).await;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let low = submit(&client, checkpointing(&dataset.name)).await;
    until_event(&client, &low, |e| is_step(e, 3)).await;
    let same = submit(&client, job(&dataset.name, 2)).await;
    let high = submit(
        &client,
        pb::TrainingJob {
            priority: 5,
            ..job(&dataset.name, 2)
        },
    )
    .await;
    finish(&client, &high).await;
    let events = finish(&client, &low).await;
    let preempted = |e: &pb::TrainingEvent| match &e.event {
        Some(Event::StateChange(s)) => s.reason.contains("higher priority"),
        _ => false,
    };
    assert!(
        events.iter().any(preempted),
        "the job of low priority was not preempted"
    );
    assert!(
        outcome(dir.path(), &low, &events) == expected,
        "the losses or the weights differ from those of an uninterrupted run"
    );
    finish(&client, &same).await;

    let bad = pb::CreateTrainingJobRequest {
        training_job: Some(pb::TrainingJob {
            priority: 1001,
            ..job(&dataset.name, 2)
        }),
        ..Default::default()
    };
    let e = client
        .training()
        .create_training_job(bad)
        .await
        .unwrap_err();
    assert_eq!(
        e.get_details_bad_request().unwrap().field_violations[0].field,
        "training_job.priority"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_changes_what_its_mask_names_and_a_stale_etag_aborts_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(
        &client,
        pb::TrainingJob {
            display_name: "first".into(),
            ..job(&dataset.name, 2)
        },
    )
    .await;
    finish(&client, &name).await;
    let update = async |job: pb::TrainingJob, paths: &[&str]| {
        let update_mask = Some(prost_types::FieldMask {
            paths: paths.iter().map(|p| p.to_string()).collect(),
        });
        let request = pb::UpdateTrainingJobRequest {
            training_job: Some(pb::TrainingJob {
                name: name.clone(),
                ..job
            }),
            update_mask,
        };
        client
            .training()
            .update_training_job(request)
            .await
            .map(|r| r.into_inner())
    };
    let before = get(&client, &name).await;
    let labels = BTreeMap::from([("team".to_owned(), "search".to_owned())]);
    let wanted = pb::TrainingJob {
        etag: before.etag.clone(),
        labels: labels.clone(),
        display_name: "ignored".into(),
        ..Default::default()
    };
    let after = update(wanted.clone(), &["labels"]).await.unwrap();
    assert_eq!(
        (after.display_name.as_str(), &after.labels),
        ("first", &labels)
    );
    assert_ne!(after.etag, before.etag);
    let e = update(wanted, &["labels"]).await.unwrap_err();
    assert_eq!(
        (
            e.code(),
            e.get_details_error_info().unwrap().reason.as_str()
        ),
        (Code::Aborted, "ETAG_STALE")
    );
    let e = update(Default::default(), &["seed"]).await.unwrap_err();
    assert_eq!(
        e.get_details_bad_request().unwrap().field_violations[0].field,
        "update_mask.paths[0]"
    );
    let e = update(
        pb::TrainingJob {
            priority: -9999,
            ..Default::default()
        },
        &["priority"],
    )
    .await
    .unwrap_err();
    assert_eq!(
        e.get_details_bad_request().unwrap().field_violations[0].field,
        "training_job.priority"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_checkpoint_is_reported_and_the_one_before_is_used() {
    let expected = undisturbed(checkpointing).await;
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(&client, checkpointing(&dataset.name)).await;
    until_event(&client, &name, |e| is_step(e, 13)).await;
    // The checkpoint of the paused job is stored.
    pause(&client, &name).await.unwrap();
    until_event(&client, &name, |e| became(e, pb::JobState::Paused)).await;
    server.kill();
    let steps = std::fs::read_dir(checkpoint(dir.path(), &name, 0).parent().unwrap()).unwrap();
    let newest = steps
        .filter_map(|e| e.unwrap().file_name().to_str()?.parse::<u64>().ok())
        .max()
        .unwrap();
    for file in ["adapter_model.safetensors", "optimizer.safetensors"] {
        let file = checkpoint(dir.path(), &name, newest).join(file);
        let mut bytes = std::fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        std::fs::write(&file, bytes).unwrap();
    }
    let server = Server::start(dir.path());
    let client = server.client().await;
    resume(&client, &name).await.unwrap();
    let events = finish(&client, &name).await;
    let reports_damage = |e: &pb::TrainingEvent| match &e.event {
        Some(Event::Log(l)) => l.message.contains("does not match its checksum"),
        _ => false,
    };
    assert!(
        events.iter().any(reports_damage),
        "the damage is not reported"
    );
    assert!(
        outcome(dir.path(), &name, &events) == expected,
        "the losses or the weights differ from those of an uninterrupted run"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_cursor_is_out_of_range_and_names_the_oldest_event() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(
        dir.path(),
        &format!("tiny={}", crate::support::golden("models/llama").display()),
        &["--events-kept", "10"],
    );
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(&client, job(&dataset.name, 30)).await;
    until("the end of the job", Duration::from_secs(60), async || {
        state(&client, &name).await == pb::JobState::Succeeded
    })
    .await;
    let list = async |after_sequence| {
        let request = pb::ListTrainingEventsRequest {
            parent: name.clone(),
            after_sequence,
            page_size: 0,
        };
        client.training().list_training_events(request).await
    };
    let e = list(0).await.unwrap_err();
    assert_eq!(e.code(), Code::OutOfRange, "{e}");
    let after: u64 = e
        .message()
        .rsplit("go on after ")
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let kept = list(after).await.unwrap().into_inner().events;
    assert_eq!(
        kept.iter().map(|e| e.sequence).collect::<Vec<_>>(),
        (after + 1..after + 11).collect::<Vec<_>>()
    );
    let request = pb::StreamTrainingEventsRequest {
        parent: name.clone(),
        after_sequence: 0,
        ..Default::default()
    };
    assert_eq!(
        client
            .training()
            .stream_training_events(request)
            .await
            .unwrap_err()
            .code(),
        Code::OutOfRange
    );
}

/// Clients request changes in a random order: every transition is legal, every refusal has a
/// reason, and nothing hangs.
#[tokio::test(flavor = "multi_thread")]
async fn random_commands_make_only_legal_transitions() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let mut jobs: Vec<String> = Vec::new();
    // Uniform numbers in 0..1 from a fixed seed.
    let draws: Vec<f64> = kaiming_uniform(7, "lifecycle", 200, 1)
        .into_iter()
        .map(|x| (f64::from(x) + 1.0) / 2.0)
        .collect();
    for draw in draws.chunks(2) {
        let (command, fraction) = ((draw[0] * 6.0) as usize, draw[1]);
        let name = jobs.get((fraction * jobs.len() as f64) as usize).cloned();
        let result = match (command, name) {
            (0, _) | (_, None) if jobs.len() < 6 => {
                let priority = (fraction * 4.0) as i32;
                jobs.push(
                    submit(
                        &client,
                        pb::TrainingJob {
                            priority,
                            ..job(&dataset.name, 25)
                        },
                    )
                    .await,
                );
                Ok(())
            }
            (1, Some(n)) => pause(&client, &n).await.map(|_| ()),
            (2 | 3, Some(n)) => resume(&client, &n).await.map(|_| ()),
            (4, Some(n)) if fraction < 0.3 => client
                .training()
                .cancel_training_job(pb::CancelTrainingJobRequest { name: n })
                .await
                .map(|_| ()),
            (5, Some(n)) if fraction < 0.3 => {
                let deleted = client
                    .training()
                    .delete_training_job(pb::DeleteTrainingJobRequest { name: n.clone() })
                    .await;
                jobs.retain(|j| deleted.is_err() || *j != n);
                deleted.map(|_| ())
            }
            _ => {
                tokio::time::sleep(Duration::from_millis(30)).await;
                Ok(())
            }
        };
        if let Err(e) = result {
            assert_eq!(e.code(), Code::FailedPrecondition, "{e}");
            let reason = e.get_details_error_info().map(|info| info.reason);
            assert!(reason.is_some_and(|reason| !reason.is_empty()), "{e}");
        }
    }
    for name in &jobs {
        // Paused jobs are resumed; the others end by themselves.
        until("the end of a job", Duration::from_secs(60), async || {
            let now = state(&client, name).await;
            if now == pb::JobState::Paused {
                let _ = resume(&client, name).await;
            }
            is_final(now)
        })
        .await;
        let mut last = None;
        for e in finish(&client, name).await {
            let Some(Event::StateChange(change)) = e.event else {
                continue;
            };
            let parse = |s: pb::JobState| {
                JobState::parse(
                    &s.as_str_name()
                        .trim_start_matches("JOB_STATE_")
                        .to_lowercase(),
                )
            };
            let (from, to) = (parse(change.from()), parse(change.to()).unwrap());
            assert_eq!(
                from, last,
                "{name}: a change does not start from the state before it"
            );
            assert!(
                from.is_none_or(|from| from.may_become(to)),
                "{name}: {from:?} to {to:?}"
            );
            last = Some(to);
        }
        assert!(
            matches!(last, Some(JobState::Succeeded | JobState::Cancelled)),
            "{name} ended: {last:?}"
        );
    }
}

/// Creates a job that waits behind another one, cancels it, and makes files for it by hand. Returns
/// its name.
async fn cancelled_with_files(server: &Server, client: &Client, wanted: pb::TrainingJob) -> String {
    let name = submit(client, wanted).await;
    let folder = checkpoint(&server.data_dir, &name, 1);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("weights"), b"weights").unwrap();
    let request = pb::CancelTrainingJobRequest { name: name.clone() };
    let cancelled = client.training().cancel_training_job(request).await;
    assert!(is_final(cancelled.unwrap().into_inner().state()));
    name
}

/// Waits until each of these jobs has a folder if and only if it exists.
async fn until_files_have_jobs(server: &Server, client: &Client, jobs: &[String]) {
    for name in jobs {
        let folder = server.data_dir.join("jobs").join(id(name));
        until("the files of existing jobs only", LIMIT, async || {
            try_get(client, name).await.is_ok() == folder.exists()
        })
        .await;
    }
}

/// A client that leaves while its job is being deleted must not leave the files, and the audit log
/// has the deletion.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_a_client_deletes_and_leaves_has_no_files() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let running = submit(&client, job(&dataset.name, 1_000_000)).await;
    until_event(&client, &running, |e| is_step(e, 1)).await;
    // A call that is given up too early deletes nothing. So calls are given up until enough of them
    // have deleted their job, however fast the machine is.
    let start = Instant::now();
    let (mut took, mut deleted) = (Duration::ZERO, Vec::new());
    while deleted.len() < 10 {
        let few = deleted.len();
        assert!(start.elapsed() < 2 * LIMIT, "only {few} were deleted");
        let (mut jobs, mut left) = (Vec::new(), Vec::new());
        for i in 0..40u32 {
            let name = cancelled_with_files(&server, &client, job(&dataset.name, 1)).await;
            jobs.push(name.clone());
            // Different clients, because a connection ends with all of its calls.
            let leaving = server.client().await;
            let request = pb::DeleteTrainingJobRequest { name: name.clone() };
            let begun = Instant::now();
            let call = async { leaving.training().delete_training_job(request).await };
            if i % 5 == 0 {
                call.await.unwrap();
                took = begun.elapsed();
                continue;
            }
            // Finer than the timer of tokio, because a deletion may take less than a millisecond.
            let patience = took * i / 40;
            let leaves = tokio::task::spawn_blocking(move || std::thread::sleep(patience));
            tokio::select! {
                answer = call => drop(answer.unwrap()),
                _ = leaves => left.push(name),
            }
        }
        until_files_have_jobs(&server, &client, &jobs).await;
        for name in left {
            if try_get(&client, &name).await.is_err() {
                deleted.push(name);
            }
        }
    }
    for name in deleted {
        until("the line of the audit log", LIMIT, async || {
            let lines = server.lines_with(&name);
            lines.iter().any(|line| is_audited(line, "delete"))
        })
        .await;
    }
}

/// A server that ends while it deletes expired jobs must not leave the files of one whose row is
/// deleted: nothing would remove them later.
#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_while_jobs_expire_leaves_no_files_without_a_job() {
    let dir = tempfile::tempdir().unwrap();
    let models = format!("tiny={}", crate::support::golden("models/llama").display());
    // The server looks for expired jobs every four seconds, and so finds many at once.
    let mut server = Server::start_with(dir.path(), &models, &["--lease", "12"]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let running = submit(&client, job(&dataset.name, 1_000_000)).await;
    until_event(&client, &running, |e| is_step(e, 1)).await;
    let mut expiring = job(&dataset.name, 1);
    expiring.ttl = Some(prost_types::Duration {
        seconds: 1,
        nanos: 0,
    });
    let mut jobs = Vec::new();
    for _ in 0..60 {
        jobs.push(cancelled_with_files(&server, &client, expiring.clone()).await);
    }
    let folders = dir.path().join("jobs");
    let left = || std::fs::read_dir(&folders).unwrap().count();
    let most = left();
    let start = Instant::now();
    // Finer than `until`: the deletions take milliseconds.
    while left() >= most {
        assert!(start.elapsed() < LIMIT, "nothing expires");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(server.terminate(LIMIT).success());
    let server = Server::start(dir.path());
    until_files_have_jobs(&server, &server.client().await, &jobs).await;
}

/// A run whose checkpoint cannot be written waits, and the server says so where it is asked for its
/// state. Here a file stands in place of the folder of the job's checkpoints.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_cannot_write_its_checkpoint_waits_and_is_listed() {
    let limit = "the run waits until it can, for 60 minutes at most";
    assert_waits_for_its_folder(20, async |_, _| (), limit, "1").await;
}

/// A paused run waits without limit: its steps would be lost otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_run_that_cannot_write_its_checkpoint_waits_and_is_listed() {
    let pause = async |client: Client, name| {
        let request = pb::PauseTrainingJobRequest { name };
        client.training().pause_training_job(request).await.unwrap();
    };
    assert_waits_for_its_folder(0, pause, "the run waits until it can:", "0").await;
}

/// Makes it impossible to write the checkpoints of a job with `save_steps`, calls `save`, and
/// expects the run to wait, with `message` in its events, until they can be written again. Then
/// `left` jobs run.
async fn assert_waits_for_its_folder(
    save_steps: u32,
    save: impl AsyncFnOnce(Client, String),
    message: &str,
    left: &str,
) {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let mut wanted = job(&dataset, 1_000_000);
    wanted.run = Some(pb::RunConfig {
        save_steps: Some(save_steps),
        ..Default::default()
    });
    let name = submit(&client, wanted).await;
    until_event(&client, &name, |e| is_step(e, 1)).await;
    let folder = checkpoints_folder(dir.path(), &name);
    let aside = folder.with_extension("aside");
    std::fs::rename(&folder, &aside).unwrap();
    until("a file in place of the folder", LIMIT, async || {
        // The run may have made the folder again.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::write(&folder, "").is_ok()
    })
    .await;
    save(server.client().await, name.clone()).await;
    let listed = async |state: &str| {
        let line = format!("jobs that run here: {state}\n");
        until(&line, LIMIT, async || {
            server.http_get("/readyz?verbose").contains(&line)
        })
        .await;
    };
    listed("1, of which 1 cannot store or read something and wait: STORAGE_UNAVAILABLE").await;
    until_event(
        &client,
        &name,
        |e| matches!(e, Event::Log(log) if log.message.contains(message)),
    )
    .await;
    // Waiting is no work of the device.
    let units = || server.metric("bradley_training_unit_seconds_count");
    let before = units();
    assert!(before.is_some());
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(units(), before);
    std::fs::remove_file(&folder).unwrap();
    std::fs::rename(&aside, &folder).unwrap();
    listed(left).await;
    let request = pb::CancelTrainingJobRequest { name: name.clone() };
    client
        .training()
        .cancel_training_job(request)
        .await
        .unwrap();
    until_event(&client, &name, |e| became(e, pb::JobState::Cancelled)).await;
}
