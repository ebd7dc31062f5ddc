//! Progress of long work, on standard error: a bar on a terminal, elsewhere a line now and then.
//! Work that is done within a second shows nothing.

use std::cell::{Cell, OnceCell};
use std::future::Future;
use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::args::DataArgs;
use super::data::{DataFiles, Uploaded, naming};
use super::failure::Failure;
use crate::domain::dataset::{IssueReason, RowIssue};
use crate::rpc::client::Client;
use crate::rpc::pb;

/// Time after which work gets a bar.
const BAR_DELAY: Duration = Duration::from_secs(1);
/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two updates.
const TICK: Duration = Duration::from_millis(250);

/// Unit of the position of a bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Pairs,
    Prompts,
    /// Optimizer steps of a job.
    Steps,
    Bytes,
    /// The work has no position, so that only the passed time is shown.
    None,
}

/// Progress of one piece of work. The bar is removed on drop.
pub(super) struct WorkProgress {
    unit: Unit,
    bar: ProgressBar,
    is_terminal: bool,
    started: Instant,
    /// Position at the start, which an earlier command has reached.
    first_position: Cell<u64>,
    is_shown: Cell<bool>,
    /// True if nothing is to be shown any more.
    is_over: Cell<bool>,
    /// Time since the start at which the next line is due.
    next_line: Cell<Duration>,
    /// The time that is left, if somebody else estimates it.
    left: Cell<Option<Duration>>,
    /// Number of tokens that were received, if the work counts them.
    tokens: OnceCell<Arc<AtomicU64>>,
}

