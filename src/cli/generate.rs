//! `bradley generate`: continues a prompt, or the prompts of a file.

mod prompts;
mod results;

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::VecDeque;
use std::future::Future;
use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

pub(super) use self::prompts::{PromptRow, ResultColumns, read};
use self::prompts::{RESULT_COLUMNS, prompt_of};
use self::results::Results;
use super::args::{GenerateArgs, Output, PromptFormArgs, SamplingArgs};
use super::failure::{Failure, Outcome, unless_interrupted};
use super::output;
use super::policy_names::PolicyNames;
use super::progress::{self, WorkProgress, say};
use super::remote::connect;
use super::scoring_flags::{template_arguments, tools};
use crate::domain::violation::counted;
use crate::rpc::client::{
    Client, Status, Streaming, is_not_found, is_server_failure, is_transient, retry_after,
};
use crate::rpc::pb;

/// Number of prompts of a file that are continued at the same time.
const IN_PROGRESS: usize = 8;
/// Time before a prompt of a file is sent again. It doubles with each failure up to
/// [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Maximum time before a prompt is sent again because the server asked for this.
const LONGEST_ASKED_PAUSE: Duration = Duration::from_secs(60);
/// Number of failures of the server at one prompt (internal errors, exhausted memory) after which
/// the prompt counts as their reason.
const MAX_SERVER_FAILURES: u32 = 10;

pub(super) async fn run(args: GenerateArgs, output: Output) -> Outcome {
    // The parser lets --prompt stand for the --data that --out requires.
    if let (Some(_), Some(out)) = (&args.prompt, &args.out) {
        return Err(Failure::Usage(format!(
            "--out {out} is for the results of --data; the text for --prompt goes to standard \
             output: write it to a file with --format json > {out}",
            out = out.display()
        )));
    }
    let base = request(&args.form, &args.sampling, args.samples)?;
    let client = connect(&args.server.target()).await?;
    let names = PolicyNames::of(&client).await?;
    let base = pb::GenerateCompletionsRequest {
        policy: names.complete("--policy", &args.policy).await?,
        ..base
    };
    let Some(prompt) = &args.prompt else {
        return continue_files(&client, &args, base).await;
    };
    let request = pb::GenerateCompletionsRequest {
        prompt: Some(prompt_of(&Value::from(prompt.as_str()), &args.form).map_err(usage)?),
        ..base
    };
    continue_one(&client, request, output).await
}

fn usage(problem: String) -> Failure {
    Failure::Usage(format!("--prompt: {problem}"))
}

/// Returns the request without policy and prompt.
pub(super) fn request(
    form: &PromptFormArgs,
    sampling: &SamplingArgs,
    samples: u32,
) -> Result<pb::GenerateCompletionsRequest, Failure> {
    Ok(pb::GenerateCompletionsRequest {
        samples,
        max_tokens: sampling.max_tokens,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        seed: sampling.seed,
        stop: sampling.stop.clone(),
        ignore_eos: sampling.ignore_eos,
        logprobs: true,
        chat_template_kwargs_json: template_arguments(form.template_args.as_deref())?,
        tools_json: tools(form.tools.as_deref())?,
        ..Default::default()
    })
}

/// A sample as it grows.
#[derive(Clone, Default)]
pub(super) struct SampleSoFar {
    /// Its text.
    pub text: String,
    /// Number of its tokens, with the one that ended it.
    pub tokens: usize,
    log_prob: f64,
    /// The number of a [`pb::FinishReason`]; `None` while the sample has not ended.
    pub finish_reason: Option<i32>,
}

/// The samples of a prompt.
#[derive(Default)]
pub(super) struct Samples {
    /// In the order of their indices.
    pub samples: Vec<SampleSoFar>,
    /// Name of the weights.
    pub policy_version: String,
    /// The seed.
    pub seed: u64,
    /// Numbers of tokens.
    pub usage: pb::GenerationUsage,
}

