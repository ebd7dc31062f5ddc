//! Finds a model's files: a folder, a GGUF file, or the Hugging Face hub and its cache.

use std::fmt;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};

use super::tokenizer::{EXTRA_FILES, is_extra_template};
use crate::domain::names::is_hub_id;
use crate::model::error::ModelError;

/// Access to the Hugging Face hub and its local cache.
#[derive(Clone, Default)]
pub struct HubOptions {
    /// HF_ENDPOINT. `None` means the public hub.
    pub endpoint: Option<String>,
    /// HF_TOKEN.
    pub token: Option<String>,
    /// HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub. `None` if there is no home directory
    /// either: then nothing of the hub can be used.
    pub cache_dir: Option<PathBuf>,
    /// HF_HUB_OFFLINE. True forbids requests to the hub.
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

impl HubOptions {
    /// Returns the local cache.
    ///
    /// # Errors
    /// Returns a text that names the variables to set if the cache has no folder.
    pub(super) fn cache(&self) -> Result<Cache, String> {
        let folder = self.cache_dir.clone().ok_or(
            "the cache of the hub (it has no folder, because the user has no home directory: set \
             HOME, HF_HOME or HF_HUB_CACHE)",
        )?;
        Ok(Cache::new(folder))
    }
}

/// Location of a model's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Located {
    /// A folder with config.json, safetensors and tokenizer.json.
    Folder(PathBuf),
    /// A GGUF file, which holds everything.
    Gguf(PathBuf),
}

/// Finds `source`: an existing folder or GGUF file, else `owner/name[@revision]` in the cache or on
/// the hub.
///
/// # Errors
/// [`ModelError::NotFound`], which lists the places that were tried.
pub fn locate(source: &str, hub: &HubOptions) -> Result<Located, ModelError> {
    let path = Path::new(source);
    if path.is_dir() {
        return Ok(Located::Folder(path.to_owned()));
    }
    if path.is_file() {
        return Ok(Located::Gguf(path.to_owned()));
    }
    let not_found = |tried: String| ModelError::NotFound {
        model: source.to_owned(),
        tried,
    };
    let (name, revision) = source.split_once('@').unwrap_or((source, "main"));
    if !is_hub_id(name) {
        return Err(not_found(
            "a folder or file of that name (none), and it is not a hub id of the form owner/name"
                .into(),
        ));
    }
    download(name, revision, hub)
        .map(Located::Folder)
        .map_err(|tried| not_found(format!("a folder or file of that name (none), {tried}")))
}

/// File in a snapshot's folder that lists the files of a completed download.
const COMPLETE: &str = ".bradley-complete.json";

