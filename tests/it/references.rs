//! References on another model: any two models whose token ids mean the same can be policy and
//! reference, in training and in scoring.

use std::collections::HashMap;
use std::path::Path;

use bradley::rpc::client::{Client, Status};
use bradley::rpc::pb::{self, training_event::Event};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use tempfile::TempDir;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::server::{
    Server, assert_refused, assert_waits, create, finish, get, is_step, job, latest, pairs, pause,
    reason, resume, score, score_with, scored, state, submit, succeed, until_event, upload,
};
use crate::support::{
    assert_close, copy_files, golden, hashes, json, numbers, perturb_weights, replace,
};

/// Steps of a job that is paused before its end. It must last for seconds, because a busy machine
/// may pause it late.
const STEPS: u64 = 300;
/// β of the scores, which is the default.
const BETA: f64 = 0.1;

/// Returns the `--models` flag for golden models under their own names.
pub fn models(names: &[&str]) -> String {
    let named = names
        .iter()
        .map(|name| format!("{name}={}", golden(&format!("models/{name}")).display()));
    named.collect::<Vec<_>>().join(",")
}

/// Scores the golden pairs with a policy against a reference.
async fn score_against(
    client: &Client,
    policy: &str,
    reference: &str,
) -> Result<pb::ScorePairsResponse, Status> {
    let options = pb::ScoringOptions {
        policy: policy.into(),
        reference: reference.into(),
        per_token_logprobs: true,
        ..Default::default()
    };
    score_with(client, options).await
}

/// Returns a LoRA job on one model with a reference on another.
fn job_against(dataset: &str, steps: u64, policy: &str, reference: &str) -> pb::TrainingJob {
    pb::TrainingJob {
        policy: policy.into(),
        reference: reference.into(),
        ..job(dataset, steps)
    }
}

fn full() -> Option<pb::training_job::Method> {
    Some(pb::training_job::Method::Full(pb::FullConfig::default()))
}

/// Checks that an answer is a refusal of `field`, and returns its message.
fn refusal<T>(what: &str, answer: Result<T, Status>, field: &str) -> String {
    let Err(status) = answer else {
        panic!("{what} is accepted")
    };
    assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
    let violations = status.get_details_bad_request().unwrap().field_violations;
    assert_eq!(violations[0].field, field, "{what}");
    violations[0].description.clone()
}

// ---- numbers

#[tokio::test(flavor = "multi_thread")]
async fn scores_against_another_model_are_those_of_transformers() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_with(
        data.path(),
        &models(&["llama", "llama-ref", "qwen2", "qwen3"]),
        &[],
    );
    let client = server.client().await;
    for case in json("references.json").as_array().unwrap() {
        let name = |key: &str| format!("models/{}", case[key].as_str().unwrap());
        let scores = score_against(&client, &name("policy"), &name("reference"))
            .await
            .unwrap();
        assert_eq!(
            (scores.policy_version, scores.reference_version),
            (name("policy"), name("reference"))
        );
        assert_eq!(
            scores.results.len(),
            case["scores"].as_object().unwrap().len()
        );
        for result in &scores.results {
            let (pair, golden) = (scored(result), &case["scores"][&result.id]);
            // β·(Σlog π_w − Σlog ref_w − Σlog π_l + Σlog ref_l), from golden log-probs.
            let mut margin = 0.0;
            for (side, side_sign, answer) in [("chosen", 1.0, &pair.a), ("rejected", -1.0, &pair.b)]
            {
                let answer = answer.as_ref().unwrap();
                let what = format!("{} {} {side}", name("policy"), result.id);
                let models = [
                    ("policy", &answer.policy_token_logprobs, 1.0),
                    ("reference", &answer.reference_token_logprobs, -1.0),
                ];
                for (model, got, model_sign) in models {
                    let want = numbers(&golden[side][model]);
                    assert_eq!(got.len(), want.len(), "{what}");
                    for (g, w) in got.iter().zip(&want) {
                        assert_close(&what, f64::from(*g), *w, 1e-5, 0.1);
                    }
                    margin += side_sign * model_sign * BETA * want.iter().sum::<f64>();
                }
            }
            assert_close(&result.id, pair.margin, margin, 1e-4, 1.0);
        }
    }
}

