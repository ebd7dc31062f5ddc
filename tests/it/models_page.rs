//! docs/models.md and the README's table of families. The tables of docs/models.md have what the
//! code computes today, and both pages have every family.

use std::path::{Path, PathBuf};

use bradley::domain::training::{
    ActivationCheckpointing, BatchConfig, LoraConfig, Precision, TrainingSpec,
};
use bradley::model::config::ModelConfig;
use bradley::model::families::Architecture;
use bradley::model::params::lora_layers;
use bradley::train::estimate::{self, Lengths, MemoryKind, trainable_parameters};
use serde_json::Value;

use crate::pages::read;

/// Tokens of a packed row in the table.
const ROW_TOKENS: usize = 8192;
/// Tokens of a scoring row, for which a server holds memory free.
pub const SCORING_ROW_TOKENS: usize = 2048;
pub const GIB: f64 = (1u64 << 30) as f64;

/// A model on the Hugging Face hub.
pub struct Published {
    /// Family and size.
    pub model: String,
    repository: String,
    /// The decoder in its config.json.
    pub config: ModelConfig,
}

/// Returns the models of tests/it/models_page.json, which has the fields of each config.json that
/// determine the model's shape.
pub fn published() -> Vec<Published> {
    let list: Vec<Value> = serde_json::from_str(&read("tests/it/models_page.json")).unwrap();
    let text = |entry: &Value, field: &str| entry[field].as_str().unwrap().to_owned();
    list.iter()
        .map(|entry| Published {
            model: text(entry, "model"),
            repository: text(entry, "repository"),
            config: ModelConfig::from_hf_json(
                &entry["config"].to_string(),
                &PathBuf::from(text(entry, "model")),
            )
            .unwrap(),
        })
        .collect()
}

/// Returns the bytes on a GPU of a server in bf16 that has only this model and trains LoRA with the
/// default settings, except for the length of the rows.
fn lora_bytes(config: &ModelConfig, checkpointing: ActivationCheckpointing) -> u64 {
    let batch = BatchConfig {
        row_tokens: ROW_TOKENS,
        activation_checkpointing: checkpointing,
        ..BatchConfig::default()
    };
    let lengths = Lengths {
        longest: batch.max_length,
        micro_batch: ROW_TOKENS,
    };
    let spec = lora_spec(batch);
    let plan = estimate::plan(config, &spec, lengths, u64::MAX, MemoryKind::Gpu).unwrap();
    assert_eq!(plan.row_tokens, ROW_TOKENS);
    let weights = 2 * config.parameter_count() as u64;
    let scoring = estimate::scoring(config, SCORING_ROW_TOKENS);
    weights + scoring + plan.training_state + plan.activations
}

fn lora_spec(batch: BatchConfig) -> TrainingSpec {
    TrainingSpec {
        precision: Some(Precision::Bf16),
        batch,
        ..TrainingSpec::default()
    }
}

/// Formats a number of parameters.
fn count(n: u64) -> String {
    let millions = n as f64 / 1e6;
    match millions < 999.5 {
        true => format!("{millions:.0}M"),
        false => format!("{:.2}B", millions / 1e3),
    }
}

/// Returns the rows of a table, each with its line break.
pub fn table(header: [&str; 2], rows: impl Iterator<Item = String>) -> String {
    let header = header.map(str::to_owned).into_iter();
    header.chain(rows).map(|row| row + "\n").collect()
}

fn memory_table() -> String {
    let gib = |config: &ModelConfig, checkpointing| {
        format!("{:.1}", lora_bytes(config, checkpointing) as f64 / GIB)
    };
    let row = |published: Published| {
        let config = &published.config;
        let trained = trainable_parameters(config, &lora_spec(BatchConfig::default()));
        format!(
            "| {} | `{}` | {} | {} | {} | {} |",
            published.model,
            published.repository,
            count(config.parameter_count() as u64),
            count(trained),
            gib(config, ActivationCheckpointing::On),
            gib(config, ActivationCheckpointing::Off),
        )
    };
    let header = [
        "| model | repository | parameters | trained | recomputed | saved |",
        "|---|---|--:|--:|--:|--:|",
    ];
    table(header, published().into_iter().map(row))
}

