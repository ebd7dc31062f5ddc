//! `bradley pairs`: makes preference pairs from a policy's own answers.
//!
//! Each prompt gets samples, which the rewards of a judge rank; the best and the worst become a
//! pair. Results are stored prompt by prompt, so that the same command continues after an
//! interruption.

mod progress_file;
mod rank;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use self::progress_file::{Outcomes, PromptOutcome, check_output};
pub(super) use self::progress_file::{PairsReport, differing};
use self::rank::{Candidate, Dropped, NoPair, choose};
use super::args::{Output, PairMakingArgs, PairsArgs};
use super::failure::{Failure, Outcome, unless_interrupted};
use super::generate::{
    GenerationFailure, Patience, PromptRow, ResultColumns, SampleSoFar, Samples, check_checkpoint,
    continued, in_order, read, repeated, request, with_row_place,
};
use super::output;
use super::policy_names::PolicyNames;
use super::progress::{self, WorkProgress, say, waiting, warn};
use super::remote::connect;
use crate::rpc::client::{Client, are_answers_refused, is_content_refused};
use crate::rpc::pb;

/// Columns of a prompt's row that its pair does not have. Those of a pair are left out, so that
/// pairs can be prompts. The others are refused: the model would read them in training, and the
/// samples do not depend on them.
pub(super) const RESULT_COLUMNS: ResultColumns = ResultColumns {
    refused: &["tools", "chat_template_kwargs", "system"],
    left_out: &[
        "chosen",
        "rejected",
        "generated",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "chosen_logps",
        "rejected_logps",
    ],
};

/// Maximum number of different warnings of a run.
const MAX_WARNINGS: usize = 10;

pub(super) async fn run(args: PairsArgs, format: Output) -> Outcome {
    let making = &args.making;
    let base = request(&making.form, &making.sampling, making.samples)?;
    if making.data.iter().any(|file| Path::new(file) == args.out) {
        return Err(would_replace(&args.out));
    }
    check_output(&args.out)?;
    let client = connect(&args.server.target()).await?;
    let names = PolicyNames::of(&client).await?;
    let given = PairPolicies::complete(&names, making).await?;
    let data = progress::find(&making.data, &making.reading).await?;
    if data.contains(&args.out) {
        return Err(would_replace(&args.out));
    }
    let rows = read(&data, &making.form, &RESULT_COLUMNS)?;
    let maker = PairMaker::new(&client, making, base, given, args.retries.retry_timeout);
    let title = data.title();
    let work = make(&maker, (title.as_str(), "making pairs"), rows, &args.out);
    let report = unless_interrupted("interrupted; the same command continues", work).await?;
    match format {
        // A line for each part: the sentence is longer than a terminal is wide.
        Output::Table => output::say_wrapped(&report.sentence().replace("; ", "\n")),
        format => output::resource(format, &report.to_json()),
    }
    if report.has_pairs() {
        return Ok(());
    }
    // An empty file is of no use to training.
    std::fs::remove_file(&args.out)
        .map_err(|e| Failure::Failed(format!("--out {}: {e}", args.out.display())))?;
    Err(Failure::Failed(
        "no prompt has a pair: lower --min-margin, raise --samples or --temperature, add \
         --keep-cut if --max-tokens cuts the answers off, raise --max-length if they are too long \
         for the judge, or name another --judge"
            .to_owned(),
    ))
}

fn would_replace(out: &Path) -> Failure {
    Failure::Usage(format!(
        "--out {} would replace a file of --data: name another file",
        out.display()
    ))
}

/// The policies that make pairs.
#[derive(Clone, Debug)]
pub(super) struct PairPolicies {
    /// Answers the prompts.
    pub policy: String,
    /// Ranks the answers; the policy if it is `None`.
    pub judge: Option<String>,
    /// The judge's reference; empty for that of the judge's job.
    pub reference: String,
}

