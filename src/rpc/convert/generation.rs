//! Converts generation requests and their answers.

use tonic::Status;

use super::scoring::text;
use super::{finish, json};
use crate::domain::message::TemplateArguments;
use crate::domain::names;
use crate::domain::violation::{Violations, quoted};
use crate::engine::api::GenerationEnd;
use crate::infer::generate::{LogProbOptions, SamplingOptions};
use crate::rpc::pb;
use crate::rpc::status::{bad_request, status};
use crate::service::generation::{
    GenerateOptions, GeneratedPart, GenerationPrompt, LikelyToken, PromptPart,
};

/// Maximum number of samples of a request.
const MAX_SAMPLES: u32 = 64;
/// Number of tokens of a sample if the request does not limit them.
const DEFAULT_MAX_TOKENS: usize = 256;
/// Maximum number of stop texts.
const MAX_STOP_TEXTS: usize = 16;
/// Maximum size of a stop text, in bytes.
const MAX_STOP_BYTES: usize = 256;
/// Maximum number of stop tokens.
const MAX_STOP_TOKENS: usize = 64;
/// Maximum number of likely tokens at each place.
const MAX_TOP_LOGPROBS: u32 = 20;
/// Highest temperature.
const MAX_TEMPERATURE: f64 = 100.0;
/// Minimum temperature above 0. Logits divided by a smaller one may overflow.
const MIN_TEMPERATURE: f64 = 1e-4;
/// Minimum of top_p. A smaller one may round to 0.
const MIN_TOP_P: f64 = 1e-6;

/// Converts a request. The second value is true if it wants the log-probs of the tokens.
pub(in crate::rpc) fn request(
    r: pb::GenerateCompletionsRequest,
) -> Result<(GenerateOptions, bool), Status> {
    let mut bad = Violations::default();
    let policy = names::parse_policy(&r.policy);
    if policy.is_none() {
        bad.push(
            "policy",
            format!(
                "is {}: it must look like models/ID or trainingJobs/ID/checkpoints/STEP",
                quoted(&r.policy)
            ),
        );
    }
    if r.samples > MAX_SAMPLES {
        bad.push(
            "samples",
            format!("is {}: at most {MAX_SAMPLES} are allowed", r.samples),
        );
    }
    let temperature = r.temperature.unwrap_or(1.0);
    if temperature != 0.0 && !(MIN_TEMPERATURE..=MAX_TEMPERATURE).contains(&temperature) {
        bad.push(
            "temperature",
            format!(
                "is {temperature}: it must be 0 or lie in {MIN_TEMPERATURE}..={MAX_TEMPERATURE}"
            ),
        );
    }
    if let Some(p) = r.top_p.filter(|p| !(MIN_TOP_P..=1.0).contains(p)) {
        bad.push("top_p", format!("is {p}: it must lie in {MIN_TOP_P}..=1"));
    }
    if r.top_k == Some(0) {
        bad.push("top_k", "is 0: leave it out for all tokens");
    }
    if r.stop.len() > MAX_STOP_TEXTS {
        bad.push(
            "stop",
            format!("has {} texts: {MAX_STOP_TEXTS} are the limit", r.stop.len()),
        );
    }
    for (i, stop) in r.stop.iter().enumerate() {
        if stop.is_empty() || stop.len() > MAX_STOP_BYTES {
            let problem = format!(
                "has {} bytes: it must have 1 to {MAX_STOP_BYTES}",
                stop.len()
            );
            bad.push(format!("stop[{i}]"), problem);
        }
    }
    if r.stop_token_ids.len() > MAX_STOP_TOKENS {
        bad.push(
            "stop_token_ids",
            format!(
                "has {} ids: {MAX_STOP_TOKENS} are the limit",
                r.stop_token_ids.len()
            ),
        );
    }
    if r.top_logprobs > MAX_TOP_LOGPROBS {
        bad.push(
            "top_logprobs",
            format!(
                "is {}: at most {MAX_TOP_LOGPROBS} are allowed",
                r.top_logprobs
            ),
        );
    }
    if r.top_logprobs > 0 && !r.logprobs && !r.prompt_logprobs {
        let problem = "has no meaning without log-probs: set logprobs or prompt_logprobs";
        bad.push("top_logprobs", problem);
    }
    if r.prompt.is_some() && !r.prompt_token_ids.is_empty() {
        let problem = "is set together with prompt: give one of them";
        bad.push("prompt_token_ids", problem);
    }
    let arguments = json::arguments(
        "",
        r.tools,
        r.tools_json,
        r.chat_template_kwargs,
        &r.chat_template_kwargs_json,
    )
    .unwrap_or_else(|(field, reason)| {
        bad.push(field.trim_start_matches('.').to_owned(), reason);
        TemplateArguments::default()
    });
    let Some(policy) = policy else {
        return Err(bad_request(bad));
    };
    let prompt = match r.prompt_token_ids.is_empty() {
        true => GenerationPrompt::Text(text("prompt", r.prompt).map_err(status)?),
        false => GenerationPrompt::Tokens(r.prompt_token_ids),
    };
    let options = GenerateOptions {
        policy,
        prompt,
        arguments,
        samples: r.samples.max(1) as usize,
        max_tokens: match r.max_tokens {
            0 => DEFAULT_MAX_TOKENS,
            n => n as usize,
        },
        sampling: SamplingOptions {
            temperature,
            // All tokens together have the probability 1.
            top_p: r.top_p.filter(|p| *p < 1.0),
            top_k: r.top_k.map(|k| k as usize),
            seed: r.seed.unwrap_or_else(rand::random),
        },
        stop: r.stop,
        stop_token_ids: r.stop_token_ids,
        ignore_eos: r.ignore_eos,
        log_probs: LogProbOptions {
            top: r.top_logprobs as usize,
            prompt: r.prompt_logprobs,
        },
        token_texts: r.token_texts,
    };
    finish((options, r.logprobs), bad)
}

/// Converts new tokens of a sample, with their log-probs if `log_probs`.
pub(in crate::rpc) fn delta(part: GeneratedPart, log_probs: bool) -> pb::CompletionDelta {
    let reason = match part.end {
        None => pb::FinishReason::Unspecified,
        Some(GenerationEnd::Stop) => pb::FinishReason::Stop,
        Some(GenerationEnd::Length) => pb::FinishReason::Length,
    };
    pb::CompletionDelta {
        index: part.sample as u32,
        text: part.text,
        token_ids: part.tokens,
        token_logprobs: match log_probs {
            true => part.log_probs,
            false => Vec::new(),
        },
        finish_reason: reason.into(),
        token_texts: part.texts,
        top_logprobs: match log_probs {
            true => part.top.into_iter().map(top_logprobs).collect(),
            false => Vec::new(),
        },
    }
}

fn top_logprobs(tokens: Vec<LikelyToken>) -> pb::TopLogprobs {
    pb::TopLogprobs {
        tokens: tokens.into_iter().map(token_logprob).collect(),
    }
}

fn token_logprob(likely: LikelyToken) -> pb::TokenLogprob {
    pb::TokenLogprob {
        token_id: likely.token,
        logprob: likely.log_prob,
        text: likely.text,
    }
}

/// Converts a token of the prompt.
pub(in crate::rpc) fn prompt_token(part: PromptPart) -> pb::PromptToken {
    pb::PromptToken {
        token_id: part.token,
        logprob: part.log_prob,
        text: part.text,
        top_logprobs: part.top.into_iter().map(token_logprob).collect(),
    }
}
