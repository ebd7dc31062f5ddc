//! The columns of a part, as Parquet or as JSON lines. Equal rows have equal bytes: the file has no
//! time and no name of a machine.

use std::sync::Arc;

use parquet::basic::ZstdLevel;
use parquet::basic::{Compression, ConvertedType, LogicalType, Repetition, Type as Physical};
use parquet::data_type::{
    BoolType, ByteArray, ByteArrayType, DataType, DoubleType, Int32Type, Int64Type,
};
use parquet::errors::Result as ParquetResult;
use parquet::file::metadata::{KeyValue, ParquetMetaDataReader};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::types::{Type, TypePtr};
use serde_json::{Map, Value, json};

use super::batch::RowResult;
use super::row::InputRow;
use crate::cli::args::PartFormat;
use crate::domain::violation::shortened;

/// Columns of every part, in their order, before the carried ones.
pub(super) const COLUMNS: [&str; 18] = [
    "row",
    "id",
    "probability",
    "calibrated_probability",
    "margin",
    "policy_logprob_a",
    "policy_logprob_b",
    "reference_logprob_a",
    "reference_logprob_b",
    "reward_a",
    "reward_b",
    "tokens_a",
    "tokens_b",
    "truncated",
    "rewards",
    "ranks",
    "error",
    "input",
];
/// Key of the number of rows with an error, in a part's metadata.
const ERRORS_KEY: &str = "bradley.errors";
/// Number of bytes at the end of a Parquet part that are read for its counts. The metadata of a
/// thousand columns fits into them.
pub(super) const TAIL_BYTES: u64 = 256 << 10;

/// Maximum number of characters of the reason in a [`RowError`].
const MAX_REASON_CHARS: usize = 400;

/// A part that is scored.
pub(super) struct ScoredPart<'a> {
    pub input: &'a str,
    pub rows: &'a [InputRow],
    pub results: &'a [RowResult],
    /// Names of the carried columns.
    pub carry: &'a [String],
    /// Names and values for the metadata of a Parquet file.
    pub about: &'a [(&'static str, String)],
}

/// Counts of a part's rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PartCounts {
    pub rows: u64,
    pub errors: u64,
}

/// A row with an error. Errors are ordered by input and row.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RowError {
    pub input: String,
    /// Its number in the input, from 1.
    pub row: u64,
    /// The error, shortened for a message.
    pub reason: String,
    /// True if the row lacks a column.
    pub lacks_column: bool,
}

