//! Arrow's IPC files and streams: each record becomes the JSON object that a JSONL line would hold.
//! One record batch is in memory at a time.

use std::fs::File;
use std::io::{BufReader, Read};

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type,
    UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch, RecordBatchReader};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::DataType;
use serde_json::{Map, Value};

use super::columns::{ColumnMap, check_answers};
use super::row::{DataRow, DataRows, PROMPT_COLUMNS, Wanted};
use crate::domain::dataset::IssueReason;
use crate::domain::logged::is_logged_column;
use crate::domain::message::without_nulls;
use crate::model::guard::guarded;
use crate::train::rows::names::{self, is_used};

/// Reads a stream.
///
/// # Errors
/// Returns a text, without the file's name, if the schema cannot be used.
pub(super) fn read_stream(
    reader: impl Read + Send + 'static,
    columns: &ColumnMap,
    wanted: Wanted,
) -> Result<DataRows, String> {
    let reader = guarded(|| StreamReader::try_new(BufReader::new(reader), None))?;
    read(reader.map_err(|e| unreadable(&e))?, columns, wanted)
}

/// Reads a file with a footer.
///
/// # Errors
/// Returns a text, without the file's name, if the schema cannot be used.
pub(super) fn read_file(
    file: File,
    columns: &ColumnMap,
    wanted: Wanted,
) -> Result<DataRows, String> {
    let reader = guarded(|| FileReader::try_new(BufReader::new(file), None))?;
    read(reader.map_err(|e| unreadable(&e))?, columns, wanted)
}

fn unreadable(e: &dyn std::fmt::Display) -> String {
    format!("is not a readable Arrow file: {e}")
}

fn read(
    batches: impl RecordBatchReader + Send + 'static,
    columns: &ColumnMap,
    wanted: Wanted,
) -> Result<DataRows, String> {
    let schema = batches.schema();
    let found: Vec<String> = schema.fields().iter().map(|f| f.name().clone()).collect();
    columns.check(&found)?;
    let names: Vec<Option<String>> = found.iter().map(|name| columns.rename(name)).collect();
    if wanted != Wanted::All {
        check_answers(&names)?;
    }
    let batches = Batches {
        inner: Some(batches),
    };
    Ok(Box::new(batches.flat_map(move |batch| -> DataRows {
        let names = names.clone();
        match batch {
            Ok(batch) => {
                let rows = batch.num_rows();
                Box::new((0..rows).map(move |i| {
                    Ok(match wanted {
                        Wanted::Pairs | Wanted::PairsAndOthers => row(&batch, &names, i, wanted),
                        Wanted::All => whole_row(&batch, &names, i),
                    })
                }))
            }
            Err(reason) => Box::new(std::iter::once(Err(reason))),
        }
    })))
}

/// Iterator over batches that ends at the first failure.
struct Batches<B> {
    inner: Option<B>,
}

impl<B: RecordBatchReader> Iterator for Batches<B> {
    type Item = Result<RecordBatch, String>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut batches = self.inner.take()?;
        match guarded(|| (batches.next(), batches)) {
            Ok((None, _)) => None,
            Ok((Some(Ok(batch)), batches)) => {
                self.inner = Some(batches);
                Some(Ok(batch))
            }
            Ok((Some(Err(e)), _)) => Some(Err(format!("cannot be read further: {e}"))),
            Err(e) => Some(Err(format!("cannot be read further: {e}"))),
        }
    }
}

fn row(batch: &RecordBatch, names: &[Option<String>], i: usize, wanted: Wanted) -> DataRow {
    let mut fields = Map::new();
    for (name, array) in names.iter().zip(batch.columns()) {
        let Some(name) = name else {
            continue;
        };
        if !is_used(name) && wanted == Wanted::PairsAndOthers {
            match value(array, i) {
                Ok(value) => fields.insert(name.clone(), value),
                Err(kind) => {
                    return DataRow::bad(name, IssueReason::InvalidType, no_json(name, &kind));
                }
            };
            continue;
        }
        if !is_used(name) {
            // The column is only reported as not used.
            let value = if array.is_null(i) {
                Value::Null
            } else {
                Value::Bool(true)
            };
            fields.insert(name.clone(), value);
            continue;
        }
        match value(array, i) {
            Ok(value) => fields.insert(name.clone(), without_nulls(value)),
            // In place of a log-prob, a text leads to a finding only where log-probs are needed.
            Err(kind) if is_logged_column(name) => fields.insert(name.clone(), Value::String(kind)),
            // For example the bytes of an image: this column leads to a finding with any value.
            Err(_) if !names::COLUMNS.contains(&name.as_str()) => {
                fields.insert(name.clone(), Value::Bool(true))
            }
            Err(kind) => {
                let message = format!("{name} holds {kind}: use {}", names::legal(name));
                return DataRow::bad(name, IssueReason::InvalidType, message);
            }
        };
    }
    DataRow::Fields(fields)
}

