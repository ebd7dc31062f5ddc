//! Divides inputs into parts and reads the rows of those that are still to be scored.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::input::{LocalCopy, ScoreInput};
use super::row::{InputRow, RowReading};
use super::store::PartStore;
use crate::cli::args::PartFormat;
use crate::cli::data::{DataRow, DataRows, InputContent, open_input};
use crate::cli::failure::Failure;
use crate::train::rows::RecordChoice;
use crate::train::rows::sandbox::SandboxedRecords;

/// Folder of the output with an [`InputRecord`] and [`InputRows`] for each input.
const INPUTS: &str = "_inputs";
/// Maximum number of ranges that the decoding process gets, as an argument. If there are more, the
/// nearest ones are merged.
const MAX_RANGES: usize = 1000;
/// Maximum number of records of a Parquet file. A damaged footer may claim any number.
const MAX_RECORDS: u64 = 1 << 36;

/// Everything that a part's name depends on, besides its input and range.
#[derive(Clone, Debug)]
pub(super) struct PartNaming {
    /// Hash of the weights and options, in hex.
    pub options: String,
    pub rows: u64,
    pub format: PartFormat,
}

impl PartNaming {
    /// Returns the name of the part that begins with a row, counted from 0.
    pub(super) fn name(&self, input: &str, identity: &str, start: u64) -> String {
        let end = start + self.rows;
        let mut hasher = blake3::Hasher::new();
        for text in [
            identity,
            &self.options,
            &start.to_string(),
            &end.to_string(),
        ] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        let hash = hasher.finalize().to_hex();
        let ending = self.format.ending();
        format!("{input}-{start:010}-{end:010}-{}.{ending}", &hash[..32])
    }
}

/// A share of the parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shard {
    /// From 0.
    pub index: u64,
    pub count: u64,
}

impl Shard {
    /// Returns true if a part belongs to this shard.
    pub(super) fn has(self, part: &str) -> bool {
        let hash = blake3::hash(part.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hash.as_bytes()[..8]);
        u64::from_le_bytes(first) % self.count == self.index
    }
}

/// Record of an input, which the output has before the input's first part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InputRecord {
    /// Name of the input.
    pub input: String,
    /// Identity of its content.
    pub identity: String,
}

/// Record of an input that was read to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InputRows {
    pub rows: u64,
}

/// Returns the name of the file with the [`InputRecord`] of an input.
pub(super) fn record_name(input: &str) -> String {
    format!("{INPUTS}/{input}.json")
}

/// Returns the name of the file with the [`InputRows`] of an input.
pub(super) fn rows_name(input: &str) -> String {
    format!("{INPUTS}/{input}.rows.json")
}

/// The rows of a part.
pub(super) struct PartToScore {
    pub name: String,
    pub input: String,
    pub rows: Vec<InputRow>,
    /// All columns of the first row of JSON that was read; empty if only Parquet was.
    pub columns: Vec<String>,
}

/// Inputs whose rows are known, counted by the reader for the display.
#[derive(Debug, Default)]
pub(super) struct PlannedRows {
    /// Number of their rows that this process has to score.
    pub rows: AtomicU64,
    /// Size of these inputs in bytes.
    pub bytes: AtomicU64,
}