impl ScoredPart<'_> {
    /// Counts the rows of this part.
    pub(super) fn counts(&self) -> PartCounts {
        PartCounts {
            rows: self.rows.len() as u64,
            errors: self.cells().filter(|cells| cells.error.is_some()).count() as u64,
        }
    }

    /// Returns the number of rows in which a pair or at least one of several answers has a score.
    pub(super) fn rows_with_score(&self) -> u64 {
        let with_score = self.cells().filter(|cells| {
            let has_reward = |rewards: &[Option<f64>]| rewards.iter().any(Option::is_some);
            cells.pair.is_some() || cells.rewards.is_some_and(has_reward)
        });
        with_score.count() as u64
    }

    /// Returns the error of the first row that has one.
    pub(super) fn first_error(&self) -> Option<RowError> {
        let mut rows = self.rows.iter().zip(self.cells());
        rows.find_map(|(row, cells)| {
            Some(RowError {
                input: self.input.to_owned(),
                row: row.row,
                reason: shortened(cells.error?, MAX_REASON_CHARS),
                lacks_column: row.lacks_column,
            })
        })
    }

    /// Returns the bytes of the part.
    ///
    /// # Errors
    /// Returns a text if the library fails.
    pub(super) fn encode(&self, format: PartFormat) -> Result<Vec<u8>, String> {
        match format {
            PartFormat::Jsonl => Ok(self.jsonl()),
            PartFormat::Parquet => self.parquet().map_err(|e| e.to_string()),
        }
    }

    /// Returns the cells of every row's result.
    fn cells(&self) -> impl Iterator<Item = ResultCells<'_>> {
        self.results.iter().map(ResultCells::of)
    }

    fn jsonl(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for (row, cells) in self.rows.iter().zip(self.cells()) {
            let pair = cells.pair;
            let a = pair.and_then(|p| p.a.as_ref());
            let b = pair.and_then(|p| p.b.as_ref());
            let values = [
                json!(row.row),
                json!(row.id),
                json!(pair.map(|p| p.probability)),
                json!(pair.and_then(|p| p.calibrated_probability)),
                json!(pair.map(|p| p.margin)),
                json!(a.map(|a| a.policy_logprob)),
                json!(b.map(|b| b.policy_logprob)),
                json!(a.map(|a| a.reference_logprob)),
                json!(b.map(|b| b.reference_logprob)),
                json!(a.map(|a| a.reward)),
                json!(b.map(|b| b.reward)),
                json!(a.map(|a| a.tokens)),
                json!(b.map(|b| b.tokens)),
                json!(cells.truncated),
                json!(cells.rewards),
                json!(cells.ranks),
                json!(cells.error),
                json!(self.input),
            ];
            let mut object: Map<String, Value> = COLUMNS
                .iter()
                .map(|name| (*name).to_owned())
                .zip(values)
                .collect();
            for (at, name) in self.carry.iter().enumerate() {
                let value = row.carried.get(at).cloned().unwrap_or_default();
                object.insert(name.clone(), value);
            }
            text.extend_from_slice(Value::Object(object).to_string().as_bytes());
            text.push(b'\n');
        }
        text
    }

    fn parquet(&self) -> ParquetResult<Vec<u8>> {
        let about = self
            .about
            .iter()
            .map(|(key, value)| KeyValue::new((*key).to_owned(), value.clone()));
        let errors = KeyValue::new(ERRORS_KEY.to_owned(), self.counts().errors.to_string());
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
            .set_created_by("bradley".to_owned())
            .set_key_value_metadata(Some(about.chain([errors]).collect()))
            .build();
        let mut bytes = Vec::new();
        let schema = Arc::new(self.schema()?);
        let mut file = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties))?;
        let mut group = file.next_row_group()?;
        self.columns(&mut group)?;
        group.close()?;
        file.close()?;
        Ok(bytes)
    }

    fn schema(&self) -> ParquetResult<Type> {
        let mut fields = Vec::new();
        for name in COLUMNS {
            fields.push(match name {
                "row" => Physical::INT64.required(name)?,
                "input" => required_text(name)?,
                "id" | "error" => text(name)?,
                "tokens_a" | "tokens_b" => Physical::INT32.optional(name)?,
                "truncated" => Physical::BOOLEAN.optional(name)?,
                "rewards" => list(name, Physical::DOUBLE)?,
                "ranks" => list(name, Physical::INT32)?,
                _ => Physical::DOUBLE.optional(name)?,
            });
        }
        for name in self.carry {
            fields.push(text(name)?);
        }
        Type::group_type_builder("scores")
            .with_fields(fields)
            .build()
    }

    fn columns<W: std::io::Write + Send>(
        &self,
        group: &mut SerializedRowGroupWriter<'_, W>,
    ) -> ParquetResult<()> {
        let rows: Vec<i64> = self.rows.iter().map(|row| row.row as i64).collect();
        write::<Int64Type, _>(group, &rows, None, None)?;
        let string = |text: &str| ByteArray::from(text.as_bytes().to_vec());
        let ids = self.rows.iter().map(|row| row.id.as_deref().map(string));
        optional::<ByteArrayType, _>(group, ids)?;
        let numbers: [fn(&ResultCells<'_>) -> Option<f64>; 9] = [
            |cells| Some(cells.pair?.probability),
            |cells| cells.pair?.calibrated_probability,
            |cells| Some(cells.pair?.margin),
            |cells| Some(cells.pair?.a.as_ref()?.policy_logprob),
            |cells| Some(cells.pair?.b.as_ref()?.policy_logprob),
            |cells| Some(cells.pair?.a.as_ref()?.reference_logprob),
            |cells| Some(cells.pair?.b.as_ref()?.reference_logprob),
            |cells| Some(cells.pair?.a.as_ref()?.reward),
            |cells| Some(cells.pair?.b.as_ref()?.reward),
        ];
        for number in numbers {
            optional::<DoubleType, _>(group, self.cells().map(|cells| number(&cells)))?;
        }
        let tokens_a = |c: ResultCells<'_>| Some(c.pair?.a.as_ref()?.tokens as i32);
        let tokens_b = |c: ResultCells<'_>| Some(c.pair?.b.as_ref()?.tokens as i32);
        optional::<Int32Type, _>(group, self.cells().map(tokens_a))?;
        optional::<Int32Type, _>(group, self.cells().map(tokens_b))?;
        optional::<BoolType, _>(group, self.cells().map(|cells| cells.truncated))?;
        lists::<DoubleType, _>(group, self.cells().map(|cells| cells.rewards))?;
        lists::<Int32Type, _>(group, self.cells().map(|cells| cells.ranks))?;
        let errors = self.cells().map(|cells| cells.error.map(string));
        optional::<ByteArrayType, _>(group, errors)?;
        let inputs = vec![string(self.input); self.rows.len()];
        write::<ByteArrayType, _>(group, &inputs, None, None)?;
        for at in 0..self.carry.len() {
            let carried = self.rows.iter().map(|row| match row.carried.get(at) {
                None | Some(Value::Null) => None,
                Some(Value::String(text)) => Some(string(text)),
                Some(other) => Some(string(&other.to_string())),
            });
            optional::<ByteArrayType, _>(group, carried)?;
        }
        Ok(())
    }
}