impl Samples {
    /// Returns the result as a JSON object.
    fn to_json(&self) -> Map<String, Value> {
        let sample = |s: &SampleSoFar| {
            json!({
                "text": s.text,
                "finish_reason": finish_reason(s.finish_reason),
                "tokens": s.tokens,
                "logprob": s.log_prob,
            })
        };
        let mut object = Map::new();
        let samples: Vec<Value> = self.samples.iter().map(sample).collect();
        object.insert("samples".into(), samples.into());
        object.insert("prompt_tokens".into(), self.usage.prompt_tokens.into());
        object.insert("policy".into(), self.policy_version.clone().into());
        object.insert("seed".into(), self.seed.into());
        object
    }
}

/// Returns the name of a finish reason, `other` for one that only newer servers have, and nothing
/// for a sample that has not ended.
pub(super) fn finish_reason(number: Option<i32>) -> Option<&'static str> {
    Some(match pb::FinishReason::try_from(number?) {
        Ok(pb::FinishReason::Stop) => "stop",
        Ok(pb::FinishReason::Length) => "length",
        Ok(pb::FinishReason::Unspecified) => return None,
        Err(_) => "other",
    })
}

/// The reason why a call about a prompt has no result.
pub(super) enum GenerationFailure {
    /// The server refused the request, or the connection was lost.
    Refused(Box<Status>),
    /// The stream ended too early.
    Cut,
    /// The text could not be printed.
    Output(Failure),
}

impl From<Status> for GenerationFailure {
    fn from(status: Status) -> Self {
        GenerationFailure::Refused(Box::new(status))
    }
}

/// The server's advice for a model without a chat template, and that of the command line.
const PLAIN_PROMPTS: (&str, &str) = (
    "use plain-text prompts and completions",
    "use plain-text prompts (--plain)",
);

impl From<GenerationFailure> for Failure {
    fn from(reason: GenerationFailure) -> Self {
        match reason {
            GenerationFailure::Refused(status) => {
                Failure::from(*status).replacing(PLAIN_PROMPTS.0, PLAIN_PROMPTS.1)
            }
            GenerationFailure::Cut => Failure::Failed(
                "the server ended the stream before the text was complete: repeat the command"
                    .into(),
            ),
            GenerationFailure::Output(failure) => failure,
        }
    }
}

/// The samples of a prompt that has been computed, as they come. Dropping it ends the work of the
/// server.
pub(super) struct SampleStream {
    responses: Streaming<pb::GenerateCompletionsResponse>,
    /// Number of samples.
    samples: usize,
    /// Gets the number of tokens that arrive, if somebody counts them.
    counter: Option<Arc<AtomicU64>>,
}

/// Begins to continue a prompt. Returns when the server has computed it.
///
/// # Errors
/// Returns the server's status if it refuses the request.
pub(super) async fn begin(
    client: &Client,
    request: pb::GenerateCompletionsRequest,
) -> Result<SampleStream, GenerationFailure> {
    let samples = request.samples.max(1) as usize;
    let answer = client.generation().generate_completions(request).await?;
    Ok(SampleStream {
        responses: answer.into_inner(),
        samples,
        counter: None,
    })
}

impl SampleStream {
    /// Reads the samples to their end. `each` gets the new text of a sample.
    ///
    /// # Errors
    /// Returns the failure of the call, or that of `each`.
    pub async fn read(
        mut self,
        mut each: impl FnMut(usize, &str) -> Outcome,
    ) -> Result<Samples, GenerationFailure> {
        let mut result = Samples {
            samples: vec![SampleSoFar::default(); self.samples],
            ..Samples::default()
        };
        while let Some(response) = self.responses.message().await? {
            for delta in response.deltas {
                let Some(sample) = result.samples.get_mut(delta.index as usize) else {
                    continue;
                };
                each(delta.index as usize, &delta.text).map_err(GenerationFailure::Output)?;
                if delta.finish_reason != 0 {
                    sample.finish_reason = Some(delta.finish_reason);
                }
                sample.text.push_str(&delta.text);
                sample.tokens += delta.token_ids.len();
                if let Some(counter) = &self.counter {
                    counter.fetch_add(delta.token_ids.len() as u64, Ordering::Relaxed);
                }
                sample.log_prob += delta
                    .token_logprobs
                    .iter()
                    .map(|l| f64::from(*l))
                    .sum::<f64>();
            }
            result.policy_version = response.policy_version;
            result.seed = response.seed;
            if let Some(usage) = response.usage {
                result.usage = usage;
                return match result.samples.iter().all(|s| s.finish_reason.is_some()) {
                    true => Ok(result),
                    false => Err(GenerationFailure::Cut),
                };
            }
        }
        Err(GenerationFailure::Cut)
    }
}

