//! Compares real tokenizers and every chat template of TRL with transformers on the dialogues and
//! texts of tests/goldens/dialogues.json: token for token, and character for character.
//!
//! The expected values are computed during the test: tests/goldens/real_tokenizers.py runs
//! transformers on the tokenizers that .ci/tokenizers fetches.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use bradley::domain::training::{
    BatchConfig, Method, OptimizerConfig, ScheduleKind, TrainingSpec, Truncation,
};
use bradley::formats::chat_template::{ChatMessage, ChatTemplate, RenderOptions};
use bradley::formats::loader::load_model;
use bradley::formats::source::HubOptions;
use bradley::formats::tokenizer::ChatTokenizer;
use bradley::infer::encode::PairEncoder;
use serde_json::Value;
use tempfile::TempDir;

use crate::golden_training::{Run, train};
use crate::support::{assert_close, encode, golden, ids, json, needed, policy, rows};

/// Names of the tokenizers in .ci/tokenizers.list.
const TOKENIZERS: [&str; 7] = [
    "deepseek_v3",
    "gemma3",
    "gptoss",
    "llama2",
    "llama3",
    "llama3_1",
    "qwen3",
];
/// Minimum numbers of texts and dialogues for each tokenizer.
const MIN_CASES: usize = 40;
/// Files of rows, with the minimum number of rows that every tokenizer's template accepts.
const ROWS: [(&str, usize); 3] = [
    ("pairs.jsonl", 6),
    ("plain.jsonl", 2),
    ("tools_pairs.jsonl", 5),
];
/// Number of chat templates of TRL 1.16.
const TEMPLATES: usize = 72;

/// Results of transformers.
struct Expected {
    /// Folder with a sub-folder for each tokenizer.
    folder: TempDir,
    values: Value,
}

/// Runs transformers once for all tests.
fn expected() -> &'static Expected {
    static EXPECTED: OnceLock<Expected> = OnceLock::new();
    let compute = || {
        let tokenizers = needed("BRADLEY_TEST_TOKENIZERS");
        let python = needed("BRADLEY_TEST_PYTHON");
        let folder = tempfile::tempdir().unwrap();
        let script = golden("real_tokenizers.py");
        let run = Command::new(python)
            .arg(script)
            .arg(tokenizers)
            .arg(folder.path())
            .output()
            .unwrap();
        assert!(
            run.status.success(),
            "{}",
            String::from_utf8_lossy(&run.stderr)
        );
        let values =
            serde_json::from_slice(&std::fs::read(folder.path().join("expected.json")).unwrap())
                .unwrap();
        Expected { folder, values }
    };
    EXPECTED.get_or_init(compute)
}

impl Expected {
    fn tokenizer(&self, name: &str) -> (ChatTokenizer, &Value) {
        let path: &Path = &self.folder.path().join(name);
        (
            ChatTokenizer::from_folder(path).unwrap(),
            &self.values["tokenizers"][name],
        )
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

/// One rendering of a dialogue, as real_tokenizers.py describes it.
struct Chat<'a> {
    dialogue: &'a str,
    messages: Vec<ChatMessage>,
    tools: Option<&'a [Value]>,
    expected: &'a Value,
}

impl<'a> Chat<'a> {
    fn new(corpus: &'a Value, expected: &'a Value) -> Self {
        let dialogue = &corpus["dialogues"][expected["dialogue"].as_u64().unwrap() as usize];
        let tools = match &dialogue["tools"] {
            Value::String(name) => Some(list(&corpus["tools"][name])),
            Value::Array(tools) => Some(tools.as_slice()),
            _ => None,
        };
        let messages = list(&dialogue["messages"])
            .iter()
            .map(|m| ChatMessage::from_json(m.clone()).unwrap())
            .collect();
        Chat {
            dialogue: text(&dialogue["name"]),
            messages,
            tools,
            expected,
        }
    }

    fn options(&self, date: &str) -> RenderOptions<'a> {
        RenderOptions {
            add_generation_prompt: self.expected["add_generation_prompt"].as_bool().unwrap(),
            tools: self.tools,
            kwargs: self.expected["kwargs"].as_object().unwrap(),
            date: Some(date.parse::<jiff::civil::Date>().unwrap().at(0, 0, 0, 0)),
        }
    }

