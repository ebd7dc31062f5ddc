//! Tests of row forms, bad rows and hostile bytes. The Parquet files are written by the parquet
//! crate.

use std::io::Write;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, DoubleType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;

use super::*;
use crate::domain::dataset::{ChatMessage, IssueReason, PreferenceRow, Text};

fn jsonl(bytes: &[u8]) -> Vec<Result<PreferenceRow, RowIssue>> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    read_rows(file.path(), DatasetFormat::Jsonl)
        .unwrap()
        .collect()
}

fn reason(row: &Result<PreferenceRow, RowIssue>) -> IssueReason {
    row.as_ref().unwrap_err().reason
}

#[test]
fn every_form_of_row_is_read() {
    let rows = jsonl(
        br#"{"prompt":"2+2?","chosen":"4","rejected":"5","weight":2,"id":7,"extra":[1]}

{"prompt":[{"role":"user","content":"Hi"}],"chosen":[{"role":"assistant","content":"a"}],"rejected":[{"role":"assistant","content":"b"}],"id":"x"}
{"chosen":[{"role":"user","content":"Q"},{"role":"assistant","content":"a"}],"rejected":[{"role":"user","content":"Q"},{"role":"assistant","content":"b"}]}
"#,
    );
    let rows: Vec<PreferenceRow> = rows.into_iter().map(Result::unwrap).collect();
    assert_eq!(
        (rows[0].row, rows[0].weight, rows[0].id.as_deref()),
        (1, 2.0, Some("7"))
    );
    assert_eq!(rows[1].row, 3, "blank lines count as lines and not as rows");
    assert_eq!(
        rows[2].prompt,
        Text::Chat(vec![ChatMessage::new("user", "Q")])
    );
    assert_eq!(
        rows[2].rejected,
        Text::Chat(vec![ChatMessage::new("assistant", "b")])
    );
}