/// The cells of a row's result; `None` becomes null.
struct ResultCells<'a> {
    pair: Option<&'a crate::rpc::pb::PairScore>,
    truncated: Option<bool>,
    rewards: Option<&'a [Option<f64>]>,
    ranks: Option<&'a [Option<i32>]>,
    error: Option<&'a str>,
}

impl<'a> ResultCells<'a> {
    fn of(result: &'a RowResult) -> Self {
        let empty = ResultCells {
            pair: None,
            truncated: None,
            rewards: None,
            ranks: None,
            error: None,
        };
        match result {
            RowResult::Pair(pair) => ResultCells {
                pair: Some(pair),
                truncated: Some(
                    [&pair.a, &pair.b]
                        .into_iter()
                        .flatten()
                        .any(|s| s.truncated),
                ),
                ..empty
            },
            RowResult::Answers(answers) => ResultCells {
                truncated: Some(answers.is_truncated),
                rewards: Some(&answers.rewards),
                ranks: Some(&answers.ranks),
                error: answers.error.as_deref(),
                ..empty
            },
            RowResult::Error(error) => ResultCells {
                error: Some(error),
                ..empty
            },
        }
    }
}

/// Builds fields of a primitive type.
trait ParquetField {
    fn required(self, name: &str) -> ParquetResult<TypePtr>;
    fn optional(self, name: &str) -> ParquetResult<TypePtr>;
}

impl ParquetField for Physical {
    fn required(self, name: &str) -> ParquetResult<TypePtr> {
        let field = Type::primitive_type_builder(name, self);
        Ok(Arc::new(
            field.with_repetition(Repetition::REQUIRED).build()?,
        ))
    }

    fn optional(self, name: &str) -> ParquetResult<TypePtr> {
        let field = Type::primitive_type_builder(name, self);
        Ok(Arc::new(
            field.with_repetition(Repetition::OPTIONAL).build()?,
        ))
    }
}

fn text_of(name: &str, repetition: Repetition) -> ParquetResult<TypePtr> {
    let field = Type::primitive_type_builder(name, Physical::BYTE_ARRAY)
        .with_repetition(repetition)
        .with_logical_type(Some(LogicalType::String))
        .with_converted_type(ConvertedType::UTF8);
    Ok(Arc::new(field.build()?))
}