impl PairPolicies {
    /// Completes the names of the flags.
    ///
    /// # Errors
    /// The errors of [`PolicyNames::complete`].
    pub async fn complete(names: &PolicyNames, args: &PairMakingArgs) -> Result<Self, Failure> {
        let policy = names.complete("--policy", &args.policy).await?;
        let judge = match &args.judge {
            Some(judge) => Some(names.complete("--judge", judge).await?),
            None => None,
        };
        let reference = match &args.reference {
            Some(reference) => names.complete("--reference", reference).await?,
            None => String::new(),
        };
        Ok(PairPolicies {
            policy,
            judge,
            reference,
        })
    }

    /// Returns the name of the judge.
    pub fn judge(&self) -> &str {
        self.judge.as_deref().unwrap_or(&self.policy)
    }
}

/// Makes the pairs of prompts and writes them to `out`, or continues an interrupted run. `title`
/// names the prompts in errors, `what` the work in the progress.
///
/// # Errors
/// Returns a failure if a call about a prompt fails, the weights change meanwhile, or a file cannot
/// be read or written.
pub(super) async fn make(
    maker: &Arc<PairMaker>,
    (title, what): (&str, &str),
    rows: Vec<PromptRow>,
    out: &Path,
) -> Result<PairsReport, Failure> {
    check_output(out)?;
    if let Some(first) = rows.first() {
        waiting("waiting for the server", maker.check(&first.prompt)).await?;
    }
    let mut outcomes = Outcomes::open(out, &maker.settings(&rows))?;
    let total = rows.len();
    let done = outcomes.done();
    if done > 0 {
        say(&format!("{done} of {total} prompts were done before"));
    }
    let progress = WorkProgress::prompts(what, total as u64);
    progress.start_at(done as u64);
    progress.count_tokens(maker.patience.tokens());
    let work = make_all(maker, title, rows, &mut outcomes, &progress);
    progress.during(work).await?;
    drop(progress);
    outcomes.finish()
}

/// Makes the pairs of the prompts that have no outcome yet.
async fn make_all(
    maker: &Arc<PairMaker>,
    title: &str,
    rows: Vec<PromptRow>,
    outcomes: &mut Outcomes,
    progress: &WorkProgress,
) -> Outcome {
    let first_seed = outcomes.seed();
    let left = rows.into_iter().skip(outcomes.done()).collect();
    let begin = |row: PromptRow| {
        let context = format!("{title}: {}", row.place);
        let maker = Arc::clone(maker);
        let seed = first_seed.wrapping_add(row.row - 1);
        async move {
            let made = maker.make(row, seed).await;
            made.map_err(|failure| with_row_place(failure, &context))
        }
    };
    let mut warned = HashSet::new();
    in_order(left, begin, |(outcome, warnings)| {
        for warning in warnings {
            if warned.len() < MAX_WARNINGS && warned.insert(warning.clone()) {
                progress.suspend(|| warn(&warning));
            }
        }
        outcomes.add(outcome)?;
        progress.add(1);
        Ok(())
    })
    .await
}

/// Makes pairs by calls of a server.
pub(super) struct PairMaker {
    client: Client,
    /// The request of a prompt, without it and its seed.
    generation: pb::GenerateCompletionsRequest,
    scoring: pb::ScoringOptions,
    patience: Patience,
    system: Option<String>,
    plain: bool,
    keep_cut: bool,
    length_penalty: f64,
    min_margin: f64,
}

