//! Pinned inputs of a job (adapters, references, datasets): the job shows their hashes, and
//! continues only with the same files.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bradley::rpc::client::{Client, Status};
use bradley::rpc::pb::{self, training_event::Event};
use bradley::train::checkpoint;
use sqlx::Connection as _;
use tempfile::TempDir;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::server::{
    Server, checkpoints_folder, create, events, finish, get, id, job, job_error_reason, latest,
    pairs, pause, resume, score, state, submit, succeed, upload,
};
use crate::support::golden;
use crate::wait::until_ok;

/// Steps of a job that is paused before its end. It must last for seconds, because a busy machine
/// may pause it late.
const STEPS: u64 = 300;
const PATIENCE: Duration = Duration::from_secs(60);

async fn delete(client: &Client, name: &str) -> Result<(), Status> {
    let request = pb::DeleteTrainingJobRequest { name: name.into() };
    client
        .training()
        .delete_training_job(request)
        .await
        .map(|_| ())
}

async fn delete_checkpoint(client: &Client, name: &str) -> Result<(), Status> {
    let request = pb::DeleteCheckpointRequest { name: name.into() };
    client
        .checkpoints()
        .delete_checkpoint(request)
        .await
        .map(|_| ())
}

/// Runs a job to its end, which must be success, and returns its name.
async fn train(client: &Client, wanted: pb::TrainingJob) -> String {
    let name = submit(client, wanted).await;
    succeed(client, &name).await;
    name
}

/// Waits until a job has an error, and returns its state and the error's reason.
async fn state_and_reason(client: &Client, name: &str) -> (pb::JobState, String) {
    until_ok("an error of the job", PATIENCE, async || {
        let shown = get(client, name).await;
        if let Some(error) = &shown.error {
            assert_eq!(error.code, Code::FailedPrecondition as i32, "{error:?}");
            return Ok((shown.state(), job_error_reason(error)));
        }
        Err(format!("{:?}", shown.state()))
    })
    .await
}

/// Changes the database of a stopped server.
async fn sql(data_dir: &Path, statement: &str) {
    let url = format!("sqlite://{}", data_dir.join("bradley.db").display());
    let mut database = sqlx::SqliteConnection::connect(&url).await.unwrap();
    let changed = sqlx::raw_sql(sqlx::AssertSqlSafe(statement.to_owned()))
        .execute(&mut database)
        .await
        .unwrap();
    assert!(changed.rows_affected() > 0, "{statement} changes no row");
    database.close().await.unwrap();
}

// ---- the adapter that a job continues with

fn with_lora(lora: pb::LoraConfig, wanted: pb::TrainingJob) -> pb::TrainingJob {
    pb::TrainingJob {
        method: Some(pb::training_job::Method::Lora(lora)),
        ..wanted
    }
}

/// Returns the LoRA settings of a job.
fn lora(shown: &pb::TrainingJob) -> pb::LoraConfig {
    let Some(pb::training_job::Method::Lora(lora)) = shown.method.clone() else {
        panic!("{shown:?}")
    };
    lora
}

