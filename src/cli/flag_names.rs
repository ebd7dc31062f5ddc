//! Puts errors of the server into the caller's words: a flag or a key of a job file in place of a
//! field's path in the API.

use serde_json::Value;

use super::failure::Failure;
use super::job_flags::{JOB_FLAGS, JobFlags, flag_for, get};
use crate::rpc::client::{ClientError, Status, field_violations, has_fallen_silent, missing_kind};

/// Prefix of the fields of a job in the server's errors.
const JOB: &str = "training_job.";
/// Fields outside of a job, or of a job that a command other than `train` changes, with the
/// caller's words for them.
const OTHER_FIELDS: [(&str, &str); 37] = [
    ("options.policy", "--policy"),
    ("options.reference", "--reference"),
    ("options.beta", "--beta"),
    ("options.max_length", "--max-length"),
    ("options.normalization", "--normalization"),
    ("options.tools", "--tools"),
    ("options.tools_json", "--tools"),
    ("options.chat_template_kwargs_json", "--template-args"),
    ("metadata.display_name", "--title"),
    ("start_date", "--from"),
    ("end_date", "--to"),
    ("by_day", "--by-day"),
    ("metadata.model", "--model"),
    ("metadata.max_length", "--max-length"),
    ("metadata.content_hash", "the file's hash"),
    ("chunk", "the file:"),
    ("dtype", "--dtype"),
    ("training_job.display_name", "--title"),
    ("training_job.labels", "--label"),
    ("training_job.priority", "--priority"),
    ("training_job.etag", "--etag"),
    // Of `generate`.
    ("samples", "--samples"),
    ("max_tokens", "--max-tokens"),
    ("temperature", "--temperature"),
    ("top_p", "--top-p"),
    ("top_k", "--top-k"),
    ("stop", "--stop"),
    ("tools", "--tools"),
    ("tools_json", "--tools"),
    ("chat_template_kwargs", "--template-args"),
    ("chat_template_kwargs_json", "--template-args"),
    // Of `evaluate`.
    ("dataset", "--dataset"),
    ("subset_column", "--subset-column"),
    ("chosen_score_column", "--score-columns"),
    ("rejected_score_column", "--score-columns"),
    ("bins", "--bins"),
    ("save_calibration", "--save-calibration"),
];
/// Instructions of the server that name a field's value, with the flag that does the same.
const INSTRUCTIONS: [(&str, &str); 2] = [
    (
        "set row_policy to SKIP",
        "leave them out with --skip-bad-rows",
    ),
    ("leaving reference empty", "leaving out --reference"),
];
/// The same for commands other than `train`.
const OTHER_INSTRUCTIONS: [(&str, &str); 4] = [
    ("lower max_tokens", "lower --max-tokens"),
    ("ask for MERGED", "add --contents merged"),
    ("export it MERGED", "use --contents merged"),
    // Of `watch` and `jobs metrics`.
    ("after_sequence", "--after"),
];
/// The server's instruction to a caller without a token, and that of the command line.
const BEARER: (&str, &str) = (
    "send the metadata \"authorization: Bearer TOKEN\"",
    "give one with --token or the variable BRADLEY_TOKEN",
);
/// Fields that `train` sets by uploading a file.
const UPLOADED: [(&str, &str); 2] = [("dataset", "data"), ("eval_dataset", "eval-data")];

/// A job file as the words of errors need it.
#[derive(Clone, Debug)]
pub(super) struct JobFile {
    /// Name of the file, as it was given.
    pub name: String,
    /// The job in it, as canonical JSON.
    pub fields: Value,
}

/// The caller's words for the fields of a job.
#[derive(Clone, Debug, Default)]
pub(super) struct JobWords {
    /// The flags that were given.
    pub flags: JobFlags,
    /// The job file, if one was given.
    pub file: Option<JobFile>,
    /// Flags that were given and upload a file: `data`, `eval-data`.
    pub uploads: Vec<&'static str>,
}

impl JobWords {
    /// Returns the caller's word for a field: the flag if it was given, else the place in the job
    /// file, else the flag that sets the field.
    pub(super) fn of_field(&self, path: &str) -> String {
        let Some(field) = path.strip_prefix(JOB) else {
            return of_other_field(path);
        };
        let upload = UPLOADED.iter().find(|(of, _)| *of == field);
        if let Some((_, flag)) = upload.filter(|(_, flag)| self.uploads.contains(flag)) {
            return format!("--{flag}");
        }
        if let Some(flag) = self.flags.flag_of(field) {
            return format!("--{}", flag.name);
        }
        let flag = flag_for(field);
        if let Some(file) = &self.file {
            let whole = flag.map_or(field, |flag| flag.field);
            if get(&file.fields, whole).is_some() || flag.is_none() {
                return format!("{}: {field}", file.name);
            }
        }
        flag.map_or_else(|| field.to_owned(), |flag| format!("--{}", flag.name))
    }

