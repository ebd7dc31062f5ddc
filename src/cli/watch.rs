//! `bradley watch`: follows a job with a progress bar, or as JSON lines.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::args::{Output, WatchArgs};
use super::failure::{Failure, Outcome};
use super::output::{self, state};
use super::remote::connect;
use super::short_names;
use crate::rpc::client::Client;
use crate::rpc::pb::{self, training_event::Event};

pub(super) async fn run(args: WatchArgs, output: Output) -> Outcome {
    let client = connect(&args.server.target()).await?;
    let job = short_names::job(&client, &args.job).await?;
    follow(&client, &job, args.after, output).await
}

/// Follows a job to its end. Returns a failure unless the job succeeded.
pub(super) async fn follow(client: &Client, job: &str, after: u64, output: Output) -> Outcome {
    let mut view = ProgressView::new(output);
    let mut end = None;
    client
        .follow(job, after, |event| {
            if let Some(Event::StateChange(change)) = &event.event {
                end = Some(change.clone());
            }
            view.show(&event);
            true
        })
        .await?;
    view.bar.finish_and_clear();
    let end = match end {
        Some(end) => end,
        // No event was left to stream, because the job had already ended.
        None => {
            let request = pb::GetTrainingJobRequest {
                name: job.to_owned(),
            };
            let job = client
                .training()
                .get_training_job(request)
                .await?
                .into_inner();
            pb::StateChange {
                from: 0,
                to: job.state,
                reason: job.error.map(|e| e.message).unwrap_or_default(),
            }
        }
    };
    match end.to() {
        pb::JobState::Succeeded => Ok(()),
        _ => Err(Failure::Failed(format!(
            "{job} ended {}: {}",
            state(end.to),
            end.reason
        ))),
    }
}

/// Prints events: as text with a progress bar on a terminal, as text without one, or as JSON lines.
pub(super) struct ProgressView {
    output: Output,
    bar: ProgressBar,
}

impl ProgressView {
    pub(super) fn new(output: Output) -> Self {
        let target = if output != Output::Table {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let style = ProgressStyle::with_template(
            "{bar:30} {pos}/{len} steps  {elapsed} passed, {prefix} left  {msg}",
        );
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(500));
        ProgressView { output, bar }
    }

    /// Clears the bar.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    pub(super) fn show(&mut self, event: &pb::TrainingEvent) {
        if self.output != Output::Table {
            return output::json_line(&output::event(event));
        }
        let text = match &event.event {
            Some(Event::StateChange(s)) => format!("{}: {}", state(s.to), s.reason),
            Some(Event::StepMetrics(s)) => {
                let p = s.progress.unwrap_or_default();
                self.bar.set_length(p.total_steps);
                self.bar.set_position(p.step);
                self.bar.set_prefix(p.eta_seconds.map_or("?".into(), |s| {
                    format!(
                        "{}",
                        indicatif::HumanDuration(Duration::from_secs_f64(s.max(0.0)))
                    )
                }));
                self.bar.set_message(metrics(&s.metrics, ""));
                if !self.bar.is_hidden() {
                    return;
                }
                // Without a terminal there is no bar, so each step prints a line.
                format!(
                    "step {}/{}  {}",
                    p.step,
                    p.total_steps,
                    metrics(&s.metrics, "")
                )
            }
            Some(Event::EvalMetrics(s)) => {
                format!(
                    "evaluation at step {}: {}",
                    s.step,
                    metrics(&s.metrics, "eval_")
                )
            }
            Some(Event::CheckpointCreated(c)) => {
                format!(
                    "checkpoint {}{}",
                    c.checkpoint,
                    if c.best { " (best)" } else { "" }
                )
            }
            Some(Event::Log(l)) => format!("{}: {}", l.severity, l.message),
            None => return,
        };
        if self.bar.is_hidden() {
            output::line(&text)
        } else {
            self.bar.println(text)
        }
    }
}

/// Formats the loss, the margin and the accuracy of the metrics whose names begin with `prefix`.
fn metrics(all: &std::collections::BTreeMap<String, f64>, prefix: &str) -> String {
    let find = |name: &str| all.get(&format!("{prefix}{name}")).copied();
    let get = |name: &str| find(name).unwrap_or(f64::NAN);
    // The normalized reward is shown if there is one, because the objective trains it.
    let reward = |name: &str| {
        find(&format!("rewards_normalized/{name}"))
            .unwrap_or_else(|| get(&format!("rewards/{name}")))
    };
    format!(
        "loss {:.4}  margin {:+.3}  accuracy {:.0}%",
        get("loss"),
        reward("margins"),
        100.0 * reward("accuracies")
    )
}
