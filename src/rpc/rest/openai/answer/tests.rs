use super::*;
use crate::domain::reason::Reason;
use crate::engine::api::EngineError;
use crate::rpc::rest::request::{LateBody, MAX_INLINE, framed};

fn asked(is_chat: bool) -> AnswerOptions {
    AnswerOptions {
        is_chat,
        id: "id".into(),
        created: 5,
        model: "tiny".into(),
        samples: 2,
        token_limit: "max_tokens",
        streams: true,
        includes_usage: true,
        alternatives: None,
        echoes: false,
        drops_samples: false,
        prompts: vec![Some("p".into())],
        further: Vec::new(),
    }
}

/// Fails the test: there is no further prompt.
async fn no_call(_: Bytes) -> Result<Response<Body>, String> {
    Err("a call was made".to_owned())
}

fn responses() -> [pb::GenerateCompletionsResponse; 2] {
    let delta = |index, text: &str, reason: pb::FinishReason| pb::CompletionDelta {
        index,
        text: text.into(),
        finish_reason: reason.into(),
        ..Default::default()
    };
    let first = vec![
        delta(1, "b", pb::FinishReason::Unspecified),
        delta(0, "", pb::FinishReason::Unspecified),
        delta(0, "a", pb::FinishReason::Length),
    ];
    let last = vec![delta(1, "c", pb::FinishReason::Stop)];
    let with = |deltas, usage| pb::GenerateCompletionsResponse {
        deltas,
        policy_version: "v".into(),
        seed: 1,
        usage,
        prompt_tokens: Vec::new(),
    };
    let usage = pb::GenerationUsage {
        prompt_tokens: 3,
        completion_tokens: 4,
    };
    [with(first, None), with(last, Some(usage))]
}

fn events(text: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(text).unwrap();
    text.split_terminator("\n\n")
        .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
        .collect()
}

/// Returns the answer to a request with one prompt.
fn whole_json(data: BytesMut, asked: &AnswerOptions) -> Value {
    serde_json::from_slice(&whole(vec![data], asked).unwrap()).unwrap()
}

#[test]
fn a_whole_answer_has_every_sample() {
    for (is_chat, place) in [(true, "/message/content"), (false, "/text")] {
        let mut data = BytesMut::new();
        for response in responses() {
            data.extend_from_slice(&framed(&response.encode_to_vec()));
        }
        let value = whole_json(data, &asked(is_chat));
        let choices = value["choices"].as_array().unwrap();
        let texts: Vec<_> = choices
            .iter()
            .map(|c| {
                (
                    c.pointer(place).unwrap().as_str(),
                    c["finish_reason"].as_str(),
                )
            })
            .collect();
        assert_eq!(
            texts,
            [(Some("a"), Some("length")), (Some("bc"), Some("stop"))]
        );
        assert_eq!(value["usage"]["total_tokens"], 7);
        assert_eq!(value["system_fingerprint"], "v");
    }
    // A stream that broke off is no answer.
    let mut data = BytesMut::new();
    data.extend_from_slice(&framed(&responses()[0].encode_to_vec()));
    assert!(whole(vec![data], &asked(true)).is_err());
}

#[test]
fn the_fields_of_answers_have_the_order_of_openais() {
    let rest = concat!(
        r#""model":"tiny","system_fingerprint":"v","choices":["#,
        r#"{"index":0,"text":"","logprobs":null,"finish_reason":null},"#,
        r#"{"index":1,"text":"c","logprobs":null,"finish_reason":"stop"}],"#,
        r#""usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#,
    );
    let [_, last] = responses();
    let text = |options: &AnswerOptions| -> String {
        let json = whole(vec![data_of(&last)], options).unwrap();
        String::from_utf8(json).unwrap()
    };
    let start = r#"{"id":"id","object":"text_completion","created":5,"#;
    assert_eq!(text(&asked(false)), format!("{start}{rest}"));
    let chat = text(&asked(true));
    let message = r#""message":{"role":"assistant","content":"c","refusal":null}"#;
    assert!(chat.contains(message), "{chat}");
    // A name like a part of the answer.
    let named = AnswerOptions {
        model: NO_CHOICES.to_owned(),
        ..asked(false)
    };
    let answer: Value = serde_json::from_str(&text(&named)).unwrap();
    assert_eq!(answer["model"], NO_CHOICES);
    assert_eq!(answer["choices"][1]["text"], "c");
    // Chunks without the numbers of tokens have no field for them.
    let options = AnswerOptions {
        includes_usage: false,
        ..asked(false)
    };
    let chunk = Chunks::new(options).of(&last.encode_to_vec()).unwrap();
    let choice = r#"{"index":1,"text":"c","logprobs":null,"finish_reason":"stop"}"#;
    let rest = r#""model":"tiny","system_fingerprint":"v","choices":["#;
    let expected = format!("data: {start}{rest}{choice}]}}\n\n");
    assert_eq!(String::from_utf8(chunk).unwrap(), expected);
}

