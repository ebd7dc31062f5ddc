//! Trained rewards: TRL's logs, a job's metrics, the choice of the best checkpoint and served
//! scores have the same numbers.

use std::collections::BTreeMap;
use std::process::Command;

use bradley::domain::dpo::{DpoConfig, LossType, WeightedLoss};
use bradley::domain::training::{
    BatchConfig, BestMetric, LoraConfig, Method, OptimizerConfig, RunConfig, ScheduleKind,
    TrainingSpec,
};
use bradley::infer::pair::EncodedPair;
use bradley::rpc::client::Client;
use bradley::rpc::pb::{self, RewardNormalization as Normalization, training_event::Event};
use bradley::train::event::RunEvent;
use bradley::train::reference::Reference;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::golden_training::{Run, events, train};
use crate::server::{
    Server, create, finish, get, is_step, job, pairs, pause, score, score_with, scored, state,
    submit, until_event, upload,
};
use crate::support::{assert_close, binary, encode, golden, json, rows, tiny};

/// Returns an objective of one loss.
fn objective(loss: &str) -> pb::DpoConfig {
    // SimPO's usual β; the other losses have TRL's default.
    let beta = (loss == "simpo").then_some(2.0);
    pb::DpoConfig {
        losses: vec![term(loss)],
        beta,
        ..Default::default()
    }
}

fn term(loss: &str) -> pb::WeightedLoss {
    pb::WeightedLoss {
        loss_type: loss.into(),
        ..Default::default()
    }
}

/// Returns a job on the golden rows that is evaluated on the same rows after its last step, in
/// batches of 4 and 2.
fn evaluated(dataset: &str, steps: u64, dpo: pb::DpoConfig) -> pb::TrainingJob {
    let wanted = job(dataset, steps);
    pb::TrainingJob {
        batch: Some(pb::BatchConfig {
            batch_size: Some(4),
            ..wanted.batch.unwrap()
        }),
        evaluation: Some(pb::training_job::Evaluation::EvalDataset(dataset.into())),
        dpo: Some(dpo),
        ..wanted
    }
}

/// Runs a job to its end, and returns its name and its last evaluation.
async fn run(client: &Client, wanted: pb::TrainingJob) -> (String, BTreeMap<String, f64>) {
    let name = submit(client, wanted).await;
    let all = finish(client, &name).await;
    assert_eq!(state(client, &name).await, pb::JobState::Succeeded);
    let last = all.into_iter().rev().find_map(|e| match e.event {
        Some(Event::EvalMetrics(e)) => Some(e.metrics),
        _ => None,
    });
    (name, last.unwrap())
}

/// Returns the mean over the rows, added in their order as in an evaluation.
fn mean(scores: &pb::ScorePairsResponse, value: impl Fn(&pb::PairScore) -> f64) -> f64 {
    let mut sum = 0.0;
    for result in &scores.results {
        sum += value(scored(result));
    }
    sum / scores.results.len() as f64
}