/// Checks jobs that continue with an adapter of rank 4, α 6 and two targets: settings that a
/// request leaves out are the adapter's, and other values are refused.
async fn assert_keeps_the_adapters_settings(
    client: &Client,
    wanted: pb::TrainingJob,
    init_adapter: &str,
) {
    let with = |lora: pb::LoraConfig| {
        with_lora(
            pb::LoraConfig {
                init_adapter: init_adapter.into(),
                ..lora
            },
            wanted.clone(),
        )
    };
    let targets = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let default = pb::LoraConfig::default;
    let refused = [
        (
            "rank",
            pb::LoraConfig {
                rank: Some(8),
                ..default()
            },
        ),
        (
            "alpha",
            pb::LoraConfig {
                alpha: Some(8.0),
                ..default()
            },
        ),
        (
            "target_modules",
            pb::LoraConfig {
                target_modules: targets(&["q_proj"]),
                ..default()
            },
        ),
        (
            "use_rslora",
            pb::LoraConfig {
                use_rslora: true,
                ..default()
            },
        ),
    ];
    for (field, lora) in refused {
        let status = create(client, with(lora)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status}");
        let fields: Vec<String> = status
            .get_details_bad_request()
            .unwrap()
            .field_violations
            .into_iter()
            .map(|v| v.field)
            .collect();
        assert_eq!(fields, [format!("training_job.lora.{field}")]);
    }
    let named = pb::LoraConfig {
        rank: Some(4),
        alpha: Some(6.0),
        target_modules: targets(&["v_proj", "q_proj"]),
        ..default()
    };
    for accepted in [default(), named] {
        let shown = create(client, with(accepted)).await.unwrap();
        for shown in [&shown, &get(client, &shown.name).await] {
            let effective = lora(shown);
            assert_eq!((effective.rank, effective.alpha), (Some(4), Some(6.0)));
            assert_eq!(effective.target_modules, ["q_proj", "v_proj"]);
        }
        finish(client, &shown.name).await;
        // The LoRA settings that the job shows are those of the adapter that it trained.
        let checkpoint = latest(&shown.name);
        let folder = tempfile::tempdir().unwrap();
        client
            .download_checkpoint(&checkpoint, pb::ExportFormat::Adapter, folder.path())
            .await
            .unwrap();
        let text = std::fs::read(folder.path().join("adapter_config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(
            (config["r"].as_u64(), config["lora_alpha"].as_f64()),
            (Some(4), Some(6.0))
        );
        // A client can create the same job again from the shown fields.
        create(
            client,
            pb::TrainingJob {
                name: String::new(),
                ..shown
            },
        )
        .await
        .unwrap();
    }
}

fn small_adapter(dataset: &str) -> pb::TrainingJob {
    let target_modules = vec!["q_proj".to_owned(), "v_proj".to_owned()];
    with_lora(
        pb::LoraConfig {
            rank: Some(4),
            alpha: Some(6.0),
            target_modules,
            ..Default::default()
        },
        job(dataset, 2),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_from_a_checkpoint_keeps_its_rank_alpha_and_targets() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let first = train(&client, small_adapter(&dataset)).await;
    let wanted = pb::TrainingJob {
        policy: latest(&first),
        ..job(&dataset, 2)
    };
    assert_keeps_the_adapters_settings(&client, wanted, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_from_an_init_adapter_keeps_its_rank_alpha_and_targets() {
    let (dir, adapters) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let models = format!("tiny={}", golden("models/llama").display());
    let server = Server::start_with(
        dir.path(),
        &models,
        &["--adapter-dir", adapters.path().to_str().unwrap()],
    );
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let first = train(&client, small_adapter(&dataset)).await;
    let folder = adapters.path().join("x");
    client
        .download_checkpoint(&latest(&first), pb::ExportFormat::Adapter, &folder)
        .await
        .unwrap();
    assert_keeps_the_adapters_settings(&client, job(&dataset, 2), "x").await;
    // An unreadable adapter is refused before the job exists, without a path of the server.
    std::fs::write(folder.join("adapter_config.json"), "{").unwrap();
    let broken = with_lora(
        pb::LoraConfig {
            init_adapter: "x".into(),
            ..Default::default()
        },
        job(&dataset, 2),
    );
    let status = create(&client, broken).await.unwrap_err();
    let violation = status
        .get_details_bad_request()
        .unwrap()
        .field_violations
        .remove(0);
    assert_eq!(violation.field, "training_job.lora.init_adapter");
    assert!(
        !violation
            .description
            .contains(adapters.path().to_str().unwrap()),
        "{violation:?}"
    );
}

// ---- identities

#[tokio::test(flavor = "multi_thread")]
async fn models_jobs_and_checkpoints_show_the_hashes_of_their_content() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let model = client
        .models()
        .list_models(pb::ListModelsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .models
        .remove(0);
    let identity = model.identity.unwrap();
    let is_hash = |hash: &str| hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
    for part in [
        &identity.weights,
        &identity.config,
        &identity.tokenizer,
        &identity.chat_template,
    ] {
        assert!(is_hash(part), "{identity:?}");
    }
    assert_eq!(identity.weights, model.fingerprint);
    let dataset = upload(&client, "pairs.jsonl").await;
    let evaluation = Some(pb::training_job::Evaluation::EvalDataset(
        dataset.name.clone(),
    ));
    let first = train(
        &client,
        pb::TrainingJob {
            evaluation,
            ..job(&dataset.name, 2)
        },
    )
    .await;
    let pins = get(&client, &first).await.pins.unwrap();
    assert_eq!(pins.base.as_ref(), Some(&identity));
    assert_eq!(
        (&pins.dataset, &pins.eval_dataset),
        (&dataset.content_hash, &dataset.content_hash)
    );
    assert_eq!((pins.policy.as_str(), pins.reference.as_str()), ("", ""));
    let other = train(&client, job(&dataset.name, 2)).await;
    let second = pb::TrainingJob {
        policy: latest(&first),
        reference: latest(&other),
        ..job(&dataset.name, 2)
    };
    let second = train(&client, second).await;
    let pins = get(&client, &second).await.pins.unwrap();
    assert!(
        is_hash(&pins.policy) && is_hash(&pins.reference) && pins.policy != pins.reference,
        "{pins:?}"
    );
    assert_eq!(pins.eval_dataset, "");
    let request = pb::ListCheckpointsRequest {
        parent: second.clone(),
    };
    let listed = client
        .checkpoints()
        .list_checkpoints(request)
        .await
        .unwrap()
        .into_inner()
        .checkpoints;
    let request = pb::GetCheckpointRequest {
        name: latest(&second),
    };
    let one = client
        .checkpoints()
        .get_checkpoint(request)
        .await
        .unwrap()
        .into_inner();
    assert!(
        listed
            .iter()
            .chain([&one])
            .all(|c| c.base.as_ref() == Some(&identity)),
        "{listed:?}"
    );
}

/// A server with a paused job whose policy and reference are checkpoints of other jobs.
struct Paused {
    dir: TempDir,
    server: Server,
    client: Client,
    dataset: String,
    job: String,
}

impl Paused {
    async fn start() -> Self {
        Self::on(&golden("pairs.jsonl")).await
    }

    /// Starts the server with a job on the rows of this file.
    async fn on(rows: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(dir.path());
        let client = server.client().await;
        let dataset = client
            .upload_dataset(rows, pb::UploadMetadata::default(), |_| {})
            .await
            .unwrap()
            .name;
        let (policy, reference) = (
            train(&client, job(&dataset, 2)).await,
            train(&client, job(&dataset, 3)).await,
        );
        let wanted = pb::TrainingJob {
            policy: latest(&policy),
            reference: latest(&reference),
            ..job(&dataset, STEPS)
        };
        let job = submit(&client, wanted).await;
        pause(&client, &job).await;
        Paused {
            dir,
            server,
            client,
            dataset,
            job,
        }
    }

    /// Executes an SQL statement while the server is stopped.
    async fn restart_after(&mut self, statement: &str) {
        assert!(self.server.terminate(PATIENCE).success());
        sql(self.dir.path(), statement).await;
        self.server = Server::start(self.dir.path());
        self.client = self.server.client().await;
    }

    /// Changes the stored progress in the job's checkpoints while the server is stopped.
    async fn restart_with(&mut self, change: impl Fn(&mut serde_json::Value)) {
        assert!(self.server.terminate(PATIENCE).success());
        let job = id(&self.job);
        let folder = checkpoints_folder(self.dir.path(), job);
        for step in checkpoint::steps(&folder).unwrap() {
            let dir = folder.join(step.to_string());
            let file = dir.join(checkpoint::STATE_FILE);
            let mut state = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            change(&mut state);
            std::fs::write(&file, state.to_string()).unwrap();
            let digest = checkpoint::digest(&dir).unwrap();
            let update = format!("UPDATE checkpoints SET digest = '{digest}'");
            let statement = format!("{update} WHERE job = '{job}' AND step = {step}");
            sql(self.dir.path(), &statement).await;
        }
        self.server = Server::start(self.dir.path());
        self.client = self.server.client().await;
    }

    /// Waits until the job is refused for its rows, with all of `words` in the message.
    async fn wait_for_refusal_of_rows(&self, words: &[&str]) {
        until_ok("a refusal of the rows", PATIENCE, async || {
            let shown = get(&self.client, &self.job).await;
            let error = shown.error.unwrap_or_default();
            if words.iter().all(|word| error.message.contains(word)) {
                assert_eq!(
                    (shown.state, job_error_reason(&error)),
                    (pb::JobState::Queued.into(), "ROWS_CHANGED".to_owned())
                );
                assert_eq!(error.code, Code::FailedPrecondition as i32);
                assert!(error.message.contains("create it again"), "{error:?}");
                return Ok(());
            }
            Err(format!("{words:?} are not in {error:?}"))
        })
        .await;
    }

    async fn warnings(&self) -> Vec<String> {
        let events = events(&self.client, &self.job).await;
        let warning = |e: pb::TrainingEvent| match e.event {
            Some(Event::Log(l)) if l.severity == "warning" => Some(l.message),
            _ => None,
        };
        events.into_iter().filter_map(warning).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_while_its_policy_or_reference_has_changed() {
    for part in ["policy", "reference"] {
        let mut it = Paused::start().await;
        let pins = get(&it.client, &it.job).await.pins.unwrap();
        let pinned = if part == "policy" {
            pins.policy
        } else {
            pins.reference
        };
        let (job, other) = (id(&it.job).to_owned(), "0".repeat(64));
        // The pin in the database changes, as if the checkpoint's content had changed.
        it.restart_after(&format!(
            "UPDATE jobs SET request = replace(request, '{pinned}', '{other}') WHERE id = '{job}'"
        ))
        .await;
        resume(&it.client, &it.job).await.unwrap();
        assert_eq!(
            state_and_reason(&it.client, &it.job).await,
            (pb::JobState::Queued, "MODEL_CHANGED".into()),
            "{part}"
        );
        let message = get(&it.client, &it.job).await.error.unwrap().message;
        assert!(
            message.contains(&pinned) && message.contains(&other) && message.contains(part),
            "{message}"
        );
        // The job continues by itself when the content is the old one again.
        it.restart_after(&format!(
            "UPDATE jobs SET request = replace(request, '{other}', '{pinned}') WHERE id = '{job}'"
        ))
        .await;
        finish(&it.client, &it.job).await;
        assert_eq!(state(&it.client, &it.job).await, pb::JobState::Succeeded);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_while_its_dataset_has_changed() {
    let it = Paused::start().await;
    let files = std::fs::read_dir(it.dir.path().join("datasets"))
        .unwrap()
        .map(|e| e.unwrap().path());
    let files: Vec<PathBuf> = files
        .filter(|f| f.to_string_lossy().contains(id(&it.dataset)))
        .collect();
    let [file] = files.as_slice() else {
        panic!("{files:?}")
    };
    let file = if file.is_dir() {
        std::fs::read_dir(file)
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path()
    } else {
        file.clone()
    };
    // The same readable rows in another order.
    let text = std::fs::read_to_string(&file).unwrap();
    let reversed: Vec<&str> = text.lines().rev().collect();
    std::fs::write(&file, reversed.join("\n") + "\n").unwrap();
    resume(&it.client, &it.job).await.unwrap();
    assert_eq!(
        state_and_reason(&it.client, &it.job).await,
        (pb::JobState::Queued, "DATASET_CHANGED".into())
    );
    // The job continues by itself when the file is the old one again.
    std::fs::write(&file, text).unwrap();
    finish(&it.client, &it.job).await;
    assert_eq!(state(&it.client, &it.job).await, pb::JobState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_for_the_file_of_its_dataset() {
    let it = Paused::start().await;
    let (file, away) = (
        it.dir.path().join("datasets").join(id(&it.dataset)),
        it.dir.path().join("away"),
    );
    std::fs::rename(&file, &away).unwrap();
    let request = pb::EstimateTrainingJobRequest {
        training_job: Some(job(&it.dataset, 2)),
    };
    let status = it
        .client
        .training()
        .estimate_training_job(request)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert_eq!(
        status.get_details_error_info().unwrap().reason,
        "ARTIFACT_MISSING"
    );
    let says = |word: &str| status.message().contains(word);
    assert!(
        says(&it.dataset) && says("data directory") && says("upload it again"),
        "{status}"
    );
    resume(&it.client, &it.job).await.unwrap();
    assert_eq!(
        state_and_reason(&it.client, &it.job).await,
        (pb::JobState::Queued, "ARTIFACT_MISSING".into())
    );
    // The job continues by itself when the file is back.
    std::fs::rename(&away, &file).unwrap();
    finish(&it.client, &it.job).await;
    assert_eq!(state(&it.client, &it.job).await, pb::JobState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_does_not_continue_with_other_tokens() {
    let mut it = Paused::start().await;
    // The recorded hash changes, as if the version that began the job had made other pairs of the
    // rows.
    let other = "0".repeat(64);
    it.restart_with(|state| state["pairs"] = other.clone().into())
        .await;
    resume(&it.client, &it.job).await.unwrap();
    it.wait_for_refusal_of_rows(&[&other]).await;
    // Version 0.2.0 recorded only the number of used tokens, not the pairs.
    let record_tokens_only = |state: &mut serde_json::Value, more: i64| {
        state.as_object_mut().unwrap().remove("pairs");
        let tokens = state["state"]["tokens"].as_i64().unwrap();
        state["state"]["tokens"] = (tokens + more).into();
    };
    it.restart_with(|state| record_tokens_only(state, 1)).await;
    it.wait_for_refusal_of_rows(&["tokens"]).await;
    // With the old rows the job continues.
    it.restart_with(|state| record_tokens_only(state, -1)).await;
    finish(&it.client, &it.job).await;
    assert_eq!(state(&it.client, &it.job).await, pb::JobState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_version_0_2_0_does_not_continue_with_keys_that_it_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rows.jsonl");
    let text = std::fs::read_to_string(golden("pairs.jsonl")).unwrap();
    let mut rows: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    rows[3]["prompt"][0]["name"] = "Ada".into();
    std::fs::write(
        &file,
        rows.iter()
            .map(|row| format!("{row}\n"))
            .collect::<String>(),
    )
    .unwrap();
    let mut it = Paused::on(&file).await;
    let pairs = std::cell::RefCell::new(serde_json::Value::Null);
    it.restart_with(|state| {
        *pairs.borrow_mut() = state.as_object_mut().unwrap().remove("pairs").unwrap()
    })
    .await;
    resume(&it.client, &it.job).await.unwrap();
    it.wait_for_refusal_of_rows(&["0.2.0", "prompt[0].name of row 4", &it.dataset])
        .await;
    // A checkpoint of this version records that the run began with these pairs.
    it.restart_with(|state| state["pairs"] = pairs.borrow().clone())
        .await;
    finish(&it.client, &it.job).await;
    assert_eq!(state(&it.client, &it.job).await, pb::JobState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_pins_is_pinned_at_its_next_start() {
    // As two older versions stored it.
    for removed in ["$.pins.contents", "$.pins"] {
        let mut it = Paused::start().await;
        let pins = get(&it.client, &it.job).await.pins;
        let job = id(&it.job).to_owned();
        it.restart_after(&format!(
            "UPDATE jobs SET request = json_remove(request, '{removed}') WHERE id = '{job}'"
        ))
        .await;
        assert_ne!(get(&it.client, &it.job).await.pins, pins);
        assert_eq!(it.warnings().await, Vec::<String>::new());
        resume(&it.client, &it.job).await.unwrap();
        finish(&it.client, &it.job).await;
        assert_eq!(get(&it.client, &it.job).await.pins, pins);
        let warnings = it.warnings().await;
        assert!(
            warnings.len() == 1 && warnings[0].contains("is pinned now"),
            "{warnings:?}"
        );
        assert_eq!(state(&it.client, &it.job).await, pb::JobState::Succeeded);
    }
}

// ---- references of ended jobs

#[tokio::test(flavor = "multi_thread")]
async fn the_reference_of_an_ended_job_cannot_be_deleted_while_the_job_has_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let named = |first: &str| pb::TrainingJob {
        reference: latest(first),
        ..job(&dataset, 2)
    };
    // Without a named reference the start weights of the policy are the reference.
    let implied = |first: &str| pb::TrainingJob {
        policy: latest(first),
        ..job(&dataset, 2)
    };
    let kinds: [&dyn Fn(&str) -> pb::TrainingJob; 2] = [&named, &implied];
    for job_against in kinds {
        let first = train(&client, job(&dataset, 2)).await;
        let second = train(&client, job_against(&first)).await;
        let before = score(&client, &latest(&second), pairs()).await;
        let refusals = [
            delete(&client, &first).await,
            delete_checkpoint(&client, &format!("{first}/checkpoints/2")).await,
        ];
        for refused in refusals {
            let status = refused.unwrap_err();
            assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
            assert_eq!(status.get_details_error_info().unwrap().reason, "IN_USE");
            assert!(
                status.message().contains(&second),
                "the job that needs it is not named: {status}"
            );
        }
        assert_eq!(
            score(&client, &latest(&second), pairs()).await.results,
            before.results
        );
        delete(&client, &second).await.unwrap();
        delete(&client, &first).await.unwrap();
    }
    // A job may be deleted if it is only the policy of another job, or if the job that has it as
    // its reference has no checkpoints.
    let first = train(&client, job(&dataset, 2)).await;
    let second = train(
        &client,
        pb::TrainingJob {
            reference: "models/tiny".into(),
            ..implied(&first)
        },
    )
    .await;
    delete(&client, &first).await.unwrap();
    score(&client, &latest(&second), pairs()).await;
    let first = train(&client, job(&dataset, 2)).await;
    let second = train(&client, named(&first)).await;
    delete_checkpoint(&client, &format!("{second}/checkpoints/2"))
        .await
        .unwrap();
    delete(&client, &first).await.unwrap();
}