/// Returns the names in `target_modules` of the linear layers of a model's first block.
fn targets(config: &ModelConfig) -> Vec<&'static str> {
    lora_layers(&config.spec, &LoraConfig::default())
        .into_iter()
        .filter(|layer| layer.block == 0)
        .map(|layer| layer.linear.lora_target())
        .collect()
}

/// Returns the table of target modules, with one row for all families that have the same ones.
fn targets_table() -> String {
    let mut groups: Vec<(Vec<&str>, Vec<&str>)> = Vec::new();
    for model in published() {
        let (family, names) = (model.config.architecture.as_str(), targets(&model.config));
        match groups.iter_mut().find(|(_, known)| *known == names) {
            Some((families, _)) if families.contains(&family) => {}
            Some((families, _)) => families.push(family),
            None => groups.push((vec![family], names)),
        }
    }
    let code = |names: &[&str]| format!("`{}`", names.join("`, `"));
    let row = |(families, names): (Vec<&str>, Vec<&str>)| {
        format!("| {} | {} |", code(&families), code(&names))
    };
    let header = ["| family | target modules |", "|---|---|"];
    table(header, groups.into_iter().map(row))
}

/// Returns the page with another table between two comments.
pub fn with_table(page: &str, name: &str, table: &str) -> String {
    let begin = format!("<!-- begin {name} -->\n");
    let end = format!("<!-- end {name} -->");
    let (before, rest) = page.split_once(&begin).unwrap();
    let (_, after) = rest.split_once(&end).unwrap();
    format!("{before}{begin}{table}{end}{after}")
}

#[test]
fn the_page_of_models_has_what_is_computed_today() {
    let page = read("docs/models.md");
    let expected = with_table(&page, "memory", &memory_table());
    let expected = with_table(&expected, "targets", &targets_table());
    if page == expected {
        return;
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("models.md");
    std::fs::write(&path, &expected).unwrap();
    let changed: Vec<&str> = expected
        .lines()
        .filter(|line| !page.contains(line))
        .collect();
    panic!(
        "docs/models.md is out of date; if the change is meant, copy {} to it. New lines:\n{}",
        path.display(),
        changed.join("\n")
    );
}

/// The numbers are those of the published files, as the hub counts them.
#[test]
fn shapes_on_the_page_are_those_of_the_published_models() {
    let published = published();
    for (repository, parameters) in [
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("mistralai/Ministral-8B-Instruct-2410", 8_019_808_256),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("google/gemma-2-9b-it", 9_241_705_984),
        ("google/gemma-3-1b-it", 999_885_952),
        ("microsoft/Phi-4-mini-instruct", 3_836_021_760),
        ("microsoft/phi-4", 14_659_507_200),
        ("allenai/OLMo-2-1124-7B-Instruct", 7_298_617_344),
        ("allenai/Olmo-3-7B-Instruct", 7_298_011_136),
        ("ibm-granite/granite-3.3-8b-instruct", 8_170_864_640),
        ("zai-org/GLM-4-9B-0414", 9_400_279_040),
    ] {
        let model = published
            .iter()
            .find(|model| model.repository == repository)
            .unwrap();
        assert_eq!(model.config.parameter_count(), parameters, "{repository}");
    }
}

#[test]
fn every_family_is_in_both_tables() {
    let published = published();
    let readme = read("README.md");
    for family in Architecture::ALL {
        let mut of_family = published
            .iter()
            .filter(|model| model.config.architecture == family);
        assert!(
            of_family.next().is_some(),
            "tests/it/models_page.json has no {}",
            family.as_str()
        );
        let code = format!("`{}`", family.as_str());
        let row = readme
            .lines()
            .find(|line| line.starts_with("| `") && line.contains(&code));
        let row = row.unwrap_or_else(|| panic!("the table of README.md has no {code}"));
        let has_repository = published
            .iter()
            .any(|model| row.contains(&format!("`{}`", model.repository)));
        assert!(
            has_repository,
            "README.md names no repository of docs/models.md for {code}"
        );
    }
}
