use tonic_types::StatusExt;

use super::*;

fn minimal() -> pb::TrainingJob {
    pb::TrainingJob {
        policy: "models/m".into(),
        dataset: "datasets/d".into(),
        ..Default::default()
    }
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
        queued_since: 0,
        worker: None,
        trace: None,
        owner: String::new(),
    }
}

#[test]
fn an_absent_field_has_its_default_and_a_job_survives_the_round_trip() {
    let request = job_request(minimal()).unwrap();
    assert_eq!(request.spec.dpo, DpoConfig::default());
    assert_eq!(request.spec.optimizer.learning_rate, 1e-4, "LoRA's default");
    let full = pb::TrainingJob {
        method: Some(pb::training_job::Method::Full(pb::FullConfig {})),
        ..minimal()
    };
    assert_eq!(
        job_request(full).unwrap().spec.optimizer.learning_rate,
        1e-6
    );
    let message = job(stored(request.clone()));
    assert_eq!(message.create_time.unwrap().nanos, 123_000_000);
    assert_eq!(again(message), request);
}

/// Converts a returned job to a request for the same job. The returned job has values for all
/// fields of LoRA, so the record of those that the client gave is reset.
fn again(shown: pb::TrainingJob) -> JobRequest {
    JobRequest {
        given_lora: GivenLora::default(),
        ..job_request(shown).unwrap()
    }
}

#[test]
fn every_bad_field_is_reported_at_once_under_its_proto_path() {
    let bad = pb::TrainingJob {
        policy: "m".into(),
        dataset: "datasets/../etc".into(),
        reference: "?".into(),
        row_policy: 9,
        dpo: Some(pb::DpoConfig {
            losses: vec![pb::WeightedLoss {
                loss_type: "nope".into(),
                weight: None,
                label_smoothing: None,
            }],
            beta: Some(-1.0),
            f_divergence: "x".into(),
            ..Default::default()
        }),
        optimizer: Some(pb::OptimizerConfig {
            learning_rate: Some(f64::NAN),
            lr_scheduler_type: "zigzag".into(),
            ..Default::default()
        }),
        batch: Some(pb::BatchConfig {
            batch_size: Some(0),
            truncation_mode: "middle".into(),
            ..Default::default()
        }),
        run: Some(pb::RunConfig {
            metric_for_best: "vibes".into(),
            logging_steps: Some(0),
            ..Default::default()
        }),
        ..Default::default()
    };
    let status = job_request(bad).unwrap_err();
    let fields: Vec<String> = status
        .get_details_bad_request()
        .unwrap()
        .field_violations
        .into_iter()
        .map(|v| v.field)
        .collect();
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
        assert!(
            fields.contains(&format!("training_job.{expected}")),
            "{expected} is missing from {fields:?}"
        );
    }
}

#[test]
fn a_bad_policy_hides_no_other_bad_field() {
    let bad = pb::TrainingJob {
        policy: "m".into(),
        ttl: Some(prost_types::Duration {
            seconds: -1,
            nanos: 0,
        }),
        chat_template_kwargs_json: "[".into(),
        ..minimal()
    };
    assert_eq!(
        refused_fields(bad),
        [
            "training_job.policy",
            "training_job.ttl",
            "training_job.chat_template_kwargs_json",
        ]
    );
}

/// Returns the paths of the fields for which a job is refused.
fn refused_fields(job: pb::TrainingJob) -> Vec<String> {
    let Err(status) = job_request(job) else {
        return Vec::new();
    };
    status
        .get_details_bad_request()
        .unwrap()
        .field_violations
        .into_iter()
        .map(|v| v.field)
        .collect()
}