    /// Replaces names of fields in a sentence by flags. Names that the caller's job file may have
    /// stay as they are, unless the flag was given.
    pub(super) fn in_sentence(&self, text: &str) -> String {
        let mut text = text.to_owned();
        if self.file.is_none() {
            for (instruction, flag) in INSTRUCTIONS {
                text = text.replace(instruction, flag);
            }
        }
        replace_names(&text, |name| {
            let name = name.strip_prefix(JOB).unwrap_or(name);
            if let Some((_, flag)) = UPLOADED.iter().find(|(field, _)| *field == name) {
                return self.file.is_none().then(|| format!("--{flag}"));
            }
            let is_meant = |field: &str| {
                field == name
                    || field
                        .strip_suffix(name)
                        .is_some_and(|before| before.ends_with('.'))
            };
            let flag = JOB_FLAGS.iter().find(|flag| is_meant(flag.field))?;
            (self.file.is_none() || self.flags.has(flag.name)).then(|| format!("--{}", flag.name))
        })
    }

    /// Converts an error of a call about the job to a failure in the caller's words.
    pub(super) fn failure(&self, error: impl Into<ClientError>) -> Failure {
        self.failure_without(error, &[])
    }

    /// Converts an error of a call about the job to a failure in the caller's words, without the
    /// errors of the fields `left_out`.
    pub(super) fn failure_without(
        &self,
        error: impl Into<ClientError>,
        left_out: &[&str],
    ) -> Failure {
        let words = ErrorWords {
            of_field: |field: &str| self.of_field(field),
            in_sentence: |text: &str| self.in_sentence(text),
        };
        failure_in_words(error.into(), &words, left_out)
    }
}

/// A failed call, with flags in place of the fields' paths.
impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let words = ErrorWords {
            of_field: of_other_field,
            in_sentence: in_other_sentence,
        };
        failure_in_words(error, &words, &[])
    }
}

fn of_other_field(path: &str) -> String {
    // An element of a list, such as stop[0], has the flag of the list.
    let list = path.split_once('[').map_or(path, |(list, _)| list);
    let word = other_word(path).or_else(|| other_word(list));
    word.unwrap_or(path).to_owned()
}

fn other_word(field: &str) -> Option<&'static str> {
    let found = OTHER_FIELDS.iter().find(|(known, _)| *known == field);
    found.map(|(_, word)| *word)
}

fn in_other_sentence(text: &str) -> String {
    let mut text = text.to_owned();
    for (instruction, flag) in OTHER_INSTRUCTIONS {
        text = text.replace(instruction, flag);
    }
    text
}

/// The caller's words for fields, and for the names of fields in sentences.
struct ErrorWords<F, S> {
    of_field: F,
    in_sentence: S,
}

fn failure_in_words<F, S>(
    error: ClientError,
    words: &ErrorWords<F, S>,
    left_out: &[&str],
) -> Failure
where
    F: Fn(&str) -> String,
    S: Fn(&str) -> String,
{
    let message = match &error {
        ClientError::Refused(status) if has_fallen_silent(status) => {
            "the server was reached but no longer answers: see whether it hangs or its machine is \
             overloaded, and repeat the command"
                .to_owned()
        }
        // Only an error of the connection has a source.
        ClientError::Refused(status) if std::error::Error::source(&**status).is_some() => format!(
            "the connection to the server is lost: {}: see whether it still runs, and repeat the \
             command",
            status.message()
        ),
        ClientError::Refused(status) => refusal(status, words, left_out),
        other => other.to_string(),
    };
    match &error {
        ClientError::Unreachable { .. }
        | ClientError::BadCertificate { .. }
        | ClientError::SilentTls { .. } => Failure::Unreachable(message),
        e if e.is_usage() => Failure::Usage(message),
        _ => Failure::Failed(message),
    }
}

fn refusal<F, S>(status: &Status, words: &ErrorWords<F, S>, left_out: &[&str]) -> String
where
    F: Fn(&str) -> String,
    S: Fn(&str) -> String,
{
    let lines: Vec<String> = field_violations(status)
        .iter()
        .filter(|(field, _)| !left_out.contains(&field.as_str()))
        .map(|(field, description)| {
            let sentence = (words.in_sentence)(description);
            match field.as_str() {
                "" => sentence,
                field => format!("{} {sentence}", (words.of_field)(field)),
            }
        })
        .collect();
    match &lines[..] {
        [] => {
            let text = (words.in_sentence)(status.message()).replace(BEARER.0, BEARER.1);
            let list = missing_kind(status).map_or("", |kind| listing(&kind));
            format!("{text} ({:?}){list}", status.code())
        }
        [one] => one.clone(),
        many => format!("the server refused these values:\n  {}", many.join("\n  ")),
    }
}

