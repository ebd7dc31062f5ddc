//! Compares renderings with those of jinja2 under transformers for the same input.

use serde_json::json;

use super::*;

fn say(role: &str, content: &str) -> ChatMessage {
    ChatMessage::new(role, content)
}

fn compile(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, vec![]).unwrap()
}

fn plain(template: &ChatTemplate, messages: &[ChatMessage]) -> String {
    template
        .render(messages, &RenderOptions::new(false))
        .unwrap()
}

#[test]
fn chatml_renders_with_and_without_a_generation_prompt() {
    let t = compile(
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + \
         message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    );
    let prompt = t
        .render(&[say("user", "Hi")], &RenderOptions::new(true))
        .unwrap();
    assert_eq!(
        prompt,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        plain(&t, &[say("user", "Hi"), say("assistant", "Yo")]),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    );
}

#[test]
fn blocks_are_trimmed_methods_work_and_special_tokens_are_variables() {
    let t = ChatTemplate::new(
        "{{ bos_token }}\n{%- for m in messages %}\n    \
         {%- if m.role == 'user' %}\n[INST] {{ m.content.strip() }} [/INST]\n    \
         {%- else %}\n {{ m['content'].split('|')[-1] }}{{ eos_token }}\n    {%- endif %}\n\
         {%- endfor %}\n",
        vec![
            ("bos_token".into(), "<s>".into()),
            ("eos_token".into(), "</s>".into()),
        ],
    )
    .unwrap();
    assert_eq!(
        plain(&t, &[say("user", " a "), say("assistant", "x|y")]),
        "<s>[INST] a [/INST] y</s>"
    );
    let kwargs = Map::from_iter([("eos_token".to_owned(), json!("<end>"))]);
    let options = RenderOptions {
        kwargs: &kwargs,
        ..RenderOptions::new(false)
    };
    assert_eq!(
        t.render(&[say("assistant", "y")], &options).unwrap(),
        "<s> y<end>"
    );
}

#[test]
fn a_template_can_refuse_and_cannot_hang() {
    let fails = |source: &str| {
        compile(source)
            .render(&[], &RenderOptions::new(false))
            .unwrap_err()
            .to_string()
    };
    assert!(
        fails("{{ raise_exception('roles must alternate') }}").contains("roles must alternate")
    );
    fails("{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}");
    fails("{% include '/etc/passwd' %}");
    fails("{{ tojson }}{{ messages | tojson(indent=1000000000) }}");
    fails(
        "{% set ns = namespace(x=1) %}{% for i in range(5000) %}{% set ns.x = [ns.x] %}\
         {% endfor %}{{ ns.x | tojson }}",
    );
    assert!(ChatTemplate::new("{% for %}", vec![]).is_err());
}

#[test]
fn tojson_is_pythons() {
    let t = compile("{{ messages | tojson }}");
    assert_eq!(
        plain(&t, &[say("user", "é\"")]),
        r#"[{"role": "user", "content": "é\""}]"#
    );
    let value = json!({
        "b": [1, 1.0, 1e16, 1e-5, 0.0001, -2.5], "a": {"é\u{7f}𝄞": null, "e": [], "o": {}},
        "t": true, "s": "</\u{1}\n"
    });
    let kwargs = Map::from_iter([("x".to_owned(), value)]);
    // Expected texts are from json.dumps in Python 3.
    for (filter, expected) in [
        (
            "tojson",
            "{\"b\": [1, 1.0, 1e+16, 1e-05, 0.0001, -2.5], \"a\": {\"é\u{7f}𝄞\": null, \"e\": \
             [], \"o\": {}}, \"t\": true, \"s\": \"</\\u0001\\n\"}",
        ),
        (
            "tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True)",
            "{\"a\":{\"e\":[],\"o\":{},\"\\u00e9\\u007f\\ud834\\udd1e\":null},\"b\":[1,1.0,1e+16,\
             1e-05,0.0001,-2.5],\"s\":\"</\\u0001\\n\",\"t\":true}",
        ),
        (
            "tojson(indent=2)",
            "{\n  \"b\": [\n    1,\n    1.0,\n    1e+16,\n    1e-05,\n    0.0001,\n    -2.5\n  \
             ],\n  \"a\": {\n    \"é\u{7f}𝄞\": null,\n    \"e\": [],\n    \"o\": {}\n  },\n  \
             \"t\": true,\n  \"s\": \"</\\u0001\\n\"\n}",
        ),
    ] {
        let t = compile(&format!("{{{{ x | {filter} }}}}"));
        let options = RenderOptions {
            kwargs: &kwargs,
            ..RenderOptions::new(false)
        };
        assert_eq!(t.render(&[], &options).unwrap(), expected, "{filter}");
    }
}

