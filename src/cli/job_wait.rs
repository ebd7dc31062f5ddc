//! Waits for the end of a job on a server.

use std::time::Duration;

use super::failure::Failure;
use super::progress::{WorkProgress, warn};
use crate::rpc::client::{Client, FirstEvent};
use crate::rpc::pb::{self, training_event::Event};

/// The way in which a job ended.
pub(super) struct EndedJob {
    /// Its last state.
    pub state: pb::JobState,
    /// The reason for it.
    pub reason: String,
}

/// Waits for the end of a job and shows its progress. `state` is that of the job at the beginning,
/// and `server_flag` the one that names the server in commands that are shown.
///
/// # Errors
/// Returns a failure if the server refuses the call, or is not reached for long.
pub(super) async fn end_of_job(
    client: &Client,
    (name, state): (&str, pb::JobState),
    server_flag: &str,
    progress: &WorkProgress,
) -> Result<EndedJob, Failure> {
    if matches!(state, pb::JobState::Paused | pb::JobState::Pausing) {
        progress.suspend(|| {
            warn(&format!(
                "{name} is paused: bradley jobs resume {name}{server_flag}"
            ));
        });
    }
    let mut reason = String::new();
    let follow = client.follow_from(name, FirstEvent::Tail(1), |event| {
        match event.event {
            Some(Event::StateChange(change)) => reason = change.reason,
            Some(Event::StepMetrics(step)) => {
                let p = step.progress.unwrap_or_default();
                let left = p.eta_seconds.map(|s| s.max(0.0));
                progress.set_total(p.total_steps);
                progress.set(p.step);
                let left = left.and_then(|s| Duration::try_from_secs_f64(s).ok());
                progress.set_left(left);
            }
            _ => {}
        }
        true
    });
    progress.during(follow).await.map_err(Failure::from)?;
    let request = pb::GetTrainingJobRequest {
        name: name.to_owned(),
    };
    let ended = client.training().get_training_job(request).await?;
    let ended = ended.into_inner();
    Ok(EndedJob {
        state: ended.state(),
        reason: ended.error.map_or(reason, |error| error.message),
    })
}
