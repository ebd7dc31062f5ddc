//! Where parts are written: a folder or an object store. A part is written once: a name that exists
//! is never overwritten, also if several processes write it at the same time. In a store without
//! conditional writes, such processes may overwrite a part with the same bytes.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode};
use tokio_stream::StreamExt;

use crate::cli::failure::Failure;
use crate::service::remote::open_store;

/// Folder for unfinished files in an output folder. Readers of data sets ignore names that begin
/// with an underscore.
const INCOMPLETE: &str = "_incomplete";
/// Maximum number of further attempts to write a file while other processes remove that folder.
const MAX_ATTEMPTS: u32 = 5;

/// The place for parts.
#[derive(Clone)]
pub(super) struct PartStore {
    place: PartPlace,
    /// The argument of `--out`.
    shown: String,
}

#[derive(Clone)]
enum PartPlace {
    Folder(PathBuf),
    Objects(Arc<dyn ObjectStore>, Key),
}

impl PartStore {
    /// Opens a folder or URL. A missing folder is created with the first part.
    ///
    /// # Errors
    /// Returns a failure if the URL cannot be used.
    pub(super) fn open(out: &str, options: &BTreeMap<String, String>) -> Result<Self, Failure> {
        let shown = out.trim_end_matches('/').to_owned();
        let place = match out.split_once("://") {
            None => PartPlace::Folder(PathBuf::from(out)),
            Some(("file", path)) => PartPlace::Folder(PathBuf::from(path)),
            Some(_) => {
                let (store, prefix) = open_store(out, options).map_err(|e| {
                    Failure::Usage(format!(
                        "--out {out:?} cannot be used: {e}: give a folder, or a URL such as \
                         s3://BUCKET/FOLDER/"
                    ))
                })?;
                PartPlace::Objects(Arc::from(store), prefix)
            }
        };
        Ok(PartStore { place, shown })
    }

    /// Returns the argument of `--out`.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    /// Lists everything that was written: name and size in bytes.
    ///
    /// # Errors
    /// Returns a failure if the store does not answer.
    pub(super) async fn list(&self) -> Result<BTreeMap<String, u64>, Failure> {
        match &self.place {
            PartPlace::Folder(root) => {
                let root = root.clone();
                self.blocking("", move || {
                    let mut found = BTreeMap::new();
                    walk(&root, "", &mut found)?;
                    Ok(found)
                })
                .await
            }
            PartPlace::Objects(store, prefix) => {
                let below = (!prefix.as_ref().is_empty()).then_some(prefix);
                let (mut listed, mut found) = (store.list(below), BTreeMap::new());
                while let Some(object) = listed.next().await {
                    let object = object.map_err(|e| self.failed("", &e))?;
                    if let Some(parts) = object.location.prefix_match(prefix) {
                        let parts: Vec<String> = parts.map(|p| p.as_ref().to_owned()).collect();
                        found.insert(parts.join("/"), object.size);
                    }
                }
                Ok(found)
            }
        }
    }

    /// Writes a file that does not exist yet, as a whole or not at all. Returns false, without
    /// writing, if it exists.
    ///
    /// # Errors
    /// Returns a failure if the disk is full, or the store does not answer or refuses.
    pub(super) async fn create(&self, name: &str, content: Vec<u8>) -> Result<bool, Failure> {
        use object_store::Error::{AlreadyExists, NotImplemented, NotSupported, Precondition};
        match &self.place {
            PartPlace::Folder(root) => {
                let (root, target) = (root.clone(), root.join(name));
                self.blocking(name, move || {
                    write_file(&root, &target, &content, OnExisting::Keep)
                })
                .await
            }
            PartPlace::Objects(store, _) => {
                let (key, content) = (self.key(name), Bytes::from(content));
                let put = store
                    .put_opts(&key, content.clone().into(), PutMode::Create.into())
                    .await;
                match put {
                    Ok(_) => Ok(true),
                    Err(AlreadyExists { .. } | Precondition { .. }) => Ok(false),
                    // A store without conditional writes. Another process that writes the file at
                    // the same time writes the same bytes.
                    Err(NotSupported { .. } | NotImplemented { .. }) => {
                        match store.head(&key).await {
                            Ok(_) => return Ok(false),
                            Err(object_store::Error::NotFound { .. }) => {}
                            Err(e) => return Err(self.failed(name, &e)),
                        }
                        let put = store.put(&key, content.into()).await;
                        put.map(|_| true).map_err(|e| self.failed(name, &e))
                    }
                    Err(e) => Err(self.failed(name, &e)),
                }
            }
        }
    }