impl PairMaker {
    /// Makes pairs with `policies`, whose names are whole. `base` is the request of a prompt,
    /// without the prompt and the policy.
    pub fn new(
        client: &Client,
        args: &PairMakingArgs,
        base: pb::GenerateCompletionsRequest,
        policies: PairPolicies,
        retry_timeout: u64,
    ) -> Arc<Self> {
        let scoring = pb::ScoringOptions {
            policy: policies.judge().to_owned(),
            reference: policies.reference,
            beta: args.beta,
            max_length: args.max_length,
            tools_json: base.tools_json.clone(),
            chat_template_kwargs_json: base.chat_template_kwargs_json.clone(),
            ..Default::default()
        };
        Arc::new(PairMaker {
            client: client.clone(),
            generation: pb::GenerateCompletionsRequest {
                policy: policies.policy,
                ..base
            },
            scoring,
            patience: Patience::new(retry_timeout),
            system: args.form.system.clone(),
            plain: args.form.plain,
            keep_cut: args.keep_cut,
            length_penalty: args.length_penalty,
            min_margin: args.min_margin,
        })
    }

    /// Checks the policy's checkpoint, the judge, its reference and the flags of the rewards before
    /// anything is generated. Errors of the prompt are left to its own turn.
    ///
    /// # Errors
    /// Returns a failure if the server refuses one of them, or does not answer for long.
    async fn check(&self, prompt: &pb::Text) -> Outcome {
        check_checkpoint(&self.client, &self.generation.policy).await?;
        let request = pb::ScoreCompletionsRequest {
            options: Some(self.scoring.clone()),
            prompt: Some(prompt.clone()),
            completions: vec![answer("a", is_chat(prompt))],
        };
        let call = || async {
            let mut service = self.client.scoring();
            let answer = match service.score_completions(request.clone()).await {
                Ok(answer) => Some(answer.into_inner()),
                Err(status) if is_content_refused(&status) => None,
                Err(status) => return Err(GenerationFailure::from(status)),
            };
            self.patience.answered();
            Ok(answer)
        };
        match repeated(&self.patience, call).await? {
            Some(scored) => check_fixed([&scored.policy_version, &scored.reference_version]),
            None => Ok(()),
        }
    }

    /// Returns everything that the pairs depend on, besides the weights and a seed that is chosen
    /// at random.
    pub fn settings(&self, rows: &[PromptRow]) -> Value {
        let mut prompts = blake3::Hasher::new();
        for row in rows {
            prompts.update(Value::Object(row.fields.clone()).to_string().as_bytes());
            prompts.update(format!("{:?}\n", row.prompt).as_bytes());
        }
        let (generation, scoring) = (&self.generation, &self.scoring);
        json!({
            "prompts": prompts.finalize().to_hex().as_str(),
            "system": self.system,
            "plain": self.plain,
            "policy": generation.policy,
            "samples": generation.samples,
            "max_tokens": generation.max_tokens,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "top_k": generation.top_k,
            "seed": generation.seed,
            "stop": generation.stop,
            "ignore_eos": generation.ignore_eos,
            "tools": generation.tools_json,
            "template_args": generation.chat_template_kwargs_json,
            "judge": scoring.policy,
            "reference": scoring.reference,
            "beta": scoring.beta,
            "max_length": scoring.max_length,
            "keep_cut": self.keep_cut,
            "length_penalty": self.length_penalty,
            "min_margin": self.min_margin,
        })
    }

