//! YAML as JSON values, and back.

use serde::Deserialize as _;
use serde_json::{Map, Number, Value};

use super::error::CanonicalError;

/// Maximum nesting of lists and mappings that is read.
const MAX_DEPTH: usize = 64;

/// Writes a value as YAML.
pub(super) fn write(value: &Value) -> Result<String, CanonicalError> {
    yaml_serde::to_string(value).map_err(|e| CanonicalError::Conversion(e.to_string()))
}

/// Reads YAML. A number or a truth value as a key becomes text.
pub(super) fn read(text: &str) -> Result<Value, CanonicalError> {
    let document: yaml_serde::Value =
        yaml_serde::from_str(text).map_err(|e| syntax(e.to_string()))?;
    convert(document, MAX_DEPTH)
}

/// Reads the documents of a YAML text, without those that are empty.
pub(super) fn read_all(text: &str) -> Result<Vec<Value>, CanonicalError> {
    let mut all = Vec::new();
    for document in yaml_serde::Deserializer::from_str(text) {
        let document =
            yaml_serde::Value::deserialize(document).map_err(|e| syntax(e.to_string()))?;
        let value = convert(document, MAX_DEPTH)?;
        if !value.is_null() {
            all.push(value);
        }
    }
    Ok(all)
}

fn syntax(reason: String) -> CanonicalError {
    CanonicalError::Syntax {
        format: "YAML",
        reason,
    }
}

fn convert(value: yaml_serde::Value, depth: usize) -> Result<Value, CanonicalError> {
    use yaml_serde::Value as Yaml;
    if depth == 0 {
        return Err(syntax(format!(
            "lists and mappings are nested more than {MAX_DEPTH} deep"
        )));
    }
    Ok(match value {
        Yaml::Null => Value::Null,
        Yaml::Bool(flag) => Value::Bool(flag),
        Yaml::Number(number) => convert_number(&number),
        Yaml::String(text) => Value::String(text),
        Yaml::Sequence(items) => Value::Array(
            items
                .into_iter()
                .map(|item| convert(item, depth - 1))
                .collect::<Result<_, _>>()?,
        ),
        Yaml::Mapping(entries) => {
            let mut object = Map::new();
            for (key, value) in entries {
                object.insert(convert_key(key)?, convert(value, depth - 1)?);
            }
            Value::Object(object)
        }
        Yaml::Tagged(tagged) => {
            return Err(syntax(format!(
                "tags such as {} are not supported: leave it out",
                tagged.tag
            )));
        }
    })
}

/// Converts a number. JSON has no infinite numbers, so protobuf's names for them are used.
fn convert_number(number: &yaml_serde::Number) -> Value {
    if let Some(n) = number.as_u64() {
        return n.into();
    }
    if let Some(n) = number.as_i64() {
        return n.into();
    }
    let x = number.as_f64().unwrap_or(f64::NAN);
    match Number::from_f64(x) {
        Some(finite) => Value::Number(finite),
        None if x == f64::INFINITY => "Infinity".into(),
        None if x == f64::NEG_INFINITY => "-Infinity".into(),
        None => "NaN".into(),
    }
}

fn convert_key(key: yaml_serde::Value) -> Result<String, CanonicalError> {
    use yaml_serde::Value as Yaml;
    match key {
        Yaml::String(text) => Ok(text),
        Yaml::Number(number) => Ok(number.to_string()),
        Yaml::Bool(flag) => Ok(flag.to_string()),
        _ => Err(syntax(
            "a key must be text, a number, true or false".to_owned(),
        )),
    }
}
