//! `--columns`: the names that a file's columns have in our format.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};

use crate::train::rows::names::{COLUMNS, check, listed, renamed, similar};

/// Column that can be mapped besides [`COLUMNS`]: the prompt of the shape `orca`.
const QUESTION: &str = "question";

/// Pairs of our name and the file's name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::cli) struct ColumnMap(Arc<Vec<(String, String)>>);

impl ColumnMap {
    /// Parses pairs of the form `OURS=THEIRS`.
    ///
    /// # Errors
    /// Returns a text that names the pair that is wrong.
    pub(in crate::cli) fn parse(pairs: &[String]) -> Result<Self, String> {
        let mut parsed: Vec<(String, String)> = Vec::new();
        for pair in pairs {
            let Some((ours, theirs)) = pair.split_once('=') else {
                return Err(format!(
                    "--columns: {pair:?} is not of the form OURS=THEIRS, such as chosen=good"
                ));
            };
            let (ours, theirs) = (ours.trim(), theirs.trim());
            if !COLUMNS.contains(&ours) && ours != QUESTION {
                let legal: Vec<String> = COLUMNS.iter().map(|name| (*name).to_owned()).collect();
                let swapped = if COLUMNS.contains(&theirs) {
                    format!("; did you mean {theirs}={ours}?")
                } else {
                    String::new()
                };
                return Err(format!(
                    "--columns: {ours:?} is not a column of a row: {} or {QUESTION}{swapped}",
                    legal.join(", ")
                ));
            }
            if parsed.iter().any(|(a, b)| a == ours || b == theirs) {
                return Err(format!(
                    "--columns: {ours}={theirs} maps a column a second time"
                ));
            }
            parsed.push((ours.to_owned(), theirs.to_owned()));
        }
        Ok(ColumnMap(Arc::new(parsed)))
    }

    /// Returns the pairs of our name and the file's.
    pub(in crate::cli) fn renames(&self) -> &[(String, String)] {
        &self.0
    }

    /// Returns the pairs as `--columns` has them, sorted.
    pub(in crate::cli) fn pairs(&self) -> Vec<String> {
        let pairs = self
            .0
            .iter()
            .map(|(ours, theirs)| format!("{ours}={theirs}"));
        let mut pairs: Vec<String> = pairs.collect();
        pairs.sort();
        pairs
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns true if a column of the file is mapped.
    pub(super) fn is_mapped(&self, theirs: &str) -> bool {
        self.0.iter().any(|(_, name)| name == theirs)
    }

    /// Returns our name of a column of the file, or `None` if another column has taken its name.
    pub(super) fn rename(&self, name: &str) -> Option<String> {
        renamed(&self.0, name).map(str::to_owned)
    }

    /// Returns the file's name of a column, for messages: `chosen[1].content` becomes
    /// `good[1].content`.
    pub(in crate::cli) fn original(&self, path: &str) -> String {
        let end = path.find(['[', '.']).unwrap_or(path.len());
        let (column, rest) = path.split_at(end);
        match self.0.iter().find(|(ours, _)| ours == column) {
            Some((_, theirs)) => format!("{theirs}{rest}"),
            None => path.to_owned(),
        }
    }

    /// Returns a message about a column with the file's name of it at the beginning.
    pub(in crate::cli) fn message(&self, field: &str, message: &str) -> String {
        match message.strip_prefix(field) {
            Some(rest) if !field.is_empty() => format!("{}{rest}", self.original(field)),
            _ => message.to_owned(),
        }
    }

    pub(in crate::cli) fn renamed(&self, fields: Map<String, Value>) -> Map<String, Value> {
        fields
            .into_iter()
            .filter_map(|(name, value)| Some((self.rename(&name)?, value)))
            .collect()
    }

    /// Checks that a file with these columns has every mapped one.
    ///
    /// # Errors
    /// Returns a text that names the missing column and those that there are.
    pub(super) fn check(&self, columns: &[String]) -> Result<(), String> {
        let missing = self.0.iter().find(|(_, theirs)| !columns.contains(theirs));
        let Some((ours, theirs)) = missing else {
            return Ok(());
        };
        let suggestion = similar(columns, theirs)
            .map(|name| format!("; did you mean {name}?"))
            .unwrap_or_default();
        let found = listed(columns);
        Err(format!(
            "has no column {theirs:?}, which --columns {ours}={theirs} names; found: \
             {found}{suggestion}"
        ))
    }
}

/// Checks that a file with these columns, by our names, has the answers of pairs.
///
/// # Errors
/// Returns a text that names the missing column, those that there are, and the flag that names
/// another one.
pub(super) fn check_answers(names: &[Option<String>]) -> Result<(), String> {
    let ours: Vec<String> = names.iter().flatten().cloned().collect();
    check(&ours).map_err(|e| format!("{e}; {}", naming("chosen")))
}

/// Describes the flag that names the column of a file for one of ours.
pub(in crate::cli) fn naming(ours: &str) -> String {
    format!("--columns {ours}=NAME reads the column NAME as {ours}")
}

/// Names of the columns that a reader has seen.
#[derive(Clone, Default)]
pub(super) struct SeenColumns(Arc<Mutex<HashSet<String>>>);

impl SeenColumns {
    pub(super) fn add(&self, name: &str) {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if names.len() < 1000 && !names.contains(name) {
            names.insert(name.to_owned());
        }
    }

    pub(super) fn list(&self) -> Vec<String> {
        let names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names: Vec<String> = names.iter().cloned().collect();
        names.sort();
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[&str]) -> Result<ColumnMap, String> {
        let pairs: Vec<String> = pairs.iter().map(|pair| (*pair).to_owned()).collect();
        ColumnMap::parse(&pairs)
    }

    #[test]
    fn columns_are_renamed_and_may_be_swapped() {
        let columns = parse(&["chosen=rejected", "rejected=chosen", "prompt=q"]).unwrap();
        let rename = |name| columns.rename(name);
        assert_eq!(rename("rejected").as_deref(), Some("chosen"));
        assert_eq!(rename("chosen").as_deref(), Some("rejected"));
        assert_eq!(rename("q").as_deref(), Some("prompt"));
        assert_eq!(rename("prompt"), None);
        assert_eq!(rename("other").as_deref(), Some("other"));
        assert_eq!(columns.original("chosen[0].content"), "rejected[0].content");
        assert_eq!(columns.original("other"), "other");
    }

    #[test]
    fn wrong_pairs_are_refused_by_name() {
        let refused = |pairs: &[&str]| parse(pairs).unwrap_err();
        assert!(refused(&["chosen"]).contains("\"chosen\" is not of the form"));
        assert!(refused(&["good=chosen"]).contains("did you mean chosen=good?"));
        assert!(refused(&["chosen=a", "chosen=b"]).contains("chosen=b maps a column a second"));
        assert!(refused(&["chosen=a", "rejected=a"]).contains("a second time"));
    }
}
