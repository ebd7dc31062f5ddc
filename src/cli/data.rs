//! Data files of the command line: any format that people have pairs in, read as rows or uploaded.
//!
//! ```text
//! arguments ─▶ places ─▶ open (decompress, recognise) ─▶ reader ─▶ rows
//! ```
//!
//! Readers hold one row, line or batch at a time. Parquet files, and Arrow files with a footer, are
//! not read from their beginning. If they are compressed or piped, they are first copied to a
//! temporary file.

mod arrow;
mod columns;
mod delimited;
mod elements;
mod kind;
mod lines;
mod open;
mod places;
mod records;
mod row;
mod stream;
mod upload;

use std::sync::{Arc, OnceLock};

pub(super) use self::columns::{ColumnMap, naming};
use self::open::is_plain;
pub(super) use self::open::{InputContent, open_input};
use self::places::DataPlace;
pub(super) use self::records::{DataRecord, WholeRecord};
use self::records::{RecordReader, whole_records};
use self::row::Wanted;
pub(super) use self::row::{DataRow, DataRows};
use self::stream::{RowStream, SourceNames};
pub(super) use self::upload::Uploaded;
use super::args::DataArgs;
use super::failure::Failure;
use super::settings::{Sources, hub};
use crate::domain::dataset::{PreferenceRow, RowIssue};
use crate::rpc::client::Client;
use crate::rpc::pb;
use crate::train::rows::{RowReader, pairs_of_line, pairs_of_record};

/// Files with rows, which exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DataFiles {
    places: Vec<DataPlace>,
    columns: ColumnMap,
}

impl DataFiles {
    /// Finds the files that arguments name, and downloads those on the hub.
    ///
    /// # Errors
    /// Returns a failure that names an argument that is wrong or a file that does not exist.
    pub(super) async fn find(files: &[String], options: &DataArgs) -> Result<Self, Failure> {
        let columns = ColumnMap::parse(&options.columns).map_err(Failure::Usage)?;
        let files = files.to_vec();
        let places = tokio::task::spawn_blocking(move || {
            let sources = Sources::environment();
            places::find(&files, &hub(&sources))
        });
        let places = places.await?.map_err(Failure::Failed)?;
        Ok(DataFiles { places, columns })
    }

    /// Returns true if no file was named.
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Returns the name of the file, or of the first one and the number of further ones.
    pub(super) fn title(&self) -> String {
        let file_name = |place: &DataPlace| match place {
            DataPlace::File(path) => path
                .file_name()
                .map_or_else(|| place.name(), |name| name.to_string_lossy().into_owned()),
            DataPlace::StandardInput => place.name(),
        };
        match &self.places[..] {
            [] => String::new(),
            [one] => file_name(one),
            [first, more @ ..] => format!("{} and {} more", file_name(first), more.len()),
        }
    }

    /// Returns the size of the files in bytes, or `None` if it is unknown.
    pub(super) fn bytes(&self) -> Option<u64> {
        self.plain().ok()??.metadata().ok().map(|m| m.len())
    }

    /// Returns the one file, if the server can read it as it is.
    fn plain(&self) -> Result<Option<&std::path::Path>, Failure> {
        match &self.places[..] {
            [DataPlace::File(path)] if self.columns.is_empty() => match is_plain(path) {
                Ok(true) => Ok(Some(path)),
                Ok(false) => Ok(None),
                Err(reason) => Err(Failure::Failed(format!("{}: {reason}", path.display()))),
            },
            _ => Ok(None),
        }
    }

    /// Uploads the rows. `sent` is called with the number of bytes queued so far.
    ///
    /// # Errors
    /// Returns a failure if a file cannot be read, or the server refuses the upload.
    pub(super) async fn upload(
        &self,
        client: &Client,
        metadata: pb::UploadMetadata,
        sent: impl FnMut(u64),
    ) -> Result<Uploaded, Failure> {
        if let Some(path) = self.plain()? {
            let dataset = client.upload_dataset(path, metadata, sent).await?;
            return Ok(Uploaded::complete(dataset, SourceNames::default()));
        }
        let rows = RowStream::new(self.places.clone(), self.columns.clone());
        upload::upload(client, rows, metadata, sent).await
    }

    /// Returns the name that one of our columns has in the files.
    pub(super) fn original_column(&self, ours: &str) -> String {
        self.columns.original(ours)
    }

    /// Returns true if the rows can be read several times, unlike those of standard input and of
    /// pipes.
    pub(super) fn is_rereadable(&self) -> bool {
        let is_file = |place: &DataPlace| matches!(place, DataPlace::File(path) if path.is_file());
        self.places.iter().all(is_file)
    }

    /// Computes the hash of the bytes that [`DataFiles::upload`] sends. The result is `None` for
    /// standard input and pipes, which can be read only once. It is also `None` if the upload would
    /// leave out rows, because the report of a stored dataset does not count these.
    ///
    /// # Errors
    /// Returns a failure if a file cannot be read.
    pub(super) async fn content_hash(&self) -> Result<Option<ContentHash>, Failure> {
        if !self.is_rereadable() {
            return Ok(None);
        }
        let (hash, left_out) = self.hashed().await?;
        Ok((left_out == 0).then_some(hash))
    }

