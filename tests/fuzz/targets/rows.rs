//! A JSONL dataset: every line gives pairs or findings.
#![no_main]

use std::collections::BTreeSet;
use std::io::Write;

use bradley::domain::dataset::DatasetFormat;
use bradley::train::rows::read_rows;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(data).unwrap();
    let lines = data.split(|b| *b == b'\n').count();
    if let Ok(rows) = read_rows(file.path(), DatasetFormat::Jsonl) {
        // A row may make several pairs, all with its number.
        let numbers: BTreeSet<u64> = rows
            .map(|row| row.map_or_else(|issue| issue.row, |pair| pair.row))
            .collect();
        assert!(numbers.len() <= lines);
    }
});
