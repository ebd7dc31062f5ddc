//! Chat templates, rendered as transformers renders them.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};

use super::error::ModelError;
pub use crate::domain::dataset::ChatMessage;

/// Template instructions before a rendering is given up: a hostile template cannot hang the server.
const FUEL: u64 = 50_000_000;
const NAME: &str = "chat_template";

/// A compiled chat template with the special tokens it may print.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles a template; `special_tokens` are variables such as `bos_token`.
    pub fn new(source: &str, special_tokens: Vec<(String, String)>) -> Result<Self, ModelError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| explain(&e))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
            jiff::fmt::strtime::format(&format, &jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC))
                .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
        });
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(|e| explain(&e))?;
        Ok(ChatTemplate { environment, source: source.to_owned(), special_tokens })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a dialogue; with `add_generation_prompt`, up to where the assistant's answer begins.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String, ModelError> {
        let template = self.environment.get_template(NAME).map_err(|e| explain(&e))?;
        let messages: Vec<Value> = messages.iter().map(|m| context! { role => m.role.as_str(), content => m.content.as_str() }).collect();
        let variables = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            tools => (),
            documents => (),
            ..Value::from_pairs(self.special_tokens.iter().map(|(k, v)| (k.as_str(), v.as_str())))
        };
        template.render(variables).map_err(|e| explain(&e))
    }
}

/// `{% generation %}` marks the assistant's tokens for transformers' masks and prints nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = source.to_owned();
    for tag in ["generation", "endgeneration"] {
        for (open, close) in [("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")] {
            let nothing = format!("{open} if true {close}").replace("if true", if tag == "generation" { "if true" } else { "endif" });
            out = out.replace(&format!("{open} {tag} {close}"), &nothing);
        }
    }
    out
}

/// Python's `json.dumps(x, ensure_ascii=False)`, which puts a space after `,` and `:`.
fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let json = serde_json::to_value(&value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let mut out = String::new();
    dump(&json, indent, 0, &mut out);
    Ok(Value::from_safe_string(out))
}

fn dump(json: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    use serde_json::Value as J;
    let newline = |out: &mut String, depth: usize| {
        if let Some(n) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', n * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match json {
        J::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { separator } else { "" });
                newline(out, depth + 1);
                dump(item, indent, depth + 1, out);
            }
            newline(out, depth);
            out.push(']');
        }
        J::Object(fields) if !fields.is_empty() => {
            out.push('{');
            for (i, (key, item)) in fields.iter().enumerate() {
                out.push_str(if i > 0 { separator } else { "" });
                newline(out, depth + 1);
                out.push_str(&J::String(key.clone()).to_string());
                out.push_str(": ");
                dump(item, indent, depth + 1, out);
            }
            newline(out, depth);
            out.push('}');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

fn explain(e: &Error) -> ModelError {
    let reason = match e.detail() {
        Some(detail) => format!("{detail}{}", e.line().map(|l| format!(" (line {l})")).unwrap_or_default()),
        None => e.to_string(),
    };
    ModelError::ChatTemplate { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(role: &str, content: &str) -> ChatMessage {
        ChatMessage { role: role.into(), content: content.into() }
    }

    #[test]
    fn chatml_renders_with_and_without_a_generation_prompt() {
        let t = ChatTemplate::new(
            "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
            vec![],
        )
        .unwrap();
        assert_eq!(t.render(&[say("user", "Hi")], true).unwrap(), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(
            t.render(&[say("user", "Hi"), say("assistant", "Yo")], false).unwrap(),
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        );
    }

    #[test]
    fn blocks_are_trimmed_methods_work_and_special_tokens_are_variables() {
        let t = ChatTemplate::new(
            "{{ bos_token }}\n{%- for m in messages %}\n    {%- if m.role == 'user' %}\n[INST] {{ m.content.strip() }} [/INST]\n    {%- else %}\n {{ m['content'].split('|')[-1] }}{{ eos_token }}\n    {%- endif %}\n{%- endfor %}\n",
            vec![("bos_token".into(), "<s>".into()), ("eos_token".into(), "</s>".into())],
        )
        .unwrap();
        assert_eq!(t.render(&[say("user", " a "), say("assistant", "x|y")], false).unwrap(), "<s>[INST] a [/INST] y</s>");
    }

    #[test]
    fn a_template_can_refuse_and_cannot_hang() {
        let t = ChatTemplate::new("{{ raise_exception('roles must alternate') }}", vec![]).unwrap();
        assert!(t.render(&[], false).unwrap_err().to_string().contains("roles must alternate"));
        let t = ChatTemplate::new("{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}", vec![]).unwrap();
        assert!(t.render(&[], false).is_err());
        assert!(ChatTemplate::new("{% for %}", vec![]).is_err());
        assert!(ChatTemplate::new("{% include '/etc/passwd' %}", vec![]).is_ok_and(|t| t.render(&[], false).is_err()));
    }

    #[test]
    fn tojson_is_pythons() {
        let t = ChatTemplate::new("{{ messages | tojson }}", vec![]).unwrap();
        assert_eq!(t.render(&[say("user", "é\"")], false).unwrap(), r#"[{"role": "user", "content": "é\""}]"#);
    }
}