#[test]
fn what_version_0_2_0_did_not_use_of_a_row_is_named() {
    let chat = |messages: &str, more: &str| {
        let answer = r#"[{"role":"assistant","content":"a"}]"#;
        let rejected = r#"{"role":"assistant","content":"b"}"#;
        format!(r#"{{"prompt":[{messages}],"chosen":{answer},"rejected":[{rejected}]{more}}}"#)
    };
    let hello = r#"{"role":"user","content":"Hi"}"#;
    let cases = [
        (
            r#"{"prompt":"2","chosen":"4","rejected":"5","weight":2,"id":7,"extra":[1]}"#
                .to_owned(),
            None,
        ),
        (chat(hello, ""), None),
        (
            chat(
                r#"{"content":"Hi","role":"user","name":null}"#,
                r#","tools":null,"chat_template_kwargs":{}"#,
            ),
            None,
        ),
        (
            r#"{"chosen":[{"role":"user","content":"Q"},{"role":"assistant","content":"a"}],
                "rejected":[{"role":"user","content":"Q"},{"role":"assistant","content":"b"}]}"#
                .replace('\n', ""),
            None,
        ),
        (chat(hello, r#","tools":[{"name":"t"}]"#), Some("tools")),
        (
            chat(hello, r#","chat_template_kwargs":{"a":1}"#),
            Some("chat_template_kwargs"),
        ),
        (
            chat(
                r#"{"role":"system","content":"S"},{"role":"user","content":"Hi","name":"x"}"#,
                "",
            ),
            Some("prompt[1].name"),
        ),
        (
            chat(
                r#"{"role":"user","content":[{"type":"text","text":"Hi"}]}"#,
                "",
            ),
            Some("prompt[0].content"),
        ),
        (
            chat(
                r#"{"role":"user","content":"Hi","reasoning_content":"r"}"#,
                "",
            ),
            Some("prompt[0].reasoning_content"),
        ),
        (
            r#"{"prompt":"2","chosen":"4","rejected":["5","6"]}"#.to_owned(),
            Some("several_rejected"),
        ),
        (
            r#"{"chosen":"2 4","rejected":"2 5"}"#.to_owned(),
            Some("implicit_prompt_text"),
        ),
        (chat(hello, r#","system":"S""#), Some("system")),
        (chat(hello, r#","system":" ""#), None),
        (
            r#"{"question":"2","chosen":"4","rejected":"5"}"#.to_owned(),
            Some("orca"),
        ),
    ];
    for (line, expected) in cases {
        let row = jsonl(line.as_bytes()).remove(0).unwrap();
        assert_eq!(row.new_since_0_2_0().as_deref(), expected, "{line}");
    }
}

#[test]
fn each_bad_row_has_its_reason_and_the_next_one_is_still_read() {
    let mut bytes = Vec::new();
    for line in [
        &b"{\"prompt\":"[..],
        b"[1,2]",
        b"\xff\xfe",
        br#"{"prompt":"a","chosen":"b"}"#,
        br#"{"prompt":"a","chosen":"b","rejected":3}"#,
        br#"{"prompt":"a","chosen":"b","rejected":[{"role":"assistant","content":"c"}]}"#,
        br#"{"prompt":"a","chosen":"b","rejected":"c","weight":-1}"#,
        br#"{"chosen":"b","rejected":"c"}"#,
        br#"{"chosen":[{"role":"user","content":"1"},{"role":"assistant","content":"b"}],"rejected":[{"role":"user","content":"2"},{"role":"assistant","content":"b"}]}"#,
        br#"{"prompt":[{"role":"user","content":null}],"chosen":[],"rejected":[]}"#,
        br#"{"prompt":"a","chosen":"b","rejected":"c"}"#,
    ] {
        bytes.extend_from_slice(line);
        bytes.push(b'\n');
    }
    let rows = jsonl(&bytes);
    use IssueReason::*;
    let expected = [
        InvalidJson,
        InvalidJson,
        InvalidUtf8,
        MissingField,
        InvalidType,
        InvalidType,
        InvalidWeight,
        DifferentPrompts,
        DifferentPrompts,
        InvalidType,
    ];
    for (row, expected) in rows.iter().zip(expected) {
        assert_eq!(reason(row), expected);
    }
    assert!(rows[10].is_ok());
    assert_eq!(rows[6].as_ref().unwrap_err().row, 7);
}

#[test]
fn a_line_at_the_limit_is_read_and_a_longer_one_is_refused_alone() {
    let line = |bytes: usize| {
        let frame = r#"{"prompt":"","chosen":"a","rejected":"b"}"#.len();
        let prompt = "x".repeat(bytes - frame);
        format!(r#"{{"prompt":"{prompt}","chosen":"a","rejected":"b"}}"#)
    };
    let lengths = [MAX_LINE_BYTES, 50, MAX_LINE_BYTES + 1, 51];
    let rows = jsonl(lengths.map(line).join("\n").as_bytes());
    let numbers: Vec<(u64, bool)> = rows
        .iter()
        .map(|row| match row {
            Ok(row) => (row.row, true),
            Err(issue) => (issue.row, false),
        })
        .collect();
    assert_eq!(numbers, [(1, true), (2, true), (3, false), (4, true)]);
}

#[test]
fn parquet_strings_and_message_lists_are_the_same_rows() {
    let schema = "message pairs {
        required group prompt (LIST) { repeated group list { required group element {
            required binary role (UTF8); required binary content (UTF8); } } }
        required group chosen (LIST) { repeated group list { required group element {
            required binary role (UTF8); required binary content (UTF8); } } }
        required group rejected (LIST) { repeated group list { required group element {
            required binary role (UTF8); required binary content (UTF8); } } }
        required double weight; }";
    let file = tempfile::NamedTempFile::new().unwrap();
    let properties = WriterProperties::builder()
        .set_compression(parquet::basic::Compression::SNAPPY)
        .build();
    let mut writer = SerializedFileWriter::new(
        file.reopen().unwrap(),
        Arc::new(parse_message_type(schema).unwrap()),
        Arc::new(properties),
    )
    .unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut texts = ["user", "Q", "assistant", "yes", "assistant", "no"].into_iter();
    while let Some(mut column) = group.next_column().unwrap() {
        match texts.next() {
            Some(t) => {
                column
                    .typed::<ByteArrayType>()
                    .write_batch(&[ByteArray::from(t)], Some(&[1]), Some(&[0]))
                    .unwrap();
            }
            None => {
                column
                    .typed::<DoubleType>()
                    .write_batch(&[1.5], None, None)
                    .unwrap();
            }
        }
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    let mut start = [0; 4];
    std::io::Read::read_exact(&mut std::fs::File::open(file.path()).unwrap(), &mut start).unwrap();
    assert_eq!(detect_format(&start), DatasetFormat::Parquet);
    let rows: Vec<_> = read_rows(file.path(), DatasetFormat::Parquet)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].weight, 1.5);
    assert_eq!(
        rows[0].chosen,
        Text::Chat(vec![ChatMessage::new("assistant", "yes")])
    );
}

#[test]
fn a_damaged_parquet_file_is_an_error_that_names_it() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"PAR1 nothing else").unwrap();
    let e = read_rows(file.path(), DatasetFormat::Parquet)
        .err()
        .unwrap()
        .to_string();
    assert!(e.contains(&file.path().display().to_string()), "{e}");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = jsonl(&bytes);
    }
}
