//! Converts scoring requests and scores.

use tonic::Status;

use serde_json::{Map, Value};

use super::{finish, json};
use crate::domain::dataset::{ChatMessage, MAX_MESSAGES, Text};
use crate::domain::dpo::Normalization;
use crate::domain::logged::sum_problem;
use crate::domain::message::TemplateArguments;
use crate::domain::names;
use crate::domain::violation::{Violations, quoted};
use crate::math::calibration::Calibration;
use crate::rpc::pb;
use crate::service::error::ServiceError;
use crate::service::scoring::logged::{LoggedPair, LoggedPolicy};
use crate::service::scoring::{PairToScore, ScoreOptions, ScoredCompletion, ScoredPair};

/// Converts the scoring options of a request. The second value is true if the request wants the
/// log-probs of each token.
pub(in crate::rpc) fn options(
    o: Option<pb::ScoringOptions>,
) -> Result<(ScoreOptions, bool), Status> {
    let o = o.unwrap_or_default();
    let mut bad = Violations::default();
    let mut name = |field: &str, value: &str| {
        let parsed = names::parse_policy(value);
        if parsed.is_none() {
            bad.push(
                field,
                format!(
                    "is {}: it must look like models/ID or trainingJobs/ID/checkpoints/STEP",
                    quoted(value)
                ),
            );
        }
        parsed
    };
    let policy = name("options.policy", &o.policy);
    let reference = if o.reference.is_empty() {
        None
    } else {
        name("options.reference", &o.reference)
    };
    let arguments = json::arguments(
        "options",
        o.tools,
        o.tools_json,
        o.chat_template_kwargs,
        &o.chat_template_kwargs_json,
    )
    .unwrap_or_else(|(field, reason)| {
        bad.push(field, reason);
        TemplateArguments::default()
    });
    let normalization = match pb::RewardNormalization::try_from(o.normalization) {
        Ok(pb::RewardNormalization::Unspecified | pb::RewardNormalization::AsTrained) => None,
        Ok(pb::RewardNormalization::Sum) => Some(Normalization::Sum),
        Ok(pb::RewardNormalization::Mean) => Some(Normalization::Mean),
        Err(_) => {
            bad.push(
                "options.normalization",
                format!("is {}: it must be AS_TRAINED, SUM or MEAN", o.normalization),
            );
            None
        }
    };
    let Some(policy) = policy else {
        return Err(crate::rpc::status::bad_request(bad));
    };
    let max_length = o.max_length.map(|n| n as usize);
    finish(
        (
            ScoreOptions {
                policy,
                reference,
                beta: o.beta,
                max_length,
                normalization,
                arguments,
            },
            o.per_token_logprobs,
        ),
        bad,
    )
}

/// Converts the normalization that was used to the value of the protobuf enum.
pub(in crate::rpc) fn normalization(n: Normalization) -> i32 {
    match n {
        Normalization::Sum => pb::RewardNormalization::Sum.into(),
        Normalization::Mean => pb::RewardNormalization::Mean.into(),
    }
}

/// Converts the stored calibration of scores.
pub(in crate::rpc) fn calibration(calibration: Calibration) -> pb::Calibration {
    pb::Calibration {
        temperature: calibration.temperature,
        length_coefficient: calibration.length_coefficient,
    }
}

/// Converts a text. `field` is its path, for errors.
///
/// # Errors
/// `InvalidArgument` if the text is missing, has too many messages or a bad message.
pub(in crate::rpc) fn text(field: &str, t: Option<pb::Text>) -> Result<Text, ServiceError> {
    match t.and_then(|t| t.form) {
        Some(pb::text::Form::Plain(s)) => Ok(Text::Plain(s)),
        Some(pb::text::Form::Chat(list)) if list.messages.len() > MAX_MESSAGES => {
            let message = format!(
                "has {} messages: {MAX_MESSAGES} are the limit",
                list.messages.len()
            );
            Err(ServiceError::invalid(field, message))
        }
        Some(pb::text::Form::Chat(list)) => {
            let messages = list.messages.into_iter().enumerate();
            Ok(Text::Chat(
                messages
                    .map(|(i, m)| message(&format!("{field}.chat.messages[{i}]"), m))
                    .collect::<Result<_, _>>()?,
            ))
        }
        None => Err(ServiceError::invalid(
            field,
            "is missing: set plain or chat",
        )),
    }
}

/// Converts a chat message with its further keys. `field` is its path, for errors.
fn message(field: &str, m: pb::Message) -> Result<ChatMessage, ServiceError> {
    let further = match (m.fields, m.fields_json.as_str()) {
        (None, "") => return Ok(ChatMessage::new(m.role, m.content)),
        (Some(_), text) if !text.is_empty() => {
            return Err(ServiceError::invalid(
                format!("{field}.fields_json"),
                "is given together with fields: use one of the two",
            ));
        }
        (Some(given), _) => {
            json::object(given).map_err(|e| ServiceError::invalid(format!("{field}.fields"), e))?
        }
        (None, text) => json::parse_object(text)
            .map_err(|e| ServiceError::invalid(format!("{field}.fields_json"), e))?,
    };
    if !m.role.is_empty() && further.contains_key("role") {
        return Err(ServiceError::invalid(
            format!("{field}.role"),
            "is given twice: here and among the further keys",
        ));
    }
    let mut fields = Map::new();
    if !m.role.is_empty() {
        fields.insert("role".to_owned(), Value::String(m.role));
    }
    if !m.content.is_empty() {
        fields.insert("content".to_owned(), Value::String(m.content));
    }
    fields.extend(further);
    // The message is an object, so the problem has a path.
    ChatMessage::parse(Value::Object(fields)).map_err(|problem| {
        ServiceError::invalid(format!("{field}.{}", problem.path()), problem.reason())
    })
}