    /// Writes a file, in place of one that exists.
    ///
    /// # Errors
    /// As [`PartStore::create`].
    pub(super) async fn replace(&self, name: &str, content: Vec<u8>) -> Result<(), Failure> {
        match &self.place {
            PartPlace::Folder(root) => {
                let (root, target) = (root.clone(), root.join(name));
                self.blocking(name, move || {
                    write_file(&root, &target, &content, OnExisting::Replace)
                })
                .await
                .map(|_| ())
            }
            PartPlace::Objects(store, _) => {
                let put = store
                    .put(&self.key(name), Bytes::from(content).into())
                    .await;
                put.map(|_| ()).map_err(|e| self.failed(name, &e))
            }
        }
    }

    /// Returns the content of a file, or only the bytes of a range; `None` if it does not exist.
    /// Azure has no requests for the last bytes, so that a range has a start.
    ///
    /// # Errors
    /// Returns a failure if it cannot be read.
    pub(super) async fn read(
        &self,
        name: &str,
        range: Option<Range<u64>>,
    ) -> Result<Option<Vec<u8>>, Failure> {
        match &self.place {
            PartPlace::Folder(root) => {
                let path = root.join(name);
                let read = move || match read_file(&path, range) {
                    Ok(content) => Ok(Some(content)),
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(e) => Err(e),
                };
                self.blocking(name, read).await
            }
            PartPlace::Objects(store, _) => {
                let options = GetOptions {
                    range: range.map(GetRange::Bounded),
                    ..Default::default()
                };
                let content = match store.get_opts(&self.key(name), options).await {
                    Ok(found) => found.bytes().await,
                    Err(object_store::Error::NotFound { .. }) => return Ok(None),
                    Err(e) => Err(e),
                };
                let content = content.map_err(|e| self.failed(name, &e))?;
                Ok(Some(content.to_vec()))
            }
        }
    }

    /// Removes the unfinished files that killed processes left. Call it when all parts exist.
    pub(super) async fn clean(&self) {
        if let PartPlace::Folder(root) = &self.place {
            // If this fails, a few files stay that nobody reads.
            let _ = tokio::fs::remove_dir_all(root.join(INCOMPLETE)).await;
        }
    }

    fn key(&self, name: &str) -> Key {
        let prefix = match &self.place {
            PartPlace::Objects(_, prefix) => prefix.as_ref(),
            PartPlace::Folder(_) => "",
        };
        let full = match prefix {
            "" => name.to_owned(),
            prefix => format!("{prefix}/{name}"),
        };
        // Unlike `from`, this leaves characters such as ~ as they are, as lists have them.
        Key::parse(&full).unwrap_or_else(|_| Key::from(full))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(std::io::Error::other).flatten().map_err(|e| {
            let remedy = match e.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                    "free some space and run the command again: it continues"
                }
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                    "give this user the right to write there, or name another folder"
                }
                _ => "correct this, or name another folder, and run the command again",
            };
            let slash = if name.is_empty() { "" } else { "/" };
            Failure::Failed(format!("--out {}{slash}{name}: {e}: {remedy}", self.shown))
        })
    }

    fn failed(&self, name: &str, e: &object_store::Error) -> Failure {
        let slash = if name.is_empty() { "" } else { "/" };
        let what = format!("--out {}{slash}{name}", self.shown);
        Failure::Failed(store_failure(&what, e, "list, read and write"))
    }
}