/// Continues a prompt. `each` gets the new text of a sample.
async fn generate(
    client: &Client,
    request: pb::GenerateCompletionsRequest,
    each: impl FnMut(usize, &str) -> Outcome,
) -> Result<Samples, GenerationFailure> {
    begin(client, request).await?.read(each).await
}

/// Returns a text as it is, or for a terminal a text that cannot control it.
pub(super) fn shown(text: &str) -> Cow<'_, str> {
    match std::io::stdout().is_terminal() {
        true => printable(text),
        false => Cow::Borrowed(text),
    }
}

/// Replaces control characters: a model may write escape sequences.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    let is_harmless = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    match text.chars().all(is_harmless) {
        true => Cow::Borrowed(text),
        false => text
            .chars()
            .map(|c| match is_harmless(c) {
                true => c,
                false => char::REPLACEMENT_CHARACTER,
            })
            .collect(),
    }
}

/// Continues one prompt and prints its text while it comes.
async fn continue_one(
    client: &Client,
    request: pb::GenerateCompletionsRequest,
    format: Output,
) -> Outcome {
    let is_stream = format == Output::Table && request.samples <= 1;
    let progress = WorkProgress::of_task("generating");
    let has_text = Cell::new(false);
    let generating = async {
        let generated = generate(client, request, |_, text| match is_stream {
            true => {
                progress.end();
                has_text.set(true);
                output::write(shown(text).as_bytes())
            }
            false => Ok(()),
        });
        progress.during(generated).await.map_err(Failure::from)
    };
    let generated = unless_interrupted("interrupted", generating).await;
    drop(progress);
    if has_text.get() && matches!(generated, Err(Failure::Interrupted(_))) {
        // The text so far has no line end, and the message gets a line of its own.
        output::line("");
    }
    let samples = generated?;
    if is_stream {
        output::line("");
    } else if format == Output::Table {
        for (i, sample) in samples.samples.iter().enumerate() {
            output::line(&format!("--- sample {i}\n{}", shown(&sample.text)));
        }
    } else {
        output::resource(format, &samples.to_json().into());
    }
    say(&format!(
        "prompt {}, samples {}, seed {}, policy {}",
        counted(samples.usage.prompt_tokens.into(), "token"),
        counted(samples.usage.completion_tokens.into(), "token"),
        samples.seed,
        samples.policy_version
    ));
    Ok(())
}

/// The time for which the prompts of a file are sent again while the server does not answer.
pub(super) struct Patience {
    limit: Duration,
    last_answer: Mutex<Instant>,
    /// Number of tokens that have arrived.
    tokens: Arc<AtomicU64>,
}

impl Patience {
    /// Begins now.
    pub fn new(seconds: u64) -> Self {
        Patience {
            limit: Duration::from_secs(seconds),
            last_answer: Mutex::new(Instant::now()),
            tokens: Arc::default(),
        }
    }

    /// Returns the number of tokens that have arrived, which grows.
    pub fn tokens(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.tokens)
    }

    /// Notes that the server has answered.
    pub fn answered(&self) {
        *self.last_answer() = Instant::now();
    }

    fn last_answer(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.last_answer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        self.last_answer().elapsed() >= self.limit
    }
}

