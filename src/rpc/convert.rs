//! Converts between protobuf and domain types. The bad fields of jobs, uploads and options are
//! collected, with their paths, and reported in one error. Texts, pairs and the other fields of an
//! evaluation are refused at the first bad field.

pub(super) mod dataset;
pub(super) mod evaluation;
pub(super) mod generation;
pub(super) mod json;
pub(super) mod model;
pub(super) mod scoring;
pub(super) mod training;

use tonic::Status;

use super::pb;
use super::status::{bad_request, status};
use crate::domain::identity::ModelIdentity;
use crate::domain::job::Millis;
use crate::domain::names;
use crate::domain::violation::{Violations, quoted};
use crate::service::error::ServiceError;

/// Converts milliseconds since the epoch to a timestamp.
pub(super) fn timestamp(ms: Millis) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: ms.div_euclid(1000),
        nanos: (ms.rem_euclid(1000) * 1_000_000) as i32,
    }
}

/// Converts a base model's content hashes.
pub(super) fn identity(identity: ModelIdentity) -> pb::ModelIdentity {
    let ModelIdentity {
        weights,
        config,
        tokenizer,
        chat_template,
    } = identity;
    pb::ModelIdentity {
        weights,
        config,
        tokenizer,
        chat_template,
    }
}

/// Returns the status for one bad field.
pub(super) fn invalid(field: &str, description: impl Into<String>) -> Status {
    status(ServiceError::invalid(field, description))
}

/// Checks a page size; 0 means the default.
pub(super) fn page_size(given: i32, default: usize) -> Result<usize, Status> {
    match given {
        0 => Ok(default),
        1..=1000 => Ok(given as usize),
        n => Err(invalid(
            "page_size",
            format!("is {n}: it must lie in 1..=1000, or be 0 for {default}"),
        )),
    }
}

/// Returns the id in `trainingJobs/{id}`. `field` is the path of the name's field, for the error.
pub(super) fn job_id<'a>(field: &str, name: &'a str) -> Result<&'a str, Status> {
    names::parse_job(name).ok_or_else(|| {
        invalid(
            field,
            format!("is {}: it must look like trainingJobs/ID", quoted(name)),
        )
    })
}

/// Returns the id in `datasets/{id}`. `field` is the path of the name's field, for the error.
pub(super) fn dataset_id<'a>(field: &str, name: &'a str) -> Result<&'a str, Status> {
    names::parse_dataset(name).ok_or_else(|| {
        invalid(
            field,
            format!("is {}: it must look like datasets/ID", quoted(name)),
        )
    })
}

/// Returns `value`, or the status for the collected violations if there are any.
pub(super) fn finish<T>(value: T, bad: Violations) -> Result<T, Status> {
    bad.into_result().map(|()| value).map_err(bad_request)
}
