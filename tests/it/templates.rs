//! Chat templates in rows, jobs and scoring calls: tools, template arguments, dates, and templates
//! that cannot be used. Rendered texts are compared with transformers itself.

use std::path::{Path, PathBuf};
use std::process::Command;

use bradley::domain::dataset::ChatMessage;
use bradley::formats::chat_template::RenderOptions;
use bradley::formats::tokenizer::ChatTokenizer;
use bradley::rpc::client::{Client, Status, json_struct};
use bradley::rpc::pb;
use serde_json::{Value, json};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::server::{Server, create, finish, get, job, scored, submit};
use crate::support::{copy_files, golden, needed};

/// A template that prints tools, the argument `style`, the date, and of each message its role,
/// content, tool calls and `reasoning_content`.
const PRINTS_ALL: &str = r#"{%- if tools is not none %}{{ tools | tojson }}{% endif -%}
{%- if style is defined %}<{{ style }}>{% endif -%}
{%- for message in messages %}
{{ message.role }}:
{%- generation -%}
{% if message.content is string %}{{ message.content }}{% elif message.content is defined %}{{ message.content | tojson }}{% endif %}
{%- endgeneration -%}
{%- for call in message.tool_calls %} {{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}
{%- if message.reasoning_content %} r={{ message.reasoning_content }}{% endif %}
{%- if message.role == 'assistant' %} {{ strftime_now('%Y-%m-%d') }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
assistant:{% endif %}"#;

/// Uploads a file whose rows are checked with a model.
async fn upload_for(client: &Client, model: &str, file: &Path) -> pb::Dataset {
    let metadata = pb::UploadMetadata {
        model: model.to_owned(),
        ..Default::default()
    };
    let uploaded = client.upload_dataset(file, metadata, |_| {});
    uploaded.await.unwrap()
}

/// Copies the tiny Llama with another chat template to `dir/model`, and returns that folder.
fn model(dir: &Path, template: &str) -> PathBuf {
    let folder = dir.join("model");
    std::fs::create_dir_all(&folder).unwrap();
    copy_files(&golden("models/llama"), &folder);
    std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    folder
}

fn serve(dir: &Path, template: &str, flags: &[&str]) -> Server {
    let models = format!("tiny={}", model(dir, template).display());
    Server::start_with(&dir.join("data"), &models, flags)
}

/// Returns a dialogue of these messages.
fn chat(messages: Value) -> Option<pb::Text> {
    let messages = messages.as_array().unwrap().iter();
    let messages = messages
        .map(|m| pb::Message {
            fields_json: m.to_string(),
            ..Default::default()
        })
        .collect();
    Some(pb::Text {
        form: Some(pb::text::Form::Chat(pb::MessageList { messages })),
    })
}

fn plain(text: &str) -> Option<pb::Text> {
    Some(pb::Text {
        form: Some(pb::text::Form::Plain(text.into())),
    })
}

fn structure(value: Value) -> bradley::rpc::client::ProtoStruct {
    json_struct(value.as_object().unwrap())
}

/// Returns the dialogue of [`question`] as a row of a dataset.
fn question_row() -> Value {
    json!({
        "prompt": [{"role": "user", "content": "1 2"}],
        "chosen": [{"role": "assistant", "content": "3"}],
        "rejected": [{"role": "assistant", "content": "4 5"}],
    })
}

fn question() -> pb::Pair {
    pb::Pair {
        prompt: chat(json!([{"role": "user", "content": "1 2"}])),
        a: chat(json!([{"role": "assistant", "content": "3"}])),
        b: chat(json!([{"role": "assistant", "content": "4 5"}])),
        ..Default::default()
    }
}

/// Scores one pair. An error of the pair is returned like an error of the call.
async fn score(
    client: &Client,
    options: pb::ScoringOptions,
    pair: pb::Pair,
) -> Result<pb::PairScore, Status> {
    let options = pb::ScoringOptions {
        per_token_logprobs: true,
        ..options
    };
    let request = pb::ScorePairsRequest {
        options: Some(options),
        pairs: vec![pair],
    };
    let answer = client.scoring().score_pairs(request).await?.into_inner();
    match &answer.results[0].result {
        Some(pb::pair_result::Result::Error(e)) => {
            use prost::Message as _;
            Err(Status::with_details(
                Code::from(e.code),
                e.message.clone(),
                e.encode_to_vec().into(),
            ))
        }
        _ => Ok(scored(&answer.results[0]).clone()),
    }
}

fn tiny() -> pb::ScoringOptions {
    pb::ScoringOptions {
        policy: "models/tiny".into(),
        ..Default::default()
    }
}

/// Scores a pair that must be refused, and returns the fields that the refusal names.
async fn refused_fields(
    client: &Client,
    options: pb::ScoringOptions,
    pair: pb::Pair,
) -> Vec<String> {
    fields(&score(client, options, pair).await.unwrap_err())
}

/// Returns the fields that a refusal names.
fn fields(status: &Status) -> Vec<String> {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let details = status.get_details_bad_request();
    details
        .into_iter()
        .flat_map(|d| d.field_violations)
        .map(|v| v.field)
        .collect()
}

fn prompt_tokens(score: &pb::PairScore) -> u32 {
    score.a.as_ref().unwrap().prompt_tokens
}

/// Returns the text of the answer A, from its token ids.
fn answer_text(score: &pb::PairScore, tokenizer: &ChatTokenizer) -> String {
    tokenizer
        .decode(&score.a.as_ref().unwrap().token_ids)
        .unwrap()
}

#[test]
#[ignore = "needs Python with transformers (BRADLEY_TEST_PYTHON)"]
fn dialogues_with_tools_render_as_in_transformers() {
    let python = needed("BRADLEY_TEST_PYTHON");
    let dir = tempfile::tempdir().unwrap();
    let everything = "{{ bos_token }}{{ tools | tojson(indent=2) }}|{{ messages | \
                      tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}|\
                      {{ messages | tojson }}|{{ x }}|{{ add_generation_prompt }}\
                      {% for m in messages if m.name is defined %}{{ loop.index }}{% break %}\
                      {% endfor %}\
                      {%-  generation -%}  a  {%-endgeneration%}";
    let tools = json!([{"type": "function", "function": {"name": "wéather", "parameters": {
        "z": 1, "a": {"type": ["string", "null"], "default": null, "x": 1.5, "y": 1e-7}}}}]);
    let dialogues = json!([
        [{"role": "user", "content": "Hi \"there\" \u{7f}𝄞"}],
        [{"content": "no role first", "role": "user", "name": null},
         {"role": "assistant", "content": null, "tool_calls": [
             {"type": "function", "function": {
                 "name": "f", "arguments": {"q": "x", "b": null, "n": 2.0}}}]},
         {"role": "tool", "tool_call_id": "1", "content": "{\"t\": 3}", "name": "f"}],
        [{"role": "user", "content": [{"type": "text", "text": "part"}]},
         {"role": "assistant", "reasoning": "think", "content": "so"},
         {"role": "assistant", "thinking": "t", "content": "a", "reasoning_content": "r"}]
    ]);
    let kwargs = json!({"x": [1, 2.5, "s", null, true, {"k": "v's"}], "bos_token": "<B>"});
    let mut cases = Vec::new();
    for template in [PRINTS_ALL, everything] {
        for dialogue in dialogues.as_array().unwrap() {
            for (tools, kwargs) in [
                (json!(null), json!({})),
                (tools.clone(), kwargs.clone()),
                (json!([]), json!({"style": "brief"})),
            ] {
                for generation in [true, false] {
                    cases.push(
                        json!({"template": template, "messages": dialogue, "tools": tools,
                               "kwargs": kwargs, "generation": generation}),
                    );
                }
            }
        }
    }
    let input = dir.path().join("cases.json");
    std::fs::write(&input, json!(cases).to_string()).unwrap();
    let program = "
import json, sys, datetime
from transformers import AutoTokenizer
tok = AutoTokenizer.from_pretrained(sys.argv[1])
out = []
for c in json.load(open(sys.argv[2])):
    kwargs = c['kwargs']
    text = tok.apply_chat_template(c['messages'], tools=c['tools'],
                                   chat_template=c['template'], tokenize=False,
                                   add_generation_prompt=c['generation'], **kwargs)
    out.append(text)
print(json.dumps([datetime.date.today().isoformat(), out]))
";
    let done = Command::new(python)
        .args(["-c", program])
        .arg(golden("models/llama"))
        .arg(&input)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let text = String::from_utf8(done.stdout).unwrap();
    let (today, expected): (jiff::civil::Date, Vec<String>) =
        serde_json::from_str(text.lines().last().unwrap())
            .map(|(day, texts): (String, Vec<String>)| (day.parse().unwrap(), texts))
            .unwrap();
    for (case, expected) in cases.iter().zip(expected) {
        let folder = model(dir.path(), case["template"].as_str().unwrap());
        let tokenizer = ChatTokenizer::from_folder(&folder).unwrap();
        let messages: Vec<ChatMessage> = case["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| ChatMessage::from_json(m.clone()).unwrap())
            .collect();
        let options = RenderOptions {
            add_generation_prompt: case["generation"].as_bool().unwrap(),
            tools: case["tools"].as_array().map(Vec::as_slice),
            kwargs: case["kwargs"].as_object().unwrap(),
            date: Some(today.at(0, 0, 0, 0)),
        };
        assert_eq!(
            tokenizer.apply_chat_template(&messages, &options).unwrap(),
            expected,
            "{case}"
        );
    }
}

#[test]
fn the_template_named_tool_use_is_used_for_dialogues_with_tools() {
    let dir = tempfile::tempdir().unwrap();
    let folder = model(dir.path(), "default");
    let more = folder.join("additional_chat_templates");
    std::fs::create_dir_all(&more).unwrap();
    std::fs::write(more.join("tool_use.jinja"), "tools").unwrap();
    let tokenizer = ChatTokenizer::from_folder(&folder).unwrap();
    let messages = [ChatMessage::new("user", "a")];
    let render = |tokenizer: &ChatTokenizer, tools: Option<Vec<Value>>| {
        let options = RenderOptions {
            tools: tools.as_deref(),
            ..RenderOptions::new(true)
        };
        tokenizer.apply_chat_template(&messages, &options)
    };
    assert_eq!(render(&tokenizer, None).unwrap(), "default");
    assert_eq!(render(&tokenizer, Some(vec![json!({})])).unwrap(), "tools");
    let with_two = tokenizer.template_hash();
    // Template files take precedence over the configuration; without them its list of named
    // templates is used.
    std::fs::remove_dir_all(&more).unwrap();
    let with_one = ChatTokenizer::from_folder(&folder).unwrap().template_hash();
    assert_ne!(
        with_one, with_two,
        "the template for tools is not part of the hash"
    );
    // With one template the hash is that of its text.
    assert_eq!(with_one, blake3::hash(b"default").to_hex().to_string());
    std::fs::remove_file(folder.join("chat_template.jinja")).unwrap();
    let path = folder.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["chat_template"] = json!([{"name": "tool_use", "template": "named tools"}]);
    std::fs::write(&path, config.to_string()).unwrap();
    let tokenizer = ChatTokenizer::from_folder(&folder).unwrap();
    assert_eq!(render(&tokenizer, Some(vec![])).unwrap(), "named tools");
    let e = render(&tokenizer, None).unwrap_err().to_string();
    assert!(
        e.contains("tool_use") && e.contains("none named \"default\""),
        "{e}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_whose_template_does_not_compile_still_scores_plain_text() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), "{% for %}", &[]);
    let client = server.client().await;
    let pair = pb::Pair {
        prompt: plain("1 2"),
        a: plain(" 3"),
        b: plain(" 4"),
        ..Default::default()
    };
    assert!(prompt_tokens(&score(&client, tiny(), pair).await.unwrap()) > 0);
    let refused = score(&client, tiny(), question()).await.unwrap_err();
    assert!(
        refused.message().contains("does not compile"),
        "{}",
        refused.message()
    );
    let model = client
        .models()
        .list_models(pb::ListModelsRequest {})
        .await
        .unwrap()
        .into_inner()
        .models
        .remove(0);
    assert!(!model.chat_template);
}

#[tokio::test(flavor = "multi_thread")]
async fn template_arguments_of_a_pair_override_the_calls_and_those_override_the_jobs() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), PRINTS_ALL, &[]);
    let client = server.client().await;
    // Styles of different lengths, so that the number of prompt tokens shows which one was used.
    let with = |style: &str| Some(structure(json!({"style": style})));
    let row = question_row();
    let own = json!({"chat_template_kwargs": {"style": "11111111"}, "tools": [{"name": "t"}]});
    let mut lines = [row.clone(), row];
    lines[1]
        .as_object_mut()
        .unwrap()
        .extend(own.as_object().unwrap().clone());
    let file = dir.path().join("rows.jsonl");
    std::fs::write(
        &file,
        lines.iter().map(|l| format!("{l}\n")).collect::<String>(),
    )
    .unwrap();
    let dataset = client
        .upload_dataset(&file, pb::UploadMetadata::default(), |_| {})
        .await
        .unwrap();
    let report = dataset.report.unwrap();
    assert_eq!(
        (report.valid_rows, report.issues.len()),
        (2, 0),
        "{report:?}"
    );

    let wanted = pb::TrainingJob {
        chat_template_kwargs: with("1 2 3"),
        ..job(&dataset.name, 1)
    };
    let bad = pb::TrainingJob {
        chat_template_kwargs: Some(structure(json!({"messages": 1}))),
        ..wanted.clone()
    };
    assert_eq!(
        fields(&create(&client, bad).await.unwrap_err()),
        ["training_job.chat_template_kwargs"]
    );
    let name = submit(&client, wanted.clone()).await;
    finish(&client, &name).await;
    let stored = get(&client, &name).await;
    assert_eq!(
        (stored.chat_template_kwargs, stored.state),
        (wanted.chat_template_kwargs, pb::JobState::Succeeded.into())
    );

    let base = prompt_tokens(&score(&client, tiny(), question()).await.unwrap());
    let checkpoint = pb::ScoringOptions {
        policy: format!("{name}/checkpoints/latest"),
        ..Default::default()
    };
    let by_job = score(&client, checkpoint.clone(), question())
        .await
        .unwrap();
    let explicit = pb::ScoringOptions {
        chat_template_kwargs: with("1 2 3"),
        ..checkpoint.clone()
    };
    assert_eq!(score(&client, explicit, question()).await.unwrap(), by_job);
    assert!(prompt_tokens(&by_job) > base);
    let longer = pb::ScoringOptions {
        chat_template_kwargs: with("1 2 3 4 5 6"),
        ..checkpoint.clone()
    };
    let by_call = score(&client, longer.clone(), question()).await.unwrap();
    assert!(prompt_tokens(&by_call) > prompt_tokens(&by_job));
    let pair = pb::Pair {
        chat_template_kwargs: with("1 2 3"),
        ..question()
    };
    assert_eq!(score(&client, longer, pair).await.unwrap(), by_job);

    // A pair's tools in the order of their keys, which only the JSON form preserves.
    let tools_json = r#"[{"type": "function", "name": "t", "a": {"z": 1, "b": 2}}]"#;
    let by_call = pb::ScoringOptions {
        tools_json: tools_json.into(),
        ..tiny()
    };
    let by_pair = pb::Pair {
        tools_json: tools_json.into(),
        ..question()
    };
    let with_tools = score(&client, by_call, question()).await.unwrap();
    assert!(prompt_tokens(&with_tools) > base);
    assert_eq!(
        score(&client, tiny(), by_pair.clone()).await.unwrap(),
        with_tools
    );
    // `score-files` gives tools to rows without tools of their own.
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("tools.json"), tools_json).unwrap();
    let mut own = question_row();
    own["tools"] = json!([{"name": "another"}]);
    let lines = format!("{}\n{own}\n", question_row());
    std::fs::write(path("two.jsonl"), lines).unwrap();
    let done = Command::new(crate::support::binary())
        .args(["score-files", "--policy", "tiny", "--out-format", "jsonl"])
        .args(["--in", &path("two.jsonl"), "--out", &path("out")])
        .args(["--tools", &path("tools.json"), "--server", &server.address])
        .env_remove("BRADLEY_CONFIG")
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    let parts = std::fs::read_dir(path("out")).unwrap();
    let part = parts
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|e| e == "jsonl"));
    let part = std::fs::read_to_string(part.unwrap()).unwrap();
    let scored: Vec<Value> = part
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let expected = with_tools.a.as_ref().unwrap().policy_logprob;
    assert_eq!(scored[0]["policy_logprob_a"].as_f64(), Some(expected));
    let of_own = pb::Pair {
        tools_json: own["tools"].to_string(),
        ..question()
    };
    let of_own = score(&client, tiny(), of_own).await.unwrap().a.unwrap();
    assert_eq!(
        scored[1]["policy_logprob_a"].as_f64(),
        Some(of_own.policy_logprob)
    );
    assert_ne!(of_own.policy_logprob, expected);

    let sorted = pb::Pair {
        tools: vec![structure(
            json!({"type": "function", "name": "t", "a": {"z": 1, "b": 2}}),
        )],
        ..question()
    };
    let same = pb::Pair {
        tools_json: r#"[{"a": {"b": 2, "z": 1}, "name": "t", "type": "function"}]"#.into(),
        ..question()
    };
    assert_eq!(
        score(&client, tiny(), sorted.clone()).await.unwrap(),
        score(&client, tiny(), same).await.unwrap()
    );

    // Refused with the name of the field.
    let both = pb::Pair {
        tools: sorted.tools.clone(),
        ..by_pair
    };
    assert_eq!(
        refused_fields(&client, tiny(), both).await,
        ["pair.tools_json"]
    );
    let text = pb::Pair {
        prompt: plain("1 2"),
        a: plain(" 3"),
        b: plain(" 4"),
        ..Default::default()
    };
    let tools_for_text = pb::Pair {
        tools: sorted.tools.clone(),
        ..text.clone()
    };
    assert_eq!(
        refused_fields(&client, tiny(), tools_for_text).await,
        ["pair.tools"]
    );
    let options = pb::ScoringOptions {
        tools: sorted.tools.clone(),
        ..tiny()
    };
    assert_eq!(
        refused_fields(&client, options, text).await,
        ["options.tools"]
    );
    let options = pb::ScoringOptions {
        chat_template_kwargs: Some(structure(json!({"documents": []}))),
        ..tiny()
    };
    assert_eq!(
        refused_fields(&client, options, question()).await,
        ["options.chat_template_kwargs"]
    );
    let image = pb::Pair {
        a: chat(json!([{"role": "assistant", "content": [{"type": "image"}]}])),
        ..question()
    };
    assert_eq!(
        refused_fields(&client, tiny(), image).await,
        ["pair.a.chat.messages[0].content[0].type"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn template_arguments_as_json_keep_their_order_and_numbers_as_in_a_row() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), PRINTS_ALL, &[]);
    let client = server.client().await;
    // The template prints the keys in this order and 1.0 as 1.0. A Struct sorts the keys and has
    // only doubles, so it gives another text.
    let text = r#"{"style":{"b":1.0,"a":1}}"#;
    let value: Value = serde_json::from_str(text).unwrap();
    let by_call = pb::ScoringOptions {
        chat_template_kwargs_json: text.into(),
        ..tiny()
    };
    let expected = score(&client, by_call.clone(), question()).await.unwrap();
    let by_pair = pb::Pair {
        chat_template_kwargs_json: text.into(),
        ..question()
    };
    assert_eq!(
        score(&client, tiny(), by_pair.clone()).await.unwrap(),
        expected
    );
    let by_struct = pb::ScoringOptions {
        chat_template_kwargs: Some(structure(value.clone())),
        ..tiny()
    };
    assert_ne!(
        score(&client, by_struct.clone(), question()).await.unwrap(),
        expected
    );

    // The command line, with the arguments in a row and in a flag.
    let run = |arguments: &[&str]| {
        let mut command = Command::new(crate::support::binary());
        let done = command
            .args(arguments)
            .env("BRADLEY_SERVER", &server.address)
            .env_remove("BRADLEY_CONFIG")
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        String::from_utf8(done.stdout).unwrap()
    };
    let mut row = question_row();
    let file = dir.path().join("rows.jsonl");
    let path = file.to_str().unwrap();
    std::fs::write(&file, row.to_string()).unwrap();
    let flags = [
        "score",
        "--policy",
        "models/tiny",
        "--data",
        path,
        "--output",
        "json",
    ];
    let by_flag = run(&[&flags[..], &["--template-args", text]].concat());
    row["chat_template_kwargs"] = value.clone();
    std::fs::write(&file, row.to_string()).unwrap();
    for said in [by_flag, run(&flags)] {
        let said: Value = serde_json::from_str(said.trim()).unwrap();
        assert_eq!(
            said["chosen"]["policy_logprob"].as_f64(),
            Some(expected.a.as_ref().unwrap().policy_logprob),
            "{said}"
        );
    }

    // A job created by the command line shows them as they were given, and scores with them.
    run(&[
        "train",
        "--data",
        path,
        "--template-args",
        text,
        "--rank",
        "4",
        "--batch-size",
        "1",
        "--max-steps",
        "1",
        "--watch",
    ]);
    let list = pb::ListTrainingJobsRequest::default();
    let made = client
        .training()
        .list_training_jobs(list)
        .await
        .unwrap()
        .into_inner()
        .training_jobs
        .remove(0);
    assert_eq!(
        (
            made.chat_template_kwargs.clone(),
            made.chat_template_kwargs_json.as_str()
        ),
        (None, text)
    );
    let trained = pb::ScoringOptions {
        policy: format!("{}/checkpoints/latest", made.name),
        ..Default::default()
    };
    let explicit = pb::ScoringOptions {
        chat_template_kwargs_json: text.into(),
        ..trained.clone()
    };
    assert_eq!(
        score(&client, trained, question()).await.unwrap(),
        score(&client, explicit, question()).await.unwrap()
    );

    // Refused with the name of the field.
    let both = pb::ScoringOptions {
        chat_template_kwargs: by_struct.chat_template_kwargs.clone(),
        ..by_call
    };
    assert_eq!(
        refused_fields(&client, both, question()).await,
        ["options.chat_template_kwargs_json"]
    );
    let both = pb::Pair {
        chat_template_kwargs: by_struct.chat_template_kwargs.clone(),
        ..by_pair
    };
    assert_eq!(
        refused_fields(&client, tiny(), both).await,
        ["pair.chat_template_kwargs_json"]
    );
    let both = pb::TrainingJob {
        chat_template_kwargs: by_struct.chat_template_kwargs,
        ..made
    };
    let refused = create(&client, both).await.unwrap_err();
    assert_eq!(fields(&refused), ["training_job.chat_template_kwargs_json"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_with_too_much_text_are_refused_by_their_field() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    // The prompt is counted once for each answer.
    let request = pb::ScoreCompletionsRequest {
        options: Some(tiny()),
        prompt: plain(&"1 ".repeat(40_000)),
        completions: (0..256).map(|_| plain(" 2").unwrap()).collect(),
    };
    let refused = client
        .scoring()
        .score_completions(request)
        .await
        .unwrap_err();
    assert_eq!(fields(&refused), ["completions"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_three_forms_of_a_message_over_grpc_give_the_same_score() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), "{{ messages | tojson }}", &[]);
    let client = server.client().await;
    let call = json!({"role": "assistant", "content": "", "tool_calls": [
        {"function": {"arguments": {"a": 1, "b": [true, null, 2.5]}, "name": "f"}}]});
    let answer = |message: pb::Message| pb::Text {
        form: Some(pb::text::Form::Chat(pb::MessageList {
            messages: vec![message],
        })),
    };
    let further = json!({"content": "", "tool_calls": call["tool_calls"]});
    // A Struct sorts its keys; here they are sorted in the JSON, too.
    let by_struct = pb::Message {
        role: "assistant".into(),
        fields: Some(structure(further.clone())),
        ..Default::default()
    };
    let by_json = pb::Message {
        role: "assistant".into(),
        fields_json: further.to_string(),
        ..Default::default()
    };
    let whole = pb::Message {
        fields_json: call.to_string(),
        ..Default::default()
    };
    let mut scores = Vec::new();
    for message in [by_struct.clone(), by_json.clone(), whole] {
        scores.push(
            score(
                &client,
                tiny(),
                pb::Pair {
                    a: Some(answer(message)),
                    ..question()
                },
            )
            .await
            .unwrap(),
        );
    }
    assert_eq!((&scores[0], &scores[0]), (&scores[1], &scores[2]));
    let both = pb::Message {
        fields: by_struct.fields,
        ..by_json
    };
    let refused = score(
        &client,
        tiny(),
        pb::Pair {
            a: Some(answer(both)),
            ..question()
        },
    )
    .await
    .unwrap_err();
    assert_eq!(fields(&refused), ["pair.a.chat.messages[0].fields_json"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_print_the_date_of_the_jobs_creation_or_of_the_setting() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), PRINTS_ALL, &["--template-date", "2001-02-03"]);
    let tokenizer = ChatTokenizer::from_folder(&dir.path().join("model")).unwrap();
    let client = server.client().await;
    let by_model = score(&client, tiny(), question()).await.unwrap();
    assert!(
        answer_text(&by_model, &tokenizer).contains("2001-02-03"),
        "{}",
        answer_text(&by_model, &tokenizer)
    );

    let file = dir.path().join("rows.jsonl");
    std::fs::write(&file, format!("{}\n", question_row())).unwrap();
    let dataset = client
        .upload_dataset(&file, pb::UploadMetadata::default(), |_| {})
        .await
        .unwrap();
    let name = submit(&client, job(&dataset.name, 1)).await;
    finish(&client, &name).await;
    let stored = get(&client, &name).await;
    let created = jiff::Timestamp::from_second(stored.create_time.unwrap().seconds).unwrap();
    let options = pb::ScoringOptions {
        policy: format!("{name}/checkpoints/latest"),
        ..Default::default()
    };
    let by_job = score(&client, options, question()).await.unwrap();
    let expected = created.to_zoned(jiff::tz::TimeZone::UTC).date().to_string();
    assert!(
        answer_text(&by_job, &tokenizer).contains(&expected),
        "{}",
        answer_text(&by_job, &tokenizer)
    );
}

/// A template that refuses messages with this content.
fn refusing(content: &str) -> String {
    format!(
        "{{%- for m in messages %}}{{%- if m.content == '{content}' %}}{{{{ raise_exception('no \
         {content}') }}}}{{%- endif %}}{{{{ m.role }}}}: {{{{ m.content + '\\n' }}}}{{%- endfor %}}"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_names_the_rows_that_only_its_own_template_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = [("a", "only b"), ("b", "only a")]
        .map(|(id, content)| model(&dir.path().join(id), &refusing(content)));
    let models = format!("a={},b={}", a.display(), b.display());
    let server = Server::start_with(&dir.path().join("data"), &models, &[]);
    let client = server.client().await;
    let row = |i: usize, prompt: &str, rejected: &str| {
        json!({"prompt": [{"role": "user", "content": prompt}],
               "chosen": [{"role": "assistant", "content": format!("yes {i}")}],
               "rejected": [{"role": "assistant", "content": rejected}]})
        .to_string()
    };
    let rows: Vec<String> = (1..=8)
        .map(|i| match i {
            3 => row(i, "1 2 3", "only a"),
            5 => row(i, "only b", "no"),
            _ => row(i, &format!("1 2 {i}"), "no"),
        })
        .collect();
    let file = dir.path().join("rows.jsonl");
    std::fs::write(&file, rows.join("\n")).unwrap();
    let dataset = upload_for(&client, "models/a", &file).await;
    let report = dataset.report.unwrap();
    let found: Vec<_> = report
        .issues
        .iter()
        .filter(|i| i.severity() == pb::IssueSeverity::Error)
        .map(|i| (i.row, i.field.as_str(), i.reason.as_str()))
        .collect();
    assert_eq!(found, [(5, "prompt", "invalid_type")], "{report:?}");

    let with = |model: &str, skip: bool| pb::TrainingJob {
        policy: format!("models/{model}"),
        row_policy: match skip {
            true => pb::RowPolicy::Skip.into(),
            false => pb::RowPolicy::Reject.into(),
        },
        ..job(&dataset.name, 1)
    };
    // The row is known to be bad for a, so a job with a is refused at once.
    let refused = create(&client, with("a", false)).await.unwrap_err();
    assert!(
        refused.message().contains("row 5, invalid_type"),
        "{refused}"
    );
    // For b another row is bad, which is known only when the job starts.
    let name = submit(&client, with("b", false)).await;
    finish(&client, &name).await;
    let failed = get(&client, &name).await;
    assert_eq!(failed.state(), pb::JobState::Failed);
    let said = failed.error.unwrap().message;
    for part in [
        "has 1 rows that cannot be used with models/b",
        "(the upload was checked with models/a)",
        "row 3, rejected invalid_type: ",
        "no only a",
        "use a model whose template accepts it",
        "row_policy to SKIP",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    for (model, expected) in [("a", "row 5, prompt"), ("b", "row 3, rejected")] {
        let name = submit(&client, with(model, true)).await;
        finish(&client, &name).await;
        let done = get(&client, &name).await;
        assert_eq!(done.state(), pb::JobState::Succeeded, "{done:?}");
        assert_eq!(done.skipped_rows.len(), 1, "{:?}", done.skipped_rows);
        assert!(
            done.skipped_rows[0].starts_with(expected),
            "{:?}",
            done.skipped_rows
        );
    }
}

/// A template whose generation prompt ends with a text that an answer may or may not begin with.
const GENERATION_PROMPT_777: &str = "{% for m in messages %}\
    {% if m.role == 'user' %}{{ m.content }}\n{% else %}A:{{ m.content }}{% endif %}\
    {% endfor %}{% if add_generation_prompt %}A: 7 7 7{% endif %}";

#[tokio::test(flavor = "multi_thread")]
async fn an_answers_score_does_not_depend_on_other_answers_and_a_cut_prompt_is_a_finding() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), GENERATION_PROMPT_777, &[]);
    let client = server.client().await;
    let text = |answer: &str| chat(json!([{"role": "assistant", "content": answer}])).unwrap();
    let score_answers = async |answers: &[&str]| {
        let request = pb::ScoreCompletionsRequest {
            options: Some(pb::ScoringOptions {
                per_token_logprobs: true,
                ..tiny()
            }),
            prompt: chat(json!([{"role": "user", "content": "1 2"}])),
            completions: answers.iter().map(|a| text(a)).collect(),
        };
        let answer = client
            .scoring()
            .score_completions(request)
            .await
            .unwrap()
            .into_inner();
        let scores = answer.results.into_iter().map(|r| match r.result {
            Some(pb::completion_result::Result::Score(s)) => s,
            other => panic!("{other:?}"),
        });
        scores.collect::<Vec<_>>()
    };
    // One answer begins with the end of the generation prompt, the other one does not.
    let (continues, differs) = (" 7 7 7 8 9", " 1 2");
    let alone = [
        score_answers(&[continues]).await.remove(0),
        score_answers(&[differs]).await.remove(0),
    ];
    assert!(alone[0].prompt_tokens > alone[1].prompt_tokens, "{alone:?}");
    assert_eq!(score_answers(&[continues, differs]).await, alone);

    // A pair's prompt is the prefix that all three share, as in TRL.
    let pair = pb::Pair {
        a: Some(text(continues)),
        b: Some(text(differs)),
        ..question()
    };
    let both = score(&client, tiny(), pair).await.unwrap();
    assert_eq!(
        (both.a.unwrap().prompt_tokens, both.b.unwrap().prompt_tokens),
        (alone[1].prompt_tokens, alone[1].prompt_tokens)
    );

    let row = |chosen: &str| {
        json!({
            "prompt": [{"role": "user", "content": "1 2"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": " 7 7 7 1"}],
        })
    };
    let file = dir.path().join("rows.jsonl");
    std::fs::write(&file, format!("{}\n{}\n", row(continues), row(differs))).unwrap();
    let dataset = upload_for(&client, "models/tiny", &file).await;
    let report = dataset.report.unwrap();
    let found: Vec<_> = report
        .issues
        .iter()
        .map(|i| (i.row, i.field.as_str(), i.reason.as_str()))
        .collect();
    assert_eq!(
        (found, report.valid_rows),
        (vec![(2, "prompt", "prompt_cut")], 2)
    );
    assert!(
        report.issues[0].message.contains("7 7 7\""),
        "{}",
        report.issues[0].message
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_the_model_does_not_have_is_a_finding() {
    let dir = tempfile::tempdir().unwrap();
    let folder = model(dir.path(), GENERATION_PROMPT_777);
    let path = folder.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let more = json!({"id": 320, "content": "<extra>", "single_word": false, "lstrip": false,
                      "rstrip": false, "normalized": false, "special": true});
    tokenizer["added_tokens"].as_array_mut().unwrap().push(more);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let server = Server::start_with(
        &dir.path().join("data"),
        &format!("tiny={}", folder.display()),
        &[],
    );
    let client = server.client().await;

    let pair = |a: &str| pb::Pair {
        prompt: plain("1 2"),
        a: plain(a),
        b: plain(" 4"),
        ..Default::default()
    };
    let refused = score(&client, tiny(), pair(" 3<extra>")).await.unwrap_err();
    assert_eq!(fields(&refused), ["pair.a"]);
    assert!(
        refused.message().contains("<extra>") && refused.message().contains("320"),
        "{}",
        refused.message()
    );
    score(&client, tiny(), pair(" 3")).await.unwrap();

    let rows = [
        "{\"prompt\":\"1 2\",\"chosen\":\" 3\",\"rejected\":\" 4\"}",
        "{\"prompt\":\"1<extra>\",\"chosen\":\" 3\",\"rejected\":\" 4\"}",
    ];
    let file = dir.path().join("rows.jsonl");
    std::fs::write(&file, rows.join("\n")).unwrap();
    let dataset = upload_for(&client, "models/tiny", &file).await;
    let report = dataset.report.unwrap();
    let found: Vec<_> = report
        .issues
        .iter()
        .map(|i| (i.row, i.field.as_str(), i.reason.as_str()))
        .collect();
    assert_eq!(
        (found, report.valid_rows),
        (vec![(2, "prompt", "token_outside_vocabulary")], 1)
    );
    // With the row left out the job trains; with it the job fails before its first step, with the
    // reason.
    let skipping = pb::TrainingJob {
        row_policy: pb::RowPolicy::Skip.into(),
        ..job(&dataset.name, 1)
    };
    for (wanted, expected) in [
        (skipping, pb::JobState::Succeeded),
        (job(&dataset.name, 1), pb::JobState::Failed),
    ] {
        let name = submit(&client, wanted).await;
        finish(&client, &name).await;
        let done = get(&client, &name).await;
        assert_eq!(done.state(), expected, "{done:?}");
        let says_why = |error: &tonic_types::Status| error.message.contains("<extra>");
        let must_say_why = expected == pb::JobState::Failed;
        assert_eq!(
            done.error.as_ref().is_some_and(says_why),
            must_say_why,
            "{done:?}"
        );
    }
}