fn text(name: &str) -> ParquetResult<TypePtr> {
    text_of(name, Repetition::OPTIONAL)
}

fn required_text(name: &str) -> ParquetResult<TypePtr> {
    text_of(name, Repetition::REQUIRED)
}

fn list(name: &str, element: Physical) -> ParquetResult<TypePtr> {
    let repeated = Type::group_type_builder("list")
        .with_repetition(Repetition::REPEATED)
        .with_fields(vec![element.optional("element")?])
        .build()?;
    let field = Type::group_type_builder(name)
        .with_repetition(Repetition::OPTIONAL)
        .with_logical_type(Some(LogicalType::List))
        .with_converted_type(ConvertedType::LIST)
        .with_fields(vec![Arc::new(repeated)]);
    Ok(Arc::new(field.build()?))
}

/// Writes the next column. `levels` and `repeats` are Parquet's definition and repetition levels.
fn write<T: DataType, W: std::io::Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    values: &[T::T],
    levels: Option<&[i16]>,
    repeats: Option<&[i16]>,
) -> ParquetResult<()> {
    if let Some(mut column) = group.next_column()? {
        column.typed::<T>().write_batch(values, levels, repeats)?;
        column.close()?;
    }
    Ok(())
}

fn optional<T: DataType, W: std::io::Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    cells: impl Iterator<Item = Option<T::T>>,
) -> ParquetResult<()> {
    let (mut values, mut levels) = (Vec::new(), Vec::new());
    for cell in cells {
        levels.push(i16::from(cell.is_some()));
        values.extend(cell);
    }
    write::<T, W>(group, &values, Some(&levels), None)
}

/// Writes a column of lists, the elements of which may be absent.
fn lists<'a, T: DataType, W: std::io::Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    cells: impl Iterator<Item = Option<&'a [Option<T::T>]>>,
) -> ParquetResult<()> {
    let (mut values, mut levels, mut repeats) = (Vec::new(), Vec::new(), Vec::new());
    for cell in cells {
        match cell {
            None | Some([]) => {
                levels.push(i16::from(cell.is_some()));
                repeats.push(0);
            }
            Some(elements) => {
                for (at, element) in elements.iter().enumerate() {
                    levels.push(if element.is_some() { 3 } else { 2 });
                    repeats.push(i16::from(at > 0));
                    values.extend(element.clone());
                }
            }
        }
    }
    write::<T, W>(group, &values, Some(&levels), Some(&repeats))
}

/// Returns the counts of a Parquet part from its last bytes, or `None` if these do not have them.
pub(super) fn parquet_counts(tail: &[u8]) -> Option<PartCounts> {
    let end = tail.len().checked_sub(8)?;
    let length = u32::from_le_bytes(tail.get(end..end + 4)?.try_into().ok()?) as usize;
    let footer = tail.get(end.checked_sub(length)?..end)?;
    let metadata = ParquetMetaDataReader::decode_metadata(footer).ok()?;
    let metadata = metadata.file_metadata();
    let errors = metadata
        .key_value_metadata()?
        .iter()
        .find(|entry| entry.key == ERRORS_KEY)?;
    Some(PartCounts {
        rows: u64::try_from(metadata.num_rows()).ok()?,
        errors: errors.value.as_ref()?.parse().ok()?,
    })
}

/// Returns the counts of a part of JSON lines, or `None` if a line is no result.
pub(super) fn jsonl_counts(content: &[u8]) -> Option<PartCounts> {
    let mut counts = PartCounts::default();
    for line in content.split(|byte| *byte == b'\n') {
        if line.is_empty() {
            continue;
        }
        let object: Map<String, Value> = serde_json::from_slice(line).ok()?;
        counts.rows += 1;
        counts.errors += u64::from(!object.get("error")?.is_null());
    }
    Some(counts)
}