    /// Returns how a rendering differs from the expected one, or `None`. Where transformers raises
    /// an error, Bradley must fail, too.
    fn difference(&self, rendered: Result<&str, String>) -> Option<String> {
        let problem = match (self.expected["text"].as_str(), rendered) {
            (Some(expected), Ok(rendered)) if expected == rendered => return None,
            (None, Err(_)) => return None,
            (Some(expected), Ok(rendered)) => {
                let same = expected
                    .chars()
                    .zip(rendered.chars())
                    .take_while(|(a, b)| a == b)
                    .count();
                let rest = |s: &str| {
                    s.chars()
                        .skip(same.saturating_sub(10))
                        .take(60)
                        .collect::<String>()
                };
                format!("{:?} is not {:?}", rest(rendered), rest(expected))
            }
            (Some(_), Err(error)) => format!("fails: {error}"),
            (None, Ok(_)) => {
                format!(
                    "renders, where transformers raises {}",
                    self.expected["error"]
                )
            }
        };
        let kwargs = &self.expected["kwargs"];
        Some(format!(
            "{}, {kwargs}, generation prompt {}: {problem}",
            self.dialogue, self.expected["add_generation_prompt"]
        ))
    }
}

fn assert_none(differences: &[String], compared: usize) {
    let first: Vec<&String> = differences.iter().take(20).collect();
    assert!(
        differences.is_empty(),
        "{} of {compared} differ: {first:#?}",
        differences.len()
    );
}

#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS) and Python with transformers (BRADLEY_TEST_PYTHON)"]
fn texts_are_encoded_and_decoded_as_in_transformers() {
    let expected = expected();
    let (mut compared, mut differences) = (0, Vec::new());
    for name in TOKENIZERS {
        let (tokenizer, values) = expected.tokenizer(name);
        assert!(list(&values["encoded"]).len() >= 2 * MIN_CASES);
        for case in list(&values["encoded"]) {
            compared += 1;
            let special = case["add_special_tokens"].as_bool().unwrap();
            let tokens = tokenizer.encode(text(&case["text"]), special).unwrap();
            if tokens != ids(&case["ids"]) {
                differences.push(format!("{name}: {case} is {tokens:?}"));
            }
        }
        for case in list(&values["decoded"]) {
            compared += 1;
            let decoded = tokenizer.decode(&ids(&case["ids"])).unwrap();
            if decoded != text(&case["text"]) {
                differences.push(format!("{name}: {case} is {decoded:?}"));
            }
        }
    }
    println!("{compared} texts compared");
    assert_none(&differences, compared);
}

#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS) and Python with transformers (BRADLEY_TEST_PYTHON)"]
fn dialogues_are_rendered_and_encoded_as_in_transformers() {
    let expected = expected();
    let corpus = json("dialogues.json");
    let date = text(&expected.values["date"]);
    let (mut compared, mut differences) = (0, Vec::new());
    for name in TOKENIZERS {
        let (tokenizer, values) = expected.tokenizer(name);
        let mut accepted = BTreeSet::new();
        for case in list(&values["chats"]) {
            compared += 1;
            let chat = Chat::new(&corpus, case);
            let rendered = tokenizer
                .apply_chat_template(&chat.messages, &chat.options(date))
                .map_err(|e| e.to_string());
            differences.extend(
                chat.difference(rendered.as_deref().map_err(Clone::clone))
                    .map(|d| format!("{name}: {d}")),
            );
            // As in TRL, no special tokens are added, because the rendered text has them already.
            if let (Ok(rendered), Some(_)) = (rendered, case.get("ids")) {
                accepted.insert(chat.dialogue);
                let tokens = tokenizer.encode(&rendered, false).unwrap();
                if tokens != ids(&case["ids"]) {
                    differences.push(format!(
                        "{name}: {}: {tokens:?} is not {}",
                        chat.dialogue, case["ids"]
                    ));
                }
            }
        }
        assert!(
            accepted.len() >= MIN_CASES,
            "{name} accepts {}",
            accepted.len()
        );
    }
    println!("{compared} dialogues compared");
    assert_none(&differences, compared);
}

#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS) and Python with trl \
            (BRADLEY_TEST_PYTHON)"]