/// Describes the failure of an object store. `rights` are those that the command needs.
pub(super) fn store_failure(what: &str, e: &object_store::Error, rights: &str) -> String {
    use object_store::Error::{NotFound, PermissionDenied, Unauthenticated};
    match e {
        PermissionDenied { .. } => format!(
            "{what}: permission denied: give these credentials the right to {rights} objects there"
        ),
        Unauthenticated { .. } => format!(
            "{what}: the store does not accept the credentials: check the variables AWS_*, \
             GOOGLE_* or AZURE_*"
        ),
        NotFound { .. } => format!("{what}: there is no such bucket or object: check the URL"),
        e => format!("{what}: {e}: correct this and run the command again: it continues"),
    }
}

/// Reads a file, or the bytes of a range.
fn read_file(path: &Path, range: Option<Range<u64>>) -> std::io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    let mut length = u64::MAX;
    if let Some(range) = range {
        file.seek(SeekFrom::Start(range.start))?;
        length = range.end.saturating_sub(range.start);
    }
    let mut content = Vec::new();
    file.take(length).read_to_end(&mut content)?;
    Ok(content)
}

/// Adds the files below a folder to `found`, with their sizes.
fn walk(root: &Path, below: &str, found: &mut BTreeMap<String, u64>) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(root.join(below)) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = match below {
            "" => name,
            below => format!("{below}/{name}"),
        };
        if path == INCOMPLETE {
            continue;
        }
        if entry.file_type()?.is_dir() {
            walk(root, &path, found)?;
        } else {
            found.insert(path, entry.metadata()?.len());
        }
    }
    Ok(())
}

/// Treatment of a file that exists already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnExisting {
    Keep,
    Replace,
}

/// Writes a file under a temporary name, syncs it and renames it. Returns false if `target` exists
/// and is kept. It begins again if another process, which has written the last part, has removed
/// the folder of unfinished files.
fn write_file(
    root: &Path,
    target: &Path,
    content: &[u8],
    existing: OnExisting,
) -> std::io::Result<bool> {
    let mut attempts = 0..MAX_ATTEMPTS;
    loop {
        match try_write(root, target, content, existing) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && attempts.next().is_some() => {}
            written => return written,
        }
    }
}

