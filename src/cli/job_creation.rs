//! Creates a job once, also if the connection breaks before the answer, and checks jobs before
//! their rows are on the server.

use std::time::Duration;

use super::failure::Outcome;
use super::flag_names::JobWords;
use super::short_names::newest_dataset;
use crate::rpc::client::{Client, Code, Status, field_violations};
use crate::rpc::pb;

/// Number of times that a call is repeated, and the time before the first repetition, which doubles
/// each time: 7.5 seconds in all.
const MAX_REPETITIONS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// Creates a job. The call is repeated while the connection breaks or the server is unavailable.
/// The request's id makes the server return the job whose first answer was lost.
///
/// # Errors
/// Returns the server's refusal, or the last error if all repetitions failed.
pub(super) async fn create_job(
    client: &Client,
    request: pb::CreateTrainingJobRequest,
) -> Result<pb::TrainingJob, Status> {
    let mut repetitions = 0;
    loop {
        let mut training = client.training();
        match training.create_training_job(request.clone()).await {
            Ok(job) => return Ok(job.into_inner()),
            Err(status) if repetitions < MAX_REPETITIONS && is_lost_or_unavailable(&status) => {
                tokio::time::sleep(FIRST_PAUSE * (1 << repetitions)).await;
                repetitions += 1;
            }
            Err(status) => return Err(status),
        }
    }
}

/// Returns true if the connection broke, or if a proxy or the server itself answered that the
/// server is unavailable. Only an error of the connection has a source.
fn is_lost_or_unavailable(status: &Status) -> bool {
    status.code() == Code::Unavailable || std::error::Error::source(status).is_some()
}

/// Checks a job before its rows are uploaded.
///
/// # Errors
/// Returns a failure that names what the server refuses besides the missing dataset.
pub(super) async fn check_without_dataset(
    client: &Client,
    job: pb::TrainingJob,
    words: &JobWords,
) -> Outcome {
    // The dataset is missing in any case.
    if let Err(refused) = check(client, job.clone()).await {
        let dataset = "training_job.dataset";
        let violations = field_violations(&refused);
        if violations.is_empty() || violations.iter().any(|(field, _)| field != dataset) {
            return Err(words.failure_without(refused, &[dataset]));
        }
    }
    // The server compares the settings with the policy, such as the rank of its adapter, only if
    // the job names a dataset. Any one of the caller's serves: refusals because of its rows have
    // no fields.
    let Some(dataset) = newest_dataset(client).await? else {
        return Ok(());
    };
    match check(client, pb::TrainingJob { dataset, ..job }).await {
        Err(refused) if !field_violations(&refused).is_empty() => Err(words.failure(refused)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Asks the server to check a job.
async fn check(client: &Client, job: pb::TrainingJob) -> Result<(), Status> {
    let request = pb::CreateTrainingJobRequest {
        training_job: Some(job),
        request_id: String::new(),
        validate_only: true,
    };
    client.training().create_training_job(request).await?;
    Ok(())
}