/// Returns a job with the settings of a golden run.
pub fn golden_job(dataset: &str, case: &Value, kind: &str) -> pb::TrainingJob {
    let settings = &case["runs"][kind]["settings"];
    let policy = case["policy"].as_str().unwrap();
    let method = match kind {
        "full" => full(),
        _ => {
            let init_adapter = format!("{policy}-start");
            let lora = pb::LoraConfig {
                rank: Some(4),
                alpha: Some(8.0),
                init_adapter,
                ..Default::default()
            };
            Some(pb::training_job::Method::Lora(lora))
        }
    };
    let optimizer = pb::OptimizerConfig {
        learning_rate: settings["learning_rate"].as_f64(),
        weight_decay: Some(0.0),
        lr_scheduler_type: "constant".into(),
        warmup_steps: Some(0),
        ..Default::default()
    };
    let batch = pb::BatchConfig {
        batch_size: Some(2),
        max_length: Some(256),
        max_steps: settings["max_steps"].as_u64(),
        shuffle: Some(false),
        ..Default::default()
    };
    pb::TrainingJob {
        display_name: "golden".into(),
        policy: format!("models/{policy}"),
        reference: format!("models/{}", case["reference"].as_str().unwrap()),
        dataset: dataset.into(),
        method,
        optimizer: Some(optimizer),
        batch: Some(batch),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn training_against_another_model_tracks_trl_on_one_device_and_on_two() {
    let adapters = golden("adapters");
    let names = models(&["llama", "llama-ref", "qwen2", "qwen3"]);
    for devices in [vec![], vec!["--device", "cpu,cpu", "--data-parallel", "2"]] {
        let data = tempfile::tempdir().unwrap();
        let flags = [vec!["--adapter-dir", adapters.to_str().unwrap()], devices].concat();
        let server = Server::start_with(data.path(), &names, &flags);
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await.name;
        for case in json("references.json").as_array().unwrap() {
            for kind in ["full", "lora"] {
                let name = submit(&client, golden_job(&dataset, case, kind)).await;
                let events = finish(&client, &name).await;
                let ended = get(&client, &name).await;
                assert_eq!(ended.state(), pb::JobState::Succeeded, "{:?}", ended.error);
                let steps = events.into_iter().filter_map(|e| match e.event {
                    Some(Event::StepMetrics(step)) => Some(step.metrics),
                    _ => None,
                });
                let (got, want) = (
                    steps.collect::<Vec<_>>(),
                    case["runs"][kind]["steps"].as_array().unwrap(),
                );
                assert_eq!(got.len(), want.len());
                for (k, (got, want)) in got.iter().zip(want).enumerate() {
                    for (metric, value) in want.as_object().unwrap() {
                        let what = format!("{} {kind} step {} {metric}", case["policy"], k + 1);
                        let tolerance = if metric == "loss" || metric == "grad_norm" {
                            1e-4
                        } else {
                            1e-3
                        };
                        assert_close(&what, got[metric], value.as_f64().unwrap(), tolerance, 1e-2);
                    }
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn margins_of_a_running_job_that_equals_its_reference_are_0_in_any_precision() {
    for (server, precision) in [("f32", "bf16"), ("bf16", "f32")] {
        let data = tempfile::tempdir().unwrap();
        let server = Server::start_with(data.path(), &models(&["llama"]), &["--precision", server]);
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await.name;
        // Steps of this size change no bit of any result.
        let optimizer = Some(pb::OptimizerConfig {
            learning_rate: Some(1e-35),
            ..Default::default()
        });
        let still = pb::TrainingJob {
            policy: "models/llama".into(),
            precision: precision.into(),
            optimizer,
            ..job(&dataset, 100_000)
        };
        let name = submit(&client, still).await;
        until_event(&client, &name, |e| is_step(e, 1)).await;
        let scores = score(&client, &latest(&name), pairs()).await;
        assert_eq!(state(&client, &name).await, pb::JobState::Running);
        for result in &scores.results {
            assert_eq!(scored(result).margin, 0.0, "{} in {precision}", result.id);
        }
    }
}

// ---- references that are refused

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_with_another_tokenizer_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_with(data.path(), &models(&["llama", "qwen2"]), &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let on_other = submit(
        &client,
        pb::TrainingJob {
            policy: "models/qwen2".into(),
            ..job(&dataset, 1)
        },
    )
    .await;
    succeed(&client, &on_other).await;
    for reference in ["models/qwen2".to_owned(), latest(&on_other)] {
        let scores = score_against(&client, "models/llama", &reference).await;
        let made = create(
            &client,
            job_against(&dataset, 1, "models/llama", &reference),
        )
        .await;
        for message in [
            refusal("scoring", scores, "options.reference"),
            refusal("training", made, "training_job.reference"),
        ] {
            assert_eq!(hashes(&message).len(), 2, "{message}");
            assert!(
                message.contains("models/llama") && message.contains("models/qwen2"),
                "{message}"
            );
        }
    }
}

/// Copies a golden model and gives the copy this number of embedding rows; additional rows are
/// zeros.
fn copy_with_embedding_rows(name: &str, rows: usize) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_files(&golden(&format!("models/{name}")), folder.path());
    let old = "\"vocab_size\": 320";
    replace(
        folder.path().join("config.json"),
        old,
        &format!("\"vocab_size\": {rows}"),
    );
    let file = folder.path().join("model.safetensors");
    let mut tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let embedding = &tensors["model.embed_tokens.weight"];
    let (old_rows, width) = embedding.dims2().unwrap();
    let resized = match rows <= old_rows {
        true => embedding.narrow(0, 0, rows).unwrap().contiguous().unwrap(),
        false => {
            let zeros = Tensor::zeros((rows - old_rows, width), DType::F32, &Device::Cpu).unwrap();
            Tensor::cat(&[embedding, &zeros], 0).unwrap()
        }
    };
    tensors.insert("model.embed_tokens.weight".into(), resized);
    candle_core::safetensors::save(&tensors, file).unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_may_have_more_embeddings_than_tokens_but_not_fewer() {
    let (small, large) = (
        copy_with_embedding_rows("llama-ref", 300),
        copy_with_embedding_rows("llama-ref", 328),
    );
    // Another end-of-sequence token does not change what token ids mean.
    replace(
        large.path().join("tokenizer_config.json"),
        "\"eos_token\": \"<|eot_id|>\"",
        "\"eos_token\": \"<|begin|>\"",
    );
    let names = format!(
        "{},small={},large={}",
        models(&["llama"]),
        small.path().display(),
        large.path().display()
    );
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_with(data.path(), &names, &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let scores = score_against(&client, "models/llama", "models/small").await;
    let made = create(
        &client,
        job_against(&dataset, 1, "models/llama", "models/small"),
    )
    .await;
    for message in [
        refusal("scoring", scores, "options.reference"),
        refusal("training", made, "training_job.reference"),
    ] {
        assert!(
            message.contains("300") && message.contains("320"),
            "{message}"
        );
    }
    for (policy, reference) in [
        ("models/llama", "models/large"),
        ("models/large", "models/llama"),
    ] {
        let scores = score_against(&client, policy, reference).await.unwrap();
        assert!(scores.results.iter().all(|r| scored(r).margin != 0.0));
        let name = submit(&client, job_against(&dataset, 2, policy, reference)).await;
        succeed(&client, &name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reference_sync_needs_a_reference_of_the_policys_shape() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_with(
        data.path(),
        &models(&["llama", "llama-ref", "qwen2", "qwen3"]),
        &[],
    );
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let following = |policy: &str, reference: &str| {
        let reference_sync = Some(pb::ReferenceSync {
            alpha: Some(0.5),
            every_steps: Some(1),
        });
        let dpo = Some(pb::DpoConfig {
            reference_sync,
            ..Default::default()
        });
        pb::TrainingJob {
            method: full(),
            dpo,
            ..job_against(&dataset, 3, policy, reference)
        }
    };
    let made = create(&client, following("models/qwen2", "models/qwen3")).await;
    let message = refusal("training", made, "training_job.dpo.reference_sync");
    assert_eq!(hashes(&message).len(), 2, "{message}");
    let name = create(&client, following("models/llama", "models/llama-ref"))
        .await
        .unwrap()
        .name;
    let losses = succeed(&client, &name).await;
    // The first loss is relative to the other model, not to the policy itself.
    let first = f64::from_bits(losses[&1]);
    assert!((first - std::f64::consts::LN_2).abs() > 1e-2, "{first}");
}

// ---- references of jobs

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_can_be_a_checkpoint_on_another_model() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_with(data.path(), &models(&["qwen2", "qwen3"]), &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    for method in [job(&dataset, 2).method, full()] {
        let other = pb::TrainingJob {
            policy: "models/qwen3".into(),
            method,
            ..job(&dataset, 2)
        };
        let other = submit(&client, other).await;
        succeed(&client, &other).await;
        let alone = score(&client, &latest(&other), pairs()).await;
        let against = score_against(&client, "models/qwen2", &latest(&other))
            .await
            .unwrap();
        assert_eq!(against.reference_version, format!("{other}/checkpoints/2"));
        let name = submit(
            &client,
            job_against(&dataset, 3, "models/qwen2", &latest(&other)),
        )
        .await;
        assert_eq!(
            get(&client, &name).await.reference,
            against.reference_version
        );
        succeed(&client, &name).await;
        // Without a reference in the request the job's reference is used.
        let own = score(&client, &latest(&name), pairs()).await;
        assert_eq!(own.reference_version, against.reference_version);
        for ((alone, against), own) in alone.results.iter().zip(&against.results).zip(&own.results)
        {
            let [alone, against, own] =
                [alone, against, own].map(|r| scored(r).a.as_ref().unwrap());
            assert_eq!(
                against.reference_token_logprobs,
                alone.policy_token_logprobs
            );
            assert_eq!(own.reference_token_logprobs, alone.policy_token_logprobs);
        }
    }
    let estimate = async |reference: &str| {
        let training_job = Some(job_against(&dataset, 3, "models/qwen2", reference));
        let request = pb::EstimateTrainingJobRequest { training_job };
        client
            .training()
            .estimate_training_job(request)
            .await
            .unwrap()
            .into_inner()
            .memory_bytes
    };
    // The heads of qwen3 are wider, so its rows need more memory than the policy's.
    assert!(estimate("models/qwen3").await > estimate("").await);
}

/// Starts a server on a Llama `a` and on a copy of another one, `b`.
fn serve(data: &Path, b: &Path) -> Server {
    let names = format!("a={},b={}", golden("models/llama").display(), b.display());
    Server::start_with(data, &names, &["--lease", "2"])
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_and_scores_wait_until_a_changed_reference_is_back() {
    let (data, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let original = golden("models/llama-ref");
    copy_files(&original, b.path());
    let mut server = serve(data.path(), b.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let against = |steps| job_against(&dataset, steps, "models/a", "models/b");
    let undisturbed = submit(&client, against(STEPS)).await;
    let expected = succeed(&client, &undisturbed).await;
    let before = score(&client, &latest(&undisturbed), pairs()).await;
    assert_eq!(before.reference_version, "models/b");
    let paused = submit(&client, against(STEPS)).await;
    pause(&client, &paused).await;
    let saving = Some(pb::RunConfig {
        save_steps: Some(2),
        ..Default::default()
    });
    let running = submit(
        &client,
        pb::TrainingJob {
            run: saving,
            ..against(100_000)
        },
    )
    .await;
    until_event(&client, &running, |e| is_step(e, 5)).await;
    let queued = submit(&client, against(2)).await;
    server.kill();

    perturb_weights(b.path().join("model.safetensors"));
    let mut server = serve(data.path(), b.path());
    let client = server.client().await;
    let of_job = score_against(&client, &latest(&undisturbed), "").await;
    assert_refused("scoring", of_job, "weights");
    assert_refused("going on", resume(&client, &paused).await, "weights");
    assert_eq!(state(&client, &paused).await, pb::JobState::Paused);
    for waiting in [&running, &queued] {
        assert_waits(&client, waiting, "weights").await;
    }
    // Calls that do not need the old reference work, and new jobs get the new one.
    score_against(&client, &latest(&undisturbed), "models/a")
        .await
        .unwrap();
    let format = pb::ExportFormat::Merged.into();
    let export = pb::ExportCheckpointRequest {
        name: latest(&undisturbed),
        format,
        ..Default::default()
    };
    client
        .checkpoints()
        .export_checkpoint(export)
        .await
        .unwrap();
    let new = submit(&client, against(2)).await;
    let losses = succeed(&client, &new).await;
    assert_ne!(
        losses[&1], expected[&1],
        "the loss does not depend on the reference"
    );
    server.kill();

    // Without the reference's model there are no scores, either.
    let alone = format!("a={}", golden("models/llama").display());
    let mut server = Server::start_with(data.path(), &alone, &["--lease", "2"]);
    let client = server.client().await;
    let Err(status) = score_against(&client, &latest(&undisturbed), "").await else {
        panic!("there are scores without models/b")
    };
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::FailedPrecondition, "MODEL_CHANGED"),
        "{status:?}"
    );
    server.kill();

    copy_files(&original, b.path());
    let server = serve(data.path(), b.path());
    let client = server.client().await;
    let after = score(&client, &latest(&undisturbed), pairs()).await;
    for (a, b) in before.results.iter().zip(&after.results) {
        assert_eq!(scored(a), scored(b), "the scores have changed");
    }
    // The killed job continues from its checkpoint by itself, then the next one runs.
    let step = get(&client, &running)
        .await
        .progress
        .unwrap_or_default()
        .step;
    until_event(&client, &running, |e| is_step(e, step + 1)).await;
    let cancel = pb::CancelTrainingJobRequest {
        name: running.clone(),
    };
    client.training().cancel_training_job(cancel).await.unwrap();
    assert_eq!(succeed(&client, &queued).await.len(), 2);
    resume(&client, &paused).await.unwrap();
    assert_eq!(
        succeed(&client, &paused).await,
        expected,
        "the losses are not those of the undisturbed run"
    );
}
