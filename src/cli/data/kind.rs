//! Recognises the format of a file by its first bytes.

use crate::train::rows::names::is_used;

/// Number of bytes of a file that are looked at.
pub(super) const HEAD: usize = 64 << 10;

/// A format that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowFormat {
    /// One JSON object a line.
    JsonLines,
    /// A JSON array, or JSON objects over several lines each, as jq prints them.
    JsonValues,
    /// CSV with this delimiter, and a header.
    Delimited(u8),
    Parquet,
    /// Arrow's IPC stream, as `save_to_disk` of Hugging Face's datasets writes it.
    ArrowStream,
    /// Arrow's IPC file (Feather).
    ArrowFile,
}

/// A compression that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    pub(super) fn name(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
        }
    }
}

/// Returns the compression of a file that starts with `head`, if it is one that can be read.
pub(super) fn compression(head: &[u8]) -> Option<Compression> {
    if head.starts_with(&[0x1f, 0x8b]) {
        Some(Compression::Gzip)
    } else if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Some(Compression::Zstd)
    } else {
        None
    }
}

/// Mark of ORC files. A header of CSV may begin with these letters, too, as in `ORCID`.
const ORC: &[u8] = b"ORC";

/// Formats that cannot be read: position and bytes of their mark, their name, and the remedy.
const REFUSED: [(usize, &[u8], &str, &str); 17] = [
    (
        0,
        b"PK\x03\x04",
        "a zip archive or an Excel workbook (.xlsx)",
        "extract the archive, or save the sheet as CSV",
    ),
    (
        0,
        b"\xd0\xcf\x11\xe0",
        "an Excel workbook (.xls)",
        "save the sheet as CSV",
    ),
    (
        257,
        b"ustar",
        "a tar archive",
        "extract it and name the files in it",
    ),
    (
        0,
        b"BZh",
        "compressed with bzip2",
        "use gzip or zstd, or decompress it: bzip2 -dc FILE > COPY",
    ),
    (
        0,
        b"\xfd7zXZ\0",
        "compressed with xz",
        "use gzip or zstd, or decompress it: xz -dc FILE > COPY",
    ),
    (
        0,
        b"\x04\x22\x4d\x18",
        "compressed with lz4",
        "use gzip or zstd, or decompress it: lz4 -dc FILE > COPY",
    ),
    (
        0,
        b"7z\xbc\xaf\x27\x1c",
        "a 7z archive",
        "extract it and name the files in it",
    ),
    (
        0,
        b"SQLite format 3\0",
        "an SQLite database",
        "export the rows as CSV or JSON",
    ),
    (
        0,
        b"\x89HDF",
        "an HDF5 file",
        "write the rows as Parquet or JSONL",
    ),
    (
        0,
        b"\x93NUMPY",
        "a NumPy array",
        "write the rows as Parquet or JSONL",
    ),
    (0, ORC, "an ORC file", "write the rows as Parquet or JSONL"),
    (
        0,
        b"Obj\x01",
        "an Avro file",
        "write the rows as Parquet or JSONL",
    ),
    (
        0,
        b"%PDF",
        "a PDF document",
        "write the rows as JSONL or CSV",
    ),
    (
        0,
        b"\x80\x04\x95",
        "a Python pickle",
        "write the rows as Parquet or JSONL",
    ),
    (
        0,
        b"\x80\x05\x95",
        "a Python pickle",
        "write the rows as Parquet or JSONL",
    ),
    (0, b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (0, b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
];

/// Returns the format of a file that starts with `head`, after decompression. `is_mapped` says
/// whether a column is named by `--columns`.
///
/// # Errors
/// Returns a text that says what the file is and what to do.
pub(super) fn kind(
    head: &[u8],
    name: &str,
    is_mapped: impl Fn(&str) -> bool,
) -> Result<RowFormat, String> {
    if head.starts_with(b"PAR1") {
        return Ok(RowFormat::Parquet);
    }
    if head.starts_with(b"ARROW1") {
        return Ok(RowFormat::ArrowFile);
    }
    if head.starts_with(&[0xff, 0xff, 0xff, 0xff]) {
        return Ok(RowFormat::ArrowStream);
    }
    let is_binary = head.contains(&0);
    let refused = REFUSED.iter().find(|(at, mark, ..)| {
        let has_mark = head.get(*at..).is_some_and(|rest| rest.starts_with(mark));
        has_mark && (is_binary || *mark != ORC)
    });
    if let Some((_, _, what, remedy)) = refused {
        return Err(format!("is {what}, which cannot be read: {remedy}"));
    }
    if is_binary {
        return Err(
            "is a binary file of an unknown format: JSONL, a JSON array, CSV, Parquet and Arrow \
             can be read, also with gzip or zstd"
                .to_owned(),
        );
    }
    let text = head
        .strip_prefix(b"\xef\xbb\xbf")
        .unwrap_or(head)
        .trim_ascii_start();
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.trim_ascii_end();
    Ok(match text.first() {
        Some(b'[') => RowFormat::JsonValues,
        // An object that ends in another line.
        Some(b'{')
            if line.len() < text.len() && matches!(line.last(), Some(b'{' | b'[' | b',')) =>
        {
            RowFormat::JsonValues
        }
        Some(b'{') => RowFormat::JsonLines,
        _ => match delimiter(line, name, is_mapped) {
            Some(delimiter) => RowFormat::Delimited(delimiter),
            None => RowFormat::JsonLines,
        },
    })
}

/// Returns the delimiter of a header with a known column. If no column is known, but the file's
/// name says that it is CSV, returns the most frequent delimiter.
fn delimiter(line: &[u8], name: &str, is_mapped: impl Fn(&str) -> bool) -> Option<u8> {
    const DELIMITERS: [u8; 3] = [b',', b'\t', b';'];
    let line = String::from_utf8_lossy(line);
    let cells = |delimiter: u8| line.split(char::from(delimiter));
    let is_header = |delimiter: &u8| {
        cells(*delimiter).count() > 1
            && cells(*delimiter).any(|cell| {
                let cell = cell.trim().trim_matches('"');
                is_used(cell) || is_mapped(cell)
            })
    };
    if let Some(delimiter) = DELIMITERS.into_iter().find(is_header) {
        return Some(delimiter);
    }
    let name = name.to_lowercase();
    let name = name.trim_end_matches(".gz").trim_end_matches(".zst");
    let is_csv = name.ends_with(".csv") || name.ends_with(".tsv");
    let most = DELIMITERS
        .into_iter()
        .rev()
        .max_by_key(|d| cells(*d).count());
    most.filter(|_| is_csv)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_recognised_by_content() {
        let of = |head: &[u8], name: &str| kind(head, name, |column| column == "good");
        let read = [
            (&b"PAR1...."[..], "x.csv", RowFormat::Parquet),
            (b"ARROW1\0\0", "x", RowFormat::ArrowFile),
            (
                b"\xff\xff\xff\xff\x10\0\0\0",
                "x.jsonl",
                RowFormat::ArrowStream,
            ),
            (b"{\"prompt\":1}\n", "x.csv", RowFormat::JsonLines),
            (b"{\"prompt\": [{\n", "x", RowFormat::JsonValues),
            (b"{", "x", RowFormat::JsonLines),
            (b"\xef\xbb\xbf \n[\n {}", "x.jsonl", RowFormat::JsonValues),
            (b"{\n  \"prompt\"", "x.jsonl", RowFormat::JsonValues),
            (
                b"prompt,chosen,rejected\n",
                "x.jsonl",
                RowFormat::Delimited(b','),
            ),
            (b"\"id\";\"chosen\"\r\n", "x", RowFormat::Delimited(b';')),
            (b"a\tgood\n", "x", RowFormat::Delimited(b'\t')),
            (b"a,b\tc\td\n", "x.tsv.gz", RowFormat::Delimited(b'\t')),
            (b"a,b\n", "x.csv.zst", RowFormat::Delimited(b',')),
            (b"prompt\n", "x.csv", RowFormat::Delimited(b',')),
            (b"a,b\n", "x.jsonl", RowFormat::JsonLines),
            (b"ORCID,chosen\n", "x", RowFormat::Delimited(b',')),
            (b"", "x.jsonl", RowFormat::JsonLines),
        ];
        for (head, name, expected) in read {
            assert_eq!(
                of(head, name),
                Ok(expected),
                "{:?}",
                head.escape_ascii().to_string()
            );
        }
        let mut tar = vec![b'a'; 600];
        tar[257..262].copy_from_slice(b"ustar");
        let refused = [
            (&b"PK\x03\x04"[..], "Excel"),
            (b"\xd0\xcf\x11\xe0\xa1", "as CSV"),
            (&tar, "tar archive"),
            (b"BZh9", "bzip2 -dc"),
            (b"ORC\x0a\0\0", "an ORC file"),
            (b"\xff\xfep\0", "save it as UTF-8"),
            (b"abc\0def", "unknown format: JSONL, a JSON array, CSV"),
        ];
        for (head, expected) in refused {
            let said = of(head, "x.jsonl").unwrap_err();
            assert!(said.contains(expected), "{said}");
        }
        assert_eq!(compression(b"\x1f\x8b\x08"), Some(Compression::Gzip));
        assert_eq!(
            compression(b"\x28\xb5\x2f\xfd\x04"),
            Some(Compression::Zstd)
        );
        assert_eq!(compression(b"{}"), None);
    }
}
