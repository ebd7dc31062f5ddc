//! Converts datasets and their validation reports.

use tonic::Status;

use super::{finish, timestamp};
use crate::domain::dataset::{Dataset, DatasetFormat, RowIssue, Severity, ValidationReport};
use crate::domain::names;
use crate::domain::violation::{Violations, quoted};
use crate::rpc::pb;
use crate::service::datasets::UploadMeta;

/// Converts and validates the metadata of an upload.
pub(in crate::rpc) fn upload_meta(m: pb::UploadMetadata) -> Result<UploadMeta, Status> {
    let mut bad = Violations::default();
    let format = match pb::DatasetFormat::try_from(m.format) {
        Ok(pb::DatasetFormat::Unspecified) => None,
        Ok(pb::DatasetFormat::Jsonl) => Some(DatasetFormat::Jsonl),
        Ok(pb::DatasetFormat::Parquet) => Some(DatasetFormat::Parquet),
        Err(_) => {
            bad.push(
                "metadata.format",
                format!(
                    "is {}: it must be JSONL (1), PARQUET (2) or 0 to guess",
                    m.format
                ),
            );
            None
        }
    };
    let model = match m.model.as_str() {
        "" => None,
        name => match names::parse_model(name) {
            Some(id) => Some(id.to_owned()),
            None => {
                bad.push(
                    "metadata.model",
                    format!(
                        "is {}: it must be empty or look like models/ID",
                        quoted(name)
                    ),
                );
                None
            }
        },
    };
    let hash = content_hash("metadata.content_hash", &m.content_hash, &mut bad);
    let max_length = if m.max_length == 0 {
        1024
    } else {
        m.max_length as usize
    };
    finish(
        UploadMeta {
            display_name: m.display_name,
            format,
            model,
            max_length,
            content_hash: hash,
        },
        bad,
    )
}

/// Converts the hash in the filter of a list; an empty text means no filter.
pub(in crate::rpc) fn filter(content_hash_field: &str) -> Result<Option<blake3::Hash>, Status> {
    let mut bad = Violations::default();
    let hash = content_hash("content_hash", content_hash_field, &mut bad);
    finish(hash, bad)
}

fn content_hash(field: &str, text: &str, bad: &mut Violations) -> Option<blake3::Hash> {
    if text.is_empty() {
        return None;
    }
    let hash = blake3::Hash::from_hex(text);
    if hash.is_err() {
        let message = format!(
            "is {}: it must be a BLAKE3 hash of 64 hex digits, or empty",
            quoted(text)
        );
        bad.push(field, message);
    }
    hash.ok()
}

/// Converts a dataset. `with_issues` includes the list of findings in its report.
pub(in crate::rpc) fn dataset(d: Dataset, with_issues: bool) -> pb::Dataset {
    pb::Dataset {
        name: format!("datasets/{}", d.id),
        display_name: d.display_name,
        format: match d.format {
            DatasetFormat::Jsonl => pb::DatasetFormat::Jsonl.into(),
            DatasetFormat::Parquet => pb::DatasetFormat::Parquet.into(),
        },
        size_bytes: d.size_bytes,
        content_hash: d.content_hash,
        report: Some(report(d.report, with_issues)),
        create_time: Some(timestamp(d.create_time)),
    }
}

fn report(r: ValidationReport, with_issues: bool) -> pb::ValidationReport {
    let (model, max_length) = match r.length_check {
        Some(check) => (
            format!("models/{}", check.model),
            u32::try_from(check.max_length).unwrap_or(u32::MAX),
        ),
        None => Default::default(),
    };
    pb::ValidationReport {
        rows: r.rows,
        valid_rows: r.valid_rows,
        counts: r.counts,
        issues: if with_issues {
            r.issues.into_iter().map(issue).collect()
        } else {
            Vec::new()
        },
        issues_truncated: r.issues_truncated,
        shapes: r.shapes,
        pairs: r.pairs,
        model,
        max_length,
    }
}

fn issue(i: RowIssue) -> pb::RowIssue {
    let severity = match i.reason.severity() {
        Severity::Warning => pb::IssueSeverity::Warning,
        Severity::Error => pb::IssueSeverity::Error,
    };
    pb::RowIssue {
        row: i.row,
        id: i.id.unwrap_or_default(),
        field: i.field,
        reason: i.reason.name().into(),
        message: i.message,
        severity: severity.into(),
    }
}
