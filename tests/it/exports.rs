//! Exports as users load them, and the f32 precision of full weights in every step.

use std::path::{Path, PathBuf};
use std::process::Command;

use bradley::domain::dataset::Text;
use bradley::domain::training::Precision;
use bradley::formats::peft::save_tensors;
use bradley::formats::weights::ElementType;
use bradley::rpc::client::Client;
use bradley::rpc::pb::{self, training_event::Event};
use candle_core::Tensor;
use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::families::FAMILIES;
use crate::gguf::write_families;
use crate::server::{
    Server, checkpoints_folder, create, finish, get, job, pairs, score, score_with, scored, submit,
    upload,
};
use crate::store_safety::waits;
use crate::support::{MODELS, copy_files, golden, needed, open, rows, tensors};

/// Golden models of text and images whose tensors have the names of older versions of transformers.
/// The published models have these names, and newer versions still write them.
const OLDER_FILES: [&str; 4] = ["gemma3-images", "mistral3-images", "qwen2_vl", "qwen2_5_vl"];

/// Copies a golden model to `folder`, for tests that change or remove it.
fn copy_model(name: &str, folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    copy_files(&golden("models").join(name), folder);
}

/// Follows a job that must succeed, and returns the bits of each step's metrics.
async fn step_metrics(client: &Client, name: &str) -> Vec<Vec<(String, u64)>> {
    let events = finish(client, name).await;
    let ended = get(client, name).await;
    assert_eq!(ended.state(), pb::JobState::Succeeded, "{:?}", ended.error);
    let bits = |s: pb::StepMetrics| {
        let mut all: Vec<(String, u64)> = s
            .metrics
            .into_iter()
            .map(|(k, v)| (k, v.to_bits()))
            .collect();
        all.sort();
        all
    };
    let step = |e: pb::TrainingEvent| match e.event {
        Some(Event::StepMetrics(s)) => Some(bits(s)),
        _ => None,
    };
    events.into_iter().filter_map(step).collect()
}

/// Downloads the export of a job's last checkpoint to the folder `out`.
async fn download(
    client: &Client,
    job: &str,
    format: pb::ExportFormat,
    dtype: &str,
    out: PathBuf,
) -> PathBuf {
    let request = pb::DownloadCheckpointRequest {
        name: format!("{job}/checkpoints/latest"),
        format: format.into(),
        dtype: dtype.into(),
    };
    client.download(request, &out).await.unwrap();
    out
}

/// Returns a full fine-tune with passes in f32, and a learning rate at which bf16 would lose most
/// changes.
fn full(dataset: &str, steps: u64) -> pb::TrainingJob {
    pb::TrainingJob {
        method: Some(pb::training_job::Method::Full(pb::FullConfig {})),
        optimizer: Some(pb::OptimizerConfig {
            learning_rate: Some(1e-5),
            ..Default::default()
        }),
        precision: "f32".into(),
        ..job(dataset, steps)
    }
}

