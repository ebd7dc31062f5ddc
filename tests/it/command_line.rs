//! The command line as a script uses it: exit codes, JSON output, and the steps from a file of
//! pairs to an adapter.

use std::process::{Command, Output};

use crate::server::Server;
use crate::support::golden;

fn bradley(server: Option<&Server>, args: &[&str]) -> Output {
    let mut command = Command::new(crate::support::binary());
    command
        .args(args)
        .env_remove("BRADLEY_SERVER")
        .env_remove("BRADLEY_MODELS")
        .env_remove("BRADLEY_CONFIG");
    if let Some(s) = server {
        command.env("BRADLEY_SERVER", &s.address);
    }
    command.output().unwrap()
}

/// Runs a command that must succeed, and returns its standard output.
fn succeed(server: &Server, args: &[&str]) -> String {
    let out = bradley(Some(server), args);
    assert!(
        out.status.success(),
        "{args:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

fn json(server: &Server, args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&succeed(server, &[args, &["--output", "json"]].concat())).unwrap()
}

#[test]
fn commands_lead_from_a_file_of_pairs_to_an_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let pairs = golden("pairs.jsonl");
    let pairs = pairs.to_str().unwrap();
    let said = succeed(
        &server,
        &[
            "train",
            "--data",
            pairs,
            "--rank",
            "4",
            "--target-modules",
            "all-linear",
            "--learning-rate",
            "0.01",
            "--batch-size",
            "2",
            "--max-steps",
            "12",
            "--watch",
        ],
    );
    assert!(
        said.contains("6 rows, 6 of them usable")
            && said.contains("step 12/12")
            && said.contains("succeeded"),
        "{said}"
    );
    let jobs = json(&server, &["jobs", "list"]);
    let name = jobs[0]["name"].as_str().unwrap().to_owned();
    assert_eq!(
        (
            jobs[0]["state"].as_str(),
            jobs[0]["progress"]["step"].as_u64()
        ),
        (Some("JOB_STATE_SUCCEEDED"), Some(12))
    );

    let latest = format!("{name}/checkpoints/latest");
    let table = succeed(&server, &["score", "--policy", &latest, "--data", pairs]);
    assert!(table.contains("accuracy 100.0%"), "{table}");
    let lines = succeed(
        &server,
        &[
            "score", "--policy", &latest, "--data", pairs, "--output", "json",
        ],
    );
    let scores: Vec<serde_json::Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert!(scores.len() == 6 && scores.iter().all(|s| s["probability"].as_f64() > Some(0.5)));

    let out = dir.path().join("adapter");
    let files = json(
        &server,
        &[
            "checkpoints",
            "download",
            &latest,
            "--out",
            out.to_str().unwrap(),
        ],
    );
    // The two files of the adapter, its model card, and the tokenizer's files.
    assert_eq!(files.as_array().unwrap().len(), 6, "{files}");
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    let config = std::fs::read_to_string(out.join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let base = config["base_model_name_or_path"].as_str().unwrap();
    let dataset = &json(&server, &["datasets", "list"])[0]["content_hash"];
    for part in [
        "library_name: peft".to_owned(),
        format!("base_model: {base}"),
        "| loss | sigmoid |".to_owned(),
        format!("| dataset (BLAKE3) | {} |", dataset.as_str().unwrap()),
    ] {
        assert!(card.contains(&part), "{part} is not in {card}");
    }
    assert!(
        out.join("adapter_config.json").is_file()
            && out.join("adapter_model.safetensors").is_file()
    );
    let export = json(
        &server,
        &["checkpoints", "export", &latest, "--format", "merged"],
    );
    let folder = export["path"].as_str().unwrap();
    assert!(
        folder.starts_with("jobs/") && folder.ends_with("/exports/12/merged-f32"),
        "{folder}"
    );
    assert!(
        server
            .data_dir
            .join(folder)
            .join("model.safetensors")
            .is_file()
    );
    let export = json(
        &server,
        &[
            "checkpoints",
            "export",
            &latest,
            "--format",
            "merged",
            "--dtype",
            "bf16",
        ],
    );
    assert!(
        export["path"]
            .as_str()
            .unwrap()
            .ends_with("/exports/12/merged-bf16"),
        "{export}"
    );

    let events = succeed(&server, &["watch", &name, "--output", "json"]);
    assert!(
        events
            .lines()
            .all(|l| serde_json::from_str::<serde_json::Value>(l).is_ok())
    );
    let dataset = json(&server, &["datasets", "list"])[0]["name"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(
        json(&server, &["datasets", "get", &dataset])["report"]["rows"],
        6
    );
    let models = json(&server, &["models", "list"]);
    let golden = std::fs::read_to_string(golden("models/llama/config.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
    let context = &golden["max_position_embeddings"];
    assert!(context.is_u64());
    assert_eq!(
        (
            &models[0]["architecture"],
            &models[0]["dtype"],
            &models[0]["max_position_embeddings"]
        ),
        (
            &serde_json::json!("llama"),
            &serde_json::json!("f32"),
            context
        )
    );
    let uses = ["TRAIN_LORA", "TRAIN_FULL", "SCORE", "EXPORT"].map(|u| format!("MODEL_USE_{u}"));
    assert_eq!(models[0]["uses"], serde_json::json!(uses));
    // Fields that are not set are shown on request only.
    let all = json(&server, &["models", "get", "tiny", "--all"]);
    assert_eq!(
        (models[0].get("text_only"), &all["text_only"]),
        (None, &false.into())
    );
    assert_eq!(models[0], json(&server, &["models", "get", "tiny"]));
    let table = succeed(&server, &["models", "list"]);
    for shown in [
        "llama",
        "train lora, train full, score, export",
        &context.to_string(),
    ] {
        assert!(table.contains(shown), "{shown} is not in\n{table}");
    }
    succeed(&server, &["health", "--server", &server.address]);
    succeed(&server, &["jobs", "delete", &name]);
    succeed(&server, &["datasets", "delete", &dataset]);
    assert_eq!(json(&server, &["jobs", "list"]), serde_json::json!([]));
}

#[test]
fn exit_codes_tell_scripts_what_went_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let code =
        |server: Option<&Server>, args: &[&str]| bradley(server, args).status.code().unwrap();
    assert_eq!(code(None, &["serve"]), 2, "no model is named");
    assert_eq!(code(None, &["serve", "--models", "/nonexistent"]), 1);
    assert_eq!(
        code(None, &["jobs", "list", "--server", "http://127.0.0.1:1"]),
        3
    );
    assert_eq!(code(Some(&server), &["jobs", "get", "none"]), 2);
    assert_eq!(
        code(
            Some(&server),
            &["score", "--policy", "models/tiny", "--data", "/nonexistent"]
        ),
        1
    );
    assert_eq!(
        code(
            Some(&server),
            &[
                "train",
                "--data",
                golden("pairs.jsonl").to_str().unwrap(),
                "--beta",
                "-1"
            ]
        ),
        2
    );
    let damaged = bradley(Some(&server), &["jobs", "list", "--token", "two\nlines"]);
    assert_eq!(damaged.status.code(), Some(2));
    let said = String::from_utf8(damaged.stderr).unwrap();
    assert!(said.contains("the token has characters"), "{said}");
    let pairs = golden("pairs.jsonl");
    let diverging = [
        "train",
        "--data",
        pairs.to_str().unwrap(),
        "--learning-rate",
        "1e30",
        "--max-length",
        "256",
        "--watch",
    ];
    assert_eq!(
        code(Some(&server), &diverging),
        1,
        "a failed job is a failure"
    );
}