/// Converts a pair to score.
pub(in crate::rpc) fn pair(p: pb::Pair) -> Result<PairToScore, ServiceError> {
    let arguments = json::arguments(
        "pair",
        p.tools,
        p.tools_json,
        p.chat_template_kwargs,
        &p.chat_template_kwargs_json,
    )
    .map_err(|(field, e)| ServiceError::invalid(field, e))?;
    let logged = logged(p.logged.unwrap_or_default())?;
    let text = |field, given| match logged.policy {
        None => text(field, given),
        Some(_) => Ok(Text::Plain(String::new())),
    };
    Ok(PairToScore {
        prompt: text("pair.prompt", p.prompt)?,
        a: text("pair.a", p.a)?,
        b: text("pair.b", p.b)?,
        arguments,
        logged,
    })
}

/// Converts the log-probs that a pair carries.
fn logged(l: pb::LoggedLogprobs) -> Result<LoggedPair, ServiceError> {
    let reference = logged_sums("reference", [l.reference_a, l.reference_b])?;
    let sums = logged_sums("policy", [l.policy_a, l.policy_b])?;
    for (name, tokens) in [("tokens_a", l.tokens_a), ("tokens_b", l.tokens_b)] {
        let problem = match tokens {
            Some(_) if sums.is_none() => {
                "has no meaning without policy_a and policy_b, because the server then counts the \
                 tokens: leave it out"
            }
            Some(0) => "is 0: an answer has at least one token",
            _ => continue,
        };
        return Err(ServiceError::invalid(
            format!("pair.logged.{name}"),
            problem,
        ));
    }
    Ok(LoggedPair {
        reference,
        policy: sums.map(|sums| LoggedPolicy {
            sums,
            tokens: [l.tokens_a, l.tokens_b],
        }),
    })
}

/// Checks the log-probs of both answers under one model.
fn logged_sums(model: &str, given: [Option<f64>; 2]) -> Result<Option<[f64; 2]>, ServiceError> {
    let field = |side: &str| format!("pair.logged.{model}_{side}");
    let sums = match given {
        [None, None] => return Ok(None),
        [Some(a), Some(b)] => [a, b],
        [a, _] => {
            let (missing, there) = if a.is_none() { ("a", "b") } else { ("b", "a") };
            let message = format!("is missing, but {model}_{there} is given: set both or none");
            return Err(ServiceError::invalid(field(missing), message));
        }
    };
    for (side, sum) in ["a", "b"].into_iter().zip(sums) {
        if let Some(problem) = sum_problem(sum) {
            return Err(ServiceError::invalid(field(side), problem));
        }
    }
    Ok(Some(sums))
}

/// Converts a pair's score, with the log-probs of each token if `per_token`.
pub(in crate::rpc) fn pair_score(s: ScoredPair, per_token: bool) -> pb::PairScore {
    pb::PairScore {
        probability: s.probability,
        margin: s.margin,
        calibrated_probability: s.calibrated_probability,
        a: Some(completion(s.a, per_token)),
        b: Some(completion(s.b, per_token)),
        logged: s.logged,
    }
}

/// Converts an answer's score, with the log-probs of each token if `per_token`.
pub(in crate::rpc) fn completion(c: ScoredCompletion, per_token: bool) -> pb::CompletionScore {
    let returned = |xs: Vec<f32>| if per_token { xs } else { Vec::new() };
    pb::CompletionScore {
        policy_logprob: c.policy_logprob,
        reference_logprob: c.reference_logprob,
        reward: c.reward,
        tokens: c.tokens as u32,
        prompt_tokens: c.prompt_tokens as u32,
        truncated: c.truncated,
        policy_token_logprobs: returned(c.policy_token_logprobs),
        reference_token_logprobs: returned(c.reference_token_logprobs),
        token_ids: if per_token { c.token_ids } else { Vec::new() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_key_of_a_bad_message_once() {
        for (further, expected) in [
            (
                r#"{"content": 3}"#,
                "prompt.chat.messages[0].content is a number: it must be a string or a list of \
                 parts",
            ),
            (
                r#"{"content": "a", "images": ["a.png"]}"#,
                "prompt.chat.messages[0].images cannot be used: models here see text only",
            ),
        ] {
            let message = pb::Message {
                role: "user".into(),
                fields_json: further.into(),
                ..Default::default()
            };
            let chat = pb::MessageList {
                messages: vec![message],
            };
            let given = pb::Text {
                form: Some(pb::text::Form::Chat(chat)),
            };
            let refused = text("prompt", Some(given)).unwrap_err();
            assert_eq!(refused.to_string(), expected);
        }
    }
}
