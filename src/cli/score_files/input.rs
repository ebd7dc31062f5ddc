//! The files that are scored: found by paths, patterns and URLs, and copied to this machine where
//! they are not on it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use glob::{MatchOptions, Pattern};
use object_store::path::Path as Key;
use object_store::{GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt};
use tempfile::NamedTempFile;
use tokio_stream::StreamExt;

use super::store::store_failure;
use crate::cli::failure::Failure;
use crate::service::remote::open_store;

/// Maximum number of inputs of one command.
const MAX_INPUTS: usize = 1_000_000;
/// Characters of patterns.
const WILDCARDS: [char; 3] = ['*', '?', '['];
/// A `*` of a pattern matches only within a folder's or file's name.
const MATCHING: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// A file or object with rows.
#[derive(Clone)]
pub(super) struct ScoreInput {
    /// Its name, with which those of its parts begin: the path below the folder that the argument
    /// names.
    pub name: String,
    /// Its whole path or URL, for messages.
    pub shown: String,
    /// Its size.
    pub bytes: u64,
    at: InputPlace,
}

#[derive(Clone)]
enum InputPlace {
    File(PathBuf),
    Object(Arc<dyn ObjectStore>, Box<ObjectMeta>),
}

/// An input as a file of this machine.
pub(super) struct LocalCopy {
    pub path: PathBuf,
    /// The identity of its content.
    pub identity: String,
    /// Size and time of change of a file at the time when its content was hashed.
    seen: Option<(u64, std::time::SystemTime)>,
    /// The temporary file of an object. It is deleted when this is dropped.
    _copy: Option<NamedTempFile>,
}

impl LocalCopy {
    /// Returns true if the file was changed since it was hashed.
    pub(super) fn has_changed(&self) -> bool {
        self.seen
            .is_some_and(|seen| stamp(&self.path).ok() != Some(seen))
    }
}

fn stamp(path: &Path) -> std::io::Result<(u64, std::time::SystemTime)> {
    let metadata = std::fs::metadata(path)?;
    Ok((metadata.len(), metadata.modified()?))
}

impl ScoreInput {
    /// Returns the identity of the content if it is known without reading it.
    pub(super) fn identity(&self) -> Option<String> {
        match &self.at {
            InputPlace::File(_) => None,
            InputPlace::Object(_, meta) => {
                let tag = meta.e_tag.as_ref().or(meta.version.as_ref())?;
                Some(format!(
                    "{} bytes, tag {}",
                    meta.size,
                    tag.trim_matches('"')
                ))
            }
        }
    }

    /// Hashes a file, or copies an object into a temporary file.
    ///
    /// # Errors
    /// Returns a text that names the input if it cannot be read, or has changed since it was
    /// listed.
    pub(super) async fn fetch(&self) -> Result<LocalCopy, String> {
        match &self.at {
            InputPlace::File(path) => {
                let path = path.clone();
                let hashed = tokio::task::spawn_blocking(move || {
                    let seen = stamp(&path)?;
                    let mut hasher = blake3::Hasher::new();
                    std::io::copy(&mut std::fs::File::open(&path)?, &mut hasher)?;
                    Ok::<_, std::io::Error>(LocalCopy {
                        path,
                        identity: format!("blake3 {}", hasher.finalize().to_hex()),
                        seen: Some(seen),
                        _copy: None,
                    })
                });
                hashed
                    .await
                    .map_err(std::io::Error::other)
                    .flatten()
                    .map_err(|e| format!("{}: {e}", self.shown))
            }
            InputPlace::Object(store, meta) => self.copy(store, meta).await,
        }
    }