/// Asserts that scores give the evaluation's numbers bit for bit. `rewards` is the prefix of the
/// metrics.
fn assert_evaluated(
    what: &str,
    scores: &pb::ScorePairsResponse,
    evaluation: &BTreeMap<String, f64>,
    rewards: &str,
) {
    let metric = |name: &str| evaluation[&format!("eval_{rewards}/{name}")];
    assert_eq!(mean(scores, |s| s.margin), metric("margins"), "{what}");
    assert_eq!(
        mean(scores, |s| s.a.as_ref().unwrap().reward),
        metric("chosen"),
        "{what}"
    );
    assert_eq!(
        mean(scores, |s| s.b.as_ref().unwrap().reward),
        metric("rejected"),
        "{what}"
    );
    assert_eq!(
        mean(scores, |s| f64::from(s.margin > 0.0)),
        metric("accuracies"),
        "{what}"
    );
    assert_ne!(metric("margins"), 0.0, "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn served_rewards_are_those_of_the_evaluation_to_the_last_bit() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    for (loss, is_mean) in [
        ("simpo", true),
        ("ipo", true),
        ("sigmoid_norm", true),
        ("orpo", true),
        ("sigmoid", false),
        ("sft", false),
    ] {
        let (name, evaluation) = run(&client, evaluated(&dataset, 3, objective(loss))).await;
        let policy = format!("{name}/checkpoints/latest");
        let served = score(&client, &policy, pairs()).await;
        assert_eq!(
            served.normalization(),
            if is_mean {
                Normalization::Mean
            } else {
                Normalization::Sum
            },
            "{loss}"
        );
        assert!(served.warnings.is_empty(), "{:?}", served.warnings);
        assert_evaluated(
            loss,
            &served,
            &evaluation,
            if is_mean {
                "rewards_normalized"
            } else {
                "rewards"
            },
        );
        assert_eq!(
            evaluation
                .keys()
                .any(|name| name.starts_with("eval_rewards_normalized/")),
            is_mean,
            "{loss}"
        );
        let has_reference = !["simpo", "orpo"].contains(&loss);
        assert_eq!(
            served.reference_version,
            if has_reference { "models/tiny" } else { "" },
            "{loss}"
        );

        // The formula, computed from the answer's own fields.
        let beta = if loss == "simpo" { 2.0 } else { 0.1 };
        for result in &served.results {
            let s = scored(result);
            for side in [s.a.as_ref().unwrap(), s.b.as_ref().unwrap()] {
                let tokens = if is_mean { side.tokens as f64 } else { 1.0 };
                let expected = beta * (side.policy_logprob - side.reference_logprob) / tokens;
                assert_close(loss, side.reward, expected, 1e-12, 1e-12);
            }
            assert_close(
                loss,
                s.probability,
                1.0 / (1.0 + (-s.margin).exp()),
                1e-12,
                1e-12,
            );
        }

        // The other normalization, on request. `rewards/*` are sums if DPOTrainer has the loss, and
        // means for SimPO and ORPO.
        let options = |n: Normalization| pb::ScoringOptions {
            policy: policy.clone(),
            normalization: n.into(),
            ..Default::default()
        };
        let sums = score_with(&client, options(Normalization::Sum))
            .await
            .unwrap();
        assert_eq!(sums.normalization(), Normalization::Sum);
        if has_reference {
            assert_evaluated(loss, &sums, &evaluation, "rewards");
        }
        let means = score_with(&client, options(Normalization::Mean))
            .await
            .unwrap();
        assert_eq!(means.normalization(), Normalization::Mean);
        if !has_reference {
            assert_evaluated(loss, &means, &evaluation, "rewards");
        }
        assert_ne!(
            mean(&sums, |s| s.margin),
            mean(&means, |s| s.margin),
            "{loss}"
        );
    }
}