    /// Returns the outcome of a prompt, and warnings: those of the server about the judge, and one
    /// if samples cannot be scored.
    async fn make(
        &self,
        row: PromptRow,
        seed: u64,
    ) -> Result<(PromptOutcome, Vec<String>), Failure> {
        let request = pb::GenerateCompletionsRequest {
            prompt: Some(row.prompt.clone()),
            seed: Some(seed),
            ..self.generation.clone()
        };
        let samples = continued(&self.client, request, &self.patience).await?;
        let tokens = u64::from(samples.usage.completion_tokens);
        let texts = self.usable(&samples);
        let dropped = |reason: Dropped| PromptOutcome {
            policy: samples.policy_version.clone(),
            judge: None,
            tokens,
            result: Err(NoPair::from(reason)),
        };
        if texts.len() < 2 {
            return Ok((dropped(Dropped::FewAnswers), Vec::new()));
        }
        let scored = self.score(&row.prompt, &texts).await?;
        let (candidates, refused) = candidates(&scored, &texts);
        let mut warnings = scored.warnings.clone();
        warnings.extend(refused.map(|reason| format!("some samples cannot be scored: {reason}")));
        let chosen = choose(&candidates, self.length_penalty, self.min_margin);
        let result = chosen.map(|pair| {
            let (best, worst) = (&candidates[pair.best], &candidates[pair.worst]);
            let mut fields = row.fields;
            fields.remove("messages");
            fields.insert("prompt".into(), prompt_json(&row.prompt));
            let is_chat = is_chat(&row.prompt);
            fields.insert("chosen".into(), answer_json(best.text, is_chat));
            fields.insert("rejected".into(), answer_json(worst.text, is_chat));
            for (column, text) in [
                ("tools", &self.generation.tools_json),
                (
                    "chat_template_kwargs",
                    &self.generation.chat_template_kwargs_json,
                ),
            ] {
                // The server has accepted this JSON.
                if let Ok(value) = serde_json::from_str::<Value>(text) {
                    fields.insert(column.into(), value);
                }
            }
            let generated = json!({
                "policy": samples.policy_version,
                "judge": scored.policy_version,
                "reference": scored.reference_version,
                "seed": seed,
                "samples": samples.samples.len(),
                "different_samples": candidates.len(),
                "margin": pair.margin,
                "chosen_reward": best.reward,
                "rejected_reward": worst.reward,
                "chosen_tokens": best.tokens,
                "rejected_tokens": worst.tokens,
            });
            fields.insert("generated".into(), generated);
            fields
        });
        let outcome = PromptOutcome {
            policy: samples.policy_version.clone(),
            judge: Some(format!(
                "{} {}",
                scored.policy_version, scored.reference_version
            )),
            tokens,
            result,
        };
        Ok((outcome, warnings))
    }

    /// Returns the different texts of samples that can be answers, in their order.
    fn usable(&self, samples: &Samples) -> Vec<String> {
        let cut = pb::FinishReason::Length as i32;
        let mut texts: Vec<String> = Vec::new();
        for sample in &samples.samples {
            let is_whole = self.keep_cut || sample.finish_reason != Some(cut);
            if is_whole && !sample.text.trim().is_empty() && !texts.contains(&sample.text) {
                texts.push(sample.text.clone());
            }
        }
        texts
    }

    /// Returns the answer of a policy to a prompt without any randomness.
    ///
    /// # Errors
    /// Returns a failure if the server refuses the call, or does not answer for long.
    pub async fn greedy(&self, prompt: &pb::Text, policy: &str) -> Result<SampleSoFar, Failure> {
        let request = pb::GenerateCompletionsRequest {
            policy: policy.to_owned(),
            prompt: Some(prompt.clone()),
            samples: 1,
            temperature: Some(0.0),
            top_p: None,
            top_k: None,
            seed: Some(0),
            ..self.generation.clone()
        };
        let samples = continued(&self.client, request, &self.patience).await?;
        Ok(samples.samples.into_iter().next().unwrap_or_default())
    }

    /// Returns the judge's rewards of answers, lowered by the length penalty as for the ranking.
    /// Empty answers and those that cannot be scored whole have none.
    ///
    /// # Errors
    /// Returns a failure if the server refuses the call, or does not answer for long.
    pub async fn rewards(
        &self,
        prompt: &pb::Text,
        texts: &[String],
    ) -> Result<Vec<Option<f64>>, Failure> {
        let is_blank = |text: &str| text.trim().is_empty();
        let written: Vec<String> = texts.iter().filter(|t| !is_blank(t)).cloned().collect();
        if written.is_empty() {
            return Ok(vec![None; texts.len()]);
        }
        let scored = self.score(prompt, &written).await?;
        let mut results = scored.results.iter();
        let mut reward = || match &results.next()?.result {
            Some(pb::completion_result::Result::Score(score)) if !score.truncated => {
                Some(score.reward - self.length_penalty * f64::from(score.tokens))
            }
            _ => None,
        };
        let rewards = texts.iter().map(|text| match is_blank(text) {
            true => None,
            false => reward(),
        });
        Ok(rewards.collect())
    }

