//! `bradley watch`: follows a job with a progress bar, as JSON lines or as a YAML list.

use std::cell::Cell;
use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::args::{Output, ServerArgs, WatchArgs};
use super::failure::{Failure, Outcome};
use super::flag_names::JobWords;
use super::output::table::terminal_width;
use super::output::{self, state};
use super::progress::warn;
use super::remote::{connect, server_flag};
use super::short_names;
use crate::domain::violation::counted;
use crate::rpc::client::{Client, FirstEvent};
use crate::rpc::pb::{self, training_event::Event};

/// Columns before a line of the summary: two spaces, the label and a space.
const LABEL_COLUMNS: usize = 15;

pub(super) async fn run(args: WatchArgs, output: Output) -> Outcome {
    check_format(output)?;
    let client = connect(&args.server.target()).await?;
    let job = short_names::job(&client, &args.job).await?;
    let view = ProgressView::new(output);
    let (first, view) = match args.tail {
        Some(n) => (FirstEvent::Tail(n), view.with_lines(n)),
        None => (FirstEvent::After(args.after), view),
    };
    follow(&client, &args.server, &job, first, view).await
}

/// Refuses a format that events do not have.
///
/// # Errors
/// Returns a failure that names the formats there are.
pub(super) fn check_format(output: Output) -> Outcome {
    match output {
        Output::Csv => Err(Failure::Usage(
            "--format csv: a job's events have different fields, so that they have no table: use \
             --format json or yaml, or bradley jobs metrics for the metrics as CSV"
                .into(),
        )),
        Output::Table | Output::Json | Output::Yaml => Ok(()),
    }
}

/// Follows a job in `view` to its end and prints a summary. Ctrl-C only ends the following. Returns
/// a failure unless the job succeeded.
pub(super) async fn follow(
    client: &Client,
    server: &ServerArgs,
    job: &str,
    first: FirstEvent,
    mut view: ProgressView,
) -> Outcome {
    let output = view.output;
    let (bar, is_lost) = (view.bar.clone(), Cell::new(false));
    let each = |event: pb::TrainingEvent| {
        is_lost.set(false);
        view.show(&event);
        true
    };
    let dropped = || {
        if !is_lost.replace(true) {
            bar.suspend(|| warn("the connection to the server is lost; trying to reconnect"));
        }
    };
    let interrupted = tokio::select! {
        followed = client.follow_noticing(job, first, each, dropped) => {
            followed?;
            false
        }
        _ = tokio::signal::ctrl_c() => true,
    };
    view.finish();
    let id = job.trim_start_matches("trainingJobs/");
    let flag = server_flag(server);
    if interrupted {
        return Err(Failure::Interrupted(format!(
            "the job goes on: bradley jobs watch {id}{flag}\n\
             to end it, too:  bradley jobs cancel {id}{flag}"
        )));
    }
    let request = pb::GetTrainingJobRequest {
        name: job.to_owned(),
    };
    let ended = client
        .training()
        .get_training_job(request)
        .await?
        .into_inner();
    if output == Output::Table {
        let checkpoints = checkpoints(client, job).await;
        for line in summary(&ended, &checkpoints, &flag) {
            output::line(&line);
        }
    }
    match ended.state() {
        pb::JobState::Succeeded => Ok(()),
        _ => Err(Failure::Failed(format!(
            "{job} ended {}: {}",
            state(ended.state),
            view.last_reason(&ended)
        ))),
    }
}

/// Returns the checkpoints of a job; none if the server does not list them. The summary then only
/// lacks them.
async fn checkpoints(client: &Client, job: &str) -> Vec<pb::Checkpoint> {
    let request = pb::ListCheckpointsRequest {
        parent: job.to_owned(),
    };
    match client.checkpoints().list_checkpoints(request).await {
        Ok(listed) => listed.into_inner().checkpoints,
        Err(e) => {
            warn(&format!("the checkpoints are not listed: {}", e.message()));
            Vec::new()
        }
    }
}

