#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use prost_types::{Any, Duration, Timestamp};
use serde_json::json;

use super::*;

/// Returns a job with a field of every kind.
fn job() -> pb::TrainingJob {
    let info = pb_any("google.rpc.ErrorInfo", &[10, 1, b'R', 18, 1, b'd']);
    pb::TrainingJob {
        name: "trainingJobs/a".into(),
        labels: BTreeMap::from([("b".into(), "2".into()), ("a".into(), "1".into())]),
        state: pb::JobState::Running.into(),
        error: Some(tonic_types::Status {
            code: 9,
            message: "m".into(),
            details: vec![info, pb_any("example.Unknown", &[1])],
        }),
        evaluation: Some(pb::training_job::Evaluation::EvalFraction(0.125)),
        dpo: Some(pb::DpoConfig {
            losses: vec![pb::WeightedLoss {
                loss_type: "sigmoid".into(),
                weight: Some(0.0),
                ..Default::default()
            }],
            beta: Some(1e-7),
            ..Default::default()
        }),
        method: Some(pb::training_job::Method::Full(pb::FullConfig {})),
        seed: Some(u64::MAX),
        row_policy: pb::RowPolicy::Skip.into(),
        progress: Some(pb::JobProgress {
            step: 12,
            tokens: 1 << 53,
            ..Default::default()
        }),
        create_time: Some(Timestamp {
            seconds: 1_700_000_000,
            nanos: 500_000_000,
        }),
        ttl: Some(Duration {
            seconds: 90,
            nanos: 0,
        }),
        latest_metrics: ('a'..='z')
            .map(|name| (name.to_string(), 0.1))
            .chain([("nan".to_owned(), f64::NEG_INFINITY)])
            .collect(),
        priority: -5,
        chat_template_kwargs: Some(prost_types::Struct {
            fields: BTreeMap::from([(
                "thinking".into(),
                prost_types::Value {
                    kind: Some(prost_types::value::Kind::BoolValue(false)),
                },
            )]),
        }),
        ..Default::default()
    }
}

fn pb_any(name: &str, value: &[u8]) -> Any {
    Any {
        type_url: format!("type.googleapis.com/{name}"),
        value: value.to_vec(),
    }
}

#[test]
fn a_job_is_written_with_the_names_of_the_proto_files() {
    let value = to_value(&job(), FieldSelection::Set).unwrap();
    let mut metrics = value["latest_metrics"].clone();
    let names: Vec<&String> = metrics.as_object().unwrap().keys().collect();
    assert!(names.is_sorted(), "{names:?}");
    assert_eq!(metrics["nan"].take(), "-Infinity");
    let mut rest = value.clone();
    rest.as_object_mut().unwrap().remove("latest_metrics");
    assert_eq!(
        rest,
        json!({
            "name": "trainingJobs/a",
            "labels": {"a": "1", "b": "2"},
            "state": "JOB_STATE_RUNNING",
            "error": {
                "code": 9,
                "message": "m",
                "details": [{
                    "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                    "reason": "R",
                    "domain": "d",
                }],
            },
            "eval_fraction": 0.125,
            "dpo": {"losses": [{"loss_type": "sigmoid", "weight": 0.0}], "beta": 1e-7},
            "full": {},
            "seed": "18446744073709551615",
            "row_policy": "ROW_POLICY_SKIP",
            "progress": {"step": 12, "tokens": 9_007_199_254_740_992_u64},
            "create_time": "2023-11-14T22:13:20.500Z",
            "ttl": "90s",
            "priority": -5,
            "chat_template_kwargs": {"thinking": false},
        })
    );
}

#[test]
fn json_and_yaml_give_the_same_job_back() {
    let mut expected = job();
    expected.error.as_mut().unwrap().details.pop();
    for fields in [FieldSelection::Set, FieldSelection::All] {
        let text = to_value(&job(), fields).unwrap().to_string();
        assert_eq!(from_json::<pb::TrainingJob>(&text).unwrap(), expected);
        let text = to_yaml(&job(), fields).unwrap();
        assert_eq!(
            from_yaml::<pb::TrainingJob>(&text).unwrap(),
            expected,
            "{text}"
        );
    }
}

#[test]
fn all_fields_are_present_on_request() {
    let value = to_value(&job(), FieldSelection::All).unwrap();
    assert_eq!(
        value.as_object().unwrap().len(),
        descriptor::<pb::TrainingJob>().unwrap().fields().len()
    );
    assert_eq!(
        (
            &value["reference"],
            &value["lora"],
            &value["dpo"]["ld_alpha"]
        ),
        (&json!(""), &json!(null), &json!(null))
    );
    assert_eq!(value["dpo"]["use_weighting"], false);
}

#[test]
fn every_message_of_the_api_can_be_written_and_read() {
    let pool = POOL.as_ref().unwrap();
    let mut messages = 0;
    for descriptor in pool.all_messages() {
        if descriptor.is_map_entry() || descriptor.package_name() != "bradley.v1" {
            continue;
        }
        messages += 1;
        let mut value = json!({});
        tidy_message(&descriptor, &mut value, FieldSelection::All);
        let mut wrong = Violations::default();
        check_message(&descriptor, &mut value, "", &mut wrong);
        assert!(wrong.is_empty(), "{}: {wrong}", descriptor.name());
        DynamicMessage::deserialize(descriptor, value).unwrap();
    }
    assert!(messages > 60, "{messages}");
}