impl WorkProgress {
    fn new(what: &str, unit: Unit, total: Option<u64>) -> Self {
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::hidden());
        bar.set_prefix(what.to_owned());
        let progress = WorkProgress {
            unit,
            bar,
            is_terminal: std::io::stderr().is_terminal(),
            started: Instant::now(),
            first_position: Cell::new(0),
            is_shown: Cell::new(false),
            is_over: Cell::new(false),
            next_line: Cell::new(LINE_INTERVAL),
            left: Cell::new(None),
            tokens: OnceCell::new(),
        };
        progress.set_style();
        progress
    }

    /// Starts work on pairs, the number of which is not known yet.
    pub fn pairs(what: &str) -> Self {
        Self::new(what, Unit::Pairs, None)
    }

    /// Starts work on `total` prompts.
    pub fn prompts(what: &str, total: u64) -> Self {
        Self::new(what, Unit::Prompts, Some(total))
    }

    /// Starts to wait for a job, the number of whose steps is not known yet.
    pub fn steps(what: &str) -> Self {
        Self::new(what, Unit::Steps, None)
    }

    /// Starts work on `total` bytes, or on an unknown number of them.
    pub fn bytes(what: &str, total: Option<u64>) -> Self {
        Self::new(what, Unit::Bytes, total)
    }

    /// Starts work without a position.
    pub fn of_task(what: &str) -> Self {
        Self::new(what, Unit::None, None)
    }

    fn set_style(&self) {
        let template = match (self.unit, self.bar.length()) {
            (Unit::None, _) => "{spinner} {prefix}  {elapsed}",
            (Unit::Pairs, None) => "{spinner} {prefix}  {pos} pairs  {msg}",
            (Unit::Pairs, Some(_)) => "{prefix} {bar:20} {pos}/{len} pairs  {msg}",
            (Unit::Prompts, None) => "{spinner} {prefix}  {pos} prompts  {elapsed}  {msg}",
            // The first prompts may take minutes, and a round has a long prefix.
            (Unit::Prompts, Some(_)) => "{spinner} {prefix} {bar:8} {pos}/{len}  {elapsed}  {msg}",
            (Unit::Steps, None) => "{spinner} {prefix}  {elapsed}",
            (Unit::Steps, Some(_)) => "{prefix} {bar:20} {pos}/{len} steps  {msg}",
            (Unit::Bytes, None) => "{spinner} {prefix}  {bytes}",
            (Unit::Bytes, Some(_)) => "{prefix} {bar:20} {bytes}/{total_bytes}  {msg}",
        };
        let style = ProgressStyle::with_template(template);
        self.bar
            .set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    }

    /// Sets the number that the position will reach.
    pub fn set_total(&self, total: u64) {
        if self.bar.length() != Some(total) {
            self.bar.set_length(total);
            self.set_style();
        }
    }

    /// Sets the position.
    pub fn set(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// Sets the position that an earlier command has reached. The time that is left is estimated
    /// from what is done after it.
    pub fn start_at(&self, position: u64) {
        self.first_position.set(position);
        self.bar.set_position(position);
    }

    /// Moves the position forward.
    pub fn add(&self, done: u64) {
        self.bar.inc(done);
    }

    /// Sets the time that is left, as the server estimates it.
    pub fn set_left(&self, left: Option<Duration>) {
        self.left.set(left);
    }

    /// Also shows a number of tokens, to which the work adds those that it receives.
    pub fn count_tokens(&self, tokens: Arc<AtomicU64>) {
        let _ = self.tokens.set(tokens);
    }

    /// Sets the text before the bar.
    pub fn rename(&self, what: &str) {
        self.bar.set_prefix(what.to_owned());
    }

    /// Runs `work` and shows the progress meanwhile.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let mut ticks = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                biased;
                result = &mut work => return result,
                _ = ticks.tick() => self.tick(),
            }
        }
    }

    /// Runs `print` while the bar is removed from the terminal.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }

    /// Describes the number of pairs that were done since the start: `60 pairs in 1.5 s, 40
    /// pairs/s`. `None` if it took less than a second.
    pub fn summary(&self) -> Option<String> {
        let passed = self.started.elapsed();
        (passed >= BAR_DELAY).then(|| {
            let (pairs, seconds) = (self.bar.position(), passed.as_secs_f64());
            format!("{pairs} pairs in {seconds:.1} s, {}", self.rate())
        })
    }

    fn rate(&self) -> String {
        let rate = self.bar.position() as f64 / self.started.elapsed().as_secs_f64().max(1e-3);
        match rate < 10.0 {
            true => format!("{rate:.1} pairs/s"),
            false => format!("{rate:.0} pairs/s"),
        }
    }

    /// Returns the rate, the number of tokens and the time that is left, as far as they are known.
    fn details(&self) -> String {
        let mut parts = Vec::new();
        if self.unit == Unit::Pairs {
            parts.push(self.rate());
        }
        let done = self.bar.position();
        if self.unit == Unit::Steps {
            // A job may have begun before this command, so that its rate is not known here.
            let left = self
                .left
                .get()
                .map(|left| format!("{} left", HumanDuration(left)));
            parts.extend(left);
            return parts.join(", ");
        }
        let tokens = self.tokens.get().map(|n| n.load(Ordering::Relaxed));
        parts.extend(tokens.filter(|n| *n > 0).map(|n| format!("{n} tokens")));
        let done_here = done.saturating_sub(self.first_position.get());
        if let Some(total) = self.bar.length().filter(|n| *n > done && done_here > 0) {
            let left = self
                .started
                .elapsed()
                .mul_f64((total - done) as f64 / done_here as f64);
            parts.push(format!("{} left", HumanDuration(left)));
        }
        parts.join(", ")
    }

    /// Removes the bar for good, for work that prints its result while it goes on.
    pub fn end(&self) {
        if !self.is_over.replace(true) {
            self.bar.finish_and_clear();
        }
    }

    fn tick(&self) {
        if self.is_over.get() {
            return;
        }
        let passed = self.started.elapsed();
        if !self.is_terminal {
            if passed >= self.next_line.get() {
                self.next_line.set(passed + LINE_INTERVAL);
                say(&self.line(passed));
            }
            return;
        }
        self.bar.set_message(self.details());
        if passed >= BAR_DELAY && !self.is_shown.replace(true) {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.bar.enable_steady_tick(TICK);
        }
    }

    /// Returns the line for where there is no terminal.
    fn line(&self, passed: Duration) -> String {
        let (done, total) = (self.bar.position(), self.bar.length());
        let done = match (self.unit, total) {
            (Unit::None, _) => format!("{} passed", HumanDuration(passed)),
            (Unit::Steps, None) => format!("{} passed", HumanDuration(passed)),
            (Unit::Steps, Some(total)) => format!("step {done} of {total}"),
            (Unit::Pairs, None) => format!("{done} pairs"),
            (Unit::Pairs, Some(total)) => format!("{done} of {total} pairs"),
            (Unit::Prompts, None) => format!("{done} prompts"),
            (Unit::Prompts, Some(total)) => format!("{done} of {total} prompts"),
            (Unit::Bytes, None) => HumanBytes(done).to_string(),
            (Unit::Bytes, Some(total)) => {
                format!("{} of {}", HumanBytes(done), HumanBytes(total))
            }
        };
        let details = self.details();
        let separator = if details.is_empty() { "" } else { ", " };
        format!("{}: {done}{separator}{details}", self.bar.prefix())
    }
}

