//! Parquet: each record becomes the JSON object that a JSONL line would hold.
//!
//! The library trusts the sizes that a file claims: a file of one kilobyte can make it allocate
//! gigabytes or create a billion elements. So the server decodes uploaded files in [another
//! process](super::apart).

use std::fs::File;
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::names::{self, MEDIA_COLUMNS, OPENAI_COLUMNS, QUESTION_COLUMN, is_openai};
use super::reader::{DataError, issue};
use super::row::{KWARGS_COLUMN, SYSTEM_COLUMN, TOOLS_COLUMN, invalid_weight};
use crate::domain::dataset::{IssueReason, RowIssue};
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

/// Returns true if a column is decoded: the columns of a row, and columns that lead to a finding if
/// they are not empty.
fn is_wanted(column: &str) -> bool {
    COLUMNS.contains(&column) || MEDIA_COLUMNS.contains(&column)
}

/// Returns the decoded columns of each record. `rename` returns the new name of a column, or `None`
/// for a column that is left out. The columns `labels` are decoded besides those of a row.
pub(super) fn decode<R: Fn(&str) -> Option<String> + Send + 'static>(
    path: &Path,
    labels: &[String],
    rename: R,
) -> Result<impl Iterator<Item = Result<Map<String, Value>, RowIssue>> + Send + use<R>, DataError> {
    let file = File::open(path).map_err(|source| DataError::Io {
        path: path.to_owned(),
        source,
    })?;
    let bad = |reason: String| DataError::BadFile {
        path: path.to_owned(),
        reason,
    };
    // The library panics on some damaged files.
    let unreadable = |e: &dyn std::fmt::Display| bad(format!("not a readable Parquet file: {e}"));
    let reader = guarded(|| SerializedFileReader::new(file))
        .map_err(|e| unreadable(&e))?
        .map_err(|e| unreadable(&e))?;
    let schema = reader.metadata().file_metadata().schema();
    let names: Vec<String> = schema
        .get_fields()
        .iter()
        .filter_map(|f| rename(f.name()))
        .collect();
    names::check(&names).map_err(bad)?;
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
    let wanted = schema
        .get_fields()
        .iter()
        .filter(|f| rename(f.name()).is_some_and(|name| is_wanted(&name)))
        .cloned()
        .collect();
    let wanted = Type::group_type_builder(schema.name())
        .with_fields(wanted)
        .build()
        .map_err(|e| unreadable(&e))?;
    let rows = guarded(|| RowIter::from_file_into(Box::new(reader)).project(Some(wanted)));
    let rows = rows
        .map_err(|e| unreadable(&e))?
        .map_err(|e| unreadable(&e))?;
    Ok(Records { rows: Some(rows) }
        .enumerate()
        .map(move |(i, record)| {
            let row = i as u64 + 1;
            let record = record.map_err(|e| {
                issue(
                    row,
                    "",
                    IssueReason::InvalidType,
                    format!("the record cannot be decoded: {e}"),
                )
            })?;
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
                    Ok(value) => value,
                    // For example the bytes of an image. The value does not matter, because the
                    // column leads to a finding anyway.
                    Err(_) if !COLUMNS.contains(&name.as_str()) => Value::Bool(true),
                    Err(kind) => {
                        let message =
                            format!("{name} holds {kind}: use text or a list of messages");
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

/// Iterator over records that ends at the first failure, because later data cannot be trusted.
struct Records {
    rows: Option<RowIter<'static>>,
}

impl Iterator for Records {
    type Item = Result<Row, String>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut rows = self.rows.take()?;
        let record = match guarded(|| rows.next()) {
            Ok(Some(Ok(record))) => Ok(record),
            Ok(None) => return None,
            Ok(Some(Err(e))) => return Some(Err(e.to_string())),
            Err(panic) => return Some(Err(panic)),
        };
        self.rows = Some(rows);
        Some(record)
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
