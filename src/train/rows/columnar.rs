//! Parquet: each record becomes the JSON object that a JSONL line would hold.
//!
//! The library trusts the sizes that a file claims: a file of one kilobyte can make it allocate
//! gigabytes or create a billion elements. So the server decodes uploaded files in [another
//! process](super::sandbox).

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::record::{Field, Row};
use parquet::schema::types::{SchemaDescPtr, SchemaDescriptor, Type};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::names::{
    self, COMPLETIONS_COLUMN, MEDIA_COLUMNS, OPENAI_COLUMNS, QUESTION_COLUMN, is_openai,
};
use super::reader::{DataError, issue};
use super::row::{KWARGS_COLUMN, SYSTEM_COLUMN, TOOLS_COLUMN, invalid_weight};
use crate::domain::dataset::{IssueReason, RowIssue};
use crate::domain::logged::is_logged_column;
use crate::domain::message::without_nulls;
use crate::model::guard::guarded;

const COLUMNS: [&str; 8] = [
    "prompt",
    "chosen",
    "rejected",
    "weight",
    "id",
    TOOLS_COLUMN,
    KWARGS_COLUMN,
    SYSTEM_COLUMN,
];

/// Column with the messages of a prompt in files of prompts.
const MESSAGES_COLUMN: &str = "messages";

/// Maximum number of records that are reported one by one because their row group is damaged.
const MAX_LOST: u64 = 1 << 20;

/// Returns true if a column is decoded: the columns of a row, and columns that lead to a finding if
/// they are not empty.
fn is_wanted(column: &str) -> bool {
    COLUMNS.contains(&column) || MEDIA_COLUMNS.contains(&column) || is_logged_column(column)
}

fn bad(path: &Path, reason: String) -> DataError {
    DataError::BadFile {
        path: path.to_owned(),
        reason,
    }
}

fn unreadable(path: &Path, e: &dyn std::fmt::Display) -> DataError {
    bad(path, format!("not a readable Parquet file: {e}"))
}

/// Opens a file and reads its footer.
fn open(path: &Path) -> Result<SerializedFileReader<File>, DataError> {
    let file = File::open(path).map_err(|source| DataError::Io {
        path: path.to_owned(),
        source,
    })?;
    // The library panics on some damaged files.
    guarded(|| SerializedFileReader::new(file))
        .map_err(|e| unreadable(path, &e))?
        .map_err(|e| unreadable(path, &e))
}

/// Returns the columns of a file that are wanted.
fn project(
    path: &Path,
    schema: &Type,
    is_wanted: impl Fn(&str) -> bool,
) -> Result<SchemaDescPtr, DataError> {
    let fields = schema.get_fields().iter().filter(|f| is_wanted(f.name()));
    let wanted = Type::group_type_builder(schema.name())
        .with_fields(fields.cloned().collect())
        .build()
        .map_err(|e| unreadable(path, &e))?;
    match schema.check_contains(&wanted) {
        true => Ok(Arc::new(SchemaDescriptor::new(Arc::new(wanted)))),
        false => Err(unreadable(path, &"its columns differ")),
    }
}

/// Returns the decoded columns of each record. `rename` returns the new name of a column, or `None`
/// for a column that is left out. The columns `labels` are decoded besides those of a row.
pub(super) fn decode<R: Fn(&str) -> Option<String> + Send + 'static>(
    path: &Path,
    labels: &[String],
    rename: R,
) -> Result<impl Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send + use<R>, DataError> {
    let reader = open(path)?;
    let schema = reader.metadata().file_metadata().schema();
    let names: Vec<String> = schema
        .get_fields()
        .iter()
        .filter_map(|f| rename(f.name()))
        .collect();
    names::check(&names).map_err(|reason| bad(path, reason))?;
    let is_openai = is_openai(&names);
    let is_orca = !names.iter().any(|name| name == "prompt");
    let is_wanted = |name: &str| {
        is_wanted(name)
            || (is_openai && OPENAI_COLUMNS.contains(&name))
            || (is_orca && name == QUESTION_COLUMN)
            || labels.iter().any(|label| label == name)
    };
    // These columns are not decoded, only reported as not used.
    let unknown: Vec<String> = names
        .iter()
        .filter(|name| !is_wanted(name))
        .cloned()
        .collect();
    let columns = project(path, schema, |name| {
        rename(name).is_some_and(|name| is_wanted(&name))
    })?;
    let labels = labels.to_vec();
    Ok(Records::new(reader, columns)
        .enumerate()
        .map(move |(i, record)| {
            let row = i as u64 + 1;
            let record = record.map_err(|e| damaged(row, &e))?;
            let mut fields = Map::new();
            for (column, field) in record.get_column_iter() {
                let Some(name) = rename(column) else {
                    continue;
                };
                if name == "weight"
                    && let Some(weight) = not_finite(field)
                {
                    return Err(invalid_weight(row, &weight.to_string()));
                }
                let value = match to_json(field) {
                    // JSON has no such number; as a text it is reported.
                    Ok(_) if is_logged_column(&name) && not_finite(field).is_some() => {
                        Value::String(field.to_string())
                    }
                    Ok(value) => value,
                    // In place of a log-prob, a text leads to a finding only where log-probs are
                    // needed.
                    Err(_) if is_logged_column(&name) => Value::String(field.to_string()),
                    // For example a date.
                    Err(_) if labels.contains(&name) && !COLUMNS.contains(&name.as_str()) => {
                        Value::String(field.to_string())
                    }
                    // For example the bytes of an image. The value does not matter, because the
                    // column leads to a finding anyway.
                    Err(_) if !COLUMNS.contains(&name.as_str()) => Value::Bool(true),
                    Err(kind) => {
                        let message = format!("{name} holds {kind}: use {}", names::legal(&name));
                        return Err(issue(row, &name, IssueReason::InvalidType, message));
                    }
                };
                // In a column of structs, a key that a row lacks is null if another row has it.
                fields.insert(name, without_nulls(value));
            }
            fields.extend(unknown.iter().map(|name| (name.clone(), Value::Bool(true))));
            Ok(fields)
        }))
}

