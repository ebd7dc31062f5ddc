use serde_json::json;

use super::*;

fn read(is_chat: bool, body: &Value) -> (pb::GenerateCompletionsRequest, AnswerOptions) {
    generation(is_chat, body.to_string().as_bytes()).unwrap()
}

/// Returns the problems of a body, each with its parameter.
fn refused(is_chat: bool, body: &Value) -> Vec<(String, String)> {
    match generation(is_chat, body.to_string().as_bytes()) {
        Err(ServiceError::InvalidArgument(bad)) => bad
            .listed()
            .iter()
            .map(|v| (v.field.clone(), v.description.clone()))
            .collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_chat_becomes_a_call() {
    let (call, asked) = read(
        true,
        &json!({
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hi"}],
            "n": 2,
            "max_completion_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "seed": 3,
            "stop": "end",
            "stop_token_ids": [4],
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": "auto",
            "chat_template_kwargs": {"b": 1, "a": 2},
            "presence_penalty": 0,
            "logit_bias": null,
            "user": "me",
        }),
    );
    let Some(pb::text::Form::Chat(chat)) = call.prompt.unwrap().form else {
        panic!("no chat");
    };
    let messages: Vec<_> = chat.messages.iter().map(|m| &m.fields_json).collect();
    assert_eq!(messages, [r#"{"role":"user","content":"Hi"}"#]);
    assert_eq!((call.policy.as_str(), call.samples), ("models/tiny", 2));
    assert_eq!((call.max_tokens, call.temperature), (9, Some(0.5)));
    assert_eq!(
        (call.top_p, call.top_k, call.seed),
        (Some(0.9), Some(7), Some(3))
    );
    assert_eq!(
        (call.stop, call.stop_token_ids),
        (vec!["end".to_owned()], vec![4])
    );
    assert!(call.ignore_eos && !call.logprobs);
    assert_eq!(call.chat_template_kwargs_json, r#"{"b":1,"a":2}"#);
    assert_eq!(
        call.tools_json,
        r#"[{"type":"function","function":{"name":"f"}}]"#
    );
    assert!(asked.streams && asked.includes_usage && asked.is_chat);
    assert_eq!((asked.samples, asked.model.as_str()), (2, "tiny"));
    assert_eq!(asked.token_limit, "max_completion_tokens");
    assert!(asked.id.starts_with("chatcmpl-"), "{}", asked.id);
}

#[test]
fn a_text_has_openais_limit_of_tokens_and_a_chat_that_of_the_service() {
    let (call, asked) = read(false, &json!({"model": "models/tiny", "prompt": ["Hi"]}));
    let form = call.prompt.unwrap().form;
    assert_eq!(form, Some(pb::text::Form::Plain("Hi".into())));
    assert_eq!((call.policy.as_str(), call.max_tokens), ("models/tiny", 16));
    assert_eq!((call.samples, asked.streams), (1, false));
    assert_eq!(asked.token_limit, "max_tokens");
    let checkpoint = "trainingJobs/1/checkpoints/best";
    let chat = json!({"model": checkpoint, "messages": [], "max_tokens": null});
    let (call, _) = read(true, &chat);
    // The service's own default.
    assert_eq!((call.policy.as_str(), call.max_tokens), (checkpoint, 0));
}

#[test]
fn every_wrong_parameter_is_named() {
    let found = refused(
        true,
        &json!({
            "messages": "Hi",
            "n": -1,
            "max_tokens": 3,
            "max_completion_tokens": 4,
            "temperature": "hot",
            "stream_options": {"include_usage": 1, "other": 2},
            "logprobs": 3,
            "frequency_penalty": 0.5,
            "response_format": {"type": "json_object"},
            "tool_choice": "required",
            "unknown": 1,
        }),
    );
    let names: Vec<_> = found.iter().map(|(field, _)| field.as_str()).collect();
    for name in [
        "model",
        "messages",
        "n",
        "max_completion_tokens",
        "temperature",
        "stream_options",
        "stream_options.include_usage",
        "stream_options.other",
        "logprobs",
        "frequency_penalty",
        "response_format",
        "tool_choice",
        "unknown",
    ] {
        assert!(names.contains(&name), "{name} is not in {found:?}");
    }
    assert_eq!(names.len(), 13, "{found:?}");
    let found = refused(
        true,
        &json!({"model": "tiny", "messages": [], "echo": true}),
    );
    assert!(found[0].1.contains("ScoreCompletions"), "{found:?}");
    let no_tokens = json!({"model": "tiny", "messages": [], "max_completion_tokens": 0});
    let found = refused(true, &no_tokens);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].0, "max_completion_tokens");
    for text in ["[]", "{", "3"] {
        assert!(generation(true, text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn messages_are_those_that_templates_expect() {
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let image = json!([{"type": "image_url"}, {"type": "text", "text": "b"}]);
    let call = |arguments: Value| json!({"function": {"name": "f", "arguments": arguments}});
    let (request, _) = read(
        true,
        &json!({"model": "tiny", "messages": [
            {"role": "user", "content": parts},
            {"role": "user", "content": image},
            {"role": "assistant", "tool_calls": [call("{\"b\":1,\"a\":2}".into())]},
            {"role": "assistant", "tool_calls": [call("no object".into())]},
        ]}),
    );
    let Some(pb::text::Form::Chat(chat)) = request.prompt.unwrap().form else {
        panic!("no chat");
    };
    let messages: Vec<Value> = chat
        .messages
        .iter()
        .map(|m| serde_json::from_str(&m.fields_json).unwrap())
        .collect();
    assert_eq!(messages[0], json!({"role": "user", "content": "a\nb"}));
    assert_eq!(messages[1]["content"], image);
    assert_eq!(
        messages[2]["tool_calls"][0],
        call(json!({"b": 1, "a": 2})),
        "{messages:?}"
    );
    assert_eq!(messages[3]["tool_calls"][0], call("no object".into()));
}

#[test]
fn values_that_change_nothing_are_accepted() {
    let (request, _) = read(
        true,
        &json!({
            "model": "tiny",
            "messages": [],
            "top_k": -1,
            "seed": -1,
            "tools": [{"type": "function"}],
            "tool_choice": "none",
            "min_p": 0,
            "use_beam_search": false,
            "skip_special_tokens": true,
        }),
    );
    assert_eq!((request.top_k, request.seed), (None, Some(u64::MAX)));
    assert!(request.tools_json.is_empty());
    let found = refused(
        true,
        &json!({"model": "tiny", "messages": [], "n": 0, "top_k": -2}),
    );
    let names: Vec<_> = found.iter().map(|(field, _)| field.as_str()).collect();
    assert_eq!(names, ["n", "top_k"]);
}

#[test]
fn a_text_has_prompts_of_every_form() {
    let read_prompts = |prompt: Value| {
        let body = json!({"model": "tiny", "prompt": prompt, "temperature": 0.5});
        let (first, asked) = read(false, &body);
        let further = asked.further.iter().map(|framed| {
            // Behind the prefix of a message.
            pb::GenerateCompletionsRequest::decode(&framed[5..]).unwrap()
        });
        let calls: Vec<_> = std::iter::once(first).chain(further).collect();
        assert!(calls.iter().all(|call| call.temperature == Some(0.5)));
        let prompts = calls.into_iter().map(|call| {
            let text = call.prompt.map(|text| text.form);
            (text.flatten(), call.prompt_token_ids)
        });
        (prompts.collect::<Vec<_>>(), asked.prompts)
    };
    let plain = |text: &str| (Some(pb::text::Form::Plain(text.into())), Vec::new());
    let text = |text: &str| Some(text.to_owned());
    let tokens = |ids: &[u32]| (None, ids.to_vec());
    for (prompt, calls, texts) in [
        (json!("a"), vec![plain("a")], vec![text("a")]),
        (json!(["a"]), vec![plain("a")], vec![text("a")]),
        (
            json!(["a", "b"]),
            vec![plain("a"), plain("b")],
            vec![text("a"), text("b")],
        ),
        (json!([3, 4]), vec![tokens(&[3, 4])], vec![None]),
        (
            json!([[3], [4, 5]]),
            vec![tokens(&[3]), tokens(&[4, 5])],
            vec![None, None],
        ),
    ] {
        assert_eq!(read_prompts(prompt.clone()), (calls, texts), "{prompt}");
    }
    for prompt in [
        json!([]),
        json!([[]]),
        json!([3, "a"]),
        json!([-1]),
        json!([[3], []]),
        json!([1.5]),
        json!({"a": 1}),
        json!(3),
    ] {
        let found = refused(false, &json!({"model": "tiny", "prompt": prompt}));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].1.contains("a list of token ids"), "{found:?}");
    }
    let many = json!({"model": "tiny", "prompt": vec!["a"; 129]});
    let found = refused(false, &many);
    assert!(found[0].1.contains("at most 128"), "{found:?}");
    // Each call would have a copy of the stop text.
    let long = "x".repeat(MAX_COPIED_BYTES);
    let found = refused(
        false,
        &json!({"model": "tiny", "prompt": ["a", "b"], "stop": long}),
    );
    assert_eq!((found.len(), found[0].0.as_str()), (1, "prompt"));
    assert!(found[0].1.contains("for each prompt"), "{found:?}");
    let (alone, _) = read(
        false,
        &json!({"model": "tiny", "prompt": ["a"], "stop": long}),
    );
    assert_eq!(alone.stop, [long]);
}

#[test]
fn log_probs_and_the_prompt_are_asked_for() {
    let text = |further: Value| {
        let mut body = json!({"model": "tiny", "prompt": [3, 4]});
        for (key, value) in further.as_object().unwrap() {
            body[key] = value.clone();
        }
        body
    };
    let (call, asked) = read(false, &text(json!({"logprobs": 0})));
    assert!(call.logprobs && call.token_texts && !call.prompt_logprobs);
    assert_eq!((call.top_logprobs, asked.alternatives), (0, Some(0)));
    let scoring = json!({"logprobs": 1, "echo": true, "max_tokens": 0, "temperature": 0});
    let (call, asked) = read(false, &text(scoring));
    assert!(call.logprobs && call.token_texts && call.prompt_logprobs);
    assert_eq!((call.top_logprobs, call.max_tokens), (1, 1));
    assert!(asked.echoes && asked.drops_samples);
    // The service turns the ids into text.
    let (call, asked) = read(false, &text(json!({"echo": true, "max_tokens": 3})));
    assert!(!call.logprobs && call.token_texts && call.prompt_logprobs);
    assert!(asked.echoes && !asked.drops_samples && asked.alternatives.is_none());
    let echoed = json!({"model": "tiny", "prompt": "a", "echo": true, "logprobs": false});
    let (call, _) = read(false, &echoed);
    assert!(!call.logprobs && !call.token_texts && !call.prompt_logprobs);
    let chat = json!({"model": "tiny", "messages": [], "logprobs": true, "top_logprobs": 20});
    let (call, asked) = read(true, &chat);
    assert!(call.logprobs && call.token_texts && !call.prompt_logprobs);
    assert_eq!((call.top_logprobs, asked.alternatives), (20, Some(20)));
    for (further, name) in [
        (json!({"logprobs": 6}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"echo": true, "stream": true}), "echo"),
        (json!({"echo": true, "n": 2}), "n"),
        (json!({"prompt": ["a", "b"], "stream": true}), "stream"),
    ] {
        let found = refused(false, &text(further));
        assert_eq!((found.len(), found[0].0.as_str()), (1, name), "{found:?}");
    }
    let alone = json!({"model": "tiny", "messages": [], "top_logprobs": 2});
    assert_eq!(refused(true, &alone)[0].0, "top_logprobs");
}