#[test]
fn rewards_of_simpo_and_orpo_are_logged_as_trls_trainers_do() {
    let golden = json("rewards.json");
    let (model, tokenizer) = tiny("llama");
    let pairs = encode(&rows("pairs.jsonl")[..4], &tokenizer, 256);
    for (name, case) in golden["logged"].as_object().unwrap() {
        let beta = case["settings"]["beta"].as_f64().unwrap();
        let loss = LossType::parse(name).unwrap();
        let dpo = DpoConfig {
            losses: vec![WeightedLoss::new(loss, 1.0)],
            beta,
            orpo_lambda: beta,
            ..DpoConfig::default()
        };
        let spec = TrainingSpec {
            method: Method::Full,
            optimizer: OptimizerConfig {
                learning_rate: 1e-9,
                schedule: ScheduleKind::Constant,
                ..Default::default()
            },
            batch: BatchConfig {
                batch_size: 4,
                max_steps: Some(1),
                shuffle: false,
                max_length: 256,
                ..Default::default()
            },
            dpo,
            ..Default::default()
        };
        let steps = train(Run {
            reference: Reference::None,
            ..Run::full(&model, &model, pairs.clone(), spec)
        });
        for (metric, want) in case["metrics"].as_object().unwrap() {
            let want = want.as_f64().unwrap();
            assert_close(
                &format!("{name} {metric}"),
                steps[0][metric.as_str()],
                want,
                1e-4,
                1e-2,
            );
            let normalized = metric.replace("rewards/", "rewards_normalized/");
            assert_eq!(
                steps[0][metric.as_str()],
                steps[0][&normalized],
                "{name} {metric}"
            );
        }
        if let Some(want) = case["loss"].as_f64() {
            assert_close(&format!("{name} loss"), steps[0]["loss"], want, 1e-4, 1e-2);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sft_job_logs_trls_metrics_with_rewards() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let golden = &json("rewards.json")["sft"];
    let steps = golden["steps"].as_array().unwrap();
    let mut wanted = job(&dataset, steps.len() as u64);
    wanted.method = Some(pb::training_job::Method::Full(pb::FullConfig {}));
    wanted.dpo = Some(objective("sft"));
    let learning_rate = golden["settings"]["learning_rate"].as_f64();
    wanted.optimizer = Some(pb::OptimizerConfig {
        learning_rate,
        lr_scheduler_type: "constant".into(),
        ..Default::default()
    });
    wanted.batch = Some(pb::BatchConfig {
        shuffle: Some(false),
        ..wanted.batch.unwrap()
    });
    let name = submit(&client, wanted).await;
    let logged = finish(&client, &name)
        .await
        .into_iter()
        .filter_map(|e| match e.event {
            Some(Event::StepMetrics(s)) => Some(s.metrics),
            _ => None,
        });
    let logged: Vec<BTreeMap<String, f64>> = logged.collect();
    assert_eq!(logged.len(), steps.len());
    for (k, (got, want)) in logged.iter().zip(steps).enumerate() {
        for (metric, value) in want.as_object().unwrap() {
            let what = format!("step {} {metric}", k + 1);
            assert_close(&what, got[metric], value.as_f64().unwrap(), 1e-3, 1e-2);
        }
    }
    assert!(logged[3]["rewards/margins"] > 0.5, "{logged:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_reference_is_used_where_no_loss_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let (first, _) = run(&client, evaluated(&dataset, 2, objective("sigmoid"))).await;
    let reference = format!("{first}/checkpoints/2");
    for (loss, rewards) in [
        ("simpo", "rewards_normalized"),
        ("orpo", "rewards_normalized"),
        ("sft", "rewards"),
    ] {
        let wanted = pb::TrainingJob {
            reference: reference.clone(),
            ..evaluated(&dataset, 3, objective(loss))
        };
        let (name, evaluation) = run(&client, wanted).await;
        let served = score(&client, &format!("{name}/checkpoints/latest"), pairs()).await;
        assert_eq!(served.reference_version, reference, "{loss}");
        assert_evaluated(loss, &served, &evaluation, rewards);
    }
    // A reference that the objective rules out is refused, not ignored.
    let dpo = pb::DpoConfig {
        reference_free: true,
        ..Default::default()
    };
    let wanted = pb::TrainingJob {
        reference,
        ..evaluated(&dataset, 3, dpo)
    };
    assert_violation(create(&client, wanted).await, "training_job.reference");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_of_tr_dpo_is_scored_against_the_reference_that_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let dpo = pb::DpoConfig {
        reference_sync: Some(pb::ReferenceSync {
            alpha: Some(0.5),
            every_steps: Some(2),
        }),
        ..Default::default()
    };
    let mut wanted = evaluated(&dataset, 5, dpo);
    wanted.method = Some(pb::training_job::Method::Full(pb::FullConfig {}));
    wanted.optimizer = Some(pb::OptimizerConfig {
        learning_rate: Some(1e-3),
        ..Default::default()
    });
    wanted.run = Some(pb::RunConfig {
        save_steps: Some(2),
        ..Default::default()
    });
    let (name, evaluation) = run(&client, wanted).await;
    let policy = format!("{name}/checkpoints/5");
    let served = score(&client, &policy, pairs()).await;
    assert_eq!(served.reference_version, format!("{policy}/reference"));
    assert_evaluated("TR-DPO", &served, &evaluation, "rewards");
    let options = pb::ScoringOptions {
        policy,
        reference: "models/tiny".into(),
        ..Default::default()
    };
    let against_start = score_with(&client, options).await.unwrap();
    assert_ne!(
        mean(&against_start, |s| s.margin),
        mean(&served, |s| s.margin),
        "the reference has not moved"
    );

    // Without its reference file a checkpoint is refused with the reason, and can still be scored
    // against a named reference.
    let policy = format!("{name}/checkpoints/4");
    let named = pb::ScoringOptions {
        policy: policy.clone(),
        reference: "models/tiny".into(),
        ..Default::default()
    };
    score_with(&client, named.clone()).await.unwrap();
    let folder = find(dir.path(), "reference.safetensors")
        .into_iter()
        .find(|path| path.parent().unwrap().ends_with("4"));
    std::fs::remove_file(folder.unwrap()).unwrap();
    let status = score_with(
        &client,
        pb::ScoringOptions {
            policy,
            ..Default::default()
        },
    )
    .await
    .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert_eq!(
        status.get_details_error_info().unwrap().reason,
        "NO_REFERENCE"
    );
    assert!(
        status.message().contains("reference.safetensors")
            && status.message().contains("name a reference"),
        "{status}"
    );
    score_with(&client, named).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_of_tr_dpo_is_scored_against_its_reference_as_it_is_at_that_step() {
    for precision in ["f32", "bf16"] {
        let dir = tempfile::tempdir().unwrap();
        let models = format!("tiny={}", golden("models/llama").display());
        let server = Server::start_with(dir.path(), &models, &["--precision", precision]);
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await.name;
        // After each step the reference equals the policy of that step, so margins against it are
        // 0. A reference of another step, as in a checkpoint, would give other margins.
        let reference_sync = Some(pb::ReferenceSync {
            alpha: Some(1.0),
            every_steps: Some(1),
        });
        let wanted = pb::TrainingJob {
            method: Some(pb::training_job::Method::Full(pb::FullConfig {})),
            dpo: Some(pb::DpoConfig {
                reference_sync,
                ..Default::default()
            }),
            optimizer: Some(pb::OptimizerConfig {
                learning_rate: Some(1e-3),
                ..Default::default()
            }),
            run: Some(pb::RunConfig {
                save_steps: Some(3),
                save_total_limit: Some(1),
                ..Default::default()
            }),
            ..job(&dataset, 100_000)
        };
        let name = submit(&client, wanted).await;
        let policy = format!("{name}/checkpoints/latest");
        until_event(&client, &name, |e| is_step(e, 5)).await;

        use pb::stream_score_pairs_request::Part;
        let options = pb::ScoringOptions {
            policy: policy.clone(),
            per_token_logprobs: true,
            ..Default::default()
        };
        let ask = |part: Part| pb::StreamScorePairsRequest { part: Some(part) };
        let (messages, receiver) = tokio::sync::mpsc::channel(4);
        messages
            .send(ask(Part::Options(options.clone())))
            .await
            .unwrap();
        messages
            .send(ask(Part::Pair(pairs().remove(0))))
            .await
            .unwrap();
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut stream = client
            .scoring()
            .stream_score_pairs(stream)
            .await
            .unwrap()
            .into_inner();
        let answer = stream.message().await.unwrap().unwrap();
        assert!(
            answer.policy_version.starts_with(&format!("{policy}@")),
            "{}",
            answer.policy_version
        );
        assert_eq!(
            scored(&answer.result.unwrap()).margin,
            0.0,
            "{precision}, streamed from {}",
            answer.policy_version
        );

        let served = score(&client, &policy, pairs()).await;
        assert_eq!(served.reference_version, format!("{policy}/reference"));
        assert!(
            served.warnings.iter().any(|w| w.contains("TR-DPO")),
            "{:?}",
            served.warnings
        );
        for result in &served.results {
            assert_eq!(scored(result).margin, 0.0, "{precision}, {}", result.id);
        }
        // A named reference is used.
        let against_start = score_with(
            &client,
            pb::ScoringOptions {
                reference: "models/tiny".into(),
                ..options
            },
        )
        .await
        .unwrap();
        assert!(
            against_start
                .results
                .iter()
                .any(|r| scored(r).margin != 0.0),
            "the policy has not changed"
        );
        assert_eq!(state(&client, &name).await, pb::JobState::Running);

        // The stream was opened while the job ran. After the pause it scores with the checkpoint,
        // against the checkpoint's reference.
        pause(&client, &name).await;
        messages
            .send(ask(Part::Pair(pairs().remove(0))))
            .await
            .unwrap();
        drop(messages);
        let answer = stream.message().await.unwrap().unwrap();
        let stored = score(&client, &policy, pairs()).await;
        assert!(
            stored.reference_version.ends_with("/reference")
                && !stored.reference_version.contains("latest"),
            "{stored:?}"
        );
        assert_eq!(
            scored(&answer.result.unwrap()),
            scored(&stored.results[0]),
            "{precision}"
        );
        assert!(stream.message().await.unwrap().is_none());
    }
}

/// Returns the files with this name below a folder.
fn find(folder: &std::path::Path, name: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(find(&path, name));
        } else if path.ends_with(name) {
            found.push(path);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_warn_that_policy_and_reference_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let options = pb::ScoringOptions {
        policy: "models/tiny".into(),
        ..Default::default()
    };
    let is_warned = |warnings: &[String]| {
        warnings
            .iter()
            .any(|w| w.contains("the same weights") && w.contains("0.5"))
    };
    let scores = score_with(&client, options.clone()).await.unwrap();
    assert!(is_warned(&scores.warnings), "{:?}", scores.warnings);
    assert_eq!(scores.normalization(), Normalization::Sum);
    assert!(scores.results.iter().all(|r| scored(r).probability == 0.5));

    let pair = pairs().remove(0);
    let completions = vec![pair.a.unwrap(), pair.b.unwrap()];
    let request = pb::ScoreCompletionsRequest {
        options: Some(options.clone()),
        prompt: pair.prompt,
        completions,
    };
    let answer = client
        .scoring()
        .score_completions(request)
        .await
        .unwrap()
        .into_inner();
    assert!(is_warned(&answer.warnings), "{:?}", answer.warnings);
    assert_eq!(answer.normalization(), Normalization::Sum);

    // A stream has the warning once.
    use pb::stream_score_pairs_request::Part;
    let mut messages = vec![pb::StreamScorePairsRequest {
        part: Some(Part::Options(options.clone())),
    }];
    messages.extend(pairs().into_iter().map(|p| pb::StreamScorePairsRequest {
        part: Some(Part::Pair(p)),
    }));
    let mut stream = client
        .scoring()
        .stream_score_pairs(tokio_stream::iter(messages))
        .await
        .unwrap()
        .into_inner();
    let mut warned = Vec::new();
    while let Some(answer) = stream.message().await.unwrap() {
        assert_eq!(answer.normalization(), Normalization::Sum);
        warned.push(is_warned(&answer.warnings));
    }
    assert!(
        warned.len() == pairs().len() && warned[0] && !warned[1..].contains(&true),
        "{warned:?}"
    );

    let unknown = pb::ScoringOptions {
        normalization: 9,
        ..options
    };
    assert_violation(score_with(&client, unknown).await, "options.normalization");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_loss_of_a_mix_may_smooth_labels_on_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let smoothed = |loss: &str, eps: f64| pb::WeightedLoss {
        label_smoothing: Some(eps),
        ..term(loss)
    };
    let wanted = |losses: Vec<pb::WeightedLoss>| {
        evaluated(
            &dataset,
            1,
            pb::DpoConfig {
                losses,
                ..Default::default()
            },
        )
    };
    // TRL's mix: exo_pair smooths, sigmoid does not.
    let name = submit(
        &client,
        wanted(vec![smoothed("exo_pair", 1e-3), term("sigmoid")]),
    )
    .await;
    finish(&client, &name).await;
    assert_eq!(state(&client, &name).await, pb::JobState::Succeeded);
    let stored = get(&client, &name).await.dpo.unwrap();
    assert_eq!(stored.losses[0].label_smoothing, Some(1e-3));
    assert_eq!(
        (stored.losses[1].label_smoothing, stored.label_smoothing),
        (None, Some(0.0))
    );

    for (term, field) in [
        (
            smoothed("hinge", 0.1),
            "training_job.dpo.losses[0].label_smoothing",
        ),
        (
            smoothed("sigmoid", 0.5),
            "training_job.dpo.losses[0].label_smoothing",
        ),
        (
            smoothed("exo_pair", 0.0),
            "training_job.dpo.losses[0].label_smoothing",
        ),
        (term("exo_pair"), "training_job.dpo.label_smoothing"),
    ] {
        assert_violation(create(&client, wanted(vec![term])).await, field);
    }
}

/// Checks that a call is refused because of this field only.
fn assert_violation<T: std::fmt::Debug>(answer: Result<T, Status>, field: &str) {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let fields: Vec<String> = status
        .get_details_bad_request()
        .unwrap()
        .field_violations
        .into_iter()
        .map(|v| v.field)
        .collect();
    assert_eq!(fields, [field], "{status}");
}

/// Returns the steps with a better value than all steps before.
fn records(evaluations: &[(u64, f64)]) -> Vec<u64> {
    let mut best = f64::NEG_INFINITY;
    let mut steps = Vec::new();
    for (step, value) in evaluations {
        if *value > best {
            best = *value;
            steps.push(*step);
        }
    }
    steps
}

#[test]
fn the_best_checkpoint_has_the_highest_margin_of_the_trained_reward() {
    let (model, tokenizer) = tiny("llama");
    let pairs = encode(&rows("pairs.jsonl"), &tokenizer, 256);
    let cut = |tokens: &[u32]| tokens[..2].to_vec();
    let short_rejected: Vec<EncodedPair> = pairs
        .iter()
        .map(|p| EncodedPair {
            rejected: cut(&p.rejected),
            ..p.clone()
        })
        .collect();
    let short_chosen: Vec<EncodedPair> = pairs
        .iter()
        .map(|p| EncodedPair {
            chosen: cut(&p.chosen),
            ..p.clone()
        })
        .collect();
    let wrong: Vec<EncodedPair> = pairs
        .iter()
        .map(|p| EncodedPair {
            chosen: p.rejected.clone(),
            rejected: cut(&p.chosen),
            ..p.clone()
        })
        .collect();
    // Long answers that training prefers dominate the sums; short ones that it does not prefer
    // dominate the means.
    let short_and_wrong = |p: &EncodedPair| EncodedPair {
        chosen: cut(&p.rejected),
        rejected: cut(&p.chosen),
        ..p.clone()
    };
    let mixed: Vec<EncodedPair> = pairs
        .iter()
        .take(1)
        .cloned()
        .chain(pairs.iter().map(short_and_wrong))
        .collect();
    // Number of evaluations in which sums and means choose other steps.
    let mut differ = 0;
    for eval in [short_rejected, short_chosen, wrong, mixed] {
        let spec = TrainingSpec {
            dpo: DpoConfig {
                losses: vec![WeightedLoss::new(LossType::Ipo, 1.0)],
                ..DpoConfig::default()
            },
            method: Method::Lora(LoraConfig::default()),
            optimizer: OptimizerConfig {
                learning_rate: 2e-2,
                ..Default::default()
            },
            batch: BatchConfig {
                batch_size: 2,
                max_length: 256,
                max_steps: Some(10),
                ..Default::default()
            },
            run: RunConfig {
                eval_steps: 1,
                metric_for_best: BestMetric::EvalMargin,
                ..Default::default()
            },
            ..Default::default()
        };
        let run = Run {
            eval,
            ..Run::lora(&model, "adapters/llama-start", pairs.clone(), spec)
        };
        let folder = run.folder.clone();
        let all = events(run);
        std::fs::remove_dir_all(folder).unwrap();
        let margins = |rewards: &str| -> Vec<(u64, f64)> {
            let name = format!("eval_{rewards}/margins");
            let of = |e: &RunEvent| match e {
                RunEvent::Eval { step, metrics } => Some((*step, metrics[&name])),
                _ => None,
            };
            all.iter().filter_map(of).collect()
        };
        let best: Vec<u64> = all
            .iter()
            .filter_map(|e| match e {
                RunEvent::Checkpoint {
                    step, best: true, ..
                } => Some(*step),
                _ => None,
            })
            .collect();
        let (sums, means) = (
            records(&margins("rewards")),
            records(&margins("rewards_normalized")),
        );
        assert_eq!(best, means);
        differ += usize::from(sums != means);
    }
    assert!(
        differ > 0,
        "sums and means choose the same steps, so these rows test nothing"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_asks_for_a_normalization_and_says_which_was_used() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let (name, evaluation) = run(&client, evaluated(&dataset, 2, objective("ipo"))).await;
    let file = golden("pairs.jsonl");
    let policy = format!("{name}/checkpoints/latest");
    let bradley = |policy: &str, more: &[&str]| {
        let args = [
            "score",
            "--policy",
            policy,
            "--data",
            file.to_str().unwrap(),
        ];
        let done = Command::new(binary())
            .args(args)
            .args(more)
            .env("BRADLEY_SERVER", &server.address)
            .env_remove("BRADLEY_CONFIG")
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
        String::from_utf8([done.stdout, done.stderr].concat()).unwrap()
    };
    for (more, used, metric) in [
        (&[][..], "means", "eval_rewards_normalized/margins"),
        (
            &["--normalization", "mean"],
            "means",
            "eval_rewards_normalized/margins",
        ),
        (&["--normalization", "sum"], "sums", "eval_rewards/margins"),
    ] {
        let said = bradley(&policy, more);
        assert!(
            said.contains(&format!("rewards are {used} over tokens")),
            "{said}"
        );
        assert!(
            said.contains(&format!("mean margin {:+.3}", evaluation[metric])),
            "{said}"
        );
    }
    let lines = bradley(&policy, &["--format", "json"]);
    // The other lines are from standard error.
    let scores: Vec<serde_json::Value> = lines
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        !scores.is_empty() && scores.iter().all(|score| score["normalization"] == "mean"),
        "{lines}"
    );
    let said = bradley("models/tiny", &[]);
    assert_eq!(
        said.matches("warning: policy and reference are the same weights")
            .count(),
        1,
        "{said}"
    );
}