/// Decodes as [`decode`] does, with every column that pairs do not use among the labels.
pub(super) fn decode_with_others<R: Fn(&str) -> Option<String> + Send + 'static>(
    path: &Path,
    rename: R,
) -> Result<impl Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send + use<R>, DataError> {
    let reader = open(path)?;
    let schema = reader.metadata().file_metadata().schema();
    let names = schema.get_fields().iter().filter_map(|f| rename(f.name()));
    let others: Vec<String> = names.filter(|name| !is_wanted(name)).collect();
    decode(path, &others, rename)
}

/// Returns all columns of each record, as they are, except that nulls inside `prompt` and
/// `messages` are removed. A value that JSON does not have, such as a date, becomes text. `rename`
/// is as for [`decode`].
pub(super) fn decode_whole<R: Fn(&str) -> Option<String> + Send + 'static>(
    path: &Path,
    rename: R,
) -> Result<impl Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send + use<R>, DataError> {
    let reader = open(path)?;
    let schema = reader.metadata().file_metadata().schema();
    let columns = project(path, schema, |name| rename(name).is_some())?;
    Ok(Records::new(reader, columns)
        .enumerate()
        .map(move |(i, record)| {
            let row = i as u64 + 1;
            let record = record.map_err(|e| damaged(row, &e))?;
            let mut fields = Map::new();
            for (column, field) in record.get_column_iter() {
                let Some(name) = rename(column) else {
                    continue;
                };
                let value = match to_json(field) {
                    Ok(value) if name == "prompt" || name == MESSAGES_COLUMN => {
                        without_nulls(value)
                    }
                    Ok(value) => value,
                    // For example a date.
                    Err(_) => Value::String(field.to_string()),
                };
                fields.insert(name, value);
            }
            Ok(fields)
        }))
}

fn damaged(row: u64, e: &str) -> RowIssue {
    let message = format!("the record cannot be decoded: {e}");
    issue(row, "", IssueReason::InvalidType, message)
}

/// The records and columns of a Parquet file that are decoded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordChoice {
    /// Columns that are decoded besides those of pairs and completions, whatever their type.
    pub columns: Vec<String>,
    /// Pairs of our name of a column and the file's.
    #[serde(default)]
    pub renames: Vec<(String, String)>,
    /// Ranges of records, counted from 0 and without the end; empty means all records.
    pub ranges: Vec<(u64, u64)>,
}

impl RecordChoice {
    /// Returns our name of a column of the file, or `None` if another column has taken its name.
    fn name<'a>(&'a self, column: &'a str) -> Option<&'a str> {
        names::renamed(&self.renames, column)
    }

    fn has(&self, record: u64) -> bool {
        self.ranges.is_empty()
            || self
                .ranges
                .iter()
                .any(|(start, end)| (*start..*end).contains(&record))
    }
}