#[tokio::test]
async fn a_large_answer_is_whole() {
    let [_, mut response] = responses();
    response.deltas[0].text = "x".repeat(MAX_INLINE);
    let data = framed(&response.encode_to_vec());
    let options = AnswerOptions {
        streams: false,
        ..asked(false)
    };
    let converter = AnswerConverter {
        endpoint: Endpoint::Text,
        asked: Arc::new(OnceLock::from(options)),
    };
    let body = Body::new(LateBody::reading(std::future::ready(Ok(data))));
    let answered = converter.convert(Response::new(body), no_call).await;
    let answered = answered.unwrap();
    assert_eq!(answered.status(), StatusCode::OK);
    let text = answer::read_all(answered.into_body()).await.unwrap();
    let value: Value = serde_json::from_slice(&text).unwrap();
    let text = value["choices"][1]["text"].as_str().unwrap();
    assert_eq!(text.len(), MAX_INLINE);
    assert_eq!(value["choices"][1]["finish_reason"], "stop");
}

#[tokio::test]
async fn answers_above_the_limit_are_refused() {
    let [_, response] = responses();
    let half = (MAX_ANSWERS_MIB << 20) / 2;
    for (bytes, prompts, http) in [
        (half, 1, StatusCode::OK),
        (2 * half, 1, StatusCode::BAD_REQUEST),
        (half, 2, StatusCode::BAD_REQUEST),
    ] {
        let mut response = response.clone();
        response.deltas[0].text = "x".repeat(bytes);
        let data = framed(&response.encode_to_vec());
        let answer = move || {
            let data = std::future::ready(Ok(data.clone()));
            Response::new(Body::new(LateBody::reading(data)))
        };
        let options = AnswerOptions {
            streams: false,
            further: vec![Bytes::new(); prompts - 1],
            ..asked(false)
        };
        let converter = AnswerConverter {
            endpoint: Endpoint::Text,
            asked: Arc::new(OnceLock::from(options)),
        };
        let first = answer();
        let call = move |_: Bytes| {
            let further = answer();
            async move { Ok::<_, String>(further) }
        };
        let answered = converter.convert(first, call).await.unwrap();
        assert_eq!(answered.status(), http, "{bytes} bytes, {prompts} prompts");
        if http == StatusCode::BAD_REQUEST {
            let text = answer::read_all(answered.into_body()).await.unwrap();
            let value: Value = serde_json::from_slice(&text).unwrap();
            assert_eq!(value["error"]["param"], "body");
            let message = value["error"]["message"].as_str().unwrap();
            assert!(message.contains("more than 32 MiB"), "{message}");
        }
    }
}

#[test]
fn a_chat_is_streamed_in_chunks() {
    let chunks = Chunks::new(asked(true));
    let cut = events(&chunks.last(None).unwrap());
    assert!(cut[0]["error"]["message"].is_string(), "{cut:?}");
    let mut all = Vec::new();
    for response in responses() {
        all.extend(events(&chunks.of(&response.encode_to_vec()).unwrap()));
    }
    let deltas: Vec<_> = all
        .iter()
        .map(|chunk| chunk.pointer("/choices/0/delta").cloned())
        .collect();
    let role = Some(json!({"role": "assistant", "content": ""}));
    let text = |text: &str| Some(json!({"content": text}));
    assert_eq!(
        deltas,
        [role.clone(), role, text("b"), text("a"), text("c"), None]
    );
    assert_eq!(all[3]["choices"][0]["finish_reason"], "length");
    assert_eq!(all[2]["usage"], Value::Null);
    assert_eq!(all[5]["usage"]["completion_tokens"], 4);
    assert_eq!(chunks.last(None).unwrap(), b"data: [DONE]\n\n");
}

#[test]
fn errors_name_the_parameters_of_the_request() {
    let mut bad = crate::domain::violation::Violations::default();
    bad.push("policy", "is \"x\"");
    bad.push("prompt.chat.messages[0].role", "is missing");
    bad.push("prompt.chat.messages[1].fields_json", "is a string");
    bad.push("prompt", "is too long");
    bad.push("tools_json", "is no list");
    bad.push("chat_template_kwargs_json", "has the key \"tools\"");
    let status = status(ServiceError::InvalidArgument(bad));
    assert_eq!(status.code(), Code::InvalidArgument);
    let chat = ErrorPlace::Chat("max_completion_tokens");
    let error = &error_json(StatusCode::BAD_REQUEST, &status, chat)["error"];
    assert_eq!(
        error["message"],
        "model is \"x\"; messages[0].role is missing; messages[1] is a string; \
         messages is too long; tools is no list; chat_template_kwargs has the key \"tools\""
    );
    assert_eq!(parameter("prompt", ErrorPlace::Text), "prompt");
    assert_eq!(
        parameter("prompt_token_ids[3]", ErrorPlace::Text),
        "prompt[3]"
    );
    let third = ErrorPlace::Prompt(2);
    assert_eq!(parameter("prompt", third), "prompt[2]");
    assert_eq!(parameter("prompt_token_ids[3]", third), "prompt[2][3]");
    assert_eq!(parameter("max_tokens", third), "max_tokens");
    assert_eq!(error["param"], "model");
    assert_eq!(error["type"], "invalid_request_error");
    let chunks = Chunks::new(asked(true));
    let last = events(&chunks.last(Some(status)).unwrap());
    assert!(last[0]["error"]["message"].is_string(), "{last:?}");
}