    async fn copy(
        &self,
        store: &Arc<dyn ObjectStore>,
        meta: &ObjectMeta,
    ) -> Result<LocalCopy, String> {
        let on_disk = |e: std::io::Error| {
            format!(
                "{}: cannot be copied to a temporary file: {e}: free some space, or name another \
                 folder with the variable TMPDIR",
                self.shown
            )
        };
        let refused = |e: object_store::Error| match e {
            object_store::Error::Precondition { .. } => format!(
                "{}: it was changed while the command ran: run it again with another --out",
                self.shown
            ),
            e => store_failure(&self.shown, &e, "list and read"),
        };
        let options = GetOptions {
            if_match: meta.e_tag.clone(),
            ..Default::default()
        };
        let found = store.get_opts(&meta.location, options).await;
        let mut chunks = found.map_err(refused)?.into_stream();
        let mut file = NamedTempFile::new().map_err(on_disk)?;
        let mut hasher = blake3::Hasher::new();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(refused)?;
            hasher.update(&chunk);
            file.write_all(&chunk).map_err(on_disk)?;
        }
        file.flush().map_err(on_disk)?;
        let hash = || format!("blake3 {}", hasher.finalize().to_hex());
        Ok(LocalCopy {
            path: file.path().to_owned(),
            identity: self.identity().unwrap_or_else(hash),
            seen: None,
            _copy: Some(file),
        })
    }
}

/// Finds the inputs of all arguments, sorted by their names.
///
/// # Errors
/// Returns a failure that names the argument, also if two inputs have the same name.
pub(super) async fn find(
    arguments: &[String],
    options: &BTreeMap<String, String>,
) -> Result<Vec<ScoreInput>, Failure> {
    let mut inputs = Vec::new();
    for argument in arguments {
        let found = match argument.split_once("://") {
            None => files(argument).map_err(Failure::Usage),
            Some(("file", path)) => files(path).map_err(Failure::Usage),
            Some((scheme, rest)) => objects(argument, scheme, rest, options).await,
        };
        let found = found.map_err(|failure| failure.with_context(&format!("--in {argument}")))?;
        if found.is_empty() {
            return Err(Failure::Usage(format!(
                "--in {argument}: nothing matches this pattern"
            )));
        }
        inputs.extend(found);
        if inputs.len() > MAX_INPUTS {
            return Err(Failure::Usage(format!(
                "--in: more than {MAX_INPUTS} inputs: merge them, or score them in several runs"
            )));
        }
    }
    inputs.sort_by(|a, b| a.name.cmp(&b.name));
    let mut names = BTreeSet::new();
    if let Some(twice) = inputs.iter().find(|input| !names.insert(&input.name)) {
        return Err(Failure::Usage(format!(
            "--in: two inputs have the name {} ({}): name a folder above both with a pattern, such \
             as 'data/**/*.jsonl', or give each an --out of its own",
            twice.name, twice.shown
        )));
    }
    Ok(inputs)
}

/// Splits a path into the folder before the first name with a wildcard, and the rest.
fn fixed_part(path: &str) -> (&str, &str) {
    let wild = path.find(WILDCARDS).unwrap_or(path.len());
    match path[..wild].rfind('/') {
        Some(slash) => (&path[..=slash], &path[slash + 1..]),
        None => ("", path),
    }
}

/// Finds the files that a path or pattern names.
fn files(argument: &str) -> Result<Vec<ScoreInput>, String> {
    let input = |path: PathBuf| -> Result<ScoreInput, String> {
        let shown = path.display().to_string();
        let metadata = std::fs::metadata(&path).map_err(|e| format!("{shown}: {e}"))?;
        if metadata.is_dir() {
            return Err(format!(
                "it is a folder: name its files, such as '{}/*.jsonl'",
                shown.trim_end_matches('/')
            ));
        }
        let (folder, _) = fixed_part(argument);
        let name = path.strip_prefix(folder).unwrap_or(&path);
        Ok(ScoreInput {
            name: name.to_string_lossy().into_owned(),
            shown,
            bytes: metadata.len(),
            at: InputPlace::File(path),
        })
    };
    if Path::new(argument).exists() || !argument.contains(WILDCARDS) {
        return Ok(vec![input(PathBuf::from(argument))?]);
    }
    let mut found = Vec::new();
    for path in glob::glob(argument).map_err(|e| e.to_string())? {
        let path = path.map_err(|e| e.to_string())?;
        if path.is_file() {
            found.push(input(path)?);
        }
    }
    Ok(found)
}