/// Returns the errors of a job in YAML.
fn errors(text: &str) -> Vec<String> {
    match from_yaml::<pb::TrainingJob>(text) {
        Err(CanonicalError::Fields(wrong)) => wrong
            .listed()
            .iter()
            .map(|v| format!("{} {}", v.field, v.description))
            .collect(),
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn wrong_keys_are_refused_with_their_path_and_the_one_that_was_meant() {
    assert_eq!(
        errors("optimiser: {}\ndpo: {betta: 0.1, losses: [{los_type: ipo}]}\nlearning_rate: 1"),
        [
            "optimiser does not exist: did you mean optimizer?",
            "dpo.betta does not exist: did you mean dpo.beta?",
            "dpo.losses[0].los_type does not exist: did you mean dpo.losses[0].loss_type?",
            "learning_rate does not exist: did you mean optimizer.learning_rate?",
        ]
    );
    // The fields are listed once.
    let far = errors("lora: {zzz: 1, rnak: 2, qqq: 3}");
    assert_eq!(
        far,
        [
            "lora.zzz does not exist: LoraConfig has rank, alpha, target_modules, use_rslora, \
          init_adapter",
            "lora.rnak does not exist: did you mean lora.rank?",
            "lora.qqq does not exist",
        ]
    );
}

#[test]
fn a_key_is_a_field_or_similar_to_one_or_neither() {
    for (key, expected) in [
        ("row_policy", KeyMatch::Field),
        ("rowPolicy", KeyMatch::Field),
        ("optimiser", KeyMatch::Misspelt),
        ("learning_rate", KeyMatch::Misspelt),
        ("architectures", KeyMatch::Unknown),
    ] {
        let found = match_key::<pb::TrainingJob>(key).unwrap();
        assert_eq!(found, expected, "{key}");
    }
}

#[test]
fn wrong_values_are_refused_together_with_what_is_accepted() {
    let wrong = "
labels: {run: 7}
dataset: [a]
dpo: {beta: high, losses: sigmoid, use_weighting: 1}
batch: {batch_size: -1, epochs: .nan, max_length: 1.5}
row_policy: skipp
state: 77
ttl: 7d
chat_template_kwargs: [1]
lora: 3
eval_fraction: 0.1
eval_dataset: datasets/x
";
    assert_eq!(
        errors(wrong),
        [
            r#"labels.run is 7: it must be text: write "7""#,
            "dataset is a list: it must be text",
            r#"dpo.beta is "high": it must be a number"#,
            r#"dpo.losses is "sigmoid": it must be a list"#,
            "dpo.use_weighting is 1: it must be true or false",
            "batch.batch_size is -1: it must be a whole number from 0 to 4294967295",
            "batch.max_length is 1.5: it must be a whole number from 0 to 4294967295",
            r#"row_policy is "skipp": did you mean SKIP?"#,
            "state is 77: it must be one of JOB_STATE_UNSPECIFIED, JOB_STATE_QUEUED, \
             JOB_STATE_PREPARING, JOB_STATE_RUNNING, JOB_STATE_CANCELLING, JOB_STATE_CANCELLED, \
             JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_PAUSING, JOB_STATE_PAUSED",
            r#"ttl is "7d": it must be a number of seconds such as "90s" or "1.5s""#,
            "chat_template_kwargs is a list: it must be an object",
            "lora is 3: it must be an object with fields of rank, alpha, target_modules, \
             use_rslora, init_adapter",
            "evaluation has eval_dataset and eval_fraction: only one of them is accepted",
        ]
    );
    assert_eq!(
        errors("evalFraction: 0.1\nevalDataset: datasets/x"),
        ["evaluation has eval_dataset and eval_fraction: only one of them is accepted"]
    );
    let list = from_yaml::<pb::TrainingJob>("- a").unwrap_err().to_string();
    assert!(
        list.starts_with("TrainingJob is a list: it must be an object"),
        "{list}"
    );
}

#[test]
fn people_may_write_short_enum_names_camel_case_and_exponents() {
    let job: pb::TrainingJob =
        from_yaml("row_policy: skip\ndisplayName: x\noptimizer: {learning_rate: 1e-6}\nseed: 1e3")
            .unwrap();
    assert_eq!(job.row_policy(), pb::RowPolicy::Skip);
    assert_eq!(job.display_name, "x");
    assert_eq!(job.optimizer.unwrap().learning_rate, Some(1e-6));
    assert_eq!(job.seed, Some(1000));
}

#[test]
fn broken_texts_are_refused_with_their_place() {
    let yaml = from_yaml::<pb::TrainingJob>("a: [")
        .unwrap_err()
        .to_string();
    assert!(
        yaml.starts_with("not valid YAML") && yaml.contains("line 2"),
        "{yaml}"
    );
    let json = from_json::<pb::TrainingJob>("{").unwrap_err().to_string();
    assert!(
        json.starts_with("not valid JSON") && json.contains("line 1"),
        "{json}"
    );
    let twice = from_yaml::<pb::TrainingJob>("seed: 1\nseed: 2")
        .unwrap_err()
        .to_string();
    assert!(twice.contains("duplicate"), "{twice}");
    let tag = from_yaml::<pb::TrainingJob>("seed: !x 1")
        .unwrap_err()
        .to_string();
    assert!(tag.contains("tags such as !x"), "{tag}");
    let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
    assert!(matches!(
        from_yaml::<pb::TrainingJob>(&deep),
        Err(CanonicalError::Syntax { .. })
    ));
}
