//! A Parquet dataset.
#![no_main]

use std::io::Write;

use bradley::domain::dataset::DatasetFormat;
use bradley::train::rows::read_rows;
use libfuzzer_sys::fuzz_target;

// The library's panics are caught and made errors; one that is not caught still ends the process.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |data: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(data).unwrap();
    if let Ok(rows) = read_rows(file.path(), DatasetFormat::Parquet) {
        // A footer may claim any number of rows.
        rows.take(1000).for_each(drop);
    }
});
