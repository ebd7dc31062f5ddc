//! Opens a model: configuration, weights and tokenizer from one source.

use std::path::Path;

use super::gguf::reader::Gguf;
use super::gguf::weights::GgufWeights;
use super::peft;
use super::source::{HubOptions, Located, locate};
use super::tokenizer::ChatTokenizer;
use super::weights::Weights;
use crate::domain::identity::ModelIdentity;
use crate::domain::names::{BaseName, is_hub_id, is_valid_id};
use crate::model::config::ModelConfig;
use crate::model::error::{ModelError, last_part};

/// An opened model. Its weights are still on disk.
#[derive(Debug)]
pub struct LoadedModel {
    /// The id in `models/{id}`.
    pub id: String,
    /// Architecture and dimensions.
    pub config: ModelConfig,
    /// The opened weight files.
    pub weights: Weights,
    /// The tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// The source as clients see it: the hub id as it was given, or the last part of a path.
    pub origin: String,
    /// The name under which PEFT and transformers find the model.
    pub base: BaseName,
}

impl LoadedModel {
    /// Returns the content hashes of the model's parts.
    pub fn identity(&self) -> ModelIdentity {
        ModelIdentity {
            weights: self.weights.fingerprint(),
            config: blake3::hash(self.config.canonical().as_bytes())
                .to_hex()
                .to_string(),
            tokenizer: self.tokenizer.content_hash().to_owned(),
            chat_template: self.tokenizer.template_hash(),
        }
    }
}

/// Opens `source` (a folder, a GGUF file or a hub id) as the model `id`. Without `id`, the id is
/// made from the last part of `source`.
///
/// # Errors
/// Returns an error that names the file, and the field or tensor in it, if something is missing,
/// malformed or not supported.
pub fn load_model(
    id: Option<&str>,
    source: &str,
    hub: &HubOptions,
) -> Result<LoadedModel, ModelError> {
    let id = id.map_or_else(|| default_id(source), str::to_owned);
    let model = open(id, source, hub)?;
    if model.tokenizer.eos_token().is_none() {
        tracing::warn!(
            model = model.id,
            "the tokenizer has no end-of-sequence token, or one that is not in its vocabulary: \
             the model does not learn where plain-text answers end; set eos_token in \
             tokenizer_config.json (tokenizer.ggml.eos_token_id in GGUF)"
        );
    }
    Ok(model)
}

fn open(id: String, source: &str, hub: &HubOptions) -> Result<LoadedModel, ModelError> {
    let located = locate(source, hub)?;
    let is_local = Path::new(source).exists();
    let (origin, base) = match is_local {
        // The paths `.` and `..` have no last part.
        true => match last_part(Path::new(source)) {
            last if last.is_empty() => (id.clone(), BaseName::from(id.as_str())),
            last => (last, BaseName::from(id.as_str())),
        },
        false => (source.to_owned(), BaseName::from_hub(source)),
    };
    match located {
        Located::Folder(folder) => {
            let path = folder.join("config.json");
            if is_local && !path.exists() {
                let holds = match folder.join(peft::CONFIG_FILE).exists() {
                    true => {
                        " but a PEFT adapter: serve the adapter's base model, or merged weights \
                         (bradley checkpoints download --contents merged)"
                    }
                    false => "",
                };
                return Err(ModelError::NotFound {
                    model: source.to_owned(),
                    tried: format!("this folder, which has no config.json{holds}"),
                });
            }
            let text = std::fs::read_to_string(&path).map_err(ModelError::io(&path))?;
            let config = ModelConfig::from_hf_json(&text, &path)?;
            let weights = Weights::open_folder(&folder)?;
            weights.check_names(&config)?;
            let tokenizer = ChatTokenizer::from_folder(&folder)?;
            Ok(LoadedModel {
                id,
                tokenizer: tokenizer.with_end_ids(&config.eos_token_ids),
                config,
                weights,
                origin,
                base,
            })
        }
        Located::Gguf(path) => load_gguf(id, &path, origin, base),
    }
}

fn load_gguf(
    id: String,
    path: &Path,
    origin: String,
    base: BaseName,
) -> Result<LoadedModel, ModelError> {
    let gguf = Gguf::open(path)?;
    let config = ModelConfig::from_gguf(&gguf)?;
    let tokenizer = ChatTokenizer::from_gguf(&gguf)?;
    let weights = Weights::from_gguf(GgufWeights::new(gguf, &config), path);
    weights.check_names(&config)?;
    Ok(LoadedModel {
        id,
        tokenizer: tokenizer.with_end_ids(&config.eos_token_ids),
        config,
        weights,
        origin,
        base,
    })
}

/// Makes a model id from the last part of a path or hub id, without `.gguf` and revision.
/// Characters that are not allowed in an id are replaced by `-`.
pub fn default_id(source: &str) -> String {
    // The revision of a hub id may have slashes.
    let source = match source.split_once('@') {
        Some((name, _)) if is_hub_id(name) => name,
        _ => source,
    };
    let last = source
        .trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or(source);
    let last = last.split('@').next().unwrap_or(last);
    let last = last.strip_suffix(".gguf").unwrap_or(last);
    let id: String = last
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '-'
            }
        })
        .take(128)
        .collect();
    if is_valid_id(&id) { id } else { "model".into() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_text_ends_as_generation_config_says_or_else_as_the_configuration_says() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models/llama");
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&golden).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        let write = |file: &str, json: &Value| {
            std::fs::write(folder.path().join(file), json.to_string()).unwrap();
        };
        let end_ids = || {
            let source = folder.path().to_str().unwrap();
            let model = load_model(None, source, &HubOptions::default()).unwrap();
            assert_eq!(model.tokenizer.eos_id(), Some(1));
            model.tokenizer.end_ids()
        };
        let text = std::fs::read_to_string(golden.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["eos_token_id"] = json!([1, 7]);
        write("config.json", &config);
        let generation_config = "generation_config.json";
        write(generation_config, &json!({"eos_token_id": [9, 8]}));
        assert_eq!(end_ids(), [1, 8, 9]);
        write(generation_config, &json!({"eos_token_id": null}));
        assert_eq!(end_ids(), [1, 7]);
        std::fs::remove_file(folder.path().join(generation_config)).unwrap();
        assert_eq!(end_ids(), [1, 7]);
    }

    #[test]
    fn a_folder_without_a_configuration_is_no_model() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().to_str().unwrap();
        let refused = load_model(None, source, &HubOptions::default()).unwrap_err();
        let expected =
            format!("model '{source}' not found; tried this folder, which has no config.json");
        assert_eq!(refused.to_string(), expected);
        std::fs::write(folder.path().join(peft::CONFIG_FILE), "{}").unwrap();
        let refused = load_model(None, source, &HubOptions::default()).unwrap_err();
        let words = "no config.json but a PEFT adapter: serve the adapter's base model";
        assert!(refused.to_string().contains(words), "{refused}");
    }

    #[test]
    fn ids_come_from_the_last_part() {
        assert_eq!(
            default_id("HuggingFaceTB/SmolLM2-135M-Instruct@main"),
            "SmolLM2-135M-Instruct"
        );
        assert_eq!(default_id("/models/SmolLM2.Q4_1.gguf"), "SmolLM2.Q4_1");
        assert_eq!(default_id("owner/tiny@refs/pr/3"), "tiny");
        assert_eq!(default_id("/models/tiny/"), "tiny");
        assert_eq!(default_id("/.."), "model");
    }
}
