//! `bradley generate`: continues a prompt, or the prompts of a file.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write};
use std::path::Path;

use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;

use super::args::{GenerateArgs, Output};
use super::failure::{Failure, Outcome};
use super::output;
use super::policy_names::PolicyNames;
use super::progress::{WorkProgress, say};
use super::remote::connect;
use super::scoring_flags::{template_arguments, tools};
use crate::domain::message::kind;
use crate::rpc::client::Client;
use crate::rpc::pb;

/// Number of prompts of a file that are continued at the same time.
const IN_PROGRESS: usize = 8;

pub(super) async fn run(args: GenerateArgs, output: Output) -> Outcome {
    let base = request(&args)?;
    let client = connect(&args.server.target()).await?;
    let names = PolicyNames::of(&client).await?;
    let base = pb::GenerateCompletionsRequest {
        policy: names.complete("--policy", &args.policy).await?,
        ..base
    };
    match (&args.prompt, &args.data) {
        (Some(prompt), _) => {
            let request = pb::GenerateCompletionsRequest {
                prompt: Some(prompt_of(&Value::from(prompt.as_str()), &args).map_err(usage)?),
                ..base
            };
            one(&client, request, output).await
        }
        (None, Some(path)) => all(&client, &args, base, path).await,
        (None, None) => Err(Failure::Usage(
            "give a prompt with --prompt TEXT, or a file of prompts with --data FILE".into(),
        )),
    }
}

fn usage(problem: String) -> Failure {
    Failure::Usage(format!("--prompt: {problem}"))
}

/// Returns the request without policy and prompt.
fn request(args: &GenerateArgs) -> Result<pb::GenerateCompletionsRequest, Failure> {
    Ok(pb::GenerateCompletionsRequest {
        samples: args.samples,
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        logprobs: true,
        chat_template_kwargs_json: template_arguments(args.template_args.as_deref())?,
        tools_json: tools(args.tools.as_deref())?,
        ..Default::default()
    })
}

/// Converts a prompt: a text, which is the message of a user unless `--plain` is given, or a list
/// of messages.
fn prompt_of(prompt: &Value, args: &GenerateArgs) -> Result<pb::Text, String> {
    let message = |role: &str, content: &str| pb::Message {
        role: role.to_owned(),
        content: content.to_owned(),
        ..Default::default()
    };
    let mut messages: Vec<pb::Message> = args
        .system
        .iter()
        .map(|system| message("system", system))
        .collect();
    match prompt {
        Value::String(text) if args.plain => {
            return Ok(pb::Text {
                form: Some(pb::text::Form::Plain(text.clone())),
            });
        }
        Value::String(text) => messages.push(message("user", text)),
        Value::Array(all) if !args.plain => {
            messages.extend(all.iter().map(|fields| pb::Message {
                fields_json: fields.to_string(),
                ..Default::default()
            }));
        }
        Value::Array(_) => return Err("has messages, but --plain is given: leave it out".into()),
        other => {
            return Err(format!(
                "is {}: it must be a text or a list of messages",
                kind(other)
            ));
        }
    }
    Ok(pb::Text {
        form: Some(pb::text::Form::Chat(pb::MessageList { messages })),
    })
}

/// A sample as it grows.
#[derive(Clone, Default)]
struct SampleSoFar {
    text: String,
    tokens: usize,
    log_prob: f64,
    finish_reason: pb::FinishReason,
}

/// The samples of a prompt.
#[derive(Default)]
struct Samples {
    samples: Vec<SampleSoFar>,
    policy_version: String,
    seed: u64,
    usage: pb::GenerationUsage,
}