/// Returns the number of records of a file, and the selected ones with their numbers from 1. A
/// column `completions` stands for `chosen` and `rejected`. The records have the file's names of
/// columns.
pub(super) fn select_records(
    path: &Path,
    choice: RecordChoice,
) -> Result<(u64, NumberedRecords), DataError> {
    let reader = open(path)?;
    let metadata = reader.metadata().file_metadata();
    let total = u64::try_from(metadata.num_rows()).unwrap_or_default();
    let schema = metadata.schema();
    let theirs: Vec<String> = schema
        .get_fields()
        .iter()
        .map(|f| f.name().to_owned())
        .collect();
    if let Some((ours, missing)) = choice.renames.iter().find(|(_, c)| !theirs.contains(c)) {
        let found = names::listed(&theirs);
        let reason = format!("no column {missing:?}, which stands for {ours}; found: {found}");
        return Err(bad(path, reason));
    }
    let names: Vec<String> = theirs
        .iter()
        .filter_map(|name| choice.name(name).map(str::to_owned))
        .collect();
    let has = |column: &str| names.iter().any(|name| name == column);
    if !has(COMPLETIONS_COLUMN) {
        names::check(&names).map_err(|reason| bad(path, reason))?;
    }
    let (is_openai, is_orca) = (is_openai(&names), !has("prompt"));
    let is_wanted = |name: &str| {
        is_wanted(name)
            || name == COMPLETIONS_COLUMN
            || (is_openai && OPENAI_COLUMNS.contains(&name))
            || (is_orca && name == QUESTION_COLUMN)
    };
    let columns = project(path, schema, |name| {
        choice.name(name).is_some_and(is_wanted) || choice.columns.iter().any(|c| c == name)
    })?;
    // Records behind a damaged one are not read, although `Records` would return some of them.
    let mut is_damaged = false;
    let records = Records::new(reader, columns).map_while(move |record| {
        let is_readable = !std::mem::replace(&mut is_damaged, record.is_err());
        is_readable.then_some(record)
    });
    let records = records.zip(0..);
    let last = choice.ranges.iter().map(|(_, end)| *end).max();
    let records = records
        .take_while(move |(_, at)| last.is_none_or(|end| *at < end))
        .filter_map(move |(record, at)| {
            let row = at + 1;
            match record {
                Ok(_) if !choice.has(at) => None,
                Ok(record) => Some(Ok((row, fields_of(row, &record, &choice)))),
                Err(e) => Some(Err(format!(
                    "record {row} cannot be decoded ({e}): the file is damaged, write it again"
                ))),
            }
        });
    Ok((total, Box::new(records)))
}

/// A record's number from 1 and its columns, or the finding about them.
pub type NumberedRecord = (u64, Result<Map<String, Value>, RowIssue>);

/// Records in order. An error, which says why the file cannot be read further, is the last item.
pub(super) type NumberedRecords = Box<dyn Iterator<Item = Result<NumberedRecord, String>> + Send>;

/// Converts a record. The columns that `choice` lists may have values of any type.
fn fields_of(
    row: u64,
    record: &Row,
    choice: &RecordChoice,
) -> Result<Map<String, Value>, RowIssue> {
    let mut fields = Map::new();
    for (column, field) in record.get_column_iter() {
        let name = choice.name(column).unwrap_or_default();
        if name == "weight"
            && let Some(weight) = not_finite(field)
        {
            return Err(invalid_weight(row, &weight.to_string()));
        }
        let is_ours = COLUMNS.contains(&name) || name == COMPLETIONS_COLUMN;
        let is_carried = choice.columns.contains(column);
        let value = match to_json(field) {
            // JSON has no such number; as a text it is reported.
            Ok(_) if is_logged_column(name) && !is_carried && not_finite(field).is_some() => {
                Value::String(field.to_string())
            }
            Ok(value) if is_ours => without_nulls(value),
            Ok(value) => value,
            Err(_) if is_carried || is_logged_column(name) => Value::String(field.to_string()),
            Err(_) if !is_ours => Value::Bool(true),
            Err(kind) => {
                let message = format!("{column} holds {kind}: use {}", names::legal(name));
                return Err(issue(row, column, IssueReason::InvalidType, message));
            }
        };
        fields.insert(column.clone(), value);
    }
    Ok(fields)
}

/// Iterator over the records of all row groups. After a failure the rest of a row group cannot be
/// trusted, so that each of its records fails, too; the next row group has pages of its own.
struct Records {
    file: SerializedFileReader<File>,
    columns: SchemaDescPtr,
    /// The row group that is opened next.
    group: usize,
    /// Number of records of the open row group that have not been returned.
    left: u64,
    /// The records of the open row group, or the reason why the others cannot be decoded.
    rows: Result<ReaderIter, String>,
    /// Number of further records that may be reported as lost, one by one. A file may claim any
    /// number of records.
    losses_left: u64,
}

impl Records {
    fn new(file: SerializedFileReader<File>, columns: SchemaDescPtr) -> Self {
        Records {
            file,
            columns,
            group: 0,
            left: 0,
            rows: Err(String::new()),
            losses_left: MAX_LOST,
        }
    }

    /// Opens the next row group.
    fn open(&mut self) {
        let (file, group) = (&self.file, self.group);
        let rows = self.file.metadata().row_group(group).num_rows();
        self.group += 1;
        self.left = u64::try_from(rows).unwrap_or(0);
        let columns = self.columns.clone();
        let opened = guarded(|| {
            let reader = file.get_row_group(group)?;
            TreeBuilder::new().as_iter(columns, &*reader)
        });
        self.rows = match opened {
            Ok(Ok(rows)) => Ok(rows),
            Ok(Err(e)) => Err(e.to_string()),
            Err(panic) => Err(panic),
        };
    }
}

