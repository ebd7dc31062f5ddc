//! Structs as JSON and back, and what is refused.

use serde_json::json;

use super::*;

fn given(value: Value) -> Struct {
    let Value::Object(fields) = value else { panic!("an object") };
    to_struct(&fields)
}

#[test]
fn a_struct_is_json_with_sorted_keys_and_whole_numbers() {
    let value = json!({"z": [1, -2.5, true, null, "s"], "a": {"n": 3}});
    let back = object(given(value.clone())).unwrap();
    assert_eq!(Value::Object(back.clone()), value);
    assert_eq!(serde_json::to_string(&back).unwrap(), r#"{"a":{"n":3},"z":[1,-2.5,true,null,"s"]}"#);
    let large = object(given(json!({"x": 1e300}))).unwrap();
    assert_eq!(large["x"], json!(1e300));
    let infinite = prost_types::Value { kind: Some(Kind::NumberValue(f64::INFINITY)) };
    assert!(object(Struct { fields: [("x".into(), infinite)].into() }).unwrap_err().contains("inf"));
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
    let from_structs = arguments("pair", vec![given(tool.clone())], String::new(), None).unwrap();
    let from_text = arguments("pair", vec![], text.clone(), None).unwrap();
    assert_eq!(from_structs, from_text);
    assert_eq!(serde_json::to_string(&from_text.tools).unwrap(), text.to_string(), "the order of keys is that of the text");
    let both = arguments("pair", vec![given(tool)], text, None).unwrap_err();
    assert_eq!(both.0, "pair.tools_json");
    assert_eq!(arguments("options", vec![], "{".into(), None).unwrap_err().0, "options.tools_json");
    assert_eq!(arguments("options", vec![], "{}".into(), None).unwrap_err().0, "options.tools_json");
    let reserved = arguments("options", vec![], String::new(), Some(given(json!({"messages": []})))).unwrap_err();
    assert_eq!(reserved.0, "options.chat_template_kwargs");
    assert_eq!(arguments("options", vec![], String::new(), None).unwrap(), TemplateArguments::default());
}
