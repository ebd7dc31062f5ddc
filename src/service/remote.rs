//! Object store for artifacts (S3, GCS, Azure, or a shared folder). It holds the files that every
//! replica must find; the data directory is then a cache of it.
//!
//! The key of a checkpoint contains the hash of its contents, so that a worker that lost its lease
//! cannot overwrite the checkpoint of its successor.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, WriteMultipart};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_stream::StreamExt;

use super::error::{Result, ServiceError, failed};
use crate::domain::reason::Reason;

/// Object that holds the identity of the store.
const IDENTITY_KEY: &str = "bradley-store-id";
/// Size of one part of a multipart upload, in bytes.
const PART_BYTES: usize = 8 << 20;
/// Maximum number of parts of one upload in flight.
const MAX_PARTS_IN_FLIGHT: usize = 4;

/// An object store. All keys are below a prefix.
#[derive(Clone)]
pub struct Remote {
    store: Arc<dyn ObjectStore>,
    prefix: Key,
    url: String,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The store itself is left out, because it would print credentials.
        f.debug_struct("Remote")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

/// Form of the URL of an artifact store, for errors.
pub const URL_FORM: &str = "a URL such as s3://bucket/prefix or file:///folder";

/// Returns true if a text is a URL with a scheme, and not only a path.
pub fn is_url(text: &str) -> bool {
    text.contains("://")
}

/// Opens the store of a URL. `options` are the variables of the vendor (`AWS_REGION`, …). Returns
/// it with the key that the URL's path names.
///
/// # Errors
/// Returns a text without the URL if that or an option cannot be used.
pub fn open_store(
    url: &str,
    options: &BTreeMap<String, String>,
) -> std::result::Result<(Box<dyn ObjectStore>, Key), String> {
    let parsed = reqwest::Url::parse(url).map_err(|e| e.to_string())?;
    let vendor = options
        .iter()
        .map(|(k, v)| (k.to_ascii_lowercase(), v.clone()));
    object_store::parse_url_opts(&parsed, vendor).map_err(|e| e.to_string())
}

impl Remote {
    /// Opens `s3://bucket/prefix`, `gs://…`, `az://…` or `file:///folder`. `options` are the
    /// variables of the vendor (`AWS_REGION`, …). A missing folder is created if `is_new`;
    /// otherwise it is an error, because it is probably a share that is not mounted.
    ///
    /// # Errors
    /// `InvalidArgument` (`artifact_url`) if the URL or an option cannot be used.
    pub fn open(url: &str, options: &BTreeMap<String, String>, is_new: bool) -> Result<Self> {
        let wrong = |e: &dyn std::fmt::Display| {
            ServiceError::invalid("artifact_url", format!("{url:?} cannot be used: {e}"))
        };
        let parsed = reqwest::Url::parse(url).map_err(|e| wrong(&e))?;
        let (mut store, prefix) = open_store(url, options).map_err(|e| wrong(&e))?;
        if parsed.scheme() == "file" {
            let folder = parsed
                .to_file_path()
                .map_err(|()| wrong(&"it names no folder"))?;
            if is_new {
                std::fs::create_dir_all(&folder).map_err(|e| wrong(&e))?;
            } else if !folder.is_dir() {
                let message = format!(
                    "{} does not exist, but this database has files there: mount it, or correct \
                     the URL",
                    folder.display()
                );
                return Err(wrong(&message));
            }
            store = Box::new(LocalFileSystem::new().with_fsync(true));
        }
        Ok(Remote {
            store: Arc::from(store),
            prefix,
            url: url.trim_end_matches('/').to_owned(),
        })
    }