#[test]
fn tools_and_every_key_of_a_message_reach_the_template_in_order() {
    let t =
        compile("{{ tools | tojson }}|{{ messages | tojson }}|{{ enable_thinking }}|{{ count }}");
    let call: serde_json::Value = serde_json::from_str(
        r#"{"tool_calls": [{"z": 1, "a": {"y": 2, "b": 3}}], "role": "assistant"}"#,
    )
    .unwrap();
    let messages = [ChatMessage::from_json(call).unwrap()];
    let tools = [serde_json::from_str(
        r#"{"type": "function", "function": {"name": "f", "description": "d"}}"#,
    )
    .unwrap()];
    let kwargs = Map::from_iter([
        ("enable_thinking".to_owned(), json!(false)),
        ("count".to_owned(), json!(1)),
    ]);
    let options = RenderOptions {
        add_generation_prompt: false,
        tools: Some(&tools),
        kwargs: &kwargs,
        date: None,
    };
    assert_eq!(
        t.render(&messages, &options).unwrap(),
        concat!(
            r#"[{"type": "function", "function": {"name": "f", "description": "d"}}]|"#,
            r#"[{"tool_calls": [{"z": 1, "a": {"y": 2, "b": 3}}], "role": "assistant"}]|"#,
            "False|1"
        )
    );
    let t = compile(
        "{% if tools is none %}none{% endif %}{% if enable_thinking is defined %}defined\
         {% endif %}",
    );
    assert_eq!(plain(&t, &messages), "none");
}

#[test]
fn reasoning_is_given_under_both_names() {
    let t = compile("{{ messages | tojson }}");
    let render = |value: serde_json::Value| plain(&t, &[ChatMessage::from_json(value).unwrap()]);
    assert_eq!(
        render(json!({"role": "assistant", "reasoning": "r", "content": "c"})),
        concat!(
            r#"[{"thinking": "r", "role": "assistant", "reasoning": "r", "content": "c", "#,
            r#""reasoning_content": "r"}]"#
        )
    );
    assert_eq!(
        render(
            json!({"role": "assistant", "content": "c", "thinking": "t", "reasoning_content": null})
        ),
        r#"[{"thinking": "t", "role": "assistant", "content": "c", "reasoning_content": "t"}]"#
    );
}

#[test]
fn the_date_is_the_given_one_in_macros_too() {
    let t = compile(
        "{% macro today() %}{{ strftime_now('%d %b %Y') }}\
         {% endmacro %}{{ strftime_now('%Y-%m-%d %H:%M') }} {{ today() }}",
    );
    let options = RenderOptions {
        date: Some(jiff::civil::date(2025, 7, 4).at(9, 5, 0, 0)),
        ..RenderOptions::new(false)
    };
    assert_eq!(
        t.render(&[], &options).unwrap(),
        "2025-07-04 09:05 04 Jul 2025"
    );
    assert_ne!(plain(&t, &[]), "2025-07-04 09:05 04 Jul 2025");
}

#[test]
fn generation_tags_print_what_is_in_them_whatever_their_white_space() {
    for (open, close) in [
        ("{% generation %}", "{% endgeneration %}"),
        ("{%generation%}", "{%endgeneration%}"),
        ("{%- generation -%}", "{%-endgeneration-%}"),
        ("{%-  generation\n%}", "{%+ endgeneration %}"),
    ] {
        let t = compile(&format!(
            "a{{% for m in messages %}}{open}{{{{ m.content }}}}{close}\
             {{% endfor %}}b{{{{ '%}}' }}}}"
        ));
        assert_eq!(plain(&t, &[say("assistant", "x")]), "axb%}", "{open}");
    }
}
