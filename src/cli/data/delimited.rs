//! CSV files with a header: each record becomes the JSON object that a JSONL line would hold.
//!
//! A cell with a JSON array of messages is read as messages, and a JSON object in the column
//! `input` as an object. Numbers in the columns of weights and log-probs become numbers. Empty
//! cells become null, except answers. Every other text of a column that is used stays text.
//! With [`Wanted::All`] this holds for prompts only, and with [`Wanted::PairsAndOthers`] for the
//! columns of pairs; all other cells stay text, also empty ones.

use std::io::Read;

use csv::{ByteRecord, Reader, ReaderBuilder};
use serde_json::{Map, Value};

use super::columns::{ColumnMap, check_answers};
use super::row::{DataRow, DataRows, PROMPT_COLUMNS, Wanted};
use crate::domain::dataset::IssueReason;
use crate::domain::logged::is_logged_column;
use crate::train::rows::MAX_LINE_BYTES;
use crate::train::rows::names::is_used;

/// Opens a CSV file and checks its header.
///
/// # Errors
/// Returns a text, without the file's name, if the header cannot be used.
pub(super) fn read(
    reader: impl Read + Send + 'static,
    delimiter: u8,
    columns: &ColumnMap,
    wanted: Wanted,
) -> Result<DataRows, String> {
    let bounded = Bounded {
        inner: reader,
        left: MAX_LINE_BYTES,
    };
    let mut csv = ReaderBuilder::new()
        .delimiter(delimiter)
        // Records of another length are reported one by one.
        .flexible(true)
        .from_reader(bounded);
    let header = csv.byte_headers().map_err(|e| unreadable(&e))?;
    let header: Vec<String> = header
        .iter()
        .map(|name| std::str::from_utf8(name).map(|name| name.trim().to_owned()))
        .collect::<Result<_, _>>()
        .map_err(|_| "has a header that is not UTF-8: save the file as UTF-8".to_owned())?;
    if let Some(twice) = header
        .iter()
        .enumerate()
        .find_map(|(i, name)| header[..i].contains(name).then_some(name))
    {
        return Err(format!("has two columns {twice:?}: rename one of them"));
    }
    columns.check(&header)?;
    let names: Vec<Option<String>> = header.iter().map(|name| columns.rename(name)).collect();
    if wanted != Wanted::All {
        check_answers(&names)?;
    }
    Ok(Box::new(CsvRecords {
        csv,
        names,
        wanted,
        has_ended: false,
    }))
}

struct CsvRecords<R> {
    csv: Reader<Bounded<R>>,
    /// The name of each column after `--columns`; `None` for one that is left out.
    names: Vec<Option<String>>,
    wanted: Wanted,
    has_ended: bool,
}

impl<R: Read> Iterator for CsvRecords<R> {
    type Item = Result<DataRow, String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_ended {
            return None;
        }
        self.csv.get_mut().left = MAX_LINE_BYTES;
        let mut record = ByteRecord::new();
        match self.csv.read_byte_record(&mut record) {
            Ok(false) => None,
            Ok(true) => Some(Ok(self.row(&record))),
            Err(e) => {
                self.has_ended = true;
                Some(Err(unreadable(&e)))
            }
        }
    }
}

impl<R> CsvRecords<R> {
    fn row(&self, record: &ByteRecord) -> DataRow {
        let (cells, columns) = (record.len(), self.names.len());
        if cells != columns {
            let message = format!(
                "the record has {cells} cells, but the header has {columns}: quote cells that \
                 contain the delimiter or a quote"
            );
            return DataRow::bad("", IssueReason::InvalidType, message);
        }
        let mut fields = Map::new();
        for (name, cell) in self.names.iter().zip(record) {
            let Some(name) = name else {
                continue;
            };
            let Ok(text) = std::str::from_utf8(cell) else {
                let message = format!("{name} is not UTF-8: save the file as UTF-8");
                return DataRow::bad(name, IssueReason::InvalidUtf8, message);
            };
            let value = match self.wanted {
                Wanted::PairsAndOthers if !is_used(name) => Ok(Value::from(text)),
                Wanted::Pairs | Wanted::PairsAndOthers => value(name, text),
                Wanted::All if PROMPT_COLUMNS.contains(&name.as_str()) => value("prompt", text),
                Wanted::All => Ok(Value::from(text)),
            };
            match value {
                Ok(value) => fields.insert(name.clone(), value),
                Err(message) => return DataRow::bad(name, IssueReason::InvalidType, message),
            };
        }
        DataRow::Fields(fields)
    }
}