#[test]
fn errors_name_the_limit_of_tokens_that_was_given() {
    let refusal = |e: ServiceError, place| {
        let status = status(e);
        let http = answer::http_status(&status, &HeaderMap::new());
        error_json(http, &status, place)["error"].clone()
    };
    let chat = ErrorPlace::Chat("max_completion_tokens");
    for (place, name) in [
        (chat, "max_completion_tokens"),
        (ErrorPlace::Chat("max_tokens"), "max_tokens"),
        (ErrorPlace::Text, "max_tokens"),
        (ErrorPlace::Prompt(2), "max_tokens"),
    ] {
        let long = EngineError::SampleTooLong {
            tokens: 9,
            limit: 8,
        };
        let error = refusal(long.into(), place);
        assert_eq!(error["param"], name, "{error}");
        let message = error["message"].as_str().unwrap();
        let start = format!("{name} is too large: ");
        assert!(message.starts_with(&start), "{message}");
        let advice = format!(": lower {name}, or shorten the prompt");
        assert!(message.ends_with(&advice), "{message}");
        // An error of no field.
        let full = EngineError::NoRoomToGenerate {
            needed_mib: 9,
            available_mib: 8,
            setting: "memory_limit",
        };
        let error = refusal(full.into(), place);
        assert_eq!(error["param"], Value::Null, "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains(&format!(": lower {name}, ask")),
            "{message}"
        );
    }
}

fn likely(text: &str, logprob: f32) -> pb::TokenLogprob {
    pb::TokenLogprob {
        token_id: 1,
        logprob,
        text: text.into(),
    }
}

/// Returns the answer to a prompt of three tokens, BOS included, with two more tokens.
fn scored() -> pb::GenerateCompletionsResponse {
    let of_prompt = |text: &str, logprob, top| pb::PromptToken {
        token_id: 1,
        logprob,
        text: text.into(),
        top_logprobs: top,
    };
    let best = |text: &str, logprob| pb::TopLogprobs {
        tokens: vec![likely(text, logprob)],
    };
    pb::GenerateCompletionsResponse {
        prompt_tokens: vec![
            of_prompt("<s>", None, Vec::new()),
            of_prompt(" né", Some(-1.5), vec![likely(" a", -0.5)]),
            of_prompt("\u{FFFD}", Some(-2.0), vec![likely("\u{FFFD}", -0.25)]),
        ],
        deltas: vec![pb::CompletionDelta {
            text: "!".into(),
            token_texts: vec!["!".into(), "</s>".into()],
            token_logprobs: vec![-0.125, f32::NEG_INFINITY],
            top_logprobs: vec![best("!", -0.125), best("?", -0.75)],
            finish_reason: pb::FinishReason::Stop.into(),
            ..Default::default()
        }],
        usage: Some(pb::GenerationUsage {
            prompt_tokens: 3,
            completion_tokens: 2,
        }),
        ..Default::default()
    }
}

fn asked_to_score(is_chat: bool) -> AnswerOptions {
    AnswerOptions {
        samples: 1,
        streams: false,
        alternatives: Some(1),
        ..asked(is_chat)
    }
}

fn data_of(response: &pb::GenerateCompletionsResponse) -> BytesMut {
    BytesMut::from(&framed(&response.encode_to_vec())[..])
}

