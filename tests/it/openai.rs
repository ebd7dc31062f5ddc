//! OpenAI's API over real sockets: log-probs of answers and of prompts, several prompts in one
//! request, prompts as token ids, as lm-evaluation-harness sends them, and requests that nobody
//! should send.

use bradley::rpc::client::Client;
use bradley::rpc::pb;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::hostile::{mutate, number_of_cases};
use crate::rest::client;
use crate::server::Server;
use crate::support::{golden, tiny};

/// Sends a request. Returns the HTTP status and the text of the answer.
async fn post_bytes(server: &Server, path: &str, body: Vec<u8>) -> (u16, String) {
    let request = client()
        .post(format!("{}/openai/v1/{path}", server.address))
        .header("content-type", "application/json")
        .body(body);
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    (status, response.text().await.unwrap())
}

/// Sends a request. Returns the HTTP status and the answer.
async fn post(server: &Server, path: &str, body: &Value) -> (u16, Value) {
    let (status, text) = post_bytes(server, path, body.to_string().into_bytes()).await;
    (status, serde_json::from_str(&text).unwrap())
}

/// Sends a request for text completions that must succeed.
async fn complete(server: &Server, body: Value) -> Value {
    let (status, answer) = post(server, "completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

fn plain(text: &str) -> Option<pb::Text> {
    Some(pb::Text {
        form: Some(pb::text::Form::Plain(text.into())),
    })
}

fn numbers(list: &Value) -> Vec<f64> {
    let list = list.as_array().unwrap().iter();
    list.map(|n| n.as_f64().unwrap()).collect()
}

/// Returns the ids of an answer's tokens, and their log-probs from ScoreCompletions.
async fn scored(client: &Client, prompt: &str, answer: &str) -> (Vec<u32>, Vec<f32>) {
    let request = pb::ScoreCompletionsRequest {
        options: Some(pb::ScoringOptions {
            policy: "models/tiny".into(),
            per_token_logprobs: true,
            ..Default::default()
        }),
        prompt: plain(prompt),
        completions: plain(answer).into_iter().collect(),
    };
    let response = client.scoring().score_completions(request).await.unwrap();
    let first = response.into_inner().results.remove(0);
    match first.result {
        Some(pb::completion_result::Result::Score(score)) => {
            (score.token_ids, score.policy_token_logprobs)
        }
        other => panic!("{other:?}"),
    }
}

/// The requests and the reading of lm-evaluation-harness (`LocalCompletionsAPI`): a batch of token
/// ids, and the log-probs between the end of the context and the generated token.
#[tokio::test(flavor = "multi_thread")]
async fn log_likelihoods_are_those_of_score_completions() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let (_, tokenizer) = tiny("llama");
    let context = tokenizer.encode("Water boils", true).unwrap();
    let (mut prompts, mut wanted) = (Vec::new(), Vec::new());
    for answer in [
        " when it is hot",
        " at noon, and it freezes when it is cold",
        "!",
    ] {
        let (ids, log_probs) = scored(&client, "Water boils", answer).await;
        prompts.push([context.clone(), ids].concat());
        wanted.push(log_probs);
    }
    let body = json!({
        "model": "tiny",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": true,
    });
    let answer = complete(&server, body).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    for (i, (choice, wanted)) in choices.iter().zip(&wanted).enumerate() {
        assert_eq!(choice["index"], i);
        let log_probs = &choice["logprobs"];
        let all = log_probs["token_logprobs"].as_array().unwrap();
        assert_eq!(all.len(), prompts[i].len() + 1);
        assert_eq!(all[0], Value::Null);
        for name in ["tokens", "top_logprobs", "text_offset"] {
            assert_eq!(log_probs[name].as_array().unwrap().len(), all.len());
        }
        let (from, to) = (context.len(), all.len() - 1);
        let of_answer = numbers(&Value::from(&all[from..to]));
        assert_eq!(of_answer.len(), wanted.len());
        for (got, want) in of_answer.iter().zip(wanted) {
            assert!((got - f64::from(*want)).abs() < 1e-4, "{got} is not {want}");
        }
        let top = log_probs["top_logprobs"].as_array().unwrap();
        for (token, top) in all.iter().zip(top).skip(1) {
            let top = top.as_object().unwrap().values();
            let best = top.map(|p| p.as_f64().unwrap()).fold(-1e9, f64::max);
            assert!(best >= token.as_f64().unwrap());
        }
        // The generated token is the most likely one.
        let best = top[to].as_object().unwrap();
        assert_eq!((best.len(), best.values().next()), (1, Some(&all[to])));
    }
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    assert_eq!(answer["usage"]["prompt_tokens"], tokens);
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probs_of_an_answer_are_those_of_the_service() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let request = pb::GenerateCompletionsRequest {
        policy: "models/tiny".into(),
        prompt: plain("Bread needs"),
        max_tokens: 12,
        temperature: Some(0.0),
        ignore_eos: true,
        logprobs: true,
        token_texts: true,
        top_logprobs: 2,
        ..Default::default()
    };
    let answer = client.generation().generate_completions(request).await;
    let mut stream = answer.unwrap().into_inner();
    let (mut log_probs, mut texts, mut ids) = (Vec::new(), Vec::new(), Vec::new());
    while let Some(response) = stream.message().await.unwrap() {
        assert!(response.prompt_tokens.is_empty());
        for delta in response.deltas {
            let places = delta.token_ids.iter().zip(&delta.token_logprobs);
            for ((id, log_prob), top) in places.zip(&delta.top_logprobs) {
                // Greedy sampling takes the most likely token.
                assert_eq!(top.tokens.len(), 2);
                assert_eq!(
                    (top.tokens[0].token_id, top.tokens[0].logprob),
                    (*id, *log_prob)
                );
                assert!(top.tokens[1].logprob <= *log_prob);
            }
            assert_eq!(delta.top_logprobs.len(), delta.token_ids.len());
            ids.extend(delta.token_ids);
            log_probs.extend(delta.token_logprobs.iter().map(|p| f64::from(*p)));
            texts.extend(delta.token_texts);
        }
    }
    assert_eq!((ids.len(), texts.len()), (12, 12));
    let body = json!({
        "model": "tiny", "prompt": "Bread needs", "max_tokens": 12, "temperature": 0,
        "ignore_eos": true, "logprobs": 2,
    });
    let answer = complete(&server, body.clone()).await;
    let choice = &answer["choices"][0];
    assert_eq!(numbers(&choice["logprobs"]["token_logprobs"]), log_probs);
    assert_eq!(choice["logprobs"]["tokens"], json!(texts));

    // The prompt before it, as text and alone.
    let mut echoing = body.clone();
    echoing["echo"] = json!(true);
    let echoed = complete(&server, echoing.clone()).await;
    let whole = &echoed["choices"][0];
    let text = format!("Bread needs{}", choice["text"].as_str().unwrap());
    assert_eq!(whole["text"], text);
    let all = whole["logprobs"]["token_logprobs"].as_array().unwrap();
    let prompt_tokens = echoed["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert_eq!(all.len(), prompt_tokens + 12);
    assert_eq!(numbers(&Value::from(&all[prompt_tokens..])), log_probs);
    echoing["max_tokens"] = json!(0);
    let alone = complete(&server, echoing).await;
    let of_prompt = &alone["choices"][0];
    assert_eq!(of_prompt["text"], "Bread needs");
    assert_eq!(of_prompt["finish_reason"], "length");
    assert_eq!(
        of_prompt["logprobs"]["token_logprobs"],
        json!(all[..prompt_tokens])
    );
    assert_eq!(alone["usage"]["completion_tokens"], 0);

    // A chat.
    let chat = json!({
        "model": "tiny", "messages": [{"role": "user", "content": "Name a colour."}],
        "max_tokens": 9, "temperature": 0, "logprobs": true, "top_logprobs": 3,
    });
    let (status, answer) = post(&server, "chat/completions", &chat).await;
    assert_eq!(status, 200, "{answer}");
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(answer["usage"]["completion_tokens"], content.len());
    for token in content {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        for name in ["token", "logprob", "bytes"] {
            assert_eq!(top[0][name], token[name]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_prompts_are_answered_as_each_alone() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let prompts: Vec<String> = (0..20).map(|i| format!("Question {i}: why?")).collect();
    let asking = |prompt: Value| {
        json!({
            "model": "tiny", "prompt": prompt, "n": 2, "max_tokens": 6, "seed": 5,
            "ignore_eos": true,
        })
    };
    let answer = complete(&server, asking(json!(prompts))).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 40);
    assert_eq!(answer["usage"]["completion_tokens"], 240);
    for i in [0, 7, 19] {
        let alone = complete(&server, asking(json!(prompts[i]))).await;
        for sample in 0..2 {
            let (choice, alone) = (&choices[2 * i + sample], &alone["choices"][sample]);
            assert_eq!(choice["index"], 2 * i + sample);
            assert_eq!(choice["text"], alone["text"]);
            assert_eq!(choice["logprobs"], Value::Null);
        }
    }
    for (prompt, parameter, part) in [
        (json!([[5], [6, 1 << 20]]), "prompt[1][1]", "vocabulary"),
        (json!([5, 1 << 20]), "prompt[1]", "vocabulary"),
        (json!(["a", 3]), "prompt", "a list of token ids"),
    ] {
        let (status, answer) = post(&server, "completions", &asking(prompt)).await;
        assert_eq!(status, 400, "{answer}");
        assert_eq!(answer["error"]["param"], parameter, "{answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(part), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tokens_of_a_long_prompt_come_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let ids: Vec<u32> = (0..600).map(|i| 5 + i % 300).collect();
    let request = pb::GenerateCompletionsRequest {
        policy: "models/tiny".into(),
        prompt_token_ids: ids.clone(),
        max_tokens: 2,
        prompt_logprobs: true,
        top_logprobs: 1,
        ..Default::default()
    };
    let copy = request.clone();
    let answer = client.generation().generate_completions(copy).await;
    let mut stream = answer.unwrap().into_inner();
    let (mut tokens, mut sizes) = (Vec::new(), Vec::new());
    while let Some(response) = stream.message().await.unwrap() {
        if !response.prompt_tokens.is_empty() {
            assert!(response.deltas.is_empty());
            sizes.push(response.prompt_tokens.len());
            tokens.extend(response.prompt_tokens);
        }
        // Only the log-probs of the prompt were asked for.
        assert!(response.deltas.iter().all(|d| d.top_logprobs.is_empty()));
    }
    assert_eq!(sizes, [256, 256, 88]);
    let got: Vec<u32> = tokens.iter().map(|token| token.token_id).collect();
    assert_eq!(got, ids);
    assert_eq!((tokens[0].logprob, tokens[0].top_logprobs.len()), (None, 0));
    for token in &tokens[1..] {
        assert!(token.logprob.is_some() && token.text.is_empty());
        assert!(token.top_logprobs[0].logprob >= token.logprob.unwrap());
    }
    for (wrong, part) in [
        (
            pb::GenerateCompletionsRequest {
                prompt: plain("x"),
                ..request.clone()
            },
            "is set together with prompt",
        ),
        (
            pb::GenerateCompletionsRequest {
                top_logprobs: 21,
                ..request.clone()
            },
            "at most 20",
        ),
        (
            pb::GenerateCompletionsRequest {
                prompt_logprobs: false,
                ..request
            },
            "set logprobs or prompt_logprobs",
        ),
    ] {
        let answer = client.generation().generate_completions(wrong).await;
        let e = answer.err().unwrap();
        assert!(e.message().contains(part), "{e}");
    }
}

/// Parameters that hostile requests change.
const PARAMETERS: [&str; 20] = [
    "echo",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "n",
    "prompt",
    "seed",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "temperature",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
    "unknown",
];

/// Changes some parameters of a request, or the bytes of its text.
fn hostile_body(random: &mut ChaCha8Rng, request: &Value) -> Vec<u8> {
    if random.random_range(0..2) == 0 {
        return mutate(random, request.to_string().as_bytes());
    }
    let values = [
        json!(null),
        json!(true),
        json!(false),
        json!(-1),
        json!(0),
        json!(1),
        json!(0.5),
        json!(1e300),
        json!(u32::MAX),
        json!(u64::MAX),
        json!(""),
        json!("x"),
        json!("models/tiny"),
        json!("é".repeat(2000)),
        json!([]),
        json!([[]]),
        json!([5, 6]),
        json!(["a", [7]]),
        json!([{"role": "user", "content": "x"}]),
        json!([{"role": 7, "content": [{"type": "text"}]}]),
        json!({}),
        json!({"include_usage": true}),
    ];
    let mut changed = request.clone();
    for _ in 0..random.random_range(1..4) {
        let name = PARAMETERS[random.random_range(0..PARAMETERS.len())];
        changed[name] = values[random.random_range(0..values.len())].clone();
    }
    changed.to_string().into_bytes()
}

/// Checks that an answer is a refusal with its reason, or a whole result. Returns true for a
/// result.
fn is_result(what: &str, status: u16, text: &str) -> bool {
    let read = |text: &str| -> Value {
        serde_json::from_str(text).unwrap_or_else(|e| panic!("{what}: {e}: {text}"))
    };
    let assert_is_error = |answer: &Value| {
        let error = &answer["error"];
        let message = error["message"].as_str().unwrap_or_default();
        assert!(!message.is_empty(), "{what}: {answer}");
        assert!(error["type"].is_string(), "{what}: {answer}");
        assert_ne!(error["code"], "INTERNAL", "{what}: {answer}");
    };
    if status != 200 {
        assert!((400..500).contains(&status), "{what}: {status} {text}");
        assert_is_error(&read(text));
        return false;
    }
    if text.starts_with("data: ") {
        let last = text.split_terminator("\n\n").last().unwrap();
        let last = last.strip_prefix("data: ").unwrap();
        if last != "[DONE]" {
            assert_is_error(&read(last));
        }
        return last == "[DONE]";
    }
    let answer = read(text);
    let choices = answer["choices"].as_array().unwrap();
    assert!(!choices.is_empty(), "{what}: {answer}");
    for (i, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], i, "{what}: {answer}");
        let content = choice
            .pointer("/message/content")
            .unwrap_or(&choice["text"]);
        assert!(content.is_string(), "{what}: {answer}");
        assert!(choice["finish_reason"].is_string(), "{what}: {answer}");
    }
    let count = |name: &str| answer["usage"][name].as_u64().unwrap();
    let sum = count("prompt_tokens") + count("completion_tokens");
    assert_eq!(count("total_tokens"), sum, "{what}: {answer}");
    true
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_requests_are_refused_with_a_reason_or_answered() {
    let dir = tempfile::tempdir().unwrap();
    let models = format!("tiny={}", golden("models/llama").display());
    // It also limits what a changed `max_tokens` may cost.
    let flags = ["--generation-cache-tokens", "1024"];
    let server = Server::start_with(dir.path(), &models, &flags);
    let mut random = ChaCha8Rng::seed_from_u64(17);
    let messages = json!([{"role": "user", "content": "Name a colour."}]);
    let requests = [
        (
            "chat/completions",
            json!({
                "model": "tiny", "messages": messages, "max_tokens": 4, "n": 2,
                "temperature": 0.5, "seed": 3, "stop": ["end"], "logprobs": true,
                "top_logprobs": 2,
            }),
        ),
        (
            "chat/completions",
            json!({
                "model": "tiny", "messages": messages, "max_completion_tokens": 4,
                "stream": true, "stream_options": {"include_usage": true},
            }),
        ),
        (
            "completions",
            json!({
                "model": "tiny", "prompt": ["One two", [5, 6, 7]], "max_tokens": 3,
                "logprobs": 1, "echo": true,
            }),
        ),
        (
            "completions",
            json!({"model": "tiny", "prompt": "One two three", "max_tokens": 4, "stream": true}),
        ),
    ];
    for (path, request) in &requests {
        let (status, text) = post_bytes(&server, path, request.to_string().into()).await;
        assert!(is_result(path, status, &text), "{request}: {text}");
    }
    for _ in 0..number_of_cases() {
        for (path, request) in &requests {
            let body = hostile_body(&mut random, request);
            let what = format!("{path} {}", String::from_utf8_lossy(&body));
            let (status, text) = post_bytes(&server, path, body).await;
            is_result(&what, status, &text);
        }
    }
    assert!(!server.has_logged("panicked"));
    assert!(server.client().await.health().await.unwrap());
}