/// Continues a prompt, and sends it again after an error that may pass. The request has a seed, so
/// that the samples do not depend on the number of attempts.
pub(super) async fn continued(
    client: &Client,
    request: pb::GenerateCompletionsRequest,
    patience: &Patience,
) -> Result<Samples, Failure> {
    let call = || generate_patiently(client, request.clone(), patience);
    repeated(patience, call).await
}

/// Continues a prompt once, and notes when the server has answered.
async fn generate_patiently(
    client: &Client,
    request: pb::GenerateCompletionsRequest,
    patience: &Patience,
) -> Result<Samples, GenerationFailure> {
    let mut stream = begin(client, request).await?;
    stream.counter = Some(patience.tokens());
    let answered = |_: usize, _: &str| {
        patience.answered();
        Ok(())
    };
    stream.read(answered).await
}

/// Makes a call, and makes it again after an error that may pass.
pub(super) async fn repeated<T, F>(
    patience: &Patience,
    mut call: impl FnMut() -> F,
) -> Result<T, Failure>
where
    F: Future<Output = Result<T, GenerationFailure>>,
{
    let mut pause = FIRST_PAUSE;
    let mut server_failures = 0;
    loop {
        let reason = match call().await {
            Ok(result) => return Ok(result),
            Err(reason) => reason,
        };
        let asked = match &reason {
            GenerationFailure::Refused(status) => {
                server_failures += u32::from(is_server_failure(status));
                if !is_transient(status.code()) || server_failures == MAX_SERVER_FAILURES {
                    return Err(reason.into());
                }
                tracing::debug!(error = %status, "a prompt is sent again");
                retry_after(status)
            }
            GenerationFailure::Cut => None,
            GenerationFailure::Output(_) => return Err(reason.into()),
        };
        if patience.is_over() {
            let seconds = patience.limit.as_secs();
            let context = format!("no answer for {seconds} s (--retry-timeout)");
            return Err(Failure::from(reason).with_context(&context));
        }
        let wait = match asked {
            Some(asked) => asked.min(LONGEST_ASKED_PAUSE),
            None => pause,
        };
        tokio::time::sleep(wait).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

/// Checks that the checkpoint exists if a policy names a step. Other errors are left to the calls
/// that use it: a caller who may generate need not have the role to read checkpoints.
///
/// # Errors
/// Returns a failure if there is no such checkpoint.
pub(super) async fn check_checkpoint(client: &Client, policy: &str) -> Outcome {
    let step = policy.split_once("/checkpoints/").map(|(_, step)| step);
    // The latest weights of a running job need not have been stored.
    if matches!(step, None | Some("latest" | "best")) {
        return Ok(());
    }
    let request = pb::GetCheckpointRequest {
        name: policy.to_owned(),
    };
    match client.checkpoints().get_checkpoint(request).await {
        Err(status) if is_not_found(&status) => Err(status.into()),
        _ => Ok(()),
    }
}

/// Adds the place of a row to a failure, unless the failure begins with a flag: the flag's value is
/// wrong for every row.
pub(super) fn with_row_place(failure: Failure, place: &str) -> Failure {
    match failure.message().starts_with("--") {
        true => failure,
        false => failure.with_context(place),
    }
}

/// Begins a task for each row, several at a time, and calls `write` with the results in the order
/// of the rows.
///
/// # Errors
/// Returns the first failure, in this order.
pub(super) async fn in_order<R, T, F>(
    rows: Vec<R>,
    mut begin: impl FnMut(R) -> F,
    mut write: impl FnMut(T) -> Outcome,
) -> Outcome
where
    T: Send + 'static,
    F: Future<Output = Result<T, Failure>> + Send + 'static,
{
    let mut waiting = rows.into_iter();
    let mut running = VecDeque::new();
    loop {
        while running.len() < IN_PROGRESS
            && let Some(row) = waiting.next()
        {
            running.push_back(tokio::spawn(begin(row)));
        }
        let Some(task) = running.pop_front() else {
            return Ok(());
        };
        write(task.await??)?;
    }
}

/// Continues the prompts of files, several at a time, and writes the results in their order.
async fn continue_files(
    client: &Client,
    args: &GenerateArgs,
    base: pb::GenerateCompletionsRequest,
) -> Outcome {
    check_checkpoint(client, &base.policy).await?;
    let data = progress::find(&args.data, &args.reading).await?;
    let rows = read(&data, &args.form, &RESULT_COLUMNS)?;
    let total = rows.len();
    let mut results = Results::create(args.out.as_deref(), &data)?;
    let mut written = 0;
    let progress = WorkProgress::prompts("generating", total as u64);
    let patience = Arc::new(Patience::new(args.retries.retry_timeout));
    progress.count_tokens(patience.tokens());
    let title = data.title();
    let work = write_all(client, (&patience, title.as_str()), base, rows, |line| {
        progress.suspend(|| results.add(line))?;
        progress.add(1);
        written += 1;
        Ok(())
    });
    let ended = unless_interrupted("interrupted", progress.during(work)).await;
    drop(progress);
    let tokens = match ended {
        Ok(tokens) => tokens,
        Err(failure) => return Err(results.interrupted(failure, written)),
    };
    results.finish()?;
    say(&format!(
        "{} continued, {}",
        counted(total as u64, "prompt"),
        counted(tokens, "token")
    ));
    Ok(())
}

/// Continues prompts and calls `write` with the line of each. Returns the number of their tokens.
async fn write_all(
    client: &Client,
    (patience, title): (&Arc<Patience>, &str),
    base: pb::GenerateCompletionsRequest,
    rows: Vec<PromptRow>,
    mut write: impl FnMut(&str) -> Outcome,
) -> Result<u64, Failure> {
    let first_seed = base.seed.unwrap_or_else(rand::random);
    let begin = |row: PromptRow| {
        let request = pb::GenerateCompletionsRequest {
            prompt: Some(row.prompt),
            // Rows differ in their random numbers, too.
            seed: Some(first_seed.wrapping_add(row.row - 1)),
            ..base.clone()
        };
        let context = format!("{title}: {}", row.place);
        let (client, patience) = (client.clone(), Arc::clone(patience));
        async move {
            let samples = continued(&client, request, &patience).await;
            let samples = samples.map_err(|failure| with_row_place(failure, &context))?;
            Ok((row.fields, samples))
        }
    };
    let mut tokens = 0;
    in_order(rows, begin, |(mut fields, samples)| {
        tokens += u64::from(samples.usage.completion_tokens);
        fields.extend(samples.to_json());
        write(&format!("{}\n", Value::Object(fields)))
    })
    .await?;
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_cannot_control_the_terminal() {
        let hostile = "a\u{1b}]0;title\u{7}b\r\u{9b}2J\n\tc é";
        assert_eq!(
            printable(hostile),
            "a\u{fffd}]0;title\u{fffd}b\u{fffd}\u{fffd}2J\n\tc é"
        );
        assert!(matches!(printable("a\n é"), Cow::Borrowed(_)));
    }

    #[test]
    fn the_error_of_a_flag_names_no_row() {
        let failed = |message: &str| Failure::Usage(message.to_owned());
        let of_flag = with_row_place(failed("--temperature is -1"), "p.jsonl: row 1");
        assert_eq!(of_flag.message(), "--temperature is -1");
        let of_prompt = with_row_place(failed("prompt has no text"), "p.jsonl: row 1");
        assert_eq!(of_prompt.message(), "p.jsonl: row 1: prompt has no text");
    }

    #[test]
    fn a_sample_that_has_not_ended_has_no_finish_reason() {
        let names = [None, Some(0), Some(1), Some(2), Some(77)].map(finish_reason);
        let expected = [None, None, Some("stop"), Some("length"), Some("other")];
        assert_eq!(names, expected);
    }
}