impl Samples {
    /// Returns the result as a JSON object.
    fn to_json(&self) -> Map<String, Value> {
        let sample = |s: &SampleSoFar| {
            json!({
                "text": s.text,
                "finish_reason": match s.finish_reason {
                    pb::FinishReason::Length => "length",
                    pb::FinishReason::Stop | pb::FinishReason::Unspecified => "stop",
                },
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

/// Continues a prompt. `each` gets the new text of a sample.
async fn generate(
    client: &Client,
    request: pb::GenerateCompletionsRequest,
    mut each: impl FnMut(usize, &str) -> Outcome,
) -> Result<Samples, Failure> {
    let wanted = request.samples.max(1) as usize;
    let mut result = Samples {
        samples: vec![SampleSoFar::default(); wanted],
        ..Samples::default()
    };
    let mut stream = client
        .generation()
        .generate_completions(request)
        .await?
        .into_inner();
    while let Some(response) = stream.message().await? {
        for delta in response.deltas {
            let Some(sample) = result.samples.get_mut(delta.index as usize) else {
                continue;
            };
            each(delta.index as usize, &delta.text)?;
            sample.finish_reason = delta.finish_reason();
            sample.text.push_str(&delta.text);
            sample.tokens += delta.token_ids.len();
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
            return Ok(result);
        }
    }
    Err(Failure::Failed(
        "the server ended the stream before the text was complete: repeat the command".into(),
    ))
}

/// Continues one prompt and prints its text while it comes.
async fn one(client: &Client, request: pb::GenerateCompletionsRequest, format: Output) -> Outcome {
    let is_stream = format == Output::Table && request.samples <= 1;
    let progress = WorkProgress::of_task("generating");
    let generated = generate(client, request, |_, text| match is_stream {
        true => {
            progress.end();
            output::write(text.as_bytes())
        }
        false => Ok(()),
    });
    let samples = progress.during(generated).await?;
    drop(progress);
    if is_stream {
        output::line("");
    } else if format == Output::Table {
        for (i, sample) in samples.samples.iter().enumerate() {
            output::line(&format!("--- sample {i}\n{}", sample.text));
        }
    } else {
        output::resource(format, &samples.to_json().into());
    }
    say(&format!(
        "{} and {} tokens, seed {}, {}",
        samples.usage.prompt_tokens,
        samples.usage.completion_tokens,
        samples.seed,
        samples.policy_version
    ));
    Ok(())
}

/// A line of the file of prompts.
struct PromptRow {
    row: u64,
    /// The line's fields, which the result repeats.
    fields: Map<String, Value>,
    prompt: pb::Text,
}

/// A row with its fields and the task that continues its prompt.
type RunningRow = (
    u64,
    Map<String, Value>,
    JoinHandle<Result<Samples, Failure>>,
);

/// Reads the prompts of a JSONL file. Every line has a text or messages in the column `prompt`, or
/// messages in `messages`.
fn read(path: &Path, args: &GenerateArgs) -> Result<Vec<PromptRow>, Failure> {
    let failed = |problem: String| Failure::Failed(format!("{}: {problem}", path.display()));
    let file = File::open(path).map_err(|e| failed(e.to_string()))?;
    let mut rows = Vec::new();
    for (row, line) in (1..).zip(BufReader::new(file).lines()) {
        let line = line.map_err(|e| failed(format!("row {row}: {e}")))?;
        if line.trim().is_empty() {
            continue;
        }
        let fields: Map<String, Value> = serde_json::from_str(&line)
            .map_err(|e| failed(format!("row {row}: {e}; give one JSON object a line")))?;
        let Some(prompt) = fields.get("prompt").or_else(|| fields.get("messages")) else {
            return Err(failed(format!(
                "row {row} has no column prompt: add it, a text or a list of messages"
            )));
        };
        let prompt = prompt_of(prompt, args)
            .map_err(|problem| failed(format!("row {row}: prompt {problem}")))?;
        rows.push(PromptRow {
            row,
            fields,
            prompt,
        });
    }
    Ok(rows)
}

/// Continues the prompts of a file, several at a time, and writes the results in their order.
async fn all(
    client: &Client,
    args: &GenerateArgs,
    base: pb::GenerateCompletionsRequest,
    path: &Path,
) -> Outcome {
    let rows = read(path, args)?;
    let unwritten =
        |out: &Path, e: std::io::Error| Failure::Failed(format!("--out {}: {e}", out.display()));
    let mut file = match &args.out {
        Some(out) => Some(File::create(out).map_err(|e| unwritten(out, e))?),
        None => None,
    };
    let total = rows.len();
    let mut waiting = rows.into_iter();
    let mut running: VecDeque<RunningRow> = VecDeque::new();
    let progress = WorkProgress::prompts("generating", total as u64);
    let work = async {
        let mut tokens = 0;
        loop {
            while running.len() < IN_PROGRESS
                && let Some(PromptRow {
                    row,
                    fields,
                    prompt,
                }) = waiting.next()
            {
                let request = pb::GenerateCompletionsRequest {
                    prompt: Some(prompt),
                    // Rows differ in their random numbers, too.
                    seed: base.seed.map(|seed| seed.wrapping_add(row - 1)),
                    ..base.clone()
                };
                let client = client.clone();
                let task =
                    tokio::spawn(async move { generate(&client, request, |_, _| Ok(())).await });
                running.push_back((row, fields, task));
            }
            let Some((row, mut fields, task)) = running.pop_front() else {
                return Ok::<u64, Failure>(tokens);
            };
            let samples = task
                .await
                .map_err(|e| Failure::Failed(format!("row {row}: {e}")))?
                .map_err(|failure| {
                    failure.with_context(&format!("{}: row {row}", path.display()))
                })?;
            tokens += u64::from(samples.usage.completion_tokens);
            fields.extend(samples.to_json());
            let line = format!("{}\n", Value::Object(fields));
            match (&mut file, &args.out) {
                (Some(file), Some(out)) => file
                    .write_all(line.as_bytes())
                    .map_err(|e| unwritten(out, e))?,
                _ => progress.suspend(|| output::write(line.as_bytes()))?,
            }
            progress.add(1);
        }
    };
    let tokens = progress.during(work).await?;
    drop(progress);
    if let (Some(file), Some(out)) = (&file, &args.out) {
        file.sync_all().map_err(|e| unwritten(out, e))?;
    }
    say(&format!("{total} prompts continued, {tokens} tokens"));
    Ok(())
}