/// Converts a cell.
fn value(column: &str, text: &str) -> Result<Value, String> {
    let trimmed = text.trim();
    let is_answer = matches!(column, "chosen" | "rejected");
    if trimmed.is_empty() && !is_answer {
        return Ok(Value::Null);
    }
    if !is_used(column) {
        // The column is only reported as not used.
        return Ok(Value::Bool(true));
    }
    if column == "weight" || is_logged_column(column) {
        let number = serde_json::from_str::<serde_json::Number>(trimmed);
        return Ok(number.map_or_else(|_| Value::from(text), Value::Number));
    }
    let holds_messages = is_answer
        || matches!(
            column,
            "prompt" | "input" | "preferred_output" | "non_preferred_output"
        );
    if holds_messages && trimmed.starts_with(['[', '{']) {
        let parsed: Option<Value> = serde_json::from_str(trimmed).ok();
        let is_message = |value: &Value| value.get("role").is_some();
        match parsed {
            Some(Value::Array(messages))
                if !messages.is_empty() && messages.iter().all(is_message) =>
            {
                return Ok(Value::Array(messages));
            }
            Some(Value::Object(input)) if column == "input" => return Ok(Value::Object(input)),
            None if trimmed.starts_with("[{'") => {
                return Err(format!(
                    "{column} is a Python list, not JSON: write the cells with json.dumps, or \
                     write the rows as JSONL or Parquet"
                ));
            }
            _ => {}
        }
    }
    Ok(Value::from(text))
}

fn unreadable(e: &csv::Error) -> String {
    match e.kind() {
        csv::ErrorKind::Io(e) => format!("cannot be read further: {e}"),
        _ => format!("cannot be read further: {e}"),
    }
}

/// A reader that fails when one record is too long, e.g. because a quote is not closed. Without it
/// the whole rest of the file would be one record in memory.
struct Bounded<R> {
    inner: R,
    /// Number of bytes that may be read before the next record begins.
    left: usize,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            return Err(std::io::Error::other(format!(
                "a record is longer than {} MiB, perhaps because a quote is not closed",
                MAX_LINE_BYTES >> 20
            )));
        }
        let read = self.inner.read(buffer)?;
        self.left = self.left.saturating_sub(read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str, delimiter: u8, columns: &[&str]) -> Result<Vec<DataRow>, String> {
        let columns: Vec<String> = columns.iter().map(|pair| (*pair).to_owned()).collect();
        let columns = ColumnMap::parse(&columns).unwrap();
        let reader = std::io::Cursor::new(text.as_bytes().to_vec());
        read(reader, delimiter, &columns, Wanted::Pairs)?.collect()
    }

    fn fields(row: &DataRow) -> String {
        match row {
            DataRow::Fields(fields) => serde_json::to_string(fields).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn cells_become_what_a_line_of_json_would_hold() {
        let messages = r#"[{""role"": ""assistant"", ""content"": ""c""}]"#;
        let text = format!(
            "\u{feff}prompt;chosen;rejected;weight;note\r\n\"a; \"\"b\"\"\";\" 2\n3\";;0.5;x\r\n\
             q;\"{messages}\";\"[1, 2]\";heavy;\r\n"
        );
        let rows = rows(&text, b';', &[]).unwrap();
        assert_eq!(
            fields(&rows[0]),
            r#"{"prompt":"a; \"b\"","chosen":" 2\n3","rejected":"","weight":0.5,"note":true}"#
        );
        assert_eq!(
            fields(&rows[1]),
            r#"{"prompt":"q","chosen":[{"role":"assistant","content":"c"}],"#.to_owned()
                + r#""rejected":"[1, 2]","weight":"heavy","note":null}"#
        );
    }

    #[test]
    fn columns_are_mapped_and_a_bad_header_is_refused() {
        let mapped = ["chosen=good", "rejected=bad"];
        let found = rows("good,bad,chosen\n1,2,3\n", b',', &mapped).unwrap();
        assert_eq!(fields(&found[0]), r#"{"chosen":"1","rejected":"2"}"#);
        let refused = |text: &str, columns: &[&str]| rows(text, b',', columns).unwrap_err();
        let said = refused("prompt,choosen,rejected\n", &[]);
        assert!(
            said.contains("did you mean chosen instead of choosen?")
                && said.contains("; --columns chosen=NAME reads"),
            "{said}"
        );
        let said = refused("godo,bad\n", &mapped);
        assert!(
            said.contains("no column \"good\"") && said.contains("mean godo?"),
            "{said}"
        );
        let said = refused("chosen,chosen,rejected\n", &[]);
        assert!(said.contains("two columns \"chosen\""), "{said}");
    }

    #[test]
    fn a_record_that_cannot_be_read_does_not_end_the_file() {
        let text = "chosen,rejected\n1,2,3\n\"[{'role': 'user'}]\",x\n1,2\n";
        let rows = rows(text, b',', &[]).unwrap();
        let said = |row: &DataRow| match row {
            DataRow::Bad(problem) => problem.message.clone(),
            other => panic!("{other:?}"),
        };
        assert!(said(&rows[0]).contains("has 3 cells, but the header has 2"));
        assert!(said(&rows[1]).contains("chosen is a Python list"));
        assert_eq!(fields(&rows[2]), r#"{"chosen":"1","rejected":"2"}"#);
    }

    #[test]
    fn a_quote_that_is_not_closed_does_not_fill_the_memory() {
        let text = format!("chosen,rejected\n\"1,{}", "2\n".repeat(MAX_LINE_BYTES));
        let said = rows(&text, b',', &[]).unwrap_err();
        assert!(said.contains("a quote is not closed"), "{said}");
    }
}
