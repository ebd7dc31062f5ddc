//! Opens a file: decompresses it, recognises its format and returns its rows.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::{Map, Value};
use tempfile::NamedTempFile;

use super::columns::{ColumnMap, SeenColumns, check_answers};
use super::kind::{Compression, HEAD, RowFormat, compression, kind};
use super::places::DataPlace;
use super::row::{DataRow, DataRows, Wanted};
use super::{arrow, delimited, elements, lines};
use crate::domain::dataset::RowIssue;
use crate::train::rows::{
    DataError, parquet_records, parquet_records_with_others, whole_parquet_records,
};

/// Maximum number of nested compressions, e.g. a .gz file inside a .zst file.
const MAX_COMPRESSIONS: usize = 2;

/// The rows of a file.
pub(super) struct Opened {
    pub rows: DataRows,
    /// True if the columns have our names already.
    pub is_renamed: bool,
}

type ByteStream = Box<dyn Read + Send>;

/// Returns true for a file that the server can read as it is.
///
/// # Errors
/// Returns a text, without the file's name, if the file cannot be opened or read.
pub(super) fn is_plain(path: &Path) -> Result<bool, String> {
    // A pipe can be read only once.
    if path.exists() && !path.is_file() {
        return Ok(false);
    }
    let mut file = File::open(path).map_err(|e| e.to_string())?;
    let head = head(&mut file).map_err(|e| e.to_string())?;
    let name = path.to_string_lossy();
    Ok(compression(&head).is_none()
        && matches!(
            kind(&head, &name, |_| false)?,
            RowFormat::JsonLines | RowFormat::Parquet
        ))
}

/// Opens a file.
///
/// # Errors
/// Returns a text, without the file's name, that says why it cannot be read and what to do.
pub(super) fn open(
    place: &DataPlace,
    columns: &ColumnMap,
    wanted: Wanted,
) -> Result<Opened, String> {
    let Unpacked {
        first,
        bytes,
        is_whole_file,
    } = unpacked(place)?;
    let kind = kind(&first, &place.name(), |column| columns.is_mapped(column))?;
    let rest = std::io::Cursor::new(first).chain(bytes);
    let renamed = |rows: DataRows| Opened {
        rows,
        is_renamed: true,
    };
    let unchanged = |rows: DataRows| Opened {
        rows,
        is_renamed: false,
    };
    Ok(match kind {
        RowFormat::JsonLines => unchanged(lines::read(rest)),
        RowFormat::JsonValues => unchanged(elements::read(rest)),
        RowFormat::Delimited(delimiter) => {
            renamed(delimited::read(rest, delimiter, columns, wanted)?)
        }
        RowFormat::ArrowStream => renamed(arrow::read_stream(rest, columns, wanted)?),
        // The last two need the end of the file first, so that a stream is copied to a file.
        RowFormat::ArrowFile => match place {
            DataPlace::File(path) if is_whole_file => {
                let file = File::open(path).map_err(|e| e.to_string())?;
                renamed(arrow::read_file(file, columns, wanted)?)
            }
            _ => renamed(arrow::read_file(
                on_disk(rest)?.into_file(),
                columns,
                wanted,
            )?),
        },
        RowFormat::Parquet => match place {
            DataPlace::File(path) if is_whole_file => {
                renamed(parquet(path, None, columns, wanted)?)
            }
            _ => {
                let copy = on_disk(rest)?;
                let path = copy.path().to_owned();
                renamed(parquet(&path, Some(copy), columns, wanted)?)
            }
        },
    })
}

/// A decompressed file.
struct Unpacked {
    /// Its first bytes.
    first: Vec<u8>,
    /// The bytes after them.
    bytes: ByteStream,
    /// True if the file itself has these bytes.
    is_whole_file: bool,
}

fn unpacked(place: &DataPlace) -> Result<Unpacked, String> {
    let mut bytes: ByteStream = match place {
        DataPlace::StandardInput => Box::new(std::io::stdin()),
        DataPlace::File(path) => Box::new(File::open(path).map_err(|e| e.to_string())?),
    };
    let mut is_whole_file = matches!(place, DataPlace::File(path) if path.is_file());
    let mut compressions = 0;
    loop {
        let first = head(&mut bytes).map_err(|e| e.to_string())?;
        let Some(compression) = compression(&first) else {
            return Ok(Unpacked {
                first,
                bytes,
                is_whole_file,
            });
        };
        compressions += 1;
        if compressions > MAX_COMPRESSIONS {
            return Err("is compressed several times: decompress it".to_owned());
        }
        is_whole_file = false;
        bytes = decompressed(compression, std::io::Cursor::new(first).chain(bytes))?;
    }
}

/// The content of an input of `score-files`.
pub(in crate::cli) enum InputContent {
    /// Rows in JSON.
    Json(DataRows),
    /// A Parquet file, decompressed into a temporary file if it was compressed.
    Parquet(Option<NamedTempFile>),
}

