//! The first pass over the rows: folds, duplicates and contradictions.

use std::collections::HashMap;

use crate::cli::data::{DataFiles, DataRecord};
use crate::cli::failure::Failure;
use crate::domain::dataset::{PreferenceRow, RowIssue, Severity};
use crate::train::validate;

/// Part of a BLAKE3 hash that identifies a pair within the files.
type PairKey = [u8; 16];

/// A row with the findings of the first pass.
#[derive(Clone, Debug)]
pub(super) struct IndexedRow {
    /// Number of the row, from 1 and through all files.
    pub row: u64,
    /// Fold of the row, from 0, or the reason why the row cannot be used.
    pub fold: Result<u32, String>,
    /// The first row with the same prompt and answers, if it is an earlier one.
    pub duplicate_of: Option<u64>,
    /// The first row with the same prompt and the same two answers that prefers the other one.
    pub contradicts: Option<u64>,
}

impl IndexedRow {
    /// Returns true if the row is scored by the adapter of this fold.
    pub fn is_scored_by(&self, fold: u32) -> bool {
        self.fold == Ok(fold)
    }

    /// Returns true if the adapter of this fold is trained on the row. A duplicate would count
    /// twice, and one of two rows that contradict each other is wrong.
    pub fn is_trained_by(&self, fold: u32) -> bool {
        let is_outside = self.fold.as_ref().is_ok_and(|own| *own != fold);
        is_outside && self.duplicate_of.is_none() && self.contradicts.is_none()
    }
}

/// All rows, and the hash of their content.
#[derive(Debug)]
pub(super) struct RowIndex {
    /// The rows in order.
    pub rows: Vec<IndexedRow>,
    /// BLAKE3 hash over all rows.
    pub content: blake3::Hash,
}

impl RowIndex {
    /// Reads the files once.
    ///
    /// # Errors
    /// Returns a failure if a file cannot be read to its end.
    pub fn read(data: &DataFiles, seed: u64, folds: u32) -> Result<Self, Failure> {
        let mut rows = Vec::new();
        let mut content = ContentHasher::default();
        let mut first_of_row: HashMap<PairKey, u64> = HashMap::new();
        let mut first_of_pair: HashMap<PairKey, u64> = HashMap::new();
        // Each swapped pair, with the position of its row.
        let mut swapped: Vec<(usize, PairKey)> = Vec::new();
        for record in data.records() {
            let record = record?;
            content.add(&record);
            let number = record.row;
            let mut row = IndexedRow {
                row: number,
                fold: Err(String::new()),
                duplicate_of: None,
                contradicts: None,
            };
            match usable(record.pairs) {
                Ok(pairs) => {
                    row.fold = Ok(fold(&pairs, seed, folds));
                    let mut whole = blake3::Hasher::new();
                    for pair in &pairs {
                        let forward = key(validate::hash(pair, &pair.chosen, &pair.rejected));
                        let backward = key(validate::hash(pair, &pair.rejected, &pair.chosen));
                        whole.update(&forward);
                        first_of_pair.entry(forward).or_insert(number);
                        swapped.push((rows.len(), backward));
                    }
                    let whole = key(*whole.finalize().as_bytes());
                    let first = *first_of_row.entry(whole).or_insert(number);
                    row.duplicate_of = (first != number).then_some(first);
                }
                Err(issue) => row.fold = Err(issue.message_with_field()),
            }
            rows.push(row);
        }
        for (position, key) in swapped {
            let row = &mut rows[position];
            let found = first_of_pair.get(&key).filter(|found| **found != row.row);
            row.contradicts = row.contradicts.or(found.copied());
        }
        Ok(RowIndex {
            rows,
            content: content.finish(),
        })
    }

    /// Returns the number of rows that a fold's adapter scores.
    pub fn scored_count(&self, fold: u32) -> u64 {
        let scored = self.rows.iter().filter(|row| row.is_scored_by(fold));
        scored.count() as u64
    }

    /// Returns the number of rows that a fold's adapter is trained on.
    pub fn trained_count(&self, fold: u32) -> u64 {
        let trained = self.rows.iter().filter(|row| row.is_trained_by(fold));
        trained.count() as u64
    }
}

/// Hashes rows with their numbers and columns.
#[derive(Default)]
pub(super) struct ContentHasher(blake3::Hasher);

impl ContentHasher {
    pub fn add(&mut self, record: &DataRecord) {
        let columns = serde_json::to_vec(&record.columns).unwrap_or_default();
        self.0.update(&record.row.to_le_bytes());
        self.0.update(&(columns.len() as u64).to_le_bytes());
        self.0.update(&columns);
    }

    pub fn finish(&self) -> blake3::Hash {
        self.0.finalize()
    }
}

/// Returns the pairs of a row, or the first error of one of them.
fn usable(pairs: Result<Vec<PreferenceRow>, RowIssue>) -> Result<Vec<PreferenceRow>, RowIssue> {
    let pairs = pairs?;
    let is_error = |issue: &RowIssue| issue.reason.severity() == Severity::Error;
    if let Some(error) = pairs.iter().flat_map(validate::check).find(is_error) {
        return Err(error);
    }
    Ok(pairs)
}

/// Returns the fold of a row: a hash of its prompt and the seed. So all rows with the same prompt
/// are in one fold, and with them all duplicates and contradictions. An adapter that was trained on
/// a prompt knows the preference for it, and would only repeat the label.
fn fold(pairs: &[PreferenceRow], seed: u64, folds: u32) -> u32 {
    let prompts = pairs.iter().map(|pair| &pair.prompt);
    // Pairs of one row may divide dialogues at different messages. The shortest beginning is
    // common to all.
    let prompt = prompts.min_by_key(|prompt| prompt.bytes());
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(&serde_json::to_vec(&prompt).unwrap_or_default());
    let mut first = [0; 8];
    hasher.finalize_xof().fill(&mut first);
    (u64::from_le_bytes(first) % u64::from(folds)) as u32
}

fn key(hash: [u8; 32]) -> PairKey {
    let mut key = PairKey::default();
    key.copy_from_slice(&hash[..16]);
    key
}
