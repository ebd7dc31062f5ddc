use tonic::Code;

use super::*;
use crate::rpc::rest::request::{LateBody, framed};
use crate::rpc::status::status;
use crate::service::error::ServiceError;

fn asked(is_chat: bool) -> AnswerOptions {
    AnswerOptions {
        is_chat,
        id: "id".into(),
        created: 5,
        model: "tiny".into(),
        samples: 2,
        streams: true,
        includes_usage: true,
    }
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

#[test]
fn a_whole_answer_has_every_sample() {
    for (is_chat, place) in [(true, "/message/content"), (false, "/text")] {
        let mut data = BytesMut::new();
        for response in responses() {
            data.extend_from_slice(&framed(&response.encode_to_vec()));
        }
        let value = whole(data, &asked(is_chat)).unwrap();
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
    assert!(whole(data, &asked(true)).is_err());
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
    let answered = converter.convert(Response::new(body)).await;
    assert_eq!(answered.status(), StatusCode::OK);
    let text = answer::read_all(answered.into_body()).await.unwrap();
    let value: Value = serde_json::from_slice(&text).unwrap();
    let text = value["choices"][1]["text"].as_str().unwrap();
    assert_eq!(text.len(), MAX_INLINE);
    assert_eq!(value["choices"][1]["finish_reason"], "stop");
}

#[test]
fn a_chat_is_streamed_in_chunks() {
    let chunks = Chunks {
        asked: asked(true),
        has_begun: Arc::default(),
        is_complete: Arc::default(),
    };
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
    let error = &error_json(StatusCode::BAD_REQUEST, &status, true)["error"];
    assert_eq!(
        error["message"],
        "model is \"x\"; messages[0].role is missing; messages[1] is a string; \
         messages is too long; tools is no list; chat_template_kwargs has the key \"tools\""
    );
    assert_eq!(parameter("prompt", false), "prompt");
    assert_eq!(error["param"], "model");
    assert_eq!(error["type"], "invalid_request_error");
    let chunks = Chunks {
        asked: asked(true),
        has_begun: Arc::default(),
        is_complete: Arc::default(),
    };
    let last = events(&chunks.last(Some(status)).unwrap());
    assert!(last[0]["error"]["message"].is_string(), "{last:?}");
}