/// Returns the snapshot folder with all files that a model needs. The error is a text that lists
/// the places that were tried.
///
/// An interrupted download has no [`COMPLETE`] file, so it is resumed, at the same commit. A
/// snapshot that another program downloaded has none either. If it is complete, this costs one
/// request and no download.
fn download(name: &str, revision: &str, hub: &HubOptions) -> Result<PathBuf, String> {
    let repo_at =
        |revision: &str| Repo::with_revision(name.to_owned(), RepoType::Model, revision.to_owned());
    let repo = repo_at(revision);
    let cache = hub.cache()?;
    let begun = cache
        .repo(repo.clone())
        .get("config.json")
        .and_then(|p| p.parent().map(Path::to_owned));
    if let Some(dir) = begun.as_ref().filter(|dir| is_complete(dir)) {
        return Ok(dir.clone());
    }
    let cached = if begun.is_some() {
        "a download that did not end, or one by another program"
    } else {
        "not there"
    };
    if hub.offline {
        let Some(dir) = begun.filter(|dir| is_usable(dir)) else {
            return Err(format!(
                "the cache {} ({cached}), and offline mode forbids the hub",
                cache.path().display()
            ));
        };
        tracing::warn!(
            model = name,
            "the cached model may be incomplete: it is used as it is, because of offline mode"
        );
        return Ok(dir);
    }
    let endpoint = hub.endpoint.as_deref().unwrap_or("https://huggingface.co");
    let offline = if begun.is_some() {
        "; HF_HUB_OFFLINE=1 uses the cache as it is"
    } else {
        ""
    };
    let failed = |e: &dyn fmt::Display| {
        format!(
            "the cache {} ({cached}) and the hub {endpoint} ({e}){offline}; a private or gated \
             model needs HF_TOKEN, a token of an account that may read it",
            cache.path().display()
        )
    };
    // The cache may have the token that `hf auth login` has stored.
    let mut api = ApiBuilder::from_cache(cache.clone());
    if hub.token.is_some() {
        api = api.with_token(hub.token.clone());
    }
    let api = api
        .with_endpoint(endpoint.to_owned())
        .with_progress(false)
        .build()
        .map_err(|e| failed(&e))?;
    // The branch may have moved since the first download. The files must all be of one commit.
    let commit = begun.as_ref().and_then(|dir| dir.file_name()?.to_str());
    let remote = api.repo(commit.map_or_else(|| repo.clone(), repo_at));
    let info = remote.info().map_err(|e| failed(&e))?;
    if info.sha.is_empty() || !info.sha.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Err(failed(&"its answer names no commit"));
    }
    let dir = cache.repo(repo.clone()).pointer_path(&info.sha);
    let files: Vec<String> = info
        .siblings
        .into_iter()
        .map(|s| s.rfilename)
        .filter(|f| is_needed(f))
        .collect();
    for file in files.iter().filter(|file| !dir.join(file).is_file()) {
        tracing::info!(model = name, file, "downloading");
        remote.download(file).map_err(|e| failed(&e))?;
    }
    if !is_usable(&dir) {
        return Err(failed(
            &"the model there lacks a config.json, safetensors weights or a tokenizer.json",
        ));
    }
    if begun.as_ref() != Some(&dir) {
        cache
            .repo(repo)
            .create_ref(&info.sha)
            .map_err(|e| failed(&e))?;
    }
    if let Err(e) = mark_complete(&dir, &files) {
        tracing::warn!(
            model = name,
            error = %e,
            "the list of downloaded files cannot be written: the hub is asked again next time"
        );
    }
    Ok(dir)
}

/// Writes the list of downloaded files. It must be called after the last download.
fn mark_complete(dir: &Path, files: &[String]) -> std::io::Result<()> {
    let unfinished = dir.join(format!("{COMPLETE}.{}", std::process::id()));
    std::fs::write(&unfinished, serde_json::to_vec(files)?)?;
    std::fs::rename(&unfinished, dir.join(COMPLETE))
}

/// Returns true if the download completed and all of its files still exist.
fn is_complete(dir: &Path) -> bool {
    let listed = std::fs::read(dir.join(COMPLETE))
        .ok()
        .and_then(|list| serde_json::from_slice::<Vec<String>>(&list).ok());
    is_usable(dir) && listed.is_some_and(|files| files.iter().all(|file| dir.join(file).is_file()))
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

/// Returns true if the folder has the files that every model needs.
fn is_usable(dir: &Path) -> bool {
    let has = |f: &str| dir.join(f).is_file();
    has("config.json")
        && has("tokenizer.json")
        && (has("model.safetensors") || has("model.safetensors.index.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_tried_is_named_and_secrets_are_not() {
        let hub = HubOptions {
            offline: true,
            cache_dir: Some("/nonexistent".into()),
            token: Some("hf_secret".into()),
            ..HubOptions::default()
        };
        let e = locate("owner/name", &hub).unwrap_err().to_string();
        assert!(e.contains("/nonexistent") && e.contains("offline"), "{e}");
        let e = locate("../../etc/passwd-no", &hub).unwrap_err().to_string();
        assert!(e.contains("owner/name"), "{e}");
        assert!(!format!("{hub:?}").contains("hf_secret"));
        let homeless = HubOptions::default();
        let e = locate("owner/name", &homeless).unwrap_err().to_string();
        assert!(e.contains("set HOME, HF_HOME or HF_HUB_CACHE"), "{e}");
    }
}
