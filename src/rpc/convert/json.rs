//! JSON in requests and answers: as `google.protobuf.Struct`, or as a string if the order of keys
//! matters.

use prost_types::value::Kind;
use prost_types::{ListValue, NullValue, Struct};
use serde_json::{Map, Number, Value};

use crate::domain::message::{TemplateArguments, check_kwargs, check_tools, kind, tools_from_json};

/// Maximum nesting of objects and lists in a Struct. It is below the limit of the protobuf library,
/// because the library's error does not name the field.
const MAX_DEPTH: usize = 24;
/// Integers with a smaller absolute value are exact as f64.
const EXACT_INTEGER_LIMIT: f64 = (1u64 << 53) as f64;

/// Path of a bad field, and the reason why its value cannot be used.
pub(in crate::rpc) type Wrong = (String, String);

/// Converts a Struct to a JSON object with sorted keys.
///
/// # Errors
/// Returns a text that completes a sentence that begins with the field's name.
pub(in crate::rpc) fn object(given: Struct) -> Result<Map<String, Value>, String> {
    fields(given, MAX_DEPTH)
}

fn fields(given: Struct, depth: usize) -> Result<Map<String, Value>, String> {
    // The map of a Struct is a BTreeMap, so its keys are sorted.
    given
        .fields
        .into_iter()
        .map(|(key, value)| Ok((key, json(value, depth)?)))
        .collect()
}

fn json(value: prost_types::Value, depth: usize) -> Result<Value, String> {
    if depth == 0 {
        return Err(format!(
            "has objects and lists nested more than {MAX_DEPTH} deep: \
             flatten it, or use the field for JSON"
        ));
    }
    Ok(match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(flag)) => Value::Bool(flag),
        Some(Kind::NumberValue(x)) => Value::Number(number(x)?),
        Some(Kind::StringValue(text)) => Value::String(text),
        Some(Kind::ListValue(list)) => Value::Array(
            list.values
                .into_iter()
                .map(|item| json(item, depth - 1))
                .collect::<Result<_, _>>()?,
        ),
        Some(Kind::StructValue(given)) => Value::Object(fields(given, depth - 1)?),
    })
}

/// Converts a number of a Struct, which is always an f64. An integral value becomes an integer.
fn number(x: f64) -> Result<Number, String> {
    if x.fract() == 0.0 && x.abs() < EXACT_INTEGER_LIMIT {
        return Ok(Number::from(x as i64));
    }
    Number::from_f64(x).ok_or_else(|| format!("has the number {x}: JSON has finite numbers only"))
}

/// Converts a JSON object to a Struct.
pub(in crate::rpc) fn to_struct(fields: &Map<String, Value>) -> Struct {
    Struct {
        fields: fields
            .iter()
            .map(|(key, value)| (key.clone(), to_value(value)))
            .collect(),
    }
}

fn to_value(value: &Value) -> prost_types::Value {
    let kind = match value {
        Value::Null => Kind::NullValue(NullValue::NullValue.into()),
        Value::Bool(flag) => Kind::BoolValue(*flag),
        Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(items) => Kind::ListValue(ListValue {
            values: items.iter().map(to_value).collect(),
        }),
        Value::Object(fields) => Kind::StructValue(to_struct(fields)),
    };
    prost_types::Value { kind: Some(kind) }
}

/// Parses a JSON object.
///
/// # Errors
/// Returns a text that completes a sentence that begins with the field's name.
pub(in crate::rpc) fn parse_object(text: &str) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(format!("is {}: it must be a JSON object", kind(&other))),
        Err(e) => Err(format!("is not JSON: {e}")),
    }
}

/// Reads the variables for the chat template from one of two fields: the Struct `given` or the JSON
/// object `text`. `place` is the path of the message with these fields, e.g. `options`, for errors.
///
/// # Errors
/// Returns the bad field if both are given or the variables cannot be used.
pub(in crate::rpc) fn kwargs(
    place: &str,
    given: Option<Struct>,
    text: &str,
) -> Result<Map<String, Value>, Wrong> {
    let (name, kwargs) = match (given, text) {
        (None, "") => return Ok(Map::new()),
        (Some(given), "") => ("chat_template_kwargs", object(given)),
        (None, text) => ("chat_template_kwargs_json", parse_object(text)),
        (Some(_), _) => {
            let reason =
                "is given together with chat_template_kwargs: use one of the two".to_owned();
            ("chat_template_kwargs_json", Err(reason))
        }
    };
    let checked = kwargs.and_then(|kwargs| check_kwargs(&kwargs).map(|()| kwargs));
    checked.map_err(|reason| (format!("{place}.{name}"), reason))
}

/// Converts the variables for the chat template to the two fields of an answer: a Struct if it
/// represents the same JSON exactly, otherwise a JSON text. Without variables both are empty.
pub(in crate::rpc) fn kwargs_fields(kwargs: Map<String, Value>) -> (Option<Struct>, String) {
    if kwargs.is_empty() {
        return (None, String::new());
    }
    let given = to_struct(&kwargs);
    let text = Value::Object(kwargs).to_string();
    match object(given.clone()).map(|read| Value::Object(read).to_string()) {
        Ok(read) if read == text => (Some(given), String::new()),
        _ => (None, text),
    }
}

/// Reads the tools and variables for the chat template from four fields of a message. `place` is
/// the path of the message, e.g. `options`, for errors.
///
/// # Errors
/// Returns the bad field if tools or variables are given in both forms or cannot be used.
pub(in crate::rpc) fn arguments(
    place: &str,
    tools: Vec<Struct>,
    tools_json: String,
    given_kwargs: Option<Struct>,
    kwargs_json: &str,
) -> Result<TemplateArguments, Wrong> {
    let wrong = |name: &str, reason: String| (format!("{place}.{name}"), reason);
    let tools = match (tools.is_empty(), tools_json.is_empty()) {
        (true, true) => None,
        (false, false) => {
            return Err(wrong(
                "tools_json",
                "is given together with tools: use one of the two".into(),
            ));
        }
        (false, true) => {
            let tools: Result<Vec<Value>, String> = tools
                .into_iter()
                .map(|tool| Ok(Value::Object(object(tool)?)))
                .collect();
            let tools = tools
                .and_then(|tools| check_tools(&tools).map(|()| tools))
                .map_err(|e| wrong("tools", e))?;
            Some(tools)
        }
        (true, false) => {
            let list = serde_json::from_str(&tools_json)
                .map_err(|e| wrong("tools_json", format!("is not JSON: {e}")))?;
            tools_from_json(list).map_err(|e| wrong("tools_json", e))?
        }
    };
    Ok(TemplateArguments {
        tools,
        kwargs: kwargs(place, given_kwargs, kwargs_json)?,
    })
}

#[cfg(test)]
mod tests;
