use tonic_types::StatusExt;

use super::*;

fn minimal() -> pb::TrainingJob {
    pb::TrainingJob { policy: "models/m".into(), dataset: "datasets/d".into(), ..Default::default() }
}

fn stored(request: JobRequest) -> Job {
    Job {
        id: "x".into(),
        version: 1,
        request,
        state: JobState::Queued,
        error: None,
        progress: Progress::default(),
        latest_metrics: Default::default(),
        skipped_rows: vec![],
        create_time: 1_700_000_000_123,
        start_time: None,
        end_time: None,
        turn: 0,
        trace: None,
        owner: String::new(),
    }
}

#[test]
fn an_absent_field_has_its_default_and_a_job_survives_the_round_trip() {
    let request = job_request(minimal()).unwrap();
    assert_eq!(request.spec.dpo, DpoConfig::default());
    assert_eq!(request.spec.optimizer.learning_rate, 1e-4, "LoRA's default");
    let full = pb::TrainingJob { method: Some(pb::training_job::Method::Full(pb::FullConfig {})), ..minimal() };
    assert_eq!(job_request(full).unwrap().spec.optimizer.learning_rate, 1e-6);
    let message = job(stored(request.clone()));
    assert_eq!(message.create_time.unwrap().nanos, 123_000_000);
    assert_eq!(job_request(message).unwrap(), request);
}

#[test]
fn every_bad_field_is_reported_at_once_under_its_proto_path() {
    let bad = pb::TrainingJob {
        policy: "m".into(),
        dataset: "datasets/../etc".into(),
        reference: "?".into(),
        row_policy: 9,
        dpo: Some(pb::DpoConfig {
            losses: vec![pb::WeightedLoss { loss_type: "nope".into(), weight: None, label_smoothing: None }],
            beta: Some(-1.0),
            f_divergence: "x".into(),
            ..Default::default()
        }),
        optimizer: Some(pb::OptimizerConfig { learning_rate: Some(f64::NAN), lr_scheduler_type: "zigzag".into(), ..Default::default() }),
        batch: Some(pb::BatchConfig { batch_size: Some(0), truncation_mode: "middle".into(), ..Default::default() }),
        run: Some(pb::RunConfig { metric_for_best: "vibes".into(), logging_steps: Some(0), ..Default::default() }),
        ..Default::default()
    };
    let status = job_request(bad).unwrap_err();
    let fields: Vec<String> = status.get_details_bad_request().unwrap().field_violations.into_iter().map(|v| v.field).collect();
    for expected in [
        "policy",
        "dataset",
        "reference",
        "row_policy",
        "dpo.losses[0].loss_type",
        "dpo.beta",
        "dpo.f_divergence",
        "optimizer.learning_rate",
        "optimizer.lr_scheduler_type",
        "batch.batch_size",
        "batch.truncation_mode",
        "run.metric_for_best",
        "run.logging_steps",
    ] {
        assert!(fields.contains(&format!("training_job.{expected}")), "{expected} is missing from {fields:?}");
    }
}
