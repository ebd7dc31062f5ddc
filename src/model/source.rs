//! Finds a model's files: a folder, a GGUF file, or the Hugging Face hub and its cache.

use std::fmt;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};

use super::error::ModelError;
use super::tokenizer::{EXTRA_FILES, is_extra_template};
use crate::domain::names::is_hub_id;

/// How the hub is reached.
#[derive(Clone, Default)]
pub struct HubOptions {
    /// HF_ENDPOINT; the public hub when absent.
    pub endpoint: Option<String>,
    /// HF_TOKEN.
    pub token: Option<String>,
    /// HF_HOME/hub or HF_HUB_CACHE; ~/.cache/huggingface/hub when absent.
    pub cache_dir: Option<PathBuf>,
    /// HF_HUB_OFFLINE: the cache only.
    pub offline: bool,
}

impl fmt::Debug for HubOptions {
    /// Never prints the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "<secret>"))
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .finish()
    }
}

/// Where a model's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Located {
    /// config.json, safetensors, tokenizer.json.
    Folder(PathBuf),
    /// Everything in one file.
    Gguf(PathBuf),
}

/// Finds `source`: an existing folder or .gguf file, else `owner/name[@revision]` on the hub.
///
/// # Errors
/// [`ModelError::NotFound`] says what was tried.
pub fn locate(source: &str, hub: &HubOptions) -> Result<Located, ModelError> {
    let path = Path::new(source);
    if path.is_dir() {
        return Ok(Located::Folder(path.to_owned()));
    }
    if path.is_file() {
        return Ok(Located::Gguf(path.to_owned()));
    }
    let not_found = |tried: String| ModelError::NotFound { model: source.to_owned(), tried };
    let (name, revision) = source.split_once('@').unwrap_or((source, "main"));
    if !is_hub_id(name) {
        return Err(not_found("a folder or file of that name (none), and it is not a hub id of the form owner/name".into()));
    }
    download(name, revision, hub).map(Located::Folder).map_err(not_found)
}

/// The snapshot folder with all the files a model needs; on failure, what was tried.
fn download(name: &str, revision: &str, hub: &HubOptions) -> Result<PathBuf, String> {
    let repo = Repo::with_revision(name.to_owned(), RepoType::Model, revision.to_owned());
    let cache = hub.cache_dir.clone().map(Cache::new).unwrap_or_default();
    let cached =
        |repo: Repo| cache.repo(repo).get("config.json").and_then(|p| p.parent().map(Path::to_owned)).filter(|dir| is_complete(dir));
    if let Some(dir) = cached(repo.clone()) {
        return Ok(dir);
    }
    if hub.offline {
        return Err(format!("the cache {} (not there), and offline mode forbids the hub", cache.path().display()));
    }
    let endpoint = hub.endpoint.as_deref().unwrap_or("https://huggingface.co");
    let failed = |e: &dyn fmt::Display| format!("the cache {} (not there) and the hub {endpoint} ({e})", cache.path().display());
    let api = ApiBuilder::from_cache(cache.clone())
        .with_endpoint(endpoint.to_owned())
        .with_token(hub.token.clone())
        .with_progress(false)
        .build()
        .map_err(|e| failed(&e))?;
    let remote = api.repo(repo.clone());
    let files: Vec<String> = remote.info().map_err(|e| failed(&e))?.siblings.into_iter().map(|s| s.rfilename).collect();
    for file in files.iter().filter(|f| is_needed(f)) {
        tracing::info!(model = name, file, "downloading");
        remote.get(file).map_err(|e| failed(&e))?;
    }
    cached(repo).ok_or_else(|| failed(&"it has no config.json with safetensors weights and a tokenizer.json"))
}

fn is_needed(file: &str) -> bool {
    let exact = [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ];
    exact.contains(&file)
        || EXTRA_FILES.contains(&file)
        || is_extra_template(file)
        || (file.starts_with("model") && file.ends_with(".safetensors") && !file.contains('/'))
}

fn is_complete(dir: &Path) -> bool {
    let has = |f: &str| dir.join(f).is_file();
    has("config.json") && has("tokenizer.json") && (has("model.safetensors") || has("model.safetensors.index.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_tried_is_named_and_secrets_are_not() {
        let hub =
            HubOptions { offline: true, cache_dir: Some("/nonexistent".into()), token: Some("hf_secret".into()), ..HubOptions::default() };
        let e = locate("owner/name", &hub).unwrap_err().to_string();
        assert!(e.contains("/nonexistent") && e.contains("offline"), "{e}");
        let e = locate("../../etc/passwd-no", &hub).unwrap_err().to_string();
        assert!(e.contains("owner/name"), "{e}");
        assert!(!format!("{hub:?}").contains("hf_secret"));
    }
}