fn rows_have_the_tokens_of_trl() {
    let expected = expected();
    let date = text(&expected.values["date"]);
    let date = date.parse::<jiff::civil::Date>().unwrap().at(0, 0, 0, 0);
    let (mut compared, mut differences) = (0, Vec::new());
    for name in TOKENIZERS {
        let (tokenizer, values) = expected.tokenizer(name);
        let encoder = PairEncoder::new(&tokenizer, 4096, Truncation::KeepStart).with_date(date);
        for (file, at_least) in ROWS {
            let (rows, wanted) = (rows(file), list(&values["rows"][file]));
            assert_eq!(rows.len(), wanted.len(), "{name} {file}");
            let mut accepted = 0;
            for (row, want) in rows.iter().zip(wanted) {
                compared += 1;
                let difference = match (encoder.encode_row(row), want.get("error")) {
                    (Ok(pair), None) => {
                        accepted += 1;
                        let got = [
                            ("prompt", &pair.prompt),
                            ("chosen", &pair.chosen),
                            ("rejected", &pair.rejected),
                        ];
                        got.into_iter()
                            .find(|(part, tokens)| **tokens != ids(&want[*part]))
                            .map(|(part, tokens)| {
                                format!("{part}: {tokens:?} is not {}", want[part])
                            })
                    }
                    (Err(_), Some(_)) => None,
                    (Ok(_), Some(error)) => Some(format!("is encoded, where TRL raises {error}")),
                    (Err(issue), None) => Some(issue.message),
                };
                differences.extend(difference.map(|d| format!("{name} {file} {:?}: {d}", row.id)));
            }
            assert!(accepted >= at_least, "{name} accepts {accepted} of {file}");
        }
    }
    println!("{compared} rows compared");
    assert_none(&differences, compared);
}

#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS) and Python with transformers \
            (BRADLEY_TEST_PYTHON)"]
fn every_template_of_trl_renders_as_in_jinja2() {
    let expected = expected();
    let corpus = json("dialogues.json");
    let date = text(&expected.values["date"]);
    let special = expected.values["special_tokens"].as_object().unwrap();
    let special: Vec<(String, String)> = special
        .iter()
        .map(|(name, token)| (name.clone(), text(token).to_owned()))
        .collect();
    let templates = expected.values["templates"].as_object().unwrap();
    assert_eq!(templates.len(), TEMPLATES);
    let (mut compared, mut differences) = (0, Vec::new());
    for (name, values) in templates {
        let template = ChatTemplate::new(text(&values["source"]), special.clone())
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        for case in list(&values["chats"]) {
            compared += 1;
            let chat = Chat::new(&corpus, case);
            let rendered = template
                .render(&chat.messages, &chat.options(date))
                .map_err(|e| e.to_string());
            if let Some(difference) = chat.difference(rendered.as_deref().map_err(Clone::clone)) {
                differences.push(format!("{name}: {difference}"));
            }
        }
    }
    println!(
        "{} templates, {compared} renderings compared",
        templates.len()
    );
    assert_none(&differences, compared);
}

/// A tiny Qwen3 with the real tokenizer, on rows with tools and template arguments.
#[test]
#[ignore = "needs real tokenizers (BRADLEY_TEST_TOKENIZERS) and Python with trl \
            (BRADLEY_TEST_PYTHON)"]
fn a_run_on_rows_with_tools_is_trls() {
    let (tokenizers, python) = (
        needed("BRADLEY_TEST_TOKENIZERS"),
        needed("BRADLEY_TEST_PYTHON"),
    );
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Path::new(&tokenizers).join("qwen3");
    let run = Command::new(python)
        .arg(golden("tools_training.py"))
        .arg(tokenizer)
        .arg(folder.path())
        .output()
        .unwrap();
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    let expected: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("expected.json")).unwrap())
            .unwrap();

    let path = folder.path().join("model");
    let (model, tokenizer) =
        policy(load_model(None, path.to_str().unwrap(), &HubOptions::default()).unwrap());
    let pairs = encode(&rows("tools_pairs.jsonl"), &tokenizer, 1024);
    assert_eq!(pairs.len(), list(&expected["pairs"]).len());
    for (pair, want) in pairs.iter().zip(list(&expected["pairs"])) {
        assert_eq!(pair.prompt, ids(&want["prompt"]), "{:?} prompt", pair.id);
        assert_eq!(pair.chosen, ids(&want["chosen"]), "{:?} chosen", pair.id);
        assert_eq!(
            pair.rejected,
            ids(&want["rejected"]),
            "{:?} rejected",
            pair.id
        );
    }
    let spec = TrainingSpec {
        method: Method::Full,
        optimizer: OptimizerConfig {
            learning_rate: 1e-3,
            schedule: ScheduleKind::Constant,
            ..Default::default()
        },
        batch: BatchConfig {
            batch_size: 2,
            max_length: 1024,
            max_steps: Some(4),
            shuffle: false,
            ..Default::default()
        },
        ..Default::default()
    };
    let got = train(Run::full(&model, &model, pairs, spec));
    let want = list(&expected["steps"]);
    assert_eq!(got.len(), want.len());
    for (step, (got, want)) in got.iter().zip(want).enumerate() {
        for metric in ["loss", "grad_norm"] {
            assert_close(
                &format!("step {} {metric}", step + 1),
                got[metric],
                want[metric].as_f64().unwrap(),
                1e-3,
                1e-2,
            );
        }
    }
}
