//! docs/losses.md: it has every loss, every value and every field of the objective with its
//! default, and nothing else.

use std::collections::BTreeMap;
use std::path::Path;

use bradley::cli::command;
use bradley::domain::dpo::{LossType, Normalization};
use bradley::rpc::client::Client;
use bradley::rpc::pb;
use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FileDescriptorSet};

use crate::pages::{code, read, table};
use crate::server::{Server, create, job, upload};

const PAGE: &str = "docs/losses.md";

/// Returns the losses on the page, each with its cells.
fn losses() -> Vec<(LossType, Vec<String>)> {
    let rows = table(&read(PAGE), "| loss | of a pair |");
    rows.into_iter()
        .map(|row| {
            let name = code(&row[0]).unwrap();
            let loss = LossType::parse(name).unwrap_or_else(|| panic!("{name} is no loss"));
            (loss, row)
        })
        .collect()
}

#[test]
fn every_loss_is_on_the_page_with_what_it_takes() {
    let losses = losses();
    let names: Vec<LossType> = losses.iter().map(|(loss, _)| *loss).collect();
    assert_eq!(names, LossType::ALL, "the losses, in the order of the code");
    for (loss, row) in losses {
        let yes = |holds: bool| if holds { "yes" } else { "no" };
        let reward = match loss.normalization() {
            Some(Normalization::Mean) => "mean",
            Some(Normalization::Sum) | None => "sum",
        };
        let trainer = match loss {
            LossType::Simpo => "CPOTrainer",
            LossType::Orpo => "ORPOTrainer",
            _ => "DPOTrainer",
        };
        let facts = [
            yes(loss.smooths_labels()),
            yes(loss.needs_reference()),
            yes(loss.accepts_divergence()),
            reward,
            trainer,
        ];
        assert_eq!(row[3..], facts, "{}", loss.name());
        assert!(!row[1].is_empty() && !row[2].is_empty(), "{}", loss.name());
    }
}

/// Adds the fields of a message, and those of the messages in it, as the page names them.
fn fields(message: &str, prefix: &str, all: &[DescriptorProto], found: &mut Vec<String>) {
    let descriptor = all.iter().find(|m| m.name() == message).unwrap();
    for field in &descriptor.field {
        let name = format!("{prefix}{}", field.name());
        found.push(name.clone());
        if field.r#type() == Type::Message {
            let inner = field.type_name().rsplit('.').next().unwrap();
            let list = match field.label() {
                Label::Repeated => "[]",
                Label::Optional | Label::Required => "",
            };
            fields(inner, &format!("{name}{list}."), all, found);
        }
    }
}

/// Returns the messages of the API.
pub fn messages() -> Vec<DescriptorProto> {
    let set = FileDescriptorSet::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
    let files = set.file.into_iter();
    files
        .filter(|file| file.package() == "bradley.v1")
        .flat_map(|file| file.message_type)
        .collect()
}

/// Returns the fields of the objective in the API.
fn objective_fields() -> Vec<String> {
    let mut found = Vec::new();
    fields("DpoConfig", "", &messages(), &mut found);
    found
}

/// Returns the settings on the page: field → its row.
fn settings() -> BTreeMap<String, Vec<String>> {
    let rows = table(&read(PAGE), "| field | default | flag |");
    let keyed = rows
        .into_iter()
        .map(|row| (code(&row[0]).unwrap().to_owned(), row));
    keyed.collect()
}

#[test]
fn every_field_of_the_objective_is_on_the_page_and_no_other() {
    let on_page = table(&read(PAGE), "| field | default | flag |");
    let names: Vec<&str> = on_page.iter().map(|row| code(&row[0]).unwrap()).collect();
    assert_eq!(
        names,
        objective_fields(),
        "the fields, in the proto's order"
    );
}

/// Returns the flag of `bradley train` for a field, as the page shows it.
fn flag_of(field: &str) -> String {
    let command = command();
    let train = command.find_subcommand("train").unwrap();
    let wanted = match field {
        "losses" => "loss".to_owned(),
        // The value of --loss.
        _ if field.starts_with("losses[]") => return "–".into(),
        _ => field.replace(['_', '.'], "-"),
    };
    let has = |arg: &clap::Arg| arg.get_long() == Some(wanted.as_str());
    match train.get_arguments().any(has) {
        true => format!("`--{wanted}`"),
        false => "–".into(),
    }
}