    /// Returns the identity of the store; `None` if it has none yet.
    ///
    /// # Errors
    /// `Unavailable` if the store does not answer.
    pub async fn identity(&self) -> Result<Option<String>> {
        match self.store.get(&self.key(IDENTITY_KEY)).await {
            Ok(found) => {
                let bytes = found
                    .bytes()
                    .await
                    .map_err(|e| unavailable(IDENTITY_KEY, &e))?;
                Ok(Some(String::from_utf8_lossy(&bytes).trim().to_owned()))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(unavailable(IDENTITY_KEY, &e)),
        }
    }

    /// Writes the identity of the store, unless another process has done so meanwhile. Returns the
    /// identity that the store has afterwards.
    ///
    /// # Errors
    /// `Unavailable` if the store does not answer or the identity cannot be read back.
    pub async fn create_identity(&self, identity: &str) -> Result<String> {
        use object_store::Error::{AlreadyExists, NotImplemented, NotSupported, Precondition};
        let (key, bytes) = (self.key(IDENTITY_KEY), identity.as_bytes().to_vec());
        match self
            .store
            .put_opts(&key, bytes.clone().into(), PutMode::Create.into())
            .await
        {
            Ok(_) | Err(AlreadyExists { .. } | Precondition { .. }) => {}
            // A store without conditional writes: the last write wins. A process that reads below
            // before another one writes gets an identity that is then replaced.
            Err(NotSupported { .. } | NotImplemented { .. }) => {
                self.store
                    .put(&key, bytes.into())
                    .await
                    .map_err(|e| unavailable(IDENTITY_KEY, &e))?;
            }
            Err(e) => return Err(unavailable(IDENTITY_KEY, &e)),
        }
        let found = self.identity().await?;
        found.ok_or_else(|| {
            unavailable_because(
                IDENTITY_KEY,
                "the object that was just written cannot be read",
            )
        })
    }

    /// Returns true if the store has no objects.
    ///
    /// # Errors
    /// `Unavailable` if the store does not answer.
    pub async fn is_empty(&self) -> Result<bool> {
        let prefix = (!self.prefix.as_ref().is_empty()).then_some(&self.prefix);
        let mut objects = self.store.list(prefix);
        match objects.next().await {
            None => Ok(true),
            Some(Ok(_)) => Ok(false),
            Some(Err(e)) => Err(unavailable("the list of its objects", &e)),
        }
    }

    /// Returns the URL of the store.
    pub fn url(&self) -> &str {
        &self.url
    }

    fn key(&self, name: &str) -> Key {
        self.prefix
            .parts()
            .chain(Key::from(name).parts().collect::<Vec<_>>())
            .collect()
    }

    /// Uploads a file atomically: it becomes visible as a whole or not at all.
    ///
    /// # Errors
    /// `Unavailable` if the store does not answer; `Internal` if the file cannot be read.
    pub async fn put_file(&self, from: &Path, name: &str) -> Result<()> {
        let mut file = tokio::fs::File::open(from)
            .await
            .map_err(|e| failed(from, e))?;
        let size = file.metadata().await.map_err(|e| failed(from, e))?.len() as usize;
        let key = self.key(name);
        if size <= PART_BYTES {
            let mut bytes = Vec::with_capacity(size);
            file.read_to_end(&mut bytes)
                .await
                .map_err(|e| failed(from, e))?;
            self.store
                .put(&key, bytes.into())
                .await
                .map_err(|e| unavailable(name, &e))?;
            return Ok(());
        }
        let upload = self
            .store
            .put_multipart(&key)
            .await
            .map_err(|e| unavailable(name, &e))?;
        let mut parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = match file.read(&mut buffer).await {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) => {
                    let _ = parts.abort().await;
                    return Err(failed(from, e));
                }
            };
            parts.write(&buffer[..n]);
            if let Err(e) = parts.wait_for_capacity(MAX_PARTS_IN_FLIGHT).await {
                let _ = parts.abort().await;
                return Err(unavailable(name, &e));
            }
        }
        parts.finish().await.map_err(|e| unavailable(name, &e))?;
        Ok(())
    }