impl Drop for WorkProgress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Prints a line on standard error.
#[allow(clippy::print_stderr)]
pub(super) fn say(text: &str) {
    eprintln!("{text}");
}

/// Prints a warning on standard error.
pub(super) fn warn(text: &str) {
    say(&format!("warning: {text}"));
}

/// Runs `work` and shows how long it takes.
pub(super) async fn waiting<T>(what: &str, work: impl Future<Output = T>) -> T {
    WorkProgress::of_task(what).during(work).await
}

/// Finds the files that arguments name, and shows how long the download of those on the hub takes.
///
/// # Errors
/// The errors of [`DataFiles::find`].
pub(super) async fn find(files: &[String], reading: &DataArgs) -> Result<DataFiles, Failure> {
    waiting("fetching the data files", DataFiles::find(files, reading)).await
}

/// Uploads data files, and shows how much is sent and that the server then checks the rows.
///
/// # Errors
/// The errors of [`DataFiles::upload`].
pub(super) async fn upload(
    client: &Client,
    data: &DataFiles,
    metadata: pb::UploadMetadata,
) -> Result<Uploaded, Failure> {
    let (title, size) = (data.title(), data.bytes());
    let progress = WorkProgress::bytes(&format!("sending {title}"), size);
    let sent = |n| {
        progress.set(n);
        if size.is_some_and(|size| n >= size) {
            progress.rename(&format!("the server checks the rows of {title}"));
        }
    };
    let uploaded = progress.during(data.upload(client, metadata, sent)).await;
    match uploaded {
        Err(Failure::Usage(message)) => {
            let message = message.replacen("the file: ", &format!("{title}: "), 1);
            Err(Failure::Usage(explained(message, data).await))
        }
        other => other,
    }
}

/// Adds the flag for a column that the first row of refused files lacks. If the files cannot be
/// read here either, the reason replaces the message, because it names the flag. Standard input and
/// pipes can be read only once, so that their message stays as it is.
async fn explained(message: String, data: &DataFiles) -> String {
    if !data.is_rereadable() {
        return message;
    }
    let (mut rows, read_failure) = data.clone().reader();
    match tokio::task::spawn_blocking(move || rows.next()).await {
        Ok(Some(Err(issue))) => match missing_column(&issue) {
            Some(column) => format!("{message}; {}", naming(column)),
            None => message,
        },
        Ok(None) => match read_failure.check() {
            Err(failure) => failure.message().to_owned(),
            Ok(()) => message,
        },
        _ => message,
    }
}

/// Returns the column that a row lacks, if this is why it cannot be read.
fn missing_column(issue: &RowIssue) -> Option<&'static str> {
    match (issue.reason, issue.field.as_str()) {
        (IssueReason::MissingField | IssueReason::DifferentPrompts, "prompt") => Some("prompt"),
        (IssueReason::MissingField, _) => Some("chosen"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_that_is_left_follows_from_what_this_command_has_done() {
        let mut progress = WorkProgress::prompts("making pairs", 1000);
        let ago = Duration::from_secs(100);
        progress.started = Instant::now().checked_sub(ago).unwrap();
        progress.start_at(980);
        assert_eq!(progress.details(), "");
        progress.add(10);
        // 10 prompts in 100 seconds, and 10 are left.
        assert_eq!(progress.details(), "2 minutes left");
        assert!(progress.line(ago).starts_with("making pairs: 990 of 1000"));
        let tokens = Arc::new(AtomicU64::new(0));
        progress.count_tokens(Arc::clone(&tokens));
        assert_eq!(progress.details(), "2 minutes left");
        tokens.fetch_add(4321, Ordering::Relaxed);
        assert_eq!(progress.details(), "4321 tokens, 2 minutes left");
    }
}