/// Opens an input of `score-files`.
///
/// # Errors
/// Returns a text, without the file's name, that says why it cannot be read and what to do.
pub(in crate::cli) fn open_input(path: &Path) -> Result<InputContent, String> {
    let place = DataPlace::File(path.to_owned());
    let Unpacked {
        first,
        bytes,
        is_whole_file,
    } = unpacked(&place)?;
    let kind = kind(&first, &place.name(), |_| false)?;
    let rest = std::io::Cursor::new(first).chain(bytes);
    Ok(match kind {
        RowFormat::JsonLines => InputContent::Json(lines::read(rest)),
        RowFormat::JsonValues => InputContent::Json(elements::read(rest)),
        RowFormat::Parquet if is_whole_file => InputContent::Parquet(None),
        RowFormat::Parquet => InputContent::Parquet(Some(on_disk(rest)?)),
        RowFormat::Delimited(_) | RowFormat::ArrowStream | RowFormat::ArrowFile => {
            return Err(
                "is CSV or Arrow: score-files reads JSONL and Parquet, so write the rows as one of \
                 them"
                    .to_owned(),
            );
        }
    })
}

/// Reads the first [`HEAD`] bytes, or all if there are fewer.
fn head(reader: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(HEAD);
    reader.take(HEAD as u64).read_to_end(&mut head)?;
    Ok(head)
}

fn decompressed(
    compression: Compression,
    compressed: impl Read + Send + 'static,
) -> Result<ByteStream, String> {
    let name = compression.name();
    Ok(match compression {
        Compression::Gzip => Box::new(Named {
            inner: flate2::read::MultiGzDecoder::new(compressed),
            name,
        }),
        Compression::Zstd => Box::new(Named {
            inner: zstd::stream::read::Decoder::new(compressed)
                .map_err(|e| format!("its zstd data cannot be read: {e}"))?,
            name,
        }),
    })
}

/// A decompressing reader whose errors name the compression.
struct Named<R> {
    inner: R,
    name: &'static str,
}

impl<R: Read> Read for Named<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.inner.read(buffer).map_err(|e| {
            let name = self.name;
            std::io::Error::new(
                e.kind(),
                format!("its {name} data is damaged or cut off ({e})"),
            )
        })
    }
}

/// Copies bytes to a temporary file, for formats that are not read from their beginning.
fn on_disk(mut bytes: impl Read) -> Result<NamedTempFile, String> {
    let failed = |e: std::io::Error| format!("cannot be copied to a temporary file: {e}");
    let mut file = NamedTempFile::new().map_err(failed)?;
    std::io::copy(&mut bytes, file.as_file_mut()).map_err(failed)?;
    file.as_file_mut().flush().map_err(failed)?;
    file.as_file_mut()
        .seek(SeekFrom::Start(0))
        .map_err(failed)?;
    Ok(file)
}

type ParquetRecords = Box<dyn Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send>;

/// Opens a Parquet file. `copy` is the temporary file at `path`, which exists as long as the rows.
fn parquet(
    path: &Path,
    copy: Option<NamedTempFile>,
    columns: &ColumnMap,
    wanted: Wanted,
) -> Result<DataRows, String> {
    let seen = SeenColumns::default();
    let (names, renames) = (seen.clone(), columns.clone());
    let rename = move |name: &str| {
        names.add(name);
        renames.rename(name)
    };
    let records = match wanted {
        Wanted::Pairs => parquet_records(path, rename).map(|r| Box::new(r) as ParquetRecords),
        Wanted::PairsAndOthers => {
            parquet_records_with_others(path, rename).map(|r| Box::new(r) as ParquetRecords)
        }
        Wanted::All => whole_parquet_records(path, rename).map(|r| Box::new(r) as ParquetRecords),
    };
    if !columns.is_empty() && !seen.list().is_empty() {
        columns.check(&seen.list())?;
    }
    if records.is_err() && wanted != Wanted::All && !seen.list().is_empty() {
        // Other than the error of the records, this one names the flag.
        let names: Vec<Option<String>> = seen.list().iter().map(|n| columns.rename(n)).collect();
        check_answers(&names)?;
    }
    let records = records.map_err(|e| match e {
        DataError::BadFile { reason, .. } => reason,
        DataError::Io { source, .. } => source.to_string(),
        other => other.to_string(),
    })?;
    Ok(Box::new(records.map(move |record| {
        let _exists = &copy;
        match record {
            Ok(fields) => Ok(DataRow::Fields(fields)),
            // Unlike a bad value, a record that cannot be decoded ends the file.
            Err(issue) if issue.field.is_empty() => Err(issue.message),
            Err(issue) => Ok(DataRow::bad(&issue.field, issue.reason, issue.message)),
        }
    })))
}