/// Describes an ended job: its final metrics, its best checkpoint and the next commands.
fn summary(job: &pb::TrainingJob, checkpoints: &[pb::Checkpoint], flag: &str) -> Vec<String> {
    let id = job.name.trim_start_matches("trainingJobs/");
    let steps = job.progress.unwrap_or_default().step;
    let mut lines = vec![format!(
        "{} {} after {}{}",
        job.name,
        state(job.state),
        counted(steps, "step"),
        duration(job).map_or(String::new(), |d| format!(" and {}", HumanDuration(d))),
    )];
    let all = &job.latest_metrics;
    if all.contains_key("loss") {
        lines.push(format!("  training:    {}", metrics(all, "")));
    }
    if all.contains_key("eval_loss") {
        lines.push(format!("  evaluation:  {}", metrics(all, "eval_")));
    }
    let best = checkpoints.iter().find(|c| c.best);
    let newest = checkpoints.iter().max_by_key(|c| c.step);
    if let Some(best) = best {
        let evaluated = match best.metrics.contains_key("eval_loss") {
            true => format!("  {}", metrics(&best.metrics, "eval_")),
            false => String::new(),
        };
        lines.push(format!("  best:        {}{evaluated}", best.name));
    }
    if let Some(newest) = newest.filter(|newest| best.is_none_or(|b| b.step != newest.step)) {
        lines.push(format!("  newest:      {}", newest.name));
    }
    let next = match (job.state(), best.or(newest)) {
        (pb::JobState::Succeeded, Some(checkpoint)) => {
            let name = checkpoint.name.trim_start_matches("trainingJobs/");
            vec![
                format!("bradley score --policy {name} --data PAIRS{flag}"),
                format!("bradley checkpoints download {name} --out FOLDER{flag}"),
            ]
        }
        _ => vec![format!("bradley jobs get {id}{flag}")],
    };
    let width = terminal_width().map_or(usize::MAX, |width| width.saturating_sub(LABEL_COLUMNS));
    let mut label = "next:";
    for line in next
        .iter()
        .flat_map(|command| command_lines(command, width))
    {
        lines.push(format!("  {label:<12} {line}"));
        label = "";
    }
    lines
}

/// Returns a command in lines of at most `width` columns, if its flags are not longer. All but the
/// last one end with a backslash, so that a shell takes them as one line.
fn command_lines(command: &str, width: usize) -> Vec<String> {
    if command.len() <= width {
        return vec![command.to_owned()];
    }
    let mut lines: Vec<String> = Vec::new();
    for part in command.split(" --") {
        match lines.last_mut() {
            None => lines.push(part.to_owned()),
            Some(line) if line.len() + part.len() + " -- \\".len() <= width => {
                line.push_str(" --");
                line.push_str(part);
            }
            Some(line) => {
                line.push_str(" \\");
                lines.push(format!("--{part}"));
            }
        }
    }
    lines
}

/// Returns the time from a job's start to its end.
fn duration(job: &pb::TrainingJob) -> Option<Duration> {
    let (start, end) = (job.start_time.as_ref()?, job.end_time.as_ref()?);
    let seconds = end.seconds.checked_sub(start.seconds)?;
    Some(Duration::from_secs(u64::try_from(seconds).ok()?))
}

/// Prints events on standard output, with a progress bar on standard error if that is a terminal.
pub(super) struct ProgressView {
    output: Output,
    bar: ProgressBar,
    /// The caller's words for the fields that reasons name; `None` for those of the API.
    words: Option<JobWords>,
    /// Number of the next events that print a line even if the bar shows the same.
    lines_left: u32,
    /// Reason of the last change of the job's state.
    reason: String,
}