    /// Uploads the plain files of a folder. The file `last` is uploaded after all others.
    ///
    /// # Errors
    /// The errors of [`Remote::put_file`].
    pub async fn put_folder(&self, from: &Path, name: &str, last: &str) -> Result<()> {
        let mut names = Vec::new();
        let mut entries = tokio::fs::read_dir(from)
            .await
            .map_err(|e| failed(from, e))?;
        while let Some(entry) = entries.next_entry().await.map_err(|e| failed(from, e))? {
            if entry
                .file_type()
                .await
                .map_err(|e| failed(from, e))?
                .is_file()
            {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort_by_key(|n| n == last);
        for file in names {
            self.put_file(&from.join(&file), &format!("{name}/{file}"))
                .await?;
        }
        Ok(())
    }

    /// Downloads the object `name` to the file `to`.
    ///
    /// # Errors
    /// `NotFound` if the object does not exist; `Unavailable` if the store does not answer.
    pub async fn get_file(&self, name: &str, to: &Path) -> Result<()> {
        let found = self
            .store
            .get(&self.key(name))
            .await
            .map_err(|e| missing_or_unavailable(name, &e))?;
        let mut bytes = found.into_stream();
        let mut file = tokio::fs::File::create(to)
            .await
            .map_err(|e| failed(to, e))?;
        while let Some(chunk) = bytes.next().await {
            file.write_all(&chunk.map_err(|e| unavailable(name, &e))?)
                .await
                .map_err(|e| failed(to, e))?;
        }
        file.flush().await.map_err(|e| failed(to, e))
    }

    /// Downloads the files of a folder to the existing folder `to`.
    ///
    /// # Errors
    /// `NotFound` if the folder has no files; `Unavailable` if the store does not answer.
    pub async fn get_folder(&self, name: &str, to: &Path) -> Result<()> {
        let listed = self
            .store
            .list_with_delimiter(Some(&self.key(name)))
            .await
            .map_err(|e| unavailable(name, &e))?;
        if listed.objects.is_empty() {
            return Err(ServiceError::not_found("artifact", name));
        }
        for object in listed.objects {
            if let Some(file) = object.location.filename() {
                self.get_file(&format!("{name}/{file}"), &to.join(file))
                    .await?;
            }
        }
        Ok(())
    }

    /// Lists all files below a folder: relative path and size in bytes.
    ///
    /// # Errors
    /// `Unavailable` if the store does not answer.
    pub async fn folder(&self, name: &str) -> Result<BTreeMap<String, u64>> {
        let key = self.key(name);
        let (mut listed, mut files) = (self.store.list(Some(&key)), BTreeMap::new());
        while let Some(object) = listed.next().await {
            let object = object.map_err(|e| unavailable(name, &e))?;
            if let Some(parts) = object.location.prefix_match(&key) {
                let parts: Vec<String> = parts.map(|part| part.as_ref().to_owned()).collect();
                files.insert(parts.join("/"), object.size);
            }
        }
        Ok(files)
    }

    /// Removes a file, or everything below a folder. Missing objects are ignored.
    ///
    /// # Errors
    /// `Unavailable` if the store does not answer.
    pub async fn remove(&self, name: &str) -> Result<()> {
        let key = self.key(name);
        let locations = self
            .store
            .list(Some(&key))
            .map(|object| object.map(|o| o.location));
        let mut all: Vec<Key> = Vec::new();
        tokio::pin!(locations);
        while let Some(location) = locations.next().await {
            all.push(location.map_err(|e| unavailable(name, &e))?);
        }
        if all.is_empty() {
            // `name` is a single file, or does not exist. In a shared folder, directories are not
            // listed as objects.
            all.push(key.clone());
        }
        for key in all {
            match self.store.delete(&key).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(e) => return Err(unavailable(name, &e)),
            }
        }
        Ok(())
    }

    /// Checks that the store answers within `timeout`.
    ///
    /// # Errors
    /// `Unavailable` if it does not.
    pub async fn ping(&self, timeout: Duration) -> Result<()> {
        let answer = tokio::time::timeout(timeout, self.store.head(&self.key("ping"))).await;
        match answer {
            Ok(Ok(_) | Err(object_store::Error::NotFound { .. })) => Ok(()),
            Ok(Err(e)) => Err(unavailable("ping", &e)),
            Err(_) => Err(unavailable_because("ping", "it did not answer in time")),
        }
    }
}

fn missing_or_unavailable(name: &str, e: &object_store::Error) -> ServiceError {
    match e {
        object_store::Error::NotFound { .. } => ServiceError::not_found("artifact", name),
        _ => unavailable(name, e),
    }
}

/// Converts an error of the store to a short message. The vendor's answer may contain parts of
/// credentials and is written to the debug log only.
fn unavailable(name: &str, e: &object_store::Error) -> ServiceError {
    use object_store::Error::{
        NotSupported, PermissionDenied, Precondition, Unauthenticated, UnknownConfigurationKey,
    };
    tracing::debug!(name, error = %e, "the artifact store failed");
    let why = match e {
        PermissionDenied { .. } => "permission denied",
        Unauthenticated { .. } => "the credentials are not accepted",
        Precondition { .. } => "another process changed it",
        NotSupported { .. } | UnknownConfigurationKey { .. } => "its configuration is wrong",
        _ => "it does not answer, or answers with an error",
    };
    unavailable_because(name, why)
}

fn unavailable_because(name: &str, why: &str) -> ServiceError {
    ServiceError::Unavailable {
        reason: Reason::ArtifactsUnavailable,
        message: format!("the artifact store failed at {name}: {why}"),
        retry_after: Duration::from_secs(2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_store(dir: &Path) -> Remote {
        Remote::open(&format!("file://{}", dir.display()), &BTreeMap::new(), true).unwrap()
    }

    #[tokio::test]
    async fn two_servers_that_find_no_identity_agree_on_one() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (folder_store(dir.path()), folder_store(dir.path()));
        assert_eq!(
            (a.identity().await.unwrap(), b.identity().await.unwrap()),
            (None, None)
        );
        let (of_a, of_b) = tokio::join!(a.create_identity("a"), b.create_identity("b"));
        let chosen = of_a.unwrap();
        assert_eq!(of_b.unwrap(), chosen);
        // A later caller gets the same identity, and the stored one never changes.
        assert_eq!(b.create_identity("c").await.unwrap(), chosen);
        assert_eq!(a.identity().await.unwrap(), Some(chosen));
    }
}