    /// Returns the judge's scores of answers. If the server refuses to score so many at a time,
    /// each half is a call of its own: the score of an answer does not depend on the others.
    async fn score(&self, prompt: &pb::Text, texts: &[String]) -> Result<SampleScores, Failure> {
        let mut all: Option<SampleScores> = None;
        // The next part is the last one.
        let mut waiting = vec![texts];
        while let Some(part) = waiting.pop() {
            let Some(scored) = self.score_part(prompt, part).await? else {
                let (first, second) = part.split_at(part.len() / 2);
                waiting.push(second);
                waiting.push(first);
                continue;
            };
            match &mut all {
                Some(all) => all.extend(scored)?,
                None => all = Some(SampleScores::of(scored)),
            }
        }
        Ok(all.unwrap_or_default())
    }

    /// Scores answers in one call. The result is `None` if they are too many for it.
    async fn score_part(
        &self,
        prompt: &pb::Text,
        texts: &[String],
    ) -> Result<Option<pb::ScoreCompletionsResponse>, Failure> {
        let is_chat = is_chat(prompt);
        let request = pb::ScoreCompletionsRequest {
            options: Some(self.scoring.clone()),
            prompt: Some(prompt.clone()),
            completions: texts.iter().map(|text| answer(text, is_chat)).collect(),
        };
        let may_be_halved = texts.len() > 1;
        let call = || async {
            let mut service = self.client.scoring();
            let answer = service.score_completions(request.clone()).await;
            let answer = match answer {
                Ok(answer) => Some(answer.into_inner()),
                Err(status) if may_be_halved && are_answers_refused(&status) => None,
                Err(status) => return Err(GenerationFailure::from(status)),
            };
            self.patience.answered();
            Ok(answer)
        };
        let scored = repeated(&self.patience, call).await?;
        if let Some(scored) = &scored {
            check_fixed([&scored.policy_version, &scored.reference_version])?;
        }
        Ok(scored)
    }
}

/// Checks that weights do not change. The current weights of a running job have one name, which
/// does not change with its steps.
fn check_fixed(versions: [&String; 2]) -> Outcome {
    for version in versions {
        if version.ends_with("/checkpoints/latest")
            || version.ends_with("/checkpoints/latest/reference")
        {
            return Err(Failure::Usage(format!(
                "the rewards need weights that do not change, but {version} is training: name a \
                 step instead of latest, or wait until the job has ended"
            )));
        }
    }
    Ok(())
}

/// Scores of the answers to a prompt, from one call or several.
#[derive(Default)]
struct SampleScores {
    /// In the order of the answers.
    results: Vec<pb::CompletionResult>,
    /// Name of the judge's weights.
    policy_version: String,
    /// Name of the reference's weights.
    reference_version: String,
    /// The server's warnings.
    warnings: Vec<String>,
}

impl SampleScores {
    fn of(scored: pb::ScoreCompletionsResponse) -> Self {
        SampleScores {
            results: scored.results,
            policy_version: scored.policy_version,
            reference_version: scored.reference_version,
            warnings: scored.warnings,
        }
    }

    /// Adds the scores of the next answers, which must be of the same weights.
    fn extend(&mut self, scored: pb::ScoreCompletionsResponse) -> Outcome {
        for (known, version) in [
            (&self.policy_version, &scored.policy_version),
            (&self.reference_version, &scored.reference_version),
        ] {
            if known != version {
                return Err(Failure::Failed(format!(
                    "the weights of the judge or its reference have changed between two answers \
                     ({known}, now {version}): name a step instead of latest"
                )));
            }
        }
        self.results.extend(scored.results);
        Ok(())
    }
}