/// Template of the bar until the number of steps is known.
const WITHOUT_STEPS: &str = "{spinner} {msg}  {elapsed}";
/// The bar gets the columns that the rest of the line leaves, so that the line fits a terminal.
const WITH_STEPS: &str = "{wide_bar} {pos}/{len} steps  {prefix} left  {msg}";

impl ProgressView {
    pub(super) fn new(output: Output) -> Self {
        let target = if output != Output::Table {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let bar = ProgressBar::with_draw_target(None, target);
        set_template(&bar, WITHOUT_STEPS);
        bar.set_message("waiting for the job's events");
        bar.enable_steady_tick(Duration::from_millis(500));
        ProgressView {
            output,
            bar,
            words: None,
            lines_left: 0,
            reason: String::new(),
        }
    }

    /// Lets the view name flags in place of a job's fields.
    pub(super) fn with_words(mut self, words: &JobWords) -> Self {
        self.words = Some(words.clone());
        self
    }

    /// Lets the first `n` events print a line each, also those that the bar shows.
    fn with_lines(mut self, n: u32) -> Self {
        self.lines_left = n;
        self
    }

    /// Returns a text of the server in the caller's words.
    fn in_words(&self, text: &str) -> String {
        match &self.words {
            Some(words) => words.in_sentence(text),
            None => text.to_owned(),
        }
    }

    /// Returns the reason why the job ended.
    fn last_reason(&self, job: &pb::TrainingJob) -> String {
        match &job.error {
            Some(error) => self.in_words(&error.message),
            None => self.in_words(&self.reason),
        }
    }

    /// Clears the bar.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    pub(super) fn show(&mut self, event: &pb::TrainingEvent) {
        if let Some(Event::StateChange(change)) = &event.event {
            self.reason.clone_from(&change.reason);
        }
        if self.output != Output::Table {
            return output::item(self.output, &output::event(event));
        }
        let needs_line = self.lines_left > 0;
        self.lines_left = self.lines_left.saturating_sub(1);
        let text = match &event.event {
            Some(Event::StateChange(s)) => {
                if self.bar.length().is_none() {
                    self.bar.set_message(state(s.to));
                }
                match s.reason.is_empty() {
                    true => state(s.to),
                    false => format!("{}: {}", state(s.to), self.in_words(&s.reason)),
                }
            }
            Some(Event::StepMetrics(s)) => {
                let p = s.progress.unwrap_or_default();
                if self.bar.length().is_none() && p.total_steps > 0 {
                    self.bar.set_length(p.total_steps);
                    set_template(&self.bar, WITH_STEPS);
                }
                self.bar.set_position(p.step);
                let left = p.eta_seconds.map(|s| output::seconds(s.max(0.0)));
                self.bar.set_prefix(left.unwrap_or_else(|| "?".to_owned()));
                self.bar.set_message(metrics(&s.metrics, ""));
                // The bar shows the step. Where there is none, or where the output goes to a file,
                // each step prints a line, and so do the newest events that --tail asks for.
                if !needs_line && !self.bar.is_hidden() && std::io::stdout().is_terminal() {
                    return;
                }
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
            Some(Event::Log(l)) => format!("{}: {}", l.severity, self.in_words(&l.message)),
            None => return,
        };
        self.bar.suspend(|| output::line(&text));
    }
}

fn set_template(bar: &ProgressBar, template: &str) {
    let style = ProgressStyle::with_template(template);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_divided_between_its_flags() {
        let policy = "--policy 0193c8e4-7a3f-7000-8000-000000000000/checkpoints/12";
        let server = "--server http://127.0.0.1:9000";
        let command = format!("bradley score {policy} --data PAIRS {server}");
        assert_eq!(command_lines(&command, usize::MAX), [command.as_str()]);
        assert_eq!(command_lines(&command, command.len()), [command.as_str()]);
        assert_eq!(
            command_lines(&command, 65),
            [
                "bradley score \\".to_owned(),
                format!("{policy} \\"),
                format!("--data PAIRS {server}"),
            ]
        );
    }
}
