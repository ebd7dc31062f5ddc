//! Tests the conversion of Structs to JSON and back, and its errors.

use serde_json::json;

use super::*;

fn given(value: Value) -> Struct {
    let Value::Object(fields) = value else {
        panic!("not an object")
    };
    to_struct(&fields)
}

#[test]
fn a_struct_is_json_with_sorted_keys_and_whole_numbers() {
    let value = json!({"z": [1, -2.5, true, null, "s"], "a": {"n": 3}});
    let back = object(given(value.clone())).unwrap();
    assert_eq!(Value::Object(back.clone()), value);
    assert_eq!(
        serde_json::to_string(&back).unwrap(),
        r#"{"a":{"n":3},"z":[1,-2.5,true,null,"s"]}"#
    );
    let large = object(given(json!({"x": 1e300}))).unwrap();
    assert_eq!(large["x"], json!(1e300));
    let infinite = prost_types::Value {
        kind: Some(Kind::NumberValue(f64::INFINITY)),
    };
    assert!(
        object(Struct {
            fields: [("x".into(), infinite)].into()
        })
        .unwrap_err()
        .contains("inf")
    );
}

#[test]
fn a_deep_struct_is_refused() {
    let mut deep = json!(1);
    for _ in 0..=MAX_DEPTH {
        deep = json!({"a": deep});
    }
    assert!(object(given(deep)).unwrap_err().contains("24 deep"));
}

#[test]
fn tools_come_as_structs_or_as_json_but_not_as_both() {
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let text = format!("[{tool}]");
    let from_structs =
        arguments("pair", vec![given(tool.clone())], String::new(), None, "").unwrap();
    let from_text = arguments("pair", vec![], text.clone(), None, "").unwrap();
    assert_eq!(from_structs, from_text);
    assert_eq!(
        serde_json::to_string(&from_text.tools).unwrap(),
        text.to_string(),
        "the order of keys is that of the text"
    );
    let both = arguments("pair", vec![given(tool)], text, None, "").unwrap_err();
    assert_eq!(both.0, "pair.tools_json");
    assert_eq!(
        arguments("options", vec![], "{".into(), None, "")
            .unwrap_err()
            .0,
        "options.tools_json"
    );
    assert_eq!(
        arguments("options", vec![], "{}".into(), None, "")
            .unwrap_err()
            .0,
        "options.tools_json"
    );
    let reserved = arguments(
        "options",
        vec![],
        String::new(),
        Some(given(json!({"messages": []}))),
        "",
    )
    .unwrap_err();
    assert_eq!(reserved.0, "options.chat_template_kwargs");
    assert_eq!(
        arguments("options", vec![], String::new(), None, "").unwrap(),
        TemplateArguments::default()
    );
}

#[test]
fn template_arguments_come_as_a_struct_or_as_json_but_not_as_both() {
    let text = r#"{"b":1.0,"a":{"z":1,"c":2.5}}"#;
    let from_text = kwargs("options", None, text).unwrap();
    assert_eq!(
        Value::Object(from_text.clone()).to_string(),
        text,
        "the order of keys and the kinds of numbers are those of the text"
    );
    let from_struct = kwargs("options", Some(to_struct(&from_text)), "").unwrap();
    assert_eq!(
        Value::Object(from_struct.clone()).to_string(),
        r#"{"a":{"c":2.5,"z":1},"b":1}"#
    );
    // The returned fields convert to the same arguments again.
    for arguments in [from_text, from_struct, Map::new()] {
        let (given, json) = kwargs_fields(arguments.clone());
        assert!(given.is_none() || json.is_empty());
        let again = kwargs("training_job", given, &json).unwrap();
        assert_eq!(
            Value::Object(again).to_string(),
            Value::Object(arguments).to_string()
        );
    }
    let mut deep = json!({"x": 1});
    for _ in 0..MAX_DEPTH + 8 {
        deep = json!({"a": deep});
    }
    let deep = kwargs("pair", None, &deep.to_string()).unwrap();
    assert_eq!(
        kwargs_fields(deep.clone()),
        (None, Value::Object(deep).to_string()),
        "a Struct may not be so deep"
    );

    let refused = [
        kwargs("pair", Some(Struct::default()), "{}"),
        kwargs("pair", None, "[1]"),
        kwargs("pair", None, "{"),
        kwargs("pair", None, r#"{"messages": []}"#),
    ];
    for refused in refused {
        assert_eq!(refused.unwrap_err().0, "pair.chat_template_kwargs_json");
    }
    assert_eq!(
        arguments("pair", vec![], String::new(), None, text)
            .unwrap()
            .kwargs["b"],
        json!(1.0)
    );
}