impl Iterator for Records {
    type Item = Result<Row, String>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.left == 0 {
            if self.group == self.file.num_row_groups() {
                return None;
            }
            self.open();
        }
        self.left -= 1;
        if let Ok(rows) = &mut self.rows {
            let failure = match guarded(|| rows.next()) {
                Ok(Some(Ok(record))) => return Some(Ok(record)),
                Ok(Some(Err(e))) => e.to_string(),
                Ok(None) => "its row group has fewer records than the file says".to_owned(),
                Err(panic) => panic,
            };
            self.rows = Err(failure);
        }
        if self.losses_left == 0 {
            (self.left, self.group) = (0, self.file.num_row_groups());
            return Some(Err(format!(
                "it and all later records are left out, because more than {MAX_LOST} records are \
                 lost"
            )));
        }
        self.losses_left -= 1;
        match &mut self.rows {
            Err(reason) if !reason.is_empty() => Some(Err(std::mem::take(reason))),
            _ => Some(Err(
                "an earlier record of its row group cannot be decoded".to_owned()
            )),
        }
    }
}

/// Returns a number that JSON cannot express.
fn not_finite(field: &Field) -> Option<f64> {
    let number = match field {
        Field::Float16(x) => f64::from(*x),
        Field::Float(x) => f64::from(*x),
        Field::Double(x) => *x,
        _ => return None,
    };
    (!number.is_finite()).then_some(number)
}

fn to_json(field: &Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Str(s) => Value::String(s.clone()),
        Field::Bytes(b) => Value::String(
            b.as_utf8()
                .map_err(|_| "bytes that are not UTF-8".to_owned())?
                .to_owned(),
        ),
        Field::Bool(b) => Value::Bool(*b),
        Field::Byte(x) => Value::from(*x),
        Field::Short(x) => Value::from(*x),
        Field::Int(x) => Value::from(*x),
        Field::Long(x) => Value::from(*x),
        Field::UByte(x) => Value::from(*x),
        Field::UShort(x) => Value::from(*x),
        Field::UInt(x) => Value::from(*x),
        Field::ULong(x) => Value::from(*x),
        Field::Float16(x) => Value::from(f64::from(*x)),
        Field::Float(x) => Value::from(*x),
        Field::Double(x) => Value::from(*x),
        Field::Group(g) => {
            let mut object = Map::new();
            for (name, field) in g.get_column_iter() {
                object.insert(name.clone(), to_json(field)?);
            }
            Value::Object(object)
        }
        Field::ListInternal(list) => Value::Array(
            list.elements()
                .iter()
                .map(to_json)
                .collect::<Result<_, _>>()?,
        ),
        other => return Err(format!("a value of an unexpected kind ({other})")),
    })
}

#[cfg(test)]
mod tests {
    use half::f16;
    use parquet::data_type::Decimal;
    use serde_json::json;

    use super::*;

    fn fields(columns: &[(&str, Field)]) -> Value {
        let columns = columns.iter().cloned();
        let record = Row::new(
            columns
                .map(|(name, field)| (name.to_owned(), field))
                .collect(),
        );
        Value::Object(fields_of(1, &record, &RecordChoice::default()).unwrap())
    }

    #[test]
    fn numbers_of_16_bits_are_numbers() {
        let number = |x: f32| Field::Float16(f16::from_f32(x));
        let columns = [("weight", number(1.5)), ("ref_chosen_logps", number(-2.25))];
        let expected = json!({"weight": 1.5, "ref_chosen_logps": -2.25});
        assert_eq!(fields(&columns), expected);
    }

    #[test]
    fn a_value_of_an_unusable_type_has_its_columns_own_remedy() {
        let remedies = [
            ("weight", "use a number"),
            ("id", "use text or a number"),
            ("chosen", "use text or a list of messages"),
        ];
        for (column, remedy) in remedies {
            let decimal = Field::Decimal(Decimal::from_i32(150, 8, 2));
            let record = Row::new(vec![(column.to_owned(), decimal)]);
            let found = fields_of(1, &record, &RecordChoice::default()).unwrap_err();
            assert!(found.message.ends_with(remedy), "{}", found.message);
        }
    }

    #[test]
    fn a_log_prob_of_an_unusable_type_is_quoted() {
        let decimal = Field::Decimal(Decimal::from_i32(-150, 8, 2));
        let nan = Field::Double(f64::NAN);
        for value in [decimal, nan] {
            let quoted = json!({"chosen_logps": value.to_string()});
            assert_eq!(fields(&[("chosen_logps", value)]), quoted);
        }
    }
}