#[test]
fn a_text_with_its_prompt_has_the_log_probs_of_both() {
    let echoing = AnswerOptions {
        echoes: true,
        prompts: vec![Some(" né?".into())],
        ..asked_to_score(false)
    };
    let value = whole_json(data_of(&scored()), &echoing);
    let choice = &value["choices"][0];
    assert_eq!(choice["text"], " né?!");
    assert_eq!(
        choice["logprobs"],
        json!({
            "tokens": ["<s>", " né", "\u{FFFD}", "!", "</s>"],
            "token_logprobs": [null, -1.5, -2.0, -0.125, -9999.0],
            "top_logprobs": [
                null,
                {" a": -0.5, " né": -1.5},
                {"\u{FFFD}": -0.25},
                {"!": -0.125},
                {"?": -0.75, "</s>": -9999.0},
            ],
            "text_offset": [0, 0, 3, 4, 5],
        })
    );
    // The prompt alone, which was sent as token ids.
    let alone = AnswerOptions {
        drops_samples: true,
        alternatives: Some(0),
        prompts: vec![None],
        ..echoing
    };
    let value = whole_json(data_of(&scored()), &alone);
    let choice = &value["choices"][0];
    assert_eq!(choice["text"], "<s> né\u{FFFD}");
    assert_eq!(choice["finish_reason"], "length");
    let log_probs = &choice["logprobs"];
    assert_eq!(log_probs["token_logprobs"], json!([null, -1.5, -2.0]));
    assert_eq!(log_probs["top_logprobs"], Value::Null);
    assert_eq!(log_probs["text_offset"], json!([0, 3, 6]));
    assert_eq!(value["usage"]["completion_tokens"], 0);
}

#[test]
fn a_chat_has_the_log_probs_and_the_bytes_of_its_tokens() {
    let response = scored();
    let value = whole_json(data_of(&response), &asked_to_score(true));
    let content = &value["choices"][0]["logprobs"]["content"];
    assert_eq!(
        content[0],
        json!({
            "token": "!", "logprob": -0.125, "bytes": [33],
            "top_logprobs": [{"token": "!", "logprob": -0.125, "bytes": [33]}],
        })
    );
    assert_eq!(content.as_array().unwrap().len(), 2);
    // A stream has each token in the chunk that it comes with.
    let chunks = Chunks::new(asked_to_score(false));
    let mut all = Vec::new();
    for _ in 0..2 {
        all.extend(events(&chunks.of(&response.encode_to_vec()).unwrap()));
    }
    let offsets = |chunk: &Value| chunk["choices"][0]["logprobs"]["text_offset"].clone();
    assert_eq!(all.iter().map(offsets).next(), Some(json!([0, 1])));
    assert!(all.iter().any(|chunk| offsets(chunk) == json!([5, 6])));
}

/// Returns the answer to the prompt whose call has this message.
fn answer_to(message: &[u8]) -> Response<Body> {
    let mut response = responses()[1].clone();
    response.deltas[0].index = 0;
    response.deltas[0].text = String::from_utf8(message.to_vec()).unwrap();
    let data = framed(&response.encode_to_vec());
    Response::new(Body::new(LateBody::reading(std::future::ready(Ok(data)))))
}

#[tokio::test]
async fn several_prompts_are_answered_in_order() {
    let options = AnswerOptions {
        further: (0..30).map(|i| Bytes::from(format!("{i}"))).collect(),
        ..asked_to_score(false)
    };
    let converter = || AnswerConverter {
        endpoint: Endpoint::Text,
        asked: Arc::new(OnceLock::from(options.clone())),
    };
    // Three of the first ten calls are refused.
    let calls = Arc::new(AtomicUsize::new(0));
    let call = |message: Bytes| {
        let calls = Arc::clone(&calls);
        async move {
            let number = calls.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            match number % 3 {
                1 if number < 10 => {
                    let full = ServiceError::ResourceExhausted {
                        reason: Reason::OutOfMemory,
                        message: "no room".to_owned(),
                    };
                    Ok(status(full).into_http())
                }
                _ => Ok::<_, String>(answer_to(&message)),
            }
        }
    };
    let answered = converter()
        .convert(answer_to(b"first"), call)
        .await
        .unwrap();
    let text = answer::read_all(answered.into_body()).await.unwrap();
    let value: Value = serde_json::from_slice(&text).unwrap();
    let choices = value["choices"].as_array().unwrap();
    let texts: Vec<&str> = choices
        .iter()
        .map(|c| c["text"].as_str().unwrap())
        .collect();
    let expected: Vec<String> = (0..30).map(|i| format!("{i}")).collect();
    assert_eq!(texts[0], "first");
    assert_eq!(texts[1..], expected);
    assert!(choices.iter().enumerate().all(|(i, c)| c["index"] == i));
    assert_eq!(value["usage"]["completion_tokens"], 31 * 4);
    assert_eq!(value["system_fingerprint"], "v");

    let wrong = |message: Bytes| async move {
        let e = match &message[..] {
            b"3" => status(ServiceError::invalid("prompt", "is too long")),
            _ => return Ok::<_, String>(answer_to(&message)),
        };
        Ok(e.into_http())
    };
    let answered = converter()
        .convert(answer_to(b"first"), wrong)
        .await
        .unwrap();
    assert_eq!(answered.status(), StatusCode::BAD_REQUEST);
    let text = answer::read_all(answered.into_body()).await.unwrap();
    let value: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(value["error"]["param"], "prompt[4]");
}