/// Starts two servers on the same files: one has frozen weights in f32, the other in bf16.
async fn two_precisions(dir: &Path) -> [(Server, Client, String); 2] {
    assert!(
        !open("llama").weights.is_exact_in(Precision::Bf16),
        "the weights must not be representable in bf16"
    );
    let mut made = Vec::new();
    for precision in ["f32", "bf16"] {
        let models = format!("tiny={}", golden("models/llama").display());
        let server = Server::start_with(&dir.join(precision), &models, &["--precision", precision]);
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await.name;
        made.push((server, client, dataset));
    }
    made.try_into()
        .unwrap_or_else(|_| panic!("not two servers"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_fine_tune_in_f32_is_the_same_on_a_bf16_server_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (mut trained, mut continued, mut lora, mut exported) = (vec![], vec![], vec![], vec![]);
    for (server, client, dataset) in &two_precisions(dir.path()).await {
        let first = submit(client, full(dataset, 12)).await;
        trained.push(step_metrics(client, &first).await);
        // A new job that starts from the checkpoint starts from its f32 tensors.
        let second = pb::TrainingJob {
            policy: format!("{first}/checkpoints/latest"),
            ..full(dataset, 3)
        };
        let second = submit(client, second).await;
        continued.push(step_metrics(client, &second).await);
        let adapter = pb::TrainingJob {
            precision: "f32".into(),
            ..job(dataset, 4)
        };
        lora.push(step_metrics(client, &submit(client, adapter).await).await);
        // The export is the checkpoint, tensor by tensor.
        let out = download(
            client,
            &second,
            pb::ExportFormat::Merged,
            "",
            server.data_dir.join("out"),
        )
        .await;
        let checkpoint = checkpoints_folder(&server.data_dir, &second).join("3/model.safetensors");
        let weights = std::fs::read(out.join("model.safetensors")).unwrap();
        assert!(
            weights == std::fs::read(checkpoint).unwrap(),
            "the export of the f32 base is not the checkpoint's file"
        );
        exported.push(weights);
    }
    assert_eq!(trained[0].len(), 12);
    assert_eq!(trained[0], trained[1], "12 steps from the base model");
    assert_eq!(continued[0], continued[1], "3 steps from its checkpoint");
    assert_eq!(lora[0], lora[1], "LoRA in f32");
    assert!(exported[0] == exported[1], "the exported weights differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_whose_model_files_are_gone_or_changed_wait_for_them() {
    let (dir, models) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folder = models.path().join("tiny");
    copy_model("llama", &folder);
    let server = Server::start_with(
        dir.path(),
        folder.to_str().unwrap(),
        &["--precision", "bf16", "--lease", "2"],
    );
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let weights = folder.join("model.safetensors");
    let original = std::fs::read(&weights).unwrap();
    let mut changed = original.clone();
    *changed.last_mut().unwrap() ^= 1;
    for (contents, expected) in [
        (Some(&changed), "had the hash"),
        (None, "model.safetensors"),
    ] {
        match contents {
            Some(bytes) => std::fs::write(&weights, bytes).unwrap(),
            None => std::fs::remove_file(&weights).unwrap(),
        }
        let name = submit(&client, full(&dataset, 2)).await;
        waits(&client, &name, "MODEL_FILES_CHANGED").await;
        let error = get(&client, &name).await.error.unwrap().message;
        assert!(
            error.contains("models/tiny")
                && error.contains(expected)
                && error.contains("put the files back"),
            "{error}"
        );
        assert!(!error.contains(models.path().to_str().unwrap()), "{error}");
        // A LoRA run in bf16 needs only the weights in memory, so it runs; its merged export needs
        // the files.
        let other = submit(&client, job(&dataset, 2)).await;
        step_metrics(&client, &other).await;
        let metrics = server.metrics();
        let counter = r#"bradley_jobs_waiting_total{reason="model_files_changed"}"#;
        assert!(
            metrics.contains(counter) && !metrics.contains(&format!("{counter} 0")),
            "no metric counts the waiting job"
        );
        let merged = pb::ExportCheckpointRequest {
            name: format!("{other}/checkpoints/latest"),
            format: pb::ExportFormat::Merged.into(),
            ..Default::default()
        };
        let refused = client
            .checkpoints()
            .export_checkpoint(merged.clone())
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert_eq!(
            refused.get_details_error_info().unwrap().reason,
            "MODEL_FILES_CHANGED"
        );
        waits(&client, &name, "MODEL_FILES_CHANGED").await;
        // It continues by itself.
        std::fs::write(&weights, &original).unwrap();
        assert_eq!(step_metrics(&client, &name).await.len(), 2);
        assert_eq!(get(&client, &name).await.error, None);
        client
            .checkpoints()
            .export_checkpoint(merged)
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python with torch, transformers and peft (BRADLEY_TEST_PYTHON)"]
async fn exports_loaded_in_transformers_and_peft_score_as_the_service_does() {
    let python = needed("BRADLEY_TEST_PYTHON");
    let (dir, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Users find the base under the name that the adapter gives. Its generation_config.json has
    // another end-of-sequence token than its config.json.
    let base = place.path().join("some-base");
    copy_model("llama-bf16", &base);
    std::fs::write(
        base.join("generation_config.json"),
        r#"{"bos_token_id": 0, "eos_token_id": 9, "pad_token_id": 1}"#,
    )
    .unwrap();
    let server = Server::start_with(dir.path(), &format!("some-base={}", base.display()), &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(
        &client,
        pb::TrainingJob {
            policy: "models/some-base".into(),
            ..job(&dataset, 8)
        },
    )
    .await;
    step_metrics(&client, &name).await;

    let merged = download(
        &client,
        &name,
        pb::ExportFormat::Merged,
        "",
        place.path().join("merged"),
    )
    .await;
    let adapter = download(
        &client,
        &name,
        pb::ExportFormat::Adapter,
        "",
        place.path().join("adapter"),
    )
    .await;
    let served = score(&client, &format!("{name}/checkpoints/latest"), pairs()).await;
    let expected = chosen_answers(&served);
    let file = place.path().join("expected.json");
    std::fs::write(
        &file,
        json!({"dtype": "torch.bfloat16", "eos": 9, "pairs": expected}).to_string(),
    )
    .unwrap();
    let said = run_script(
        &python,
        "exports.py",
        &[&merged, &adapter, &file],
        place.path(),
    );
    let number = |what: &str| -> f64 {
        let line = said
            .lines()
            .find_map(|l| l.strip_prefix(what))
            .unwrap_or_else(|| panic!("{what}: {said}"));
        line.trim().parse().unwrap()
    };
    println!("{said}");
    // PEFT adds the same adapter to the same base: only the order of f32 sums differs.
    assert!(number("peft ") < 1e-4, "{said}");
    // The merge rounds each changed weight to bf16 once, by at most 2^-8 of its value. The rounding
    // errors in a matrix multiplication are independent and mostly cancel, so log-probs stay within
    // that bound. The base without its adapter is far outside of it.
    assert!(number("merged ") < 2f64.powi(-8), "{said}");
    assert!(said.contains("generate stops at 9"), "{said}");

    // The merged folder is a complete model that can be served.
    let (again, model) = (
        tempfile::tempdir().unwrap(),
        format!("merged={}", merged.display()),
    );
    let other = Server::start_with(again.path(), &model, &[]);
    let from_merged = score(&other.client().await, "models/merged", pairs()).await;
    for (got, want) in from_merged.results.iter().zip(&served.results) {
        let (got, want) = (
            scored(got).a.clone().unwrap().policy_logprob,
            scored(want).a.clone().unwrap().policy_logprob,
        );
        assert!(
            (got - want).abs() < 2f64.powi(-8) * want.abs(),
            "{got} is not {want}"
        );
    }
}

/// Returns the golden chat rows with the service's log-probs of the chosen answers' tokens, as the
/// scripts in tests/clients read them.
fn chosen_answers(served: &pb::ScorePairsResponse) -> Vec<serde_json::Value> {
    let text = |t: &Text| match t {
        Text::Chat(messages) => json!(messages),
        Text::Plain(_) => panic!("not a chat row"),
    };
    rows("pairs.jsonl")
        .iter()
        .zip(&served.results)
        .map(|(row, result)| {
            let logps = &scored(result).a.as_ref().unwrap().policy_token_logprobs;
            json!({"prompt": text(&row.prompt), "chosen": text(&row.chosen), "logps": logps})
        })
        .collect()
}

/// Runs a script of tests/clients in a folder. It must succeed. Returns its output.
fn run_script(python: &str, script: &str, arguments: &[&Path], folder: &Path) -> String {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let output = Command::new(python)
        .arg(scripts.join(script))
        .args(arguments)
        .current_dir(folder)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let (said, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{said}\n{errors}");
    said.into_owned()
}

/// Returns the name that transformers' module gives to a tensor of a model in [`OLDER_FILES`].
/// Other files of such models have this name.
fn newer_name(stored: &str) -> String {
    let other_parts = ["visual.", "vision_tower.", "multi_modal_projector."];
    let name = stored.strip_prefix("language_model.").unwrap_or(stored);
    if other_parts.iter().any(|part| name.starts_with(part)) {
        return format!("model.{name}");
    }
    name.replacen("model.", "model.language_model.", 1)
}

/// Copies the golden models to `folder`, those of text and images also with the other names that
/// their tensors have in files. Returns the names of the copies.
fn copy_families(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in MODELS.into_iter().chain(FAMILIES) {
        copy_model(name, &folder.join(name));
        names.push(name.to_owned());
    }
    for name in OLDER_FILES {
        let newer = format!("{name}-newer");
        copy_model(name, &folder.join(&newer));
        let renamed: Vec<(String, Tensor)> = tensors(&format!("models/{name}/model.safetensors"))
            .into_iter()
            .map(|(name, tensor)| (newer_name(&name), tensor))
            .collect();
        save_tensors(&folder.join(&newer).join("model.safetensors"), &renamed).unwrap();
        names.push(newer);
    }
    names
}

/// Runs a job, exports its weights to folders whose names begin with `out`, and scores with them.
/// Returns what tests/clients/families.py needs to know, except the base model.
async fn exported(client: &Client, wanted: pb::TrainingJob, out: &Path) -> serde_json::Value {
    let is_lora = matches!(wanted.method, Some(pb::training_job::Method::Lora(_)));
    let name = submit(client, wanted).await;
    step_metrics(client, &name).await;
    let format = pb::ExportFormat::Merged;
    let merged = download(client, &name, format, "", out.with_extension("merged")).await;
    let mut adapter = None;
    if is_lora {
        let (format, out) = (pb::ExportFormat::Adapter, out.with_extension("adapter"));
        adapter = Some(download(client, &name, format, "", out).await);
    }
    let served = score(client, &format!("{name}/checkpoints/latest"), pairs()).await;
    json!({"merged": merged, "adapter": adapter, "pairs": chosen_answers(&served)})
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python with torch, transformers and peft (BRADLEY_TEST_PYTHON)"]
async fn exports_of_each_family_have_the_log_probs_of_the_service_in_transformers_and_peft() {
    let python = needed("BRADLEY_TEST_PYTHON");
    let (dir, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let names = copy_families(place.path());
    let gguf = place.path().join("gguf");
    std::fs::create_dir(&gguf).unwrap();
    let converted = write_families(&gguf);
    let models: Vec<String> = names
        .iter()
        .map(|name| format!("{name}={}", place.path().join(name).display()))
        .chain(
            converted
                .iter()
                .map(|model| format!("{}-gguf={}", model.name, model.gguf.display())),
        )
        .collect();
    let server = Server::start_with(dir.path(), &models.join(","), &["--precision", "f32"]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let lora = |model: &str| pb::TrainingJob {
        policy: format!("models/{model}"),
        ..job(&dataset, 4)
    };
    let mut cases = Vec::new();
    for name in &names {
        let mut case = exported(&client, lora(name), &place.path().join(name)).await;
        case["base"] = json!(name);
        cases.push(case);
        // The checkpoint of a full fine-tune has only the tensors of the language model.
        if name.contains("_vl") || name.contains("-images") {
            let full = pb::TrainingJob {
                method: Some(pb::training_job::Method::Full(pb::FullConfig {})),
                ..lora(name)
            };
            let out = place.path().join(format!("{name}-full"));
            let mut case = exported(&client, full, &out).await;
            case["base"] = json!(name);
            cases.push(case);
        }
    }
    for model in &converted {
        let id = format!("{}-gguf", model.name);
        let mut case = exported(&client, lora(&id), &place.path().join(&id)).await;
        case["same_weights"] = json!(model.folder);
        cases.push(case);
    }
    let file = place.path().join("cases.json");
    std::fs::write(&file, json!(cases).to_string()).unwrap();
    let said = run_script(&python, "families.py", &[&file], place.path());
    println!("{said}");
    assert_eq!(said.lines().count(), cases.len(), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_made_in_the_element_type_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, job(&dataset, 2)).await;
    step_metrics(&client, &name).await;
    for (dtype, torch) in [
        ("f32", "float32"),
        ("bf16", "bfloat16"),
        ("f16", "float16"),
        ("", "float32"),
    ] {
        let out = download(
            &client,
            &name,
            pb::ExportFormat::Merged,
            dtype,
            dir.path().join(format!("out-{dtype}")),
        )
        .await;
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["dtype"], torch);
        let weights = bradley::formats::weights::Weights::open_folder(&out).unwrap();
        let wanted = ElementType::parse(if dtype.is_empty() { "f32" } else { dtype }).unwrap();
        assert_eq!(weights.element_type(), wanted);
    }
    let ask = async |format: pb::ExportFormat, dtype: &str| {
        let request = pb::ExportCheckpointRequest {
            name: format!("{name}/checkpoints/latest"),
            format: format.into(),
            dtype: dtype.into(),
        };
        client
            .checkpoints()
            .export_checkpoint(request)
            .await
            .map(|r| r.into_inner())
    };
    for (format, dtype) in [
        (pb::ExportFormat::Merged, "int8"),
        (pb::ExportFormat::Adapter, "bf16"),
        (pb::ExportFormat::Unspecified, "f32"),
    ] {
        let e = ask(format, dtype).await.unwrap_err();
        assert!(
            e.code() == Code::InvalidArgument && e.message().contains("dtype"),
            "{e}"
        );
    }
    // Deleting the checkpoint also deletes its exports.
    let folder = ask(pb::ExportFormat::Merged, "f16").await.unwrap().path;
    let exports = server.data_dir.join(&folder).parent().unwrap().to_owned();
    assert!(exports.is_dir());
    let request = pb::DeleteCheckpointRequest {
        name: format!("{name}/checkpoints/2"),
    };
    client
        .checkpoints()
        .delete_checkpoint(request)
        .await
        .unwrap();
    assert!(!exports.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_names_a_folder_of_the_server() {
    let (dir, adapters, models) = (
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    let folder = models.path().join("tiny");
    copy_model("llama", &folder);
    let flags = ["--adapter-dir", adapters.path().to_str().unwrap()];
    let server = Server::start_with(dir.path(), folder.to_str().unwrap(), &flags);
    let client = server.client().await;
    let hidden =
        [dir.path(), adapters.path(), models.path()].map(|path| path.to_str().unwrap().to_owned());
    let assert_names_no_folder = |what: &str, text: &str| {
        for path in &hidden {
            assert!(!text.contains(path.as_str()), "{what}: {text}");
        }
    };
    let listed = client
        .models()
        .list_models(pb::ListModelsRequest {})
        .await
        .unwrap()
        .into_inner()
        .models;
    assert_eq!(listed[0].source, "tiny");
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, job(&dataset, 2)).await;
    step_metrics(&client, &name).await;
    let latest = format!("{name}/checkpoints/latest");

    let request = pb::ExportCheckpointRequest {
        name: latest.clone(),
        ..Default::default()
    };
    let export = client
        .checkpoints()
        .export_checkpoint(request)
        .await
        .unwrap()
        .into_inner();
    assert_names_no_folder("an export", &format!("{export:?}"));
    let out = download(
        &client,
        &name,
        pb::ExportFormat::Adapter,
        "",
        adapters.path().join("mine"),
    )
    .await;
    let config = std::fs::read_to_string(out.join("adapter_config.json")).unwrap();
    assert_names_no_folder("adapter_config.json", &config);
    assert!(
        config.contains(r#""base_model_name_or_path": "tiny""#),
        "{config}"
    );

    // An adapter that cannot be used, and an adapter without weights.
    std::fs::write(
        out.join("adapter_config.json"),
        config.replace(r#""use_dora": false"#, r#""use_dora": true"#),
    )
    .unwrap();
    let mut wanted = job(&dataset, 1);
    let lora = pb::LoraConfig {
        rank: Some(4),
        init_adapter: "mine".into(),
        ..Default::default()
    };
    wanted.method = Some(pb::training_job::Method::Lora(lora));
    let refusal = async || {
        let refused = create(&client, wanted.clone()).await;
        refused.unwrap_err().to_string()
    };
    let unusable = refusal().await;
    assert!(unusable.contains("use_dora is true"), "{unusable}");
    assert_names_no_folder("an unusable adapter", &unusable);
    std::fs::remove_file(out.join("adapter_model.safetensors")).unwrap();
    assert_names_no_folder("an adapter without weights", &refusal().await);

    // A checkpoint without its weights.
    let checkpoint = checkpoints_folder(dir.path(), &name).join("2");
    std::fs::remove_file(checkpoint.join("adapter_model.safetensors")).unwrap();
    let options = pb::ScoringOptions {
        policy: latest.clone(),
        ..Default::default()
    };
    let scored = score_with(&client, options).await;
    assert_names_no_folder("scoring with a damaged checkpoint", &format!("{scored:?}"));
    let merged = pb::ExportCheckpointRequest {
        name: latest,
        format: pb::ExportFormat::Merged.into(),
        ..Default::default()
    };
    let refused = client
        .checkpoints()
        .export_checkpoint(merged)
        .await
        .unwrap_err();
    assert_names_no_folder("an export of a damaged checkpoint", &format!("{refused:?}"));
}
