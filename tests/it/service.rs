//! The service through its own client: the whole cycle, invalid input, and scores that depend only
//! on the pair.

use std::time::{Duration, Instant};

use bradley::rpc::pb;
use tonic::Code;
use tonic_types::StatusExt;

use crate::server::{
    Server, finish, get, job, pairs, score, scored, state, submit, try_get, upload,
};
use crate::support::golden;
use crate::wait::until;

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_trained_scored_exported_and_continued() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    assert!(client.health().await.unwrap());
    let dataset = upload(&client, "pairs.jsonl").await;
    assert_eq!(dataset.report.as_ref().unwrap().valid_rows, 6);
    let mut wanted = job(&dataset.name, 12);
    wanted.evaluation = Some(pb::training_job::Evaluation::EvalDataset(
        dataset.name.clone(),
    ));
    wanted.run = Some(pb::RunConfig {
        save_steps: Some(4),
        save_total_limit: Some(2),
        eval_steps: Some(6),
        ..Default::default()
    });
    let name = submit(&client, wanted).await;
    let events = finish(&client, &name).await;
    assert!(
        events
            .iter()
            .enumerate()
            .all(|(i, e)| e.sequence == i as u64 + 1),
        "the sequence numbers have a gap"
    );
    let losses: Vec<f64> = events
        .iter()
        .filter_map(|e| match &e.event {
            Some(pb::training_event::Event::StepMetrics(s)) => Some(s.metrics["loss"]),
            _ => None,
        })
        .collect();
    assert_eq!(losses.len(), 12);
    assert!(losses[11] < losses[0] / 2.0, "{losses:?}");
    assert_eq!(state(&client, &name).await, pb::JobState::Succeeded);

    let checkpoints = client
        .checkpoints()
        .list_checkpoints(pb::ListCheckpointsRequest {
            parent: name.clone(),
        })
        .await
        .unwrap()
        .into_inner()
        .checkpoints;
    let newest: Vec<u64> = checkpoints
        .iter()
        .filter(|c| !c.best)
        .map(|c| c.step)
        .collect();
    assert!(
        newest.len() <= 2
            && checkpoints.iter().any(|c| c.step == 12)
            && checkpoints.iter().any(|c| c.best),
        "{checkpoints:?}"
    );

    let before = score(&client, "models/tiny", pairs()).await;
    assert!(
        before
            .results
            .iter()
            .all(|r| scored(r).margin == 0.0 && scored(r).probability == 0.5)
    );
    let after = score(&client, &format!("{name}/checkpoints/latest"), pairs()).await;
    assert!(
        after
            .results
            .iter()
            .all(|r| scored(r).margin > 0.0 && scored(r).probability > 0.5)
    );
    assert_eq!(after.policy_version, format!("{name}/checkpoints/12"));
    assert_eq!(after.reference_version, "models/tiny");
    let first = scored(&after.results[0]);
    let a = first.a.as_ref().unwrap();
    assert_eq!(a.policy_token_logprobs.len(), a.tokens as usize);
    let total: f64 = a.policy_token_logprobs.iter().map(|x| *x as f64).sum();
    assert_eq!(total, a.policy_logprob);
    assert!((first.margin - (a.reward - first.b.as_ref().unwrap().reward)).abs() < 1e-12);

    for format in [pb::ExportFormat::Adapter, pb::ExportFormat::Merged] {
        let out = dir.path().join(format.as_str_name());
        let names = client
            .download_checkpoint(&format!("{name}/checkpoints/12"), format, &out)
            .await
            .unwrap();
        assert!(
            names.iter().any(|n| n.ends_with(".safetensors")),
            "{names:?}"
        );
    }
    // The merged model gives the same scores as the adapter.
    let merged = dir.path().join("EXPORT_FORMAT_MERGED");
    let other_dir = tempfile::tempdir().unwrap();
    let other = Server::start_with(
        other_dir.path(),
        &format!("merged={}", merged.display()),
        &[],
    );
    let from_merged = score(&other.client().await, "models/merged", pairs()).await;
    for (got, want) in from_merged.results.iter().zip(&after.results) {
        let logprob = |r: &pb::PairResult| scored(r).a.as_ref().unwrap().policy_logprob;
        let (got, want) = (logprob(got), logprob(want));
        assert!(
            (got - want).abs() < 1e-4 * want.abs(),
            "{got} is not {want}"
        );
    }

    // A job may start from another job's adapter, which is then also its reference.
    let mut more = job(&dataset.name, 2);
    more.policy = format!("{name}/checkpoints/latest");
    let second = submit(&client, more).await;
    let first_loss = finish(&client, &second)
        .await
        .into_iter()
        .find_map(|e| match e.event {
            Some(pb::training_event::Event::StepMetrics(s)) => Some(s.metrics["loss"]),
            _ => None,
        });
    // Exactly log 2, because policy and reference are the same weights.
    assert_eq!(first_loss.unwrap(), std::f64::consts::LN_2);
    client
        .training()
        .delete_training_job(pb::DeleteTrainingJobRequest {
            name: second.clone(),
        })
        .await
        .unwrap();
    let gone = try_get(&client, &second).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_fine_tune_is_scored_and_has_no_adapter_export() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let mut wanted = job(&dataset.name, 4);
    wanted.method = Some(pb::training_job::Method::Full(pb::FullConfig {}));
    wanted.optimizer = Some(pb::OptimizerConfig {
        learning_rate: Some(1e-3),
        ..Default::default()
    });
    wanted.dpo = Some(pb::DpoConfig {
        reference_sync: Some(pb::ReferenceSync {
            alpha: Some(0.5),
            every_steps: Some(2),
        }),
        ..Default::default()
    });
    let name = submit(&client, wanted).await;
    finish(&client, &name).await;
    assert_eq!(state(&client, &name).await, pb::JobState::Succeeded);
    let after = score(&client, &format!("{name}/checkpoints/latest"), pairs()).await;
    assert!(after.results.iter().any(|r| scored(r).margin > 0.0));
    let e = client
        .download_checkpoint(
            &format!("{name}/checkpoints/4"),
            pb::ExportFormat::Adapter,
            dir.path(),
        )
        .await
        .unwrap_err();
    assert!(e.to_string().contains("MERGED"), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_score_has_the_same_bits_alone_with_others_and_in_any_order() {
    for precision in ["f32", "bf16"] {
        assert_scores_depend_only_on_the_pair(precision).await;
    }
}

async fn assert_scores_depend_only_on_the_pair(precision: &str) {
    let dir = tempfile::tempdir().unwrap();
    let models = format!("tiny={}", golden("models/llama").display());
    let server = Server::start_with(dir.path(), &models, &["--precision", precision]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(&client, job(&dataset.name, 3)).await;
    finish(&client, &name).await;
    let policy = format!("{name}/checkpoints/latest");
    let mut many: Vec<pb::Pair> = Vec::new();
    for copy in 0..11 {
        many.extend(pairs().into_iter().map(|p| pb::Pair {
            id: format!("{}#{copy}", p.id),
            ..p
        }));
    }
    many.truncate(64);
    many.reverse();
    let together = score(&client, &policy, many).await.results;
    assert_eq!(together.len(), 64);
    let bits = |s: &pb::PairScore| {
        let side = |c: &pb::CompletionScore| -> Vec<u64> {
            let tokens = c
                .policy_token_logprobs
                .iter()
                .chain(&c.reference_token_logprobs)
                .map(|x| x.to_bits() as u64);
            tokens
                .chain([
                    c.reward.to_bits(),
                    c.policy_logprob.to_bits(),
                    c.reference_logprob.to_bits(),
                ])
                .collect()
        };
        (
            s.probability.to_bits(),
            s.margin.to_bits(),
            side(s.a.as_ref().unwrap()),
            side(s.b.as_ref().unwrap()),
        )
    };
    for pair in pairs() {
        let alone = bits(scored(
            &score(&client, &policy, vec![pair.clone()]).await.results[0],
        ));
        for r in together
            .iter()
            .filter(|r| r.id.split('#').next() == Some(&pair.id))
        {
            assert_eq!(bits(scored(r)), alone, "{}", r.id);
        }
        // Swapped answers give the mirrored score.
        let swapped = pb::Pair {
            a: pair.b.clone(),
            b: pair.a.clone(),
            ..pair.clone()
        };
        let mirrored = score(&client, &policy, vec![swapped]).await.results;
        assert_eq!(scored(&mirrored[0]).margin, -f64::from_bits(alone.1));
    }
    // The streaming call gives the same bits; its answers may come in any order.
    let options = pb::ScoringOptions {
        policy: policy.clone(),
        per_token_logprobs: true,
        ..Default::default()
    };
    let mut messages = vec![pb::StreamScorePairsRequest {
        part: Some(pb::stream_score_pairs_request::Part::Options(options)),
    }];
    messages.extend(pairs().into_iter().map(|p| pb::StreamScorePairsRequest {
        part: Some(pb::stream_score_pairs_request::Part::Pair(p)),
    }));
    let mut stream = client
        .scoring()
        .stream_score_pairs(tokio_stream::iter(messages))
        .await
        .unwrap()
        .into_inner();
    let mut seen = 0;
    while let Some(answer) = stream.message().await.unwrap() {
        let result = answer.result.unwrap();
        let same = together
            .iter()
            .find(|r| r.id == format!("{}#0", result.id))
            .unwrap();
        assert_eq!(bits(scored(&result)), bits(scored(same)));
        seen += 1;
    }
    assert_eq!(seen, pairs().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_pair_has_its_own_error_and_the_rest_is_scored() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let mut batch = pairs();
    batch[1].b = None;
    let plain = |s: &str| {
        Some(pb::Text {
            form: Some(pb::text::Form::Plain(s.into())),
        })
    };
    batch[2].a = plain("mixed");
    batch[3] = pb::Pair {
        id: "long".into(),
        prompt: plain(&"the river ".repeat(6000)),
        a: plain("a"),
        b: plain("b"),
        ..Default::default()
    };
    let results = score(&client, "models/tiny", batch).await.results;
    let error = |i: usize| match &results[i].result {
        Some(pb::pair_result::Result::Error(e)) => e.clone(),
        other => panic!("{other:?}"),
    };
    for (i, field) in [(1, "pair.b"), (2, "pair.a"), (3, "pair.prompt")] {
        assert_eq!(error(i).code, Code::InvalidArgument as i32);
        assert!(error(i).message.contains(field), "{}", error(i).message);
    }
    scored(&results[0]);
    scored(&results[4]);

    let prompt = plain("The capital of France is");
    let completions = vec![
        plain(" Paris.").unwrap(),
        plain(" 42").unwrap(),
        pb::Text {
            form: Some(pb::text::Form::Chat(Default::default())),
        },
    ];
    let options = Some(pb::ScoringOptions {
        policy: "models/tiny".into(),
        ..Default::default()
    });
    let request = pb::ScoreCompletionsRequest {
        options,
        prompt,
        completions,
    };
    let answer = client
        .scoring()
        .score_completions(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(answer.ranking.len(), 2);
    assert!(matches!(
        answer.results[2].result,
        Some(pb::completion_result::Result::Error(_))
    ));
    assert!((answer.results.iter().map(|r| r.probability).sum::<f64>() - 1.0).abs() < 1e-12);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_requests_are_refused_with_their_reason_and_the_server_continues() {
    let dir = tempfile::tempdir().unwrap();
    let models = format!("tiny={}", golden("models/llama").display());
    let server = Server::start_with(dir.path(), &models, &["--memory-limit", "2GiB"]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let create = |j: pb::TrainingJob, id: &str| {
        let request = pb::CreateTrainingJobRequest {
            training_job: Some(j),
            request_id: id.into(),
            validate_only: false,
        };
        let client = client.clone();
        async move { client.training().create_training_job(request).await }
    };
    let fields = |s: &tonic::Status| -> Vec<String> {
        s.get_details_bad_request()
            .unwrap()
            .field_violations
            .into_iter()
            .map(|v| v.field)
            .collect()
    };
    let mut bad = job("datasets/none", 1);
    bad.dpo = Some(pb::DpoConfig {
        beta: Some(0.0),
        ..Default::default()
    });
    bad.batch = Some(pb::BatchConfig {
        batch_size: Some(0),
        ..Default::default()
    });
    let e = create(bad, "").await.unwrap_err();
    assert_eq!(e.code(), Code::InvalidArgument);
    assert_eq!(
        fields(&e),
        ["training_job.dpo.beta", "training_job.batch.batch_size"]
    );
    assert_eq!(
        create(job("datasets/none", 1), "")
            .await
            .unwrap_err()
            .code(),
        Code::NotFound
    );
    let mut unknown = job(&dataset.name, 1);
    unknown.policy = "models/none".into();
    assert_eq!(
        create(unknown, "").await.unwrap_err().code(),
        Code::NotFound
    );
    let mut huge = job(&dataset.name, 1);
    huge.batch = Some(pb::BatchConfig {
        batch_size: Some(4096),
        max_length: Some(1 << 20),
        ..Default::default()
    });
    let e = create(huge, "").await.unwrap_err();
    assert_eq!(
        (
            e.code(),
            e.get_details_error_info().unwrap().reason.as_str()
        ),
        (Code::ResourceExhausted, "OUT_OF_MEMORY")
    );

    let first = create(job(&dataset.name, 1), "once")
        .await
        .unwrap()
        .into_inner();
    let again = create(job(&dataset.name, 1), "once")
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first.name, again.name);
    assert_eq!(
        create(job(&dataset.name, 2), "once")
            .await
            .unwrap_err()
            .code(),
        Code::AlreadyExists
    );
    let checked = pb::CreateTrainingJobRequest {
        training_job: Some(job(&dataset.name, 1)),
        validate_only: true,
        ..Default::default()
    };
    assert_eq!(
        client
            .training()
            .create_training_job(checked)
            .await
            .unwrap()
            .into_inner()
            .name,
        ""
    );

    finish(&client, &first.name).await;
    // A repeated call gets its job although the dataset is gone.
    let other = upload(&client, "plain.jsonl").await;
    let created = create(job(&other.name, 1), "twice").await.unwrap();
    let created = created.into_inner();
    finish(&client, &created.name).await;
    let delete = pb::DeleteDatasetRequest {
        name: other.name.clone(),
    };
    client.datasets().delete_dataset(delete).await.unwrap();
    let repeated = create(job(&other.name, 1), "twice").await.unwrap();
    assert_eq!(repeated.into_inner().name, created.name);
    let cancel = pb::CancelTrainingJobRequest {
        name: first.name.clone(),
    };
    assert_eq!(
        client
            .training()
            .cancel_training_job(cancel)
            .await
            .unwrap_err()
            .code(),
        Code::FailedPrecondition
    );
    let cursor = pb::StreamTrainingEventsRequest {
        parent: first.name.clone(),
        after_sequence: 1000,
        ..Default::default()
    };
    assert_eq!(
        client
            .training()
            .stream_training_events(cursor)
            .await
            .unwrap_err()
            .code(),
        Code::OutOfRange
    );
    for name in ["trainingJobs/../x", "x", ""] {
        let e = try_get(&client, name).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument, "{name}");
    }

    // Uploads without a usable row, or in the wrong order.
    let file = dir.path().join("bad.jsonl");
    std::fs::write(&file, "{\"prompt\":\"a\"}\nnot json\n\u{fffd}\n").unwrap();
    let e = client
        .upload_dataset(&file, pb::UploadMetadata::default(), |_| {})
        .await
        .unwrap_err()
        .to_string();
    assert!(
        e.contains("row 1") && e.contains("chosen is missing") && e.contains("row 2"),
        "{e}"
    );
    let chunk = pb::UploadDatasetRequest {
        part: Some(pb::upload_dataset_request::Part::Chunk(vec![1])),
    };
    let e = client
        .datasets()
        .upload_dataset(tokio_stream::iter(vec![chunk]))
        .await
        .unwrap_err();
    assert_eq!(e.code(), Code::InvalidArgument);

    // A job on a dataset with an invalid row is refused, or skips the row and lists it.
    std::fs::write(
        &file,
        std::fs::read_to_string(golden("pairs.jsonl")).unwrap()
            + "{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"b\"}\n",
    )
    .unwrap();
    let mixed = client
        .upload_dataset(&file, pb::UploadMetadata::default(), |_| {})
        .await
        .unwrap();
    assert_eq!(mixed.report.unwrap().counts["identical_answers"], 1);
    let e = create(job(&mixed.name, 1), "").await.unwrap_err();
    assert_eq!(
        (
            e.code(),
            e.get_details_error_info().unwrap().reason.as_str()
        ),
        (Code::FailedPrecondition, "DATASET_INVALID")
    );
    let mut skipping = job(&mixed.name, 1);
    skipping.row_policy = pb::RowPolicy::Skip.into();
    let skipping = create(skipping, "").await.unwrap().into_inner().name;
    finish(&client, &skipping).await;
    let done = get(&client, &skipping).await;
    assert_eq!(done.state(), pb::JobState::Succeeded);
    assert!(
        done.skipped_rows.len() == 1 && done.skipped_rows[0].contains("row 7"),
        "{:?}",
        done.skipped_rows
    );

    // A diverging run fails with the rows that caused it, and the next job is unaffected.
    let mut diverging = job(&dataset.name, 50);
    diverging.optimizer = Some(pb::OptimizerConfig {
        learning_rate: Some(1e30),
        max_grad_norm: Some(0.0),
        ..Default::default()
    });
    let diverging = create(diverging, "").await.unwrap().into_inner().name;
    finish(&client, &diverging).await;
    let failed = get(&client, &diverging).await;
    assert_eq!(failed.state(), pb::JobState::Failed);
    assert!(failed.error.unwrap().message.contains("rows ["));
    let fine = create(job(&dataset.name, 1), "")
        .await
        .unwrap()
        .into_inner()
        .name;
    finish(&client, &fine).await;
    assert_eq!(state(&client, &fine).await, pb::JobState::Succeeded);

    let page = client
        .training()
        .list_training_jobs(pb::ListTrainingJobsRequest {
            page_size: 2,
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(page.training_jobs.len(), 2);
    let next = pb::ListTrainingJobsRequest {
        page_size: 2,
        page_token: page.next_page_token,
        ..Default::default()
    };
    assert_eq!(
        client
            .training()
            .list_training_jobs(next)
            .await
            .unwrap()
            .into_inner()
            .training_jobs
            .len(),
        2
    );
    let failed = pb::ListTrainingJobsRequest {
        states: vec![pb::JobState::Failed.into()],
        ..Default::default()
    };
    assert_eq!(
        client
            .training()
            .list_training_jobs(failed)
            .await
            .unwrap()
            .into_inner()
            .training_jobs
            .len(),
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn scoring_is_answered_while_a_job_trains_and_the_job_makes_progress() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let name = submit(&client, job(&dataset.name, 100_000)).await;
    until(
        "the start of the run",
        Duration::from_secs(60),
        async || state(&client, &name).await == pb::JobState::Running,
    )
    .await;
    let (mut steps, latest) = (Vec::new(), format!("{name}/checkpoints/latest"));
    let start = Instant::now();
    // At least 20 calls, and as many as the job needs for a step.
    while steps.len() < 20 || steps.last() == steps.first() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "the job makes no progress while pairs are scored: {steps:?}"
        );
        let live = score(&client, &latest, pairs());
        let live = tokio::time::timeout(Duration::from_secs(30), live)
            .await
            .expect("scoring is not answered");
        assert_eq!(live.results.iter().map(scored).count(), 6);
        let shown = get(&client, &name).await;
        steps.push(shown.progress.unwrap().step);
    }
    client
        .training()
        .cancel_training_job(pb::CancelTrainingJobRequest { name: name.clone() })
        .await
        .unwrap();
    finish(&client, &name).await;
    assert_eq!(state(&client, &name).await, pb::JobState::Cancelled);
}