impl PlannedRows {
    /// Adds an input of `bytes` bytes, of which `rows` rows are to be scored.
    pub(super) fn add(&self, rows: u64, bytes: u64) {
        self.rows.fetch_add(rows, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Reads the parts of one shard that are missing.
pub(super) struct PartReader {
    pub inputs: Vec<ScoreInput>,
    pub out: PartStore,
    pub naming: PartNaming,
    pub shard: Shard,
    pub rows: RowReading,
    /// Files of the output with their sizes.
    pub written: BTreeMap<String, u64>,
    pub planned: Arc<PlannedRows>,
}

/// The reason why reading ended.
enum Stop {
    /// The run has failed elsewhere, so that nobody receives parts any more.
    Unwanted,
    /// This input cannot be read, but others can.
    BadInput(String),
    Failed(Failure),
}

impl PartReader {
    /// Reads and sends the parts, and returns the inputs that cannot be read. It blocks its thread.
    ///
    /// # Errors
    /// Returns a failure if the output cannot be used or has parts of another content of an input.
    pub(super) fn run(
        self,
        runtime: &Handle,
        parts: &mpsc::Sender<PartToScore>,
    ) -> Result<Vec<String>, Failure> {
        let mut bad = Vec::new();
        for input in &self.inputs {
            let before = self.planned.bytes.load(Ordering::Relaxed);
            match self.read(runtime, input, parts) {
                Ok(()) => {}
                Err(Stop::Unwanted) => break,
                Err(Stop::BadInput(message)) => bad.push(message),
                Err(Stop::Failed(failure)) => return Err(failure),
            }
            // An input that is bad from the start has no rows.
            if self.planned.bytes.load(Ordering::Relaxed) == before {
                self.planned.add(0, input.bytes);
            }
        }
        Ok(bad)
    }

    fn read(
        &self,
        runtime: &Handle,
        input: &ScoreInput,
        parts: &mpsc::Sender<PartToScore>,
    ) -> Result<(), Stop> {
        let rows = runtime
            .block_on(self.known_rows(input))
            .map_err(Stop::Failed)?;
        if let (Some(identity), Some(rows)) = (input.identity(), rows)
            && self.missing(input, &identity, rows).is_empty()
        {
            self.plan(input, &identity, rows);
            return runtime
                .block_on(self.check(input, &identity))
                .map_err(Stop::Failed);
        }
        let copy = runtime.block_on(input.fetch()).map_err(Stop::BadInput)?;
        runtime
            .block_on(self.check(input, &copy.identity))
            .map_err(Stop::Failed)?;
        if let Some(rows) = rows {
            self.plan(input, &copy.identity, rows);
            if self.missing(input, &copy.identity, rows).is_empty() {
                return Ok(());
            }
        }
        let content =
            open_input(&copy.path).map_err(|e| Stop::BadInput(format!("{}: {e}", input.shown)))?;
        let counted = match content {
            InputContent::Json(lines) => {
                let counted = self.read_json(input, &copy, lines, parts)?;
                if rows.is_none() {
                    self.plan(input, &copy.identity, counted);
                }
                counted
            }
            InputContent::Parquet(unpacked) => {
                let path = unpacked.as_ref().map_or(&*copy.path, |file| file.path());
                let records = self.open_parquet(input, path, vec![(0, 0)])?;
                let total = records.total();
                drop(records);
                if rows.is_none() {
                    self.plan(input, &copy.identity, total);
                }
                self.read_parquet(input, &copy, (path, total), parts)?
            }
        };
        let record = InputRows { rows: counted };
        runtime
            .block_on(self.note(&rows_name(&input.name), &record))
            .map_err(Stop::Failed)?;
        Ok(())
    }

    /// Returns the first rows of this shard's parts that are missing.
    fn missing(&self, input: &ScoreInput, identity: &str, rows: u64) -> Vec<u64> {
        let starts = (0..rows).step_by(self.naming.rows as usize);
        starts
            .filter(|start| self.is_missing(&self.naming.name(&input.name, identity, *start)))
            .collect()
    }

    fn is_missing(&self, part: &str) -> bool {
        self.shard.has(part) && !self.written.contains_key(part)
    }

    /// Adds an input with a known number of rows to the planned ones. Called once for an input.
    fn plan(&self, input: &ScoreInput, identity: &str, rows: u64) {
        let planned: u64 = self
            .missing(input, identity, rows)
            .into_iter()
            .map(|start| self.naming.rows.min(rows - start))
            .sum();
        self.planned.add(planned, input.bytes);
    }

    /// Returns the number of the input's rows, if it was read to its end before.
    async fn known_rows(&self, input: &ScoreInput) -> Result<Option<u64>, Failure> {
        let name = rows_name(&input.name);
        if !self.written.contains_key(&name) {
            return Ok(None);
        }
        let content = self.out.read(&name, None).await?;
        let record = content.and_then(|c| serde_json::from_slice::<InputRows>(&c).ok());
        Ok(record.map(|record| record.rows))
    }

    /// Notes the input's identity in the output, or compares it with the one that is there.
    async fn check(&self, input: &ScoreInput, identity: &str) -> Result<(), Failure> {
        let record = InputRecord {
            input: input.name.clone(),
            identity: identity.to_owned(),
        };
        let name = record_name(&input.name);
        if self.note(&name, &record).await? {
            return Ok(());
        }
        let content = self.out.read(&name, None).await?.unwrap_or_default();
        match serde_json::from_slice::<InputRecord>(&content) {
            Ok(noted) if noted == record => Ok(()),
            _ => Err(Failure::Failed(format!(
                "{}: it is not the content of which --out {} has parts ({name}): name another \
                 --out, or restore the file",
                input.shown,
                self.out.shown()
            ))),
        }
    }

    /// Writes a record unless it exists. Returns true if it was written.
    async fn note(&self, name: &str, record: &impl Serialize) -> Result<bool, Failure> {
        let mut content = serde_json::to_vec(record).map_err(|e| Failure::Failed(e.to_string()))?;
        content.push(b'\n');
        self.out.create(name, content).await
    }

    fn read_json(
        &self,
        input: &ScoreInput,
        copy: &LocalCopy,
        lines: DataRows,
        parts: &mpsc::Sender<PartToScore>,
    ) -> Result<u64, Stop> {
        let mut filling = Filling::new(self, input, copy, parts);
        for (line, number) in lines.zip(1..) {
            let bad = |e: String| Stop::BadInput(format!("{}: {e}", input.shown));
            let row = match line.map_err(bad)? {
                DataRow::Line(line) if line.iter().all(u8::is_ascii_whitespace) => continue,
                // A row of another part is not parsed.
                DataRow::Line(_) if !filling.is_wanted() => None,
                DataRow::Line(line) => self.rows.line(number, &line),
                DataRow::Fields(fields) => Some(self.rows.whole_record(number, fields)),
                DataRow::Bad(problem) => Some(InputRow::bad(number, problem.message)),
            };
            filling.add(row)?;
        }
        filling.end()
    }

    /// Starts the process that decodes a Parquet file.
    fn open_parquet(
        &self,
        input: &ScoreInput,
        path: &Path,
        ranges: Vec<(u64, u64)>,
    ) -> Result<SandboxedRecords, Stop> {
        let choice = RecordChoice {
            columns: self.rows.carry.clone(),
            renames: self.rows.columns.renames().to_vec(),
            ranges,
        };
        let records =
            SandboxedRecords::open(path, &choice).map_err(|e| damaged(input, path, &e))?;
        match records.total() {
            total if total > MAX_RECORDS => {
                let claim = format!("its footer claims {total} records: write it again");
                Err(damaged(input, path, &claim))
            }
            _ => Ok(records),
        }
    }

    fn read_parquet(
        &self,
        input: &ScoreInput,
        copy: &LocalCopy,
        (path, total): (&Path, u64),
        parts: &mpsc::Sender<PartToScore>,
    ) -> Result<u64, Stop> {
        let missing = self.missing(input, &copy.identity, total);
        if missing.is_empty() {
            return Ok(total);
        }
        let ranges = missing
            .into_iter()
            .map(|start| (start, start + self.naming.rows));
        let ranges = merged(ranges.collect());
        let mut records = self.open_parquet(input, path, ranges)?.peekable();
        let mut filling = Filling::new(self, input, copy, parts);
        for at in 0..total {
            let number = at + 1;
            let is_next = match records.peek() {
                Some(Ok((next, _))) => *next <= number,
                Some(Err(_)) => true,
                None => false,
            };
            let row = match is_next {
                true => records
                    .next()
                    .transpose()
                    .map_err(|e| damaged(input, path, &e))?,
                false if filling.is_wanted() => {
                    let claim = format!(
                        "it has fewer records than the {total} that its footer claims: write it \
                         again"
                    );
                    return Err(damaged(input, path, &claim));
                }
                false => None,
            };
            filling.add(row.map(|(_, fields)| match fields {
                Ok(fields) => self.rows.record(number, fields),
                Err(issue) => InputRow::bad(number, issue.message_with_field()),
            }))?;
        }
        filling.end()
    }
}

/// Returns the finding about a Parquet file. Messages name the file that was decoded, which may be
/// a temporary one.
fn damaged(input: &ScoreInput, path: &Path, e: &dyn std::fmt::Display) -> Stop {
    let message = e.to_string();
    let reason = message
        .strip_prefix(&format!("{}: ", path.display()))
        .unwrap_or(&message);
    Stop::BadInput(format!("{}: {reason}", input.shown))
}

/// Merges neighbouring ranges, and the nearest ones if there are too many.
fn merged(ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut gap = 0;
    loop {
        let mut result: Vec<(u64, u64)> = Vec::new();
        for (start, end) in &ranges {
            match result.last_mut() {
                Some(last) if *start <= last.1 + gap => last.1 = *end,
                _ => result.push((*start, *end)),
            }
        }
        if result.len() <= MAX_RANGES {
            return result;
        }
        gap = (gap * 2).max(1);
    }
}

/// Collects the rows of the current part.
struct Filling<'a> {
    reader: &'a PartReader,
    input: &'a ScoreInput,
    copy: &'a LocalCopy,
    parts: &'a mpsc::Sender<PartToScore>,
    /// Number of rows so far.
    count: u64,
    /// Name of the current part if it is wanted.
    name: Option<String>,
    rows: Vec<InputRow>,
}

impl<'a> Filling<'a> {
    fn new(
        reader: &'a PartReader,
        input: &'a ScoreInput,
        copy: &'a LocalCopy,
        parts: &'a mpsc::Sender<PartToScore>,
    ) -> Self {
        let mut filling = Filling {
            reader,
            input,
            copy,
            parts,
            count: 0,
            name: None,
            rows: Vec::new(),
        };
        filling.begin();
        filling
    }

    fn begin(&mut self) {
        let naming = &self.reader.naming;
        let name = naming.name(&self.input.name, &self.copy.identity, self.count);
        self.name = Some(name).filter(|name| self.reader.is_missing(name));
    }

    /// Returns true if the next row belongs to a part that is wanted.
    fn is_wanted(&self) -> bool {
        self.name.is_some()
    }

    /// Adds the next row, which may be absent if it is not wanted.
    fn add(&mut self, row: Option<InputRow>) -> Result<(), Stop> {
        self.count += 1;
        if self.name.is_some() {
            let number = self.count;
            let row = row.unwrap_or_else(|| InputRow::bad(number, "the row is blank".to_owned()));
            self.rows.push(row);
        }
        if self.count.is_multiple_of(self.reader.naming.rows) {
            self.send()?;
            self.begin();
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), Stop> {
        let rows = std::mem::take(&mut self.rows);
        let Some(name) = self.name.take().filter(|_| !rows.is_empty()) else {
            return Ok(());
        };
        self.check_unchanged()?;
        let part = PartToScore {
            name,
            input: self.input.name.clone(),
            rows,
            columns: self
                .reader
                .rows
                .first_columns
                .get()
                .cloned()
                .unwrap_or_default(),
        };
        self.parts.blocking_send(part).map_err(|_| Stop::Unwanted)
    }

    /// Sends the last part and returns the number of rows.
    fn end(mut self) -> Result<u64, Stop> {
        self.send()?;
        // The number is stored, also if the last rows were not wanted.
        self.check_unchanged()?;
        Ok(self.count)
    }

    fn check_unchanged(&self) -> Result<(), Stop> {
        match self.copy.has_changed() {
            false => Ok(()),
            true => Err(Stop::BadInput(format!(
                "{}: it was changed while the command ran: run it again with another --out",
                self.input.shown
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_divided_among_shards_and_named_by_everything_they_depend_on() {
        let naming = PartNaming {
            options: "o".into(),
            rows: 100,
            format: PartFormat::Jsonl,
        };
        let name = |input: &str, identity: &str, start| naming.name(input, identity, start);
        let first = name("a/x.parquet", "i", 100);
        assert!(
            first.starts_with("a/x.parquet-0000000100-0000000200-"),
            "{first}"
        );
        assert!(first.ends_with(".jsonl"), "{first}");
        assert_ne!(first, name("a/x.parquet", "j", 100));
        let other = PartNaming {
            options: "p".into(),
            ..naming.clone()
        };
        assert_ne!(first, other.name("a/x.parquet", "i", 100));
        let shards = [0, 1, 2].map(|index| Shard { index, count: 3 });
        for start in 0..50 {
            let part = name("x", "i", start * 100);
            assert_eq!(shards.iter().filter(|shard| shard.has(&part)).count(), 1);
        }
    }

    #[test]
    fn too_many_ranges_are_merged() {
        assert_eq!(merged(vec![(0, 8), (8, 16), (24, 32)]), [(0, 16), (24, 32)]);
        let scattered: Vec<(u64, u64)> = (0..5000).map(|i| (i * 20, i * 20 + 10)).collect();
        let fewer = merged(scattered.clone());
        assert!(fewer.len() <= MAX_RANGES);
        assert!(scattered.iter().all(|(start, end)| {
            fewer
                .iter()
                .any(|range| range.0 <= *start && *end <= range.1)
        }));
    }
}
