//! Tests with real files of every format, plain, compressed and damaged.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder, StructBuilder};
use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow_ipc::writer::{FileWriter, StreamWriter};
use arrow_schema::{DataType, Field, Fields};
use parquet::data_type::{ByteArray, ByteArrayType, DoubleType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::*;
use crate::domain::dataset::{ChatMessage, IssueReason, RowShape, Text};

type ReadPairs = Vec<Result<PreferenceRow, RowIssue>>;

fn read_mapped(files: &[&Path], columns: &[&str]) -> Result<ReadPairs, String> {
    let columns: Vec<String> = columns.iter().map(|pair| (*pair).to_owned()).collect();
    let data = DataFiles {
        places: files
            .iter()
            .map(|path| DataPlace::File(path.to_path_buf()))
            .collect(),
        columns: ColumnMap::parse(&columns).unwrap(),
    };
    let (reader, read_failure) = data.reader();
    let rows = reader.collect();
    match read_failure.check() {
        Ok(()) => Ok(rows),
        Err(Failure::Failed(text)) => Err(text),
        Err(other) => panic!("{other:?}"),
    }
}

fn read(file: &Path) -> Result<ReadPairs, String> {
    read_mapped(&[file], &[])
}

/// Returns row number, prompt, chosen and rejected of plain rows.
fn texts(rows: &ReadPairs) -> Vec<(u64, [String; 3])> {
    let plain = |text: &Text| match text {
        Text::Plain(text) => text.clone(),
        Text::Chat(messages) => panic!("{messages:?}"),
    };
    rows.iter()
        .map(|row| {
            let row = row.as_ref().unwrap();
            (
                row.row,
                [&row.prompt, &row.chosen, &row.rejected].map(plain),
            )
        })
        .collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn parquet_file(path: &Path, names: [&str; 3]) {
    let columns = names.map(|name| format!("required binary {name} (UTF8);"));
    let schema = parse_message_type(&format!("message m {{ {} }}", columns.concat())).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for texts in [["p", "q"], ["a", "b"], ["c", "d"]] {
        let mut column = group.next_column().unwrap().unwrap();
        let texts = texts.map(|text| ByteArray::from(text.as_bytes().to_vec()));
        column
            .typed::<ByteArrayType>()
            .write_batch(&texts, None, None)
            .unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

/// Returns the two rows of the other files as Arrow.
fn batch(names: [&str; 3]) -> RecordBatch {
    let columns = [["p", "q"], ["a", "b"], ["c", "d"]];
    let columns = names.into_iter().zip(columns).map(|(name, texts)| {
        (
            name,
            Arc::new(StringArray::from(texts.to_vec())) as ArrayRef,
        )
    });
    RecordBatch::try_from_iter(columns).unwrap()
}

/// Writes the same two rows in every format, with these names of columns.
fn every_format(dir: &Path, names: [&str; 3]) -> Vec<std::path::PathBuf> {
    let rows = [["p", "a", "c"], ["q", "b", "d"]];
    let lines = rows.map(|row| {
        let pairs = names
            .iter()
            .zip(row)
            .map(|(name, text)| format!("\"{name}\": \"{text}\""));
        format!("{{{}}}", pairs.collect::<Vec<_>>().join(", "))
    });
    let csv = format!("{}\np,a,c\nq,b,d\n", names.join(","));
    let mut written: Vec<(&str, Vec<u8>)> = vec![
        ("lines", lines.join("\n").into_bytes()),
        ("array", format!("[{}]", lines.join(",\n")).into_bytes()),
        (
            "objects",
            lines.join("\n").replace(", ", ",\n ").into_bytes(),
        ),
        ("table", csv.clone().into_bytes()),
        ("tabs", csv.replace(',', "\t").into_bytes()),
    ];
    let parquet = dir.join("x");
    parquet_file(&parquet, names);
    written.push(("columns", std::fs::read(&parquet).unwrap()));
    let (batch, mut stream, mut file) = (batch(names), Vec::new(), Vec::new());
    let mut writer = StreamWriter::try_new(&mut stream, &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    drop(writer);
    let mut writer = FileWriter::try_new(&mut file, &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    drop(writer);
    written.extend([("stream", stream), ("file", file)]);
    let mut paths = Vec::new();
    for (name, bytes) in written {
        let compressed = [
            (name.to_owned(), bytes.clone()),
            (format!("{name}.gz"), gzip(&bytes)),
            (
                format!("{name}.zst"),
                zstd::encode_all(&bytes[..], 1).unwrap(),
            ),
        ];
        for (name, bytes) in compressed {
            let path = dir.join(name);
            std::fs::write(&path, bytes).unwrap();
            paths.push(path);
        }
    }
    paths
}

fn expected() -> Vec<(u64, [String; 3])> {
    let row = |texts: [&str; 3]| texts.map(str::to_owned);
    vec![(1, row(["p", "a", "c"])), (2, row(["q", "b", "d"]))]
}

#[test]
fn every_format_is_read_plain_and_compressed_whatever_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let paths = every_format(dir.path(), ["prompt", "chosen", "rejected"]);
    assert_eq!(paths.len(), 24);
    for path in paths {
        let rows = read(&path).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(texts(&rows), expected(), "{}", path.display());
    }
}

#[test]
fn columns_are_mapped_in_every_format_and_a_wrong_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for path in every_format(dir.path(), ["instruction", "good", "chosen"]) {
        let mapped = ["prompt=instruction", "chosen=good", "rejected=chosen"];
        let rows = read_mapped(&[&path], &mapped).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(texts(&rows), expected(), "{}", path.display());
        let wrong = ["prompt=instruction", "chosen=goood", "rejected=chosen"];
        let said = read_mapped(&[&path], &wrong).unwrap_err();
        assert!(
            said.starts_with(&path.display().to_string())
                && said.contains("no column \"goood\"")
                && said.contains("did you mean good?"),
            "{said}"
        );
    }
}

#[test]
fn a_table_without_the_columns_of_answers_names_the_flag() {
    let dir = tempfile::tempdir().unwrap();
    let mut refused = 0;
    for path in every_format(dir.path(), ["Prompt", "Chosen", "Rejected"]) {
        // Rows in JSON are refused one by one.
        if let Err(said) = read(&path) {
            assert!(
                said.contains("did you mean chosen instead of Chosen?")
                    && said.ends_with("; --columns chosen=NAME reads the column NAME as chosen"),
                "{said}"
            );
            refused += 1;
        }
    }
    assert!(refused >= 9, "{refused}");
}

#[test]
fn rows_of_several_files_are_numbered_through_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let good = r#"{"prompt":"p","chosen":"a","rejected":"c"}"#;
    let (a, b) = (dir.path().join("a.jsonl"), dir.path().join("b.jsonl"));
    // The last line of the first file has no line feed.
    std::fs::write(&a, format!("{good}\n\n{good}")).unwrap();
    std::fs::write(
        &b,
        format!("{good}\n{{\"prompt\":\"p\",\"rejected\":\"c\"}}\nx\n"),
    )
    .unwrap();
    let rows = read_mapped(&[&a, &b], &[]).unwrap();
    let numbers: Vec<u64> = rows[..3]
        .iter()
        .map(|row| row.as_ref().unwrap().row)
        .collect();
    assert_eq!(
        numbers,
        [1, 3, 4],
        "blank lines count as lines and not as rows"
    );
    let said: Vec<(u64, String)> = rows[3..]
        .iter()
        .map(|row| row.as_ref().unwrap_err())
        .map(|issue| (issue.row, issue.message.clone()))
        .collect();
    assert_eq!((said[0].0, said[1].0), (5, 6));
    assert!(
        said[0]
            .1
            .starts_with("chosen is missing; found: prompt, rejected")
            && said[0].1.ends_with("b.jsonl, row 2)"),
        "{said:?}"
    );
    assert!(said[1].1.ends_with("b.jsonl, row 3)"), "{said:?}");
    let mapped = read_mapped(&[&b], &["chosen=prompt", "prompt=chosen"]);
    let said = mapped.unwrap().remove(1).unwrap_err();
    assert_eq!(said.reason, IssueReason::DifferentPrompts);
    assert_eq!(
        said.field, "chosen",
        "the column as it is named in the file"
    );
    assert!(
        said.message
            .starts_with("chosen is missing, and the two texts"),
        "{}",
        said.message
    );
}

#[test]
fn damaged_files_end_with_a_failure_instead_of_fewer_rows() {
    let dir = tempfile::tempdir().unwrap();
    let paths = every_format(dir.path(), ["prompt", "chosen", "rejected"]);
    // Nothing shows that a plain text was cut off, and the end mark of an Arrow stream is optional.
    let may_be_cut = ["lines", "objects", "table", "tabs", "stream"];
    for path in paths {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if may_be_cut.contains(&name.as_str()) {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 6]).unwrap();
        let said = read(&path).unwrap_err();
        assert!(said.starts_with(&path.display().to_string()), "{said}");
    }
    let excel = dir.path().join("book.csv");
    std::fs::write(&excel, b"PK\x03\x04....").unwrap();
    let said = read(&excel).unwrap_err();
    assert!(
        said.contains("book.csv: is a zip archive or an Excel workbook"),
        "{said}"
    );
    assert!(
        read(&dir.path().join("none"))
            .unwrap_err()
            .contains("none: ")
    );
}

#[test]
fn arrow_values_become_those_of_json() {
    let fields = Fields::from(vec![
        Field::new("role", DataType::Utf8, true),
        Field::new("content", DataType::Utf8, true),
        Field::new("name", DataType::Utf8, true),
    ]);
    let messages = |role: &str, content: &str| -> ArrayRef {
        let mut list = ListBuilder::new(StructBuilder::from_fields(fields.clone(), 1));
        let builder = list.values();
        for (i, text) in [Some(role), Some(content), None].into_iter().enumerate() {
            builder
                .field_builder::<StringBuilder>(i)
                .unwrap()
                .append_option(text);
        }
        builder.append(true);
        list.append(true);
        Arc::new(list.finish())
    };
    let write = |columns: Vec<(&str, ArrayRef)>| {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut writer = StreamWriter::try_new(&mut file, &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        drop(writer);
        read(file.path()).unwrap().remove(0)
    };
    let columns = vec![
        ("prompt", messages("user", "Hi")),
        ("chosen", messages("assistant", "a")),
        ("rejected", messages("assistant", "b")),
        (
            "system",
            Arc::new(StringArray::from(vec!["Be brief."])) as ArrayRef,
        ),
        ("id", Arc::new(Int64Array::from(vec![7]))),
        ("weight", Arc::new(Float64Array::from(vec![0.5]))),
        ("score", Arc::new(Float64Array::from(vec![f64::NAN]))),
    ];
    let row = write(columns.clone()).unwrap();
    let message = |role: &str, text: &str| ChatMessage::new(role, text);
    assert_eq!(
        row.prompt,
        Text::Chat(vec![message("system", "Be brief."), message("user", "Hi")])
    );
    assert_eq!(row.chosen, Text::Chat(vec![message("assistant", "a")]));
    assert_eq!((row.id.as_deref(), row.weight), (Some("7"), 0.5));
    assert_eq!(
        (row.shape, &row.ignored[..]),
        (RowShape::Preference, &["score".to_owned()][..])
    );
    let mut wrong = columns;
    wrong[5].1 = Arc::new(Float64Array::from(vec![f64::NAN]));
    let issue = write(wrong).unwrap_err();
    assert_eq!(
        (issue.field.as_str(), issue.reason),
        ("weight", IssueReason::InvalidType)
    );
    assert!(issue.message.contains("NaN"), "{}", issue.message);
}

#[test]
fn a_bad_value_in_a_parquet_file_is_a_finding_of_its_row_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.parquet");
    let columns = ["prompt", "chosen", "rejected"]
        .map(|name| format!("required binary {name} (UTF8);"))
        .concat();
    let schema = format!("message m {{ {columns} required double weight; }}");
    let schema = parse_message_type(&schema).unwrap();
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for texts in [["p", "q"], ["a", "b"], ["c", "d"]] {
        let mut column = group.next_column().unwrap().unwrap();
        let texts = texts.map(|text| ByteArray::from(text.as_bytes().to_vec()));
        column
            .typed::<ByteArrayType>()
            .write_batch(&texts, None, None)
            .unwrap();
        column.close().unwrap();
    }
    let mut column = group.next_column().unwrap().unwrap();
    column
        .typed::<DoubleType>()
        .write_batch(&[f64::NAN, 0.5], None, None)
        .unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    let rows = read(&path).unwrap_or_else(|e| panic!("{e}"));
    let issue = rows[0].as_ref().unwrap_err();
    assert_eq!((issue.row, issue.field.as_str()), (1, "weight"));
    assert!(
        issue.message.starts_with("weight is NaN"),
        "{}",
        issue.message
    );
    let row = rows[1].as_ref().unwrap();
    assert_eq!((rows.len(), row.row, row.weight), (2, 2, 0.5));
}

#[test]
fn a_file_that_is_cut_off_is_not_converted() {
    let dir = tempfile::tempdir().unwrap();
    let cut = dir.path().join("cut.json");
    std::fs::write(&cut, "[{}, {}").unwrap();
    let rows = RowStream::new(vec![DataPlace::File(cut)], ColumnMap::default());
    let failure = upload::to_jsonl(rows, |_| true);
    assert!(
        matches!(failure, Err(Failure::Failed(text)) if text.contains("cut.json: ends inside"))
    );
}

#[tokio::test]
async fn the_hash_is_that_of_the_bytes_that_are_sent() {
    let dir = tempfile::tempdir().unwrap();
    let paths = every_format(dir.path(), ["prompt", "chosen", "rejected"]);
    let hash = |path: &Path| {
        let data = DataFiles {
            places: vec![DataPlace::File(path.to_path_buf())],
            columns: ColumnMap::default(),
        };
        async move { data.content_hash().await.unwrap().map(|hash| hash.hex) }
    };
    let lines = std::fs::read(&paths[0]).unwrap();
    let expected = |bytes: &[u8]| Some(blake3::hash(bytes).to_hex().to_string());
    assert_eq!(hash(&paths[0]).await, expected(&lines), "sent as it is");
    // The conversion ends each line with a line feed.
    let converted = [&lines[..], b"\n"].concat();
    assert_eq!(
        hash(&paths[1]).await,
        expected(&converted),
        "{}",
        paths[1].display()
    );
    // The report of a stored dataset does not tell that rows were left out.
    let cut = dir.path().join("cut.csv");
    std::fs::write(&cut, "prompt,chosen,rejected\na,b,c\na,b\n").unwrap();
    assert_eq!(hash(&cut).await, None);
}

#[test]
fn all_columns_of_every_format_are_read_if_no_pairs_are_wanted() {
    let dir = tempfile::tempdir().unwrap();
    // No column of a pair but the prompt, in 24 files.
    for path in every_format(dir.path(), ["prompt", "tags", "note"]) {
        let data = DataFiles {
            places: vec![DataPlace::File(path.clone())],
            columns: ColumnMap::default(),
        };
        let rows: Vec<String> = data
            .whole_records()
            .map(|record| {
                let record = record.unwrap_or_else(|e| panic!("{}: {e:?}", path.display()));
                format!("{}: {}", record.place, json_of(record.columns.unwrap()))
            })
            .collect();
        let expected = [
            r#"row 1: {"prompt":"p","tags":"a","note":"c"}"#,
            r#"row 2: {"prompt":"q","tags":"b","note":"d"}"#,
        ];
        assert_eq!(rows, expected, "{}", path.display());
        assert!(read(&path).is_err() || read(&path).unwrap()[0].is_err());
    }
}

#[test]
fn rows_of_pairs_keep_their_other_columns_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    for path in every_format(dir.path(), ["chosen", "rejected", "source"]) {
        let data = DataFiles {
            places: vec![DataPlace::File(path.clone())],
            columns: ColumnMap::default(),
        };
        let rows: Vec<String> = data
            .records()
            .map(|record| json_of(record.unwrap().columns))
            .collect();
        let expected = [
            r#"{"chosen":"p","rejected":"a","source":"c"}"#,
            r#"{"chosen":"q","rejected":"b","source":"d"}"#,
        ];
        assert_eq!(rows, expected, "{}", path.display());
    }
}

fn json_of(columns: serde_json::Map<String, serde_json::Value>) -> String {
    serde_json::Value::Object(columns).to_string()
}