/// Returns a hint that names the command which lists the resources of a kind; empty if there is
/// none.
fn listing(kind: &str) -> &'static str {
    match kind {
        "job" => ": bradley jobs list shows your jobs",
        "dataset" => ": bradley datasets list shows your datasets",
        "checkpoint" => ": bradley checkpoints list JOB shows those of a job",
        "model" => ": bradley models list shows those of this server",
        _ => "",
    }
}

/// Replaces names with an underscore or a dot in a text, but not within quotation marks.
fn replace_names(text: &str, word: impl Fn(&str) -> Option<String>) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '/' | '-');
    let (mut out, mut name) = (String::new(), String::new());
    let (mut is_quoted, mut is_escaped) = (false, false);
    let flush = |name: &mut String, out: &mut String| {
        let core = name.trim_end_matches('.');
        let is_path = core.contains(['_', '.']) && !core.contains(['/', '-']);
        match is_path.then(|| word(core)).flatten() {
            Some(flag) => {
                out.push_str(&flag);
                out.push_str(&name[core.len()..]);
            }
            None => out.push_str(name),
        }
        name.clear();
    };
    for c in text.chars() {
        if is_quoted {
            out.push(c);
            is_quoted = is_escaped || c != '"';
            is_escaped = c == '\\' && !is_escaped;
            continue;
        }
        if is_part(c) {
            name.push(c);
            continue;
        }
        flush(&mut name, &mut out);
        is_quoted = c == '"';
        out.push(c);
    }
    flush(&mut name, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Parser)]
    struct Given {
        #[command(flatten)]
        flags: JobFlags,
    }

    fn words(args: &[&str], file: Option<Value>) -> JobWords {
        let given = Given::try_parse_from([&["train"], args].concat()).unwrap();
        JobWords {
            flags: given.flags,
            file: file.map(|fields| JobFile {
                name: "job.yaml".into(),
                fields,
            }),
            uploads: Vec::new(),
        }
    }

    #[test]
    fn a_field_has_the_name_that_the_caller_gave() {
        let of_flags = words(&["--beta", "-1"], None);
        for (path, word) in [
            ("training_job.dpo.beta", "--beta"),
            ("training_job.dpo.losses[0].loss_type", "--loss"),
            ("training_job.dpo.f_alpha", "--f-alpha"),
            ("training_job.lora.target_modules[2]", "--target-modules"),
            ("training_job.dpo.reference_sync", "--reference-sync"),
            (
                "training_job.dpo.reference_sync.alpha",
                "--reference-sync-alpha",
            ),
            ("training_job.chat_template_kwargs.a", "--template-args"),
            ("options.beta", "--beta"),
            ("chunk", "the file:"),
            ("stop[1]", "--stop"),
            ("elsewhere", "elsewhere"),
        ] {
            assert_eq!(of_flags.of_field(path), word);
        }
        let file = json!({"dpo": {"beta": 0.1, "losses": [{"loss_type": "x"}]}});
        let of_both = words(&["--beta", "-1"], Some(file));
        for (path, word) in [
            ("training_job.dpo.beta", "--beta"),
            (
                "training_job.dpo.losses[0].loss_type",
                "job.yaml: dpo.losses[0].loss_type",
            ),
            ("training_job.lora.rank", "--rank"),
        ] {
            assert_eq!(of_both.of_field(path), word);
        }
    }

    #[test]
    fn sentences_name_flags_but_quotations_stay() {
        let sentence = "needs an evaluation: set eval_dataset or eval_fraction. \"max_length\" and \
                        exo_pair stay, dpo.reference_free. eval_rewards/margins";
        assert_eq!(
            words(&[], None).in_sentence(sentence),
            "needs an evaluation: set --eval-data or --eval-fraction. \"max_length\" and exo_pair \
             stay, --reference-free. eval_rewards/margins"
        );
        let file = Some(json!({}));
        assert_eq!(words(&[], file).in_sentence(sentence), sentence);
        assert_eq!(
            words(&[], None).in_sentence("fix them, or set row_policy to SKIP to train on 4"),
            "fix them, or leave them out with --skip-bad-rows to train on 4"
        );
        let logged = "by leaving reference empty, or set logged_check to warn";
        assert_eq!(
            words(&[], None).in_sentence(logged),
            "by leaving out --reference, or set --logged-check to warn"
        );
        assert_eq!(
            replace_names(r#"a_b "c_d\" e_f" g_h"#, |_| Some("x".into())),
            r#"x "c_d\" e_f" x"#
        );
    }
}