#[test]
fn all_linear_is_shown_as_the_names_that_it_stands_for() {
    let with = |names: &[&str]| pb::TrainingJob {
        method: Some(pb::training_job::Method::Lora(pb::LoraConfig {
            target_modules: names.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        })),
        ..minimal()
    };
    let request = job_request(with(&["all-linear"])).unwrap();
    let given = request.given_lora.target_modules.clone().unwrap();
    assert_eq!(given, TARGET_MODULES);
    let Some(pb::training_job::Method::Lora(shown)) = job(stored(request)).method else {
        panic!("the job has no LoRA settings");
    };
    assert_eq!(shown.target_modules, TARGET_MODULES);
    assert_eq!(
        refused_fields(with(&["all-linear", "q_proj"])),
        ["training_job.lora.target_modules[0]"]
    );
}

fn with_dpo(loss: &str, dpo: pb::DpoConfig) -> pb::TrainingJob {
    let losses = vec![pb::WeightedLoss {
        loss_type: loss.into(),
        ..Default::default()
    }];
    pb::TrainingJob {
        dpo: Some(pb::DpoConfig { losses, ..dpo }),
        ..minimal()
    }
}

fn with_optimizer(optimizer: pb::OptimizerConfig) -> pb::TrainingJob {
    pb::TrainingJob {
        optimizer: Some(optimizer),
        ..minimal()
    }
}

#[test]
fn a_setting_of_the_objective_without_effect_is_refused() {
    let default = pb::DpoConfig::default;
    let settings = [
        (
            "f_alpha",
            pb::DpoConfig {
                f_alpha: Some(0.3),
                ..default()
            },
        ),
        (
            "simpo_gamma",
            pb::DpoConfig {
                simpo_gamma: Some(0.5),
                ..default()
            },
        ),
        (
            "orpo_lambda",
            pb::DpoConfig {
                orpo_lambda: Some(0.2),
                ..default()
            },
        ),
        (
            "discopop_tau",
            pb::DpoConfig {
                discopop_tau: Some(0.1),
                ..default()
            },
        ),
    ];
    for (name, dpo) in settings {
        assert_eq!(
            refused_fields(with_dpo("sigmoid", dpo)),
            [format!("training_job.dpo.{name}")]
        );
    }
    let smoothed = pb::DpoConfig {
        label_smoothing: Some(0.1),
        ..default()
    };
    for loss in [
        "hinge",
        "ipo",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "discopop",
        "sft",
        "sigmoid_norm",
        "orpo",
    ] {
        assert_eq!(
            refused_fields(with_dpo(loss, smoothed.clone())),
            ["training_job.dpo.label_smoothing"],
            "{loss}"
        );
    }
}

#[test]
fn a_setting_of_the_objective_with_effect_is_accepted() {
    let default = pb::DpoConfig::default;
    let alpha = pb::DpoConfig {
        f_divergence: "alpha_divergence".into(),
        f_alpha: Some(0.3),
        ..default()
    };
    let smoothed = || pb::DpoConfig {
        label_smoothing: Some(0.1),
        ..default()
    };
    let accepted = [
        ("sigmoid", alpha),
        (
            "simpo",
            pb::DpoConfig {
                simpo_gamma: Some(0.3),
                ..default()
            },
        ),
        (
            "orpo",
            pb::DpoConfig {
                orpo_lambda: Some(0.2),
                ..default()
            },
        ),
        (
            "discopop",
            pb::DpoConfig {
                discopop_tau: Some(0.1),
                ..default()
            },
        ),
        (
            "hinge",
            pb::DpoConfig {
                label_smoothing: Some(0.0),
                ..default()
            },
        ),
        ("sigmoid", smoothed()),
        ("exo_pair", smoothed()),
        ("robust", smoothed()),
        ("aot", smoothed()),
        ("aot_unpaired", smoothed()),
        ("simpo", smoothed()),
    ];
    for (loss, dpo) in accepted {
        let wanted = with_dpo(loss, dpo);
        let request = job_request(wanted.clone()).unwrap_or_else(|e| panic!("{loss}: {e:?}"));
        // A client can create the same job again from the returned one.
        assert_eq!(again(job(stored(request.clone()))), request, "{wanted:?}");
    }
}