fn try_write(
    root: &Path,
    target: &Path,
    content: &[u8],
    existing: OnExisting,
) -> std::io::Result<bool> {
    if existing == OnExisting::Keep && target.try_exists()? {
        return Ok(false);
    }
    let unfinished = root.join(INCOMPLETE);
    std::fs::create_dir_all(&unfinished)?;
    let folder = target.parent().unwrap_or(root);
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(&unfinished)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    let renamed = match existing {
        OnExisting::Replace => file.persist(target),
        OnExisting::Keep => file.persist_noclobber(target),
    };
    match renamed {
        Ok(_) => {}
        Err(e) if e.error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(false),
        Err(e) => return Err(e.error),
    }
    std::fs::File::open(folder)?.sync_all()?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// Opens a bucket of Azure at a local port.
    fn azure(listener: &TcpListener) -> PartStore {
        // Selects the cryptography for TLS, as `main` does.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let options = [
            ("AZURE_STORAGE_ENDPOINT", endpoint.as_str()),
            ("AZURE_STORAGE_ACCOUNT_NAME", "account"),
            ("AZURE_SKIP_SIGNATURE", "true"),
            ("AZURE_ALLOW_HTTP", "true"),
        ];
        let options = options.map(|(name, value)| (name.to_owned(), value.to_owned()));
        PartStore::open("az://bucket/out/", &BTreeMap::from(options)).unwrap()
    }

    /// Answers a request for the last two bytes of an object, and returns the request.
    async fn answer(listener: TcpListener) -> String {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            assert!(stream.read_buf(&mut request).await.unwrap() > 0);
        }
        let answer = "HTTP/1.1 206 Partial Content\r\nContent-Length: 2\r\n\
                      Content-Range: bytes 3-4/5\r\nETag: \"1\"\r\n\
                      Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\nst";
        stream.write_all(answer.as_bytes()).await.unwrap();
        String::from_utf8(request).unwrap()
    }

    #[tokio::test]
    async fn the_end_of_a_part_is_read_from_azure() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let store = azure(&listener);
        let answered = tokio::spawn(answer(listener));
        let read = store.read("x.parquet", Some(3..5)).await.unwrap();
        assert_eq!(read.as_deref(), Some(&b"st"[..]));
        let request = answered.await.unwrap().to_lowercase();
        assert!(
            request.starts_with("get /bucket/out/x.parquet ")
                && request.contains("range: bytes=3-4\r\n"),
            "{request}"
        );
    }

    /// Refuses all requests for lack of rights.
    async fn refuse_all(listener: TcpListener) {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                assert!(stream.read_buf(&mut request).await.unwrap() > 0);
            }
            let answer =
                b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            stream.write_all(answer).await.unwrap();
            // The client closes the connection. Bytes that nobody reads would reset it.
            while stream.read_buf(&mut request).await.is_ok_and(|n| n > 0) {}
        }
    }

    #[tokio::test]
    async fn a_bucket_that_refuses_the_rights_is_named_with_those_that_are_needed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let store = azure(&listener);
        let refusing = tokio::spawn(refuse_all(listener));
        let expected = "--out az://bucket/out/x.parquet: permission denied: give these credentials \
                        the right to list, read and write objects there";
        let read = store.read("x.parquet", None).await.unwrap_err();
        assert_eq!(read.message(), expected);
        let created = store.create("x.parquet", b"1".to_vec()).await.unwrap_err();
        assert_eq!(created.message(), expected);
        let replaced = store.replace("x.parquet", b"1".to_vec()).await.unwrap_err();
        assert_eq!(replaced.message(), expected);
        refusing.abort();
    }

    #[tokio::test]
    async fn a_full_disk_is_named_with_its_remedy() {
        let store = PartStore::open("out", &BTreeMap::new()).unwrap();
        let write = || Err::<(), _>(std::io::Error::from_raw_os_error(libc::ENOSPC));
        let failure = store.blocking("x.parquet", write).await.unwrap_err();
        let message = failure.message();
        assert!(
            message.starts_with("--out out/x.parquet: ")
                && message.ends_with(": free some space and run the command again: it continues"),
            "{message}"
        );
    }

    #[tokio::test]
    async fn a_part_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let store = PartStore::open(out.to_str().unwrap(), &BTreeMap::new()).unwrap();
        assert!(store.list().await.unwrap().is_empty());
        assert!(
            store
                .create("a/b.parquet", b"first".to_vec())
                .await
                .unwrap()
        );
        assert!(
            !store
                .create("a/b.parquet", b"later".to_vec())
                .await
                .unwrap()
        );
        let read = store.read("a/b.parquet", None).await.unwrap();
        assert_eq!(read.as_deref(), Some(&b"first"[..]));
        for (range, expected) in [(2..5, &b"rst"[..]), (0..5, b"first"), (1..3, b"ir")] {
            let read = store.read("a/b.parquet", Some(range)).await.unwrap();
            assert_eq!(read.as_deref(), Some(expected));
        }
        store.replace("m.json", b"1".to_vec()).await.unwrap();
        store.replace("m.json", b"22".to_vec()).await.unwrap();
        let listed = store.list().await.unwrap();
        let expected = [("a/b.parquet".to_owned(), 5), ("m.json".to_owned(), 2)];
        assert_eq!(listed, BTreeMap::from(expected));
        store.clean().await;
        assert!(!out.join(INCOMPLETE).exists());
    }
}