    /// Computes the hash of the bytes that [`DataFiles::upload`] sends, in hex, also if it leaves
    /// out rows. The files must be readable several times.
    ///
    /// # Errors
    /// Returns a failure if a file cannot be read.
    pub(super) async fn bytes_hash(&self) -> Result<String, Failure> {
        let (hash, _) = self.hashed().await?;
        Ok(hash.hex)
    }

    /// Returns the hash of the bytes to upload, and the number of rows that are left out.
    async fn hashed(&self) -> Result<(ContentHash, u64), Failure> {
        let plain = self.plain()?.map(std::path::Path::to_owned);
        let rows = RowStream::new(self.places.clone(), self.columns.clone());
        let hash = move || -> Result<(ContentHash, u64), Failure> {
            let mut hasher = blake3::Hasher::new();
            let mut names = SourceNames::default();
            let mut left_out = 0;
            if let Some(path) = plain {
                let failed = |e| Failure::Failed(format!("{}: {e}", path.display()));
                let mut file = std::fs::File::open(&path).map_err(failed)?;
                std::io::copy(&mut file, &mut hasher).map_err(failed)?;
            } else {
                let converted = upload::to_jsonl(rows, |text| {
                    hasher.update(&text);
                    true
                })?;
                names = converted.0;
                left_out = converted.1.rows;
            }
            let hex = hasher.finalize().to_hex().to_string();
            Ok((ContentHash { hex, names }, left_out))
        };
        tokio::task::spawn_blocking(hash).await?
    }

    /// Returns true if `path` is one of the files.
    pub(super) fn contains(&self, path: &std::path::Path) -> bool {
        let is_same = |file: &std::path::Path| {
            let whole = |path: &std::path::Path| path.canonicalize().ok();
            whole(file).is_some_and(|file| Some(file) == whole(path))
        };
        self.places
            .iter()
            .any(|place| matches!(place, DataPlace::File(file) if is_same(file)))
    }

    /// Returns the rows of all files with their own columns. If a file cannot be read to its end,
    /// the failure is the last item.
    pub(super) fn records(
        &self,
    ) -> impl Iterator<Item = Result<DataRecord, Failure>> + Send + use<> {
        let (places, columns) = (self.places.clone(), self.columns.clone());
        RecordReader::new(RowStream::wanting(Wanted::PairsAndOthers, places, columns))
    }

    /// Returns the rows of all files with all of their columns, which need not be those of pairs.
    /// If a file cannot be read to its end, the failure is the last item.
    pub(super) fn whole_records(
        &self,
    ) -> impl Iterator<Item = Result<WholeRecord, Failure>> + Send + use<> {
        let (places, columns) = (self.places.clone(), self.columns.clone());
        whole_records(RowStream::wanting(Wanted::All, places, columns))
    }

    /// Returns the pairs of all files, with findings about rows that cannot be read. After the last
    /// one, the second result says whether a file could not be read to its end.
    pub(super) fn reader(self) -> (RowReader, ReadFailure) {
        let read_failure = ReadFailure::default();
        let pairs = PairReader {
            rows: RowStream::new(self.places, self.columns),
            current: Box::new(std::iter::empty()),
            read_failure: read_failure.clone(),
        };
        (Box::new(pairs), read_failure)
    }
}

/// The hash of data files.
pub(super) struct ContentHash {
    /// BLAKE3 hash in hex.
    pub hex: String,
    names: SourceNames,
}

impl ContentHash {
    /// Combines a stored dataset that has this hash with the names in the files.
    pub(super) fn stored(&self, dataset: pb::Dataset) -> Uploaded {
        Uploaded::complete(dataset, self.names.clone())
    }
}

/// The failure that ended a reader before the end of its files.
#[derive(Clone, Default)]
pub(super) struct ReadFailure(Arc<OnceLock<String>>);

impl ReadFailure {
    /// Returns the failure, if there was one. Call it after the reader has ended.
    pub(super) fn check(&self) -> Result<(), Failure> {
        match self.0.get() {
            Some(reason) => Err(Failure::Failed(reason.clone())),
            None => Ok(()),
        }
    }
}

/// Iterator over pairs. The row numbers go through all files.
struct PairReader {
    rows: RowStream,
    /// Pairs of the current row.
    current: Box<dyn Iterator<Item = Result<PreferenceRow, RowIssue>> + Send>,
    read_failure: ReadFailure,
}

impl Iterator for PairReader {
    type Item = Result<PreferenceRow, RowIssue>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(pair) = self.current.next() {
                return Some(pair.map_err(|issue| self.rows.names().placed(issue)));
            }
            let (row, content) = match self.rows.next()? {
                Ok(next) => next,
                Err(failure) => {
                    let _ = self.read_failure.0.set(failure.message().to_owned());
                    return None;
                }
            };
            self.current = match content {
                DataRow::Line(line) if line.iter().all(u8::is_ascii_whitespace) => continue,
                DataRow::Line(line) => Box::new(pairs_of_line(row, &line)),
                DataRow::Fields(fields) => Box::new(pairs_of_record(row, fields)),
                DataRow::Bad(problem) => Box::new(std::iter::once(Err(RowIssue {
                    row,
                    id: None,
                    field: problem.field,
                    reason: problem.reason,
                    message: problem.message,
                    of_model: false,
                }))),
            };
        }
    }
}

#[cfg(test)]
mod tests;