#[test]
fn a_setting_of_the_schedule_without_effect_is_refused() {
    let default = pb::OptimizerConfig::default;
    let refused = [
        (
            "min_lr_ratio",
            "",
            pb::OptimizerConfig {
                min_lr_ratio: Some(0.1),
                ..default()
            },
        ),
        (
            "min_lr_ratio",
            "cosine",
            pb::OptimizerConfig {
                min_lr_ratio: Some(0.1),
                ..default()
            },
        ),
        (
            "warmup_steps",
            "constant",
            pb::OptimizerConfig {
                warmup_steps: Some(3),
                ..default()
            },
        ),
        (
            "warmup_ratio",
            "constant",
            pb::OptimizerConfig {
                warmup_ratio: Some(0.1),
                ..default()
            },
        ),
    ];
    for (name, schedule, optimizer) in refused {
        let optimizer = pb::OptimizerConfig {
            lr_scheduler_type: schedule.into(),
            ..optimizer
        };
        assert_eq!(
            refused_fields(with_optimizer(optimizer)),
            [format!("training_job.optimizer.{name}")],
            "{schedule}"
        );
    }
    let status = job_request(with_optimizer(pb::OptimizerConfig {
        lr_scheduler_type: "constant".into(),
        warmup_steps: Some(3),
        ..default()
    }));
    let violations = status
        .unwrap_err()
        .get_details_bad_request()
        .unwrap()
        .field_violations;
    assert!(
        violations[0].description.contains("constant_with_warmup"),
        "{violations:?}"
    );
}

#[test]
fn a_constant_rate_after_a_warm_up_is_accepted_and_shown_by_its_name() {
    let default = pb::OptimizerConfig::default;
    let accepted = [
        (
            "constant_with_warmup",
            "constant_with_warmup",
            pb::OptimizerConfig {
                warmup_steps: Some(3),
                ..default()
            },
        ),
        (
            "constant_with_warmup",
            "constant_with_warmup",
            pb::OptimizerConfig {
                warmup_ratio: Some(0.1),
                ..default()
            },
        ),
        (
            "constant",
            "constant",
            pb::OptimizerConfig {
                warmup_steps: Some(0),
                ..default()
            },
        ),
        (
            "cosine_with_floor",
            "cosine_with_floor",
            pb::OptimizerConfig {
                min_lr_ratio: Some(0.2),
                ..default()
            },
        ),
        (
            "cosine_with_min_lr",
            "cosine_with_floor",
            pb::OptimizerConfig {
                min_lr_ratio: Some(0.2),
                ..default()
            },
        ),
    ];
    for (given, shown, optimizer) in accepted {
        let request = job_request(with_optimizer(pb::OptimizerConfig {
            lr_scheduler_type: given.into(),
            ..optimizer
        }))
        .unwrap();
        let message = job(stored(request.clone()));
        assert_eq!(message.optimizer.as_ref().unwrap().lr_scheduler_type, shown);
        assert_eq!(again(message), request);
    }
}

/// A job that was stored before such settings were refused can still be read and returned.
#[test]
fn a_stored_job_with_a_setting_without_effect_is_shown() {
    let mut request = job_request(minimal()).unwrap();
    request.spec.dpo.losses = vec![WeightedLoss {
        loss: LossType::Hinge,
        weight: 1.0,
        label_smoothing: None,
    }];
    (
        request.spec.dpo.label_smoothing,
        request.spec.dpo.simpo_gamma,
    ) = (0.1, 3.0);
    (
        request.spec.optimizer.schedule,
        request.spec.optimizer.warmup,
    ) = (ScheduleKind::Constant, Warmup::Steps(5));
    let read: JobRequest = serde_json::from_str(&serde_json::to_string(&request).unwrap()).unwrap();
    assert_eq!(read, request);
    let shown = job(stored(read));
    assert_eq!(
        shown.optimizer.unwrap().lr_scheduler_type,
        "constant_with_warmup"
    );
    let dpo = shown.dpo.unwrap();
    assert_eq!((dpo.label_smoothing, dpo.simpo_gamma), (Some(0.1), None));
}