/// Returns the samples that were scored whole, and a reason in the words of the flags if one was
/// not.
fn candidates<'a>(
    scored: &SampleScores,
    texts: &'a [String],
) -> (Vec<Candidate<'a>>, Option<String>) {
    let mut candidates = Vec::new();
    let mut refused: Option<String> = None;
    for (result, text) in scored.results.iter().zip(texts) {
        match &result.result {
            Some(pb::completion_result::Result::Score(score)) if !score.truncated => {
                candidates.push(Candidate {
                    text,
                    reward: score.reward,
                    tokens: score.tokens,
                });
            }
            Some(pb::completion_result::Result::Score(_)) => {
                refused
                    .get_or_insert_with(|| "with the prompt they exceed --max-length".to_owned());
            }
            Some(pb::completion_result::Result::Error(status)) => {
                refused.get_or_insert_with(|| reason_in_flags(&status.message));
            }
            None => {}
        }
    }
    (candidates, refused)
}

/// Returns the server's reason without the field that it begins with, and with the flag's name.
fn reason_in_flags(message: &str) -> String {
    let reason = match message.split_once(' ') {
        Some((field, rest)) if field == "prompt" || field.starts_with("completions[") => rest,
        _ => message,
    };
    reason.replace("max_length", "--max-length")
}

fn is_chat(prompt: &pb::Text) -> bool {
    matches!(prompt.form, Some(pb::text::Form::Chat(_)))
}

/// Returns a sample as an answer to score.
fn answer(text: &str, is_chat: bool) -> pb::Text {
    let form = match is_chat {
        true => pb::text::Form::Chat(pb::MessageList {
            messages: vec![pb::Message {
                role: "assistant".into(),
                content: text.to_owned(),
                ..Default::default()
            }],
        }),
        false => pb::text::Form::Plain(text.to_owned()),
    };
    pb::Text { form: Some(form) }
}

/// Returns a sample as a row has it.
fn answer_json(text: &str, is_chat: bool) -> Value {
    match is_chat {
        true => json!([{"role": "assistant", "content": text}]),
        false => text.into(),
    }
}

/// Returns a prompt as a row has it.
pub(super) fn prompt_json(prompt: &pb::Text) -> Value {
    match &prompt.form {
        Some(pb::text::Form::Chat(list)) => list
            .messages
            .iter()
            .map(|message| {
                // Messages of rows are whole JSON objects, those of flags have role and content.
                serde_json::from_str::<Map<String, Value>>(&message.fields_json).map_or_else(
                    |_| json!({"role": message.role, "content": message.content}),
                    Value::Object,
                )
            })
            .collect(),
        Some(pb::text::Form::Plain(text)) => text.as_str().into(),
        None => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(policy: &str, number: usize) -> pb::ScoreCompletionsResponse {
        pb::ScoreCompletionsResponse {
            results: vec![pb::CompletionResult::default(); number],
            policy_version: policy.to_owned(),
            reference_version: "r".to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn the_reason_why_an_answer_has_no_score_names_the_flag() {
        assert_eq!(
            reason_in_flags("prompt the prompt alone has 9 tokens, max_length is 8"),
            "the prompt alone has 9 tokens, --max-length is 8"
        );
        assert_eq!(reason_in_flags("completions[1] has no text"), "has no text");
        assert_eq!(reason_in_flags("the device is full"), "the device is full");
    }

    #[test]
    fn scores_of_several_calls_are_of_the_same_weights() {
        let mut all = SampleScores::of(scored("p", 2));
        all.extend(scored("p", 3)).unwrap();
        assert_eq!(all.results.len(), 5);
        let e = all.extend(scored("q", 1)).unwrap_err();
        assert!(e.message().contains("(p, now q)"), "{}", e.message());
    }
}
