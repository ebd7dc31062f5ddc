//! Tests of the JSON forms of messages and template arguments.

use serde_json::json;

use super::*;

#[test]
fn a_message_keeps_every_key_in_order_and_drops_nulls() {
    let text = r#"{"content":null,"role":"assistant","tool_calls":[{"z":1,"a":null}],"name":null,
                   "reasoning_content":"hm"}"#;
    let message = ChatMessage::from_json(serde_json::from_str(text).unwrap()).unwrap();
    assert_eq!(
        serde_json::to_string(&message).unwrap(),
        r#"{"role":"assistant","tool_calls":[{"z":1,"a":null}],"reasoning_content":"hm"}"#
    );
    assert_eq!(message.role(), "assistant");
    assert!(!message.is_blank());
    let back: ChatMessage =
        serde_json::from_str(&serde_json::to_string(&message).unwrap()).unwrap();
    assert_eq!(back, message);
}

#[test]
fn what_is_no_message_is_refused_by_its_path() {
    for (value, expected) in [
        (json!("hi"), "the message is a string"),
        (json!({"content": "a"}), "role is missing"),
        (json!({"role": 1, "content": "a"}), "role is a number"),
        (json!({"role": "user"}), "content is missing"),
        (json!({"role": "user", "content": null}), "content is null"),
        (json!({"role": "user", "content": 3}), "content is a number"),
        (
            json!({"role": "user", "content": ["a"]}),
            "content[0] is a string",
        ),
        (
            json!({
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]
            }),
            "content[1].type cannot be used",
        ),
        (
            json!({"role": "user", "content": [{"type": "x", "audio": "a.wav"}]}),
            "content[0].audio cannot be used",
        ),
        (
            json!({"role": "user", "content": "a", "images": ["a.png"]}),
            "images cannot be used",
        ),
    ] {
        let e = ChatMessage::from_json(value.clone()).unwrap_err();
        assert!(e.starts_with(expected), "{value}: {e}");
    }
    let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}]});
    assert_eq!(
        serde_json::to_value(ChatMessage::from_json(parts.clone()).unwrap()).unwrap(),
        parts
    );
}

#[test]
fn a_message_is_blank_when_it_says_nothing() {
    for (value, blank) in [
        (json!({"role": "user", "content": " \n"}), true),
        (json!({"role": "user", "content": " ", "name": "Ada"}), true),
        (
            json!({"role": "user", "content": [{"type": "text", "text": " "}]}),
            true,
        ),
        (
            json!({"role": "user", "content": [{"type": "text", "text": "a"}]}),
            false,
        ),
        (
            json!({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}),
            false,
        ),
        (
            json!({"role": "assistant", "content": "", "tool_calls": []}),
            true,
        ),
        (
            json!({"role": "assistant", "content": "", "model": "gpt-4", "weight": 1}),
            true,
        ),
        (
            json!({"role": "assistant", "content": "", "reasoning_content": "Hm."}),
            false,
        ),
    ] {
        assert_eq!(
            ChatMessage::from_json(value.clone()).unwrap().is_blank(),
            blank,
            "{value}"
        );
    }
}

#[test]
fn tools_are_a_list_or_a_string_of_it() {
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let list = tools_from_json(tools.clone()).unwrap().unwrap();
    assert_eq!(
        tools_from_json(Value::String(tools.to_string()))
            .unwrap()
            .unwrap(),
        list
    );
    assert_eq!(tools_from_json(Value::Null).unwrap(), None);
    assert_eq!(tools_from_json(json!("")).unwrap(), None);
    assert_eq!(tools_from_json(json!([])).unwrap(), Some(vec![]));
    for bad in [
        json!({"a": 1}),
        json!("{\"a\": 1}"),
        json!("nonsense"),
        json!([1]),
    ] {
        assert!(tools_from_json(bad.clone()).is_err(), "{bad}");
    }
    let many = vec![json!({}); MAX_TOOLS + 1];
    assert!(check_tools(&many).unwrap_err().contains("1025 tools"));
    // Many values without text use memory, too.
    let empty = [json!({"list": vec![""; MAX_ARGUMENT_BYTES / 64]})];
    assert!(check_tools(&empty).unwrap_err().contains("bytes"));
    let long = [json!({"description": "d".repeat(MAX_ARGUMENT_BYTES)})];
    assert!(check_tools(&long).unwrap_err().contains("bytes"));
    let mut deep = json!({});
    for _ in 0..MAX_DEPTH {
        deep = json!({"a": deep});
    }
    assert!(check_tools(&[deep]).unwrap_err().contains("deep"));
}

#[test]
fn names_that_apply_chat_template_takes_are_no_template_arguments() {
    for name in ["messages", "tools", "documents", "add_generation_prompt"] {
        let kwargs = Map::from_iter([(name.to_owned(), json!(true))]);
        assert!(check_kwargs(&kwargs).unwrap_err().contains(name));
    }
    assert!(check_kwargs(&Map::from_iter([("bos_token".to_owned(), json!("<s>"))])).is_ok());
}

#[test]
fn arguments_that_are_given_nearer_win() {
    let below = TemplateArguments {
        tools: Some(vec![json!({"a": 1})]),
        kwargs: Map::from_iter([("x".to_owned(), json!(1)), ("y".to_owned(), json!(2))]),
    };
    let own = TemplateArguments {
        tools: None,
        kwargs: Map::from_iter([("x".to_owned(), json!(3))]),
    };
    let merged = own.over(&below);
    assert_eq!(merged.tools, below.tools);
    assert_eq!(
        merged.kwargs,
        Map::from_iter([("x".to_owned(), json!(3)), ("y".to_owned(), json!(2))])
    );
}

#[test]
fn null_keys_are_removed_at_every_depth() {
    assert_eq!(
        without_nulls(json!({"a": null, "b": [{"c": null, "d": 1}, null]})),
        json!({"b": [{"d": 1}, null]})
    );
}