/// Finds the objects that a URL names, with or without a pattern. A URL that ends with / names all
/// objects below it.
///
/// # Errors
/// [`Failure::Usage`] if the URL, its pattern or what it names is wrong. [`Failure::Failed`] for
/// other errors of the store, after which the same command may succeed.
async fn objects(
    url: &str,
    scheme: &str,
    rest: &str,
    options: &BTreeMap<String, String>,
) -> Result<Vec<ScoreInput>, Failure> {
    let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
    let root = format!("{scheme}://{bucket}/");
    let (store, _) = open_store(&root, options).map_err(|e| {
        let remedy = "give a path, or a URL such as s3://BUCKET/FOLDER/*.parquet";
        Failure::Usage(format!("{e}: {remedy}"))
    })?;
    let store: Arc<dyn ObjectStore> = Arc::from(store);
    let failed = |e: object_store::Error| {
        let message = store_failure(url, &e, "list and read");
        match e {
            object_store::Error::NotFound { .. } => Failure::Usage(message),
            _ => Failure::Failed(message),
        }
    };
    let wrong = |e: &dyn std::fmt::Display| Failure::Usage(e.to_string());
    let (folder, _) = fixed_part(path);
    let input = |meta: ObjectMeta| {
        let key = meta.location.as_ref();
        ScoreInput {
            name: key.strip_prefix(folder).unwrap_or(key).to_owned(),
            shown: format!("{root}{key}"),
            bytes: meta.size,
            at: InputPlace::Object(Arc::clone(&store), Box::new(meta)),
        }
    };
    if !path.contains(WILDCARDS) && !path.is_empty() && !path.ends_with('/') {
        let key = Key::parse(path).map_err(|e| wrong(&e))?;
        return Ok(vec![input(store.head(&key).await.map_err(failed)?)]);
    }
    let pattern = match path.contains(WILDCARDS) {
        true => Some(Pattern::new(path).map_err(|e| wrong(&e))?),
        false => None,
    };
    let prefix = Key::parse(folder.trim_end_matches('/')).map_err(|e| wrong(&e))?;
    let mut listed = store.list((!folder.is_empty()).then_some(&prefix));
    let mut found = Vec::new();
    while let Some(meta) = listed.next().await {
        let meta = meta.map_err(failed)?;
        let key = meta.location.as_ref();
        let is_meant = pattern
            .as_ref()
            .is_none_or(|pattern| pattern.matches_with(key, MATCHING));
        if is_meant && found.len() <= MAX_INPUTS {
            found.push(input(meta));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn inputs_are_named_below_the_fixed_folder() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a/x.jsonl", "b/x.jsonl", "b/y.parquet"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        let at = |name: &str| format!("{}/{name}", dir.path().display());
        let names = async |arguments: &[&str]| {
            let arguments: Vec<String> = arguments.iter().map(|a| at(a)).collect();
            match find(&arguments, &BTreeMap::new()).await {
                Ok(found) => found.into_iter().map(|input| input.name).collect(),
                Err(failure) => vec![failure.message().to_owned()],
            }
        };
        assert_eq!(names(&["**/x.jsonl"]).await, ["a/x.jsonl", "b/x.jsonl"]);
        assert_eq!(
            names(&["b/y.parquet", "a/*"]).await,
            ["x.jsonl", "y.parquet"]
        );
        let twice = names(&["a/*", "b/*.jsonl"]).await;
        assert!(
            twice[0].contains("two inputs have the name x.jsonl"),
            "{twice:?}"
        );
        assert!(names(&["c/*"]).await[0].contains("nothing matches"));
        assert!(names(&["a"]).await[0].contains("is a folder"));
    }
}
