//! The first pass over the rows: folds, duplicates and contradictions.

use std::collections::HashMap;

use crate::cli::data::{DataFiles, DataRecord};
use crate::cli::failure::Failure;
use crate::domain::dataset::{PreferenceRow, RowIssue, Severity, Text};
use crate::train::validate;

/// Part of a BLAKE3 hash that identifies a pair, a row's pairs or a prompt within the files.
type ContentKey = [u8; 16];

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
        let mut first_of_row: HashMap<ContentKey, u64> = HashMap::new();
        let mut first_of_pair: HashMap<ContentKey, u64> = HashMap::new();
        // Each swapped pair, with the position of its row.
        let mut swapped: Vec<(usize, ContentKey)> = Vec::new();
        let mut groups = PromptGroups::default();
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
                    groups.add(pairs.iter().map(|pair| prompt_key(&pair.prompt)));
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
                Err(issue) => {
                    row.fold = Err(issue.message_with_field());
                    groups.add([]);
                }
            }
            rows.push(row);
        }
        for (position, key) in swapped {
            let row = &mut rows[position];
            let found = first_of_pair.get(&key).filter(|found| **found != row.row);
            row.contradicts = row.contradicts.or(found.copied());
        }
        for position in 0..rows.len() {
            let first = groups.first(position);
            if first != position {
                rows[position].fold = rows[first].fold.clone();
            }
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

/// Groups of rows: those that share a prompt, directly or through other rows, are in one group.
/// This is a union-find over the positions of the rows.
#[derive(Default)]
struct PromptGroups {
    /// For each row the position of an earlier row of its group, or its own if it is the first.
    parents: Vec<usize>,
    /// Position of the first row with a prompt.
    first_of_prompt: HashMap<ContentKey, usize>,
}

impl PromptGroups {
    /// Adds the next row with its prompts. A row without prompts is a group of its own.
    fn add(&mut self, prompts: impl IntoIterator<Item = ContentKey>) {
        let position = self.parents.len();
        self.parents.push(position);
        for prompt in prompts {
            let other = *self.first_of_prompt.entry(prompt).or_insert(position);
            let (a, b) = (self.first(position), self.first(other));
            self.parents[a.max(b)] = a.min(b);
        }
    }

    /// Returns the position of the first row of a row's group.
    fn first(&mut self, mut position: usize) -> usize {
        while self.parents[position] != position {
            // Shortens the way for later calls.
            self.parents[position] = self.parents[self.parents[position]];
            position = self.parents[position];
        }
        position
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

/// Returns the fold of a row that is the first of its group: a hash of its prompt and the seed. The
/// other rows of the group are in the same fold. So all rows with the same prompt are in one fold,
/// and with them all duplicates and contradictions. An adapter that was trained on a prompt knows
/// the preference for it, and would only repeat the label.
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

/// Returns the key of a prompt. It hashes the same text as [`fold`], so that rows of one pair with
/// the same key have the same fold already.
fn prompt_key(prompt: &Text) -> ContentKey {
    let text = serde_json::to_vec(prompt).unwrap_or_default();
    key(*blake3::hash(&text).as_bytes())
}

fn key(hash: [u8; 32]) -> ContentKey {
    let mut key = ContentKey::default();
    key.copy_from_slice(&hash[..16]);
    key
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cli::args::DataArgs;

    async fn index(lines: &[Value], seed: u64, folds: u32) -> RowIndex {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
        std::fs::write(&path, lines.join("\n")).unwrap();
        let files = [path.to_str().unwrap().to_owned()];
        let options = DataArgs::default();
        let data = DataFiles::find(&files, &options).await.unwrap();
        RowIndex::read(&data, seed, folds).unwrap()
    }

    /// Returns the messages of a dialogue, the user's first.
    fn dialogue(contents: &[&str]) -> Value {
        let messages = contents.iter().enumerate().map(|(i, content)| {
            let role = if i % 2 == 0 { "user" } else { "assistant" };
            json!({"role": role, "content": content})
        });
        messages.collect()
    }

    #[test]
    fn rows_that_share_a_prompt_through_others_are_one_group() {
        let mut groups = PromptGroups::default();
        let rows: [&[u8]; 8] = [&[1], &[2], &[], &[1, 3], &[4], &[3, 2], &[5, 4], &[]];
        for row in rows {
            groups.add(row.iter().map(|n| [*n; 16]));
        }
        let first: Vec<usize> = (0..rows.len()).map(|row| groups.first(row)).collect();
        assert_eq!(first, [0, 0, 2, 0, 4, 0, 4, 7]);
    }

    #[tokio::test]
    async fn rows_of_several_pairs_are_in_the_fold_of_each_of_their_prompts() {
        // The pairs of the second row have the prompts [q] and [q, a, r].
        let single = json!({
            "chosen": dialogue(&["q", "a", "r", "good"]),
            "rejected": dialogue(&["q", "a", "r", "bad"]),
        });
        let several = json!({
            "chosen": dialogue(&["q", "a", "r", "fine"]),
            "rejected": [dialogue(&["q", "b"]), dialogue(&["q", "a", "r", "poor"])],
        });
        let short = json!({
            "chosen": dialogue(&["q", "c"]),
            "rejected": dialogue(&["q", "d"]),
        });
        let mut apart = 0;
        for seed in 0..20 {
            let alone = index(std::slice::from_ref(&short), seed, 4).await;
            let all = index(&[single.clone(), several.clone(), short.clone()], seed, 4).await;
            let folds: Vec<_> = all
                .rows
                .iter()
                .map(|row| row.fold.clone().unwrap())
                .collect();
            assert_eq!(folds[1..], [folds[0]; 2], "seed {seed}");
            apart += usize::from(alone.rows[0].fold != Ok(folds[0]));
        }
        assert!(
            apart > 0,
            "the short and the long prompt always have the same fold"
        );
    }

    #[tokio::test]
    async fn the_fold_of_a_row_with_one_pair_depends_on_its_prompt_and_the_seed_only() {
        let row = |i: u64| {
            let (prompt, chosen) = (format!("p{}", i % 7), format!("c{i}"));
            json!({"prompt": prompt, "chosen": chosen, "rejected": "r"})
        };
        let rows: Vec<Value> = (0..30).map(row).collect();
        let all = index(&rows, 5, 3).await;
        for (i, indexed) in all.rows.iter().enumerate() {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&5_u64.to_le_bytes());
            hasher.update(format!("\"p{}\"", i % 7).as_bytes());
            let mut first = [0; 8];
            hasher.finalize_xof().fill(&mut first);
            assert_eq!(indexed.fold, Ok((u64::from_le_bytes(first) % 3) as u32));
        }
    }
}