#[test]
fn the_flags_on_the_page_are_those_of_the_command() {
    let page = read(PAGE);
    let mut expected = page.clone();
    for (field, row) in settings() {
        let line = format!("| `{field}` | {} | {} |", row[1], row[2]);
        let corrected = format!("| `{field}` | {} | {} |", row[1], flag_of(&field));
        assert!(expected.contains(&line), "{line}");
        expected = expected.replace(&line, &corrected);
    }
    if page != expected {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("losses.md");
        std::fs::write(&path, &expected).unwrap();
        panic!(
            "docs/losses.md has wrong flags: copy {} to it",
            path.display()
        );
    }
}

/// Returns the objective of a job that the server would create, with its defaults.
async fn completed(client: &Client, dataset: &str, dpo: pb::DpoConfig) -> pb::DpoConfig {
    let request = pb::CreateTrainingJobRequest {
        training_job: Some(pb::TrainingJob {
            dpo: Some(dpo),
            // TR-DPO needs full fine-tuning.
            method: Some(pb::training_job::Method::Full(pb::FullConfig {})),
            ..job(dataset, 1)
        }),
        validate_only: true,
        ..Default::default()
    };
    let answer = client.training().create_training_job(request).await;
    answer.unwrap().into_inner().dpo.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn defaults_on_the_page_are_those_of_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let plain = completed(&client, &dataset, pb::DpoConfig::default()).await;
    // Settings that are shown only if they have an effect.
    let term = |loss: &str| pb::WeightedLoss {
        loss_type: loss.into(),
        ..Default::default()
    };
    let all = pb::DpoConfig {
        losses: ["sigmoid", "discopop", "simpo", "orpo"].map(term).to_vec(),
        f_divergence: "alpha_divergence".into(),
        reference_sync: Some(pb::ReferenceSync::default()),
        ..Default::default()
    };
    let all = completed(&client, &dataset, all).await;
    let sync = all.reference_sync.unwrap();
    let off = |is_set: bool| if is_set { "set" } else { "off" }.to_owned();
    let number = |n: Option<f64>| n.unwrap().to_string();
    let defaults = [
        ("losses", plain.losses[0].loss_type.clone()),
        ("losses[].loss_type", "–".into()),
        ("losses[].weight", number(all.losses[3].weight)),
        ("losses[].label_smoothing", "–".into()),
        ("beta", number(plain.beta)),
        ("label_smoothing", number(plain.label_smoothing)),
        ("f_divergence", plain.f_divergence),
        ("f_alpha", number(all.f_alpha)),
        ("discopop_tau", number(all.discopop_tau)),
        ("rpo_alpha", off(plain.rpo_alpha.is_some())),
        ("dpop_lambda", number(plain.dpop_lambda)),
        ("simpo_gamma", number(all.simpo_gamma)),
        ("orpo_lambda", number(all.orpo_lambda)),
        ("use_weighting", plain.use_weighting.to_string()),
        ("ld_alpha", off(plain.ld_alpha.is_some())),
        ("reference_free", plain.reference_free.to_string()),
        ("reference_sync", off(plain.reference_sync.is_some())),
        ("reference_sync.alpha", number(sync.alpha)),
        (
            "reference_sync.every_steps",
            sync.every_steps.unwrap().to_string(),
        ),
    ];
    let on_page: BTreeMap<String, String> = settings()
        .into_iter()
        .map(|(field, row)| (field, row[1].clone()))
        .collect();
    let defaults: BTreeMap<String, String> = defaults
        .into_iter()
        .map(|(field, default)| (field.to_owned(), default))
        .collect();
    assert_eq!(on_page, defaults);
}

#[tokio::test(flavor = "multi_thread")]
async fn divergences_on_the_page_are_those_that_the_server_takes() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let wrong = pb::TrainingJob {
        dpo: Some(pb::DpoConfig {
            f_divergence: "no_such_divergence".into(),
            ..Default::default()
        }),
        ..job(&dataset, 1)
    };
    let refusal = create(&client, wrong).await.unwrap_err();
    let text = format!("{refusal:?}");
    // "is unknown: use reverse_kl, forward_kl, js_divergence or alpha_divergence".
    let (_, list) = text.split_once("is unknown: use ").unwrap();
    let values: Vec<&str> = list
        .split([',', ' '])
        .filter(|word| !word.is_empty() && *word != "or")
        .take_while(|word| word.contains('_'))
        .map(|word| word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric()))
        .collect();
    assert_eq!(values.len(), 4, "{values:?}");
    let meaning = settings().remove("f_divergence").unwrap().remove(3);
    let on_page: Vec<&str> = meaning
        .split("; ")
        .map(|part| part.split_once(':').unwrap().0)
        .collect();
    assert_eq!(on_page, values);
}