/// Converts all columns of a record.
fn whole_row(batch: &RecordBatch, names: &[Option<String>], i: usize) -> DataRow {
    let mut fields = Map::new();
    for (name, array) in names.iter().zip(batch.columns()) {
        let Some(name) = name else {
            continue;
        };
        let value = match value(array, i) {
            // In a column of structs, a key that a row lacks is null if another row has it.
            Ok(value) if PROMPT_COLUMNS.contains(&name.as_str()) => without_nulls(value),
            Ok(value) => value,
            Err(kind) => return DataRow::bad(name, IssueReason::InvalidType, no_json(name, &kind)),
        };
        fields.insert(name.clone(), value);
    }
    DataRow::Fields(fields)
}

fn no_json(name: &str, kind: &str) -> String {
    format!("{name} holds {kind}, which JSON does not have: leave the column out")
}

/// Converts an element.
///
/// # Errors
/// Returns a description of an element that JSON cannot express.
fn value(array: &dyn Array, i: usize) -> Result<Value, String> {
    if array.is_null(i) {
        return Ok(Value::Null);
    }
    let float = |x: f64| {
        serde_json::Number::from_f64(x)
            .map(Value::Number)
            .ok_or_else(|| x.to_string())
    };
    let list = |items: &dyn Array| -> Result<Value, String> {
        let items = (0..items.len()).map(|i| value(items, i));
        Ok(Value::Array(items.collect::<Result<_, _>>()?))
    };
    let text = |bytes: &[u8]| {
        std::str::from_utf8(bytes)
            .map(Value::from)
            .map_err(|_| "bytes that are not UTF-8".to_owned())
    };
    match array.data_type() {
        DataType::Null => Ok(Value::Null),
        DataType::Boolean => Ok(Value::from(array.as_boolean().value(i))),
        DataType::Int8 => Ok(Value::from(array.as_primitive::<Int8Type>().value(i))),
        DataType::Int16 => Ok(Value::from(array.as_primitive::<Int16Type>().value(i))),
        DataType::Int32 => Ok(Value::from(array.as_primitive::<Int32Type>().value(i))),
        DataType::Int64 => Ok(Value::from(array.as_primitive::<Int64Type>().value(i))),
        DataType::UInt8 => Ok(Value::from(array.as_primitive::<UInt8Type>().value(i))),
        DataType::UInt16 => Ok(Value::from(array.as_primitive::<UInt16Type>().value(i))),
        DataType::UInt32 => Ok(Value::from(array.as_primitive::<UInt32Type>().value(i))),
        DataType::UInt64 => Ok(Value::from(array.as_primitive::<UInt64Type>().value(i))),
        DataType::Float16 => float(f64::from(array.as_primitive::<Float16Type>().value(i))),
        DataType::Float32 => float(f64::from(array.as_primitive::<Float32Type>().value(i))),
        DataType::Float64 => float(array.as_primitive::<Float64Type>().value(i)),
        DataType::Utf8 => Ok(Value::from(array.as_string::<i32>().value(i))),
        DataType::LargeUtf8 => Ok(Value::from(array.as_string::<i64>().value(i))),
        DataType::Utf8View => Ok(Value::from(array.as_string_view().value(i))),
        DataType::Binary => text(array.as_binary::<i32>().value(i)),
        DataType::LargeBinary => text(array.as_binary::<i64>().value(i)),
        DataType::List(_) => list(&array.as_list::<i32>().value(i)),
        DataType::LargeList(_) => list(&array.as_list::<i64>().value(i)),
        DataType::FixedSizeList(..) => list(&array.as_fixed_size_list().value(i)),
        DataType::Struct(fields) => {
            let mut object = Map::new();
            for (field, column) in fields.iter().zip(array.as_struct().columns()) {
                object.insert(field.name().clone(), value(column, i)?);
            }
            Ok(Value::Object(object))
        }
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let key = value(dictionary.keys(), i)?;
            let key = key.as_u64().and_then(|key| usize::try_from(key).ok());
            match key.filter(|key| *key < dictionary.values().len()) {
                Some(key) => value(dictionary.values(), key),
                None => Err("a key outside its dictionary".to_owned()),
            }
        }
        other => Err(format!("a value of type {other}")),
    }
}
