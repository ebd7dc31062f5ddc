//! Resources as flat fields: the rows of a table, the columns of CSV, the sides of a comparison.

use serde_json::{Map, Value, json};

use super::human;
use super::table::{Section, Shown};

/// Number of digits of a hash that a table shows.
const HASH_DIGITS: usize = 12;
/// Number of digits of a whole hash.
const WHOLE_HASH: usize = 64;
/// Prefixes of enum names, which people need not see.
const ENUM_PREFIXES: [&str; 7] = [
    "JOB_STATE_",
    "ROW_POLICY_",
    "DATASET_FORMAT_",
    "MODEL_USE_",
    "ISSUE_SEVERITY_",
    "EXPORT_FORMAT_",
    "REWARD_NORMALIZATION_",
];

/// Returns the fields of a JSON object with the paths of nested ones: `dpo.beta`. Lists are values.
pub fn fields(value: &Value) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    if let Value::Object(object) = value {
        collect("", object, &mut all);
    }
    all
}

fn collect(path: &str, object: &Map<String, Value>, all: &mut Vec<(String, Value)>) {
    for (key, value) in object {
        let at = match path {
            "" => key.clone(),
            path => format!("{path}.{key}"),
        };
        match value {
            Value::Object(inner) if !inner.is_empty() => collect(&at, inner, all),
            value => all.push((at, value.clone())),
        }
    }
}

/// Returns the fields in which two objects differ, with the values of `a` and of `b`. Null stands
/// for a field that one of them lacks.
pub fn differences(a: &Value, b: &Value) -> Vec<(String, Value, Value)> {
    let (of_a, of_b) = (fields(a), fields(b));
    let find = |fields: &[(String, Value)], path: &str| {
        let found = fields.iter().find(|(other, _)| other == path);
        found.map_or(Value::Null, |(_, value)| value.clone())
    };
    let only_b = of_b
        .iter()
        .filter(|(path, _)| !of_a.iter().any(|(other, _)| other == path));
    of_a.iter()
        .chain(only_b)
        .map(|(path, _)| (path.clone(), find(&of_a, path), find(&of_b, path)))
        .filter(|(_, a, b)| a != b)
        .collect()
}

/// Returns the value at a path. The keys of maps may contain dots.
pub fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let object = value.as_object()?;
    if let Some(found) = object.get(path) {
        return Some(found);
    }
    let splits = path.match_indices('.').map(|(i, _)| i);
    splits
        .filter_map(|i| at(object.get(&path[..i])?, &path[i + 1..]))
        .next()
}

/// Returns a value as text for a program: strings without quotes, lists and objects as JSON.
pub fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Returns a value as text for people: quantities with units, short hashes, enum names without
/// their prefix.
pub fn readable(path: &str, value: &Value) -> String {
    let name = path.rsplit('.').next().unwrap_or(path);
    match value {
        Value::Number(n) if name.ends_with("_bytes") => {
            n.as_u64().map_or_else(|| n.to_string(), human::bytes)
        }
        Value::Number(n) if name == "seconds" || name.ends_with("_seconds") => {
            n.as_f64().map_or_else(|| n.to_string(), human::seconds)
        }
        Value::Number(n) => number(n),
        Value::String(text) => readable_text(name, text),
        Value::Array(items) if path == "dpo.losses" => losses(items),
        Value::Array(items)
            if items
                .iter()
                .all(|item| !item.is_object() && !item.is_array()) =>
        {
            let items: Vec<String> = items.iter().map(|item| readable(path, item)).collect();
            items.join(", ")
        }
        // An empty message says only that it is there: `full` of a full fine-tune.
        Value::Object(object) if object.is_empty() && name == "full" => "yes".to_owned(),
        // An empty map: a job without labels.
        Value::Object(object) if object.is_empty() => String::new(),
        other => plain(other),
    }
}

/// Formats a number with at most 6 significant digits if it has a fraction.
fn number(n: &serde_json::Number) -> String {
    match n.as_f64() {
        Some(x) if n.is_f64() && x.fract() == 0.0 && x.abs() < 1e15 => format!("{x:.0}"),
        Some(x) if n.is_f64() => match format!("{x:.5e}").parse::<f64>() {
            Ok(rounded) => Value::from(rounded).to_string(),
            Err(_) => n.to_string(),
        },
        _ => n.to_string(),
    }
}

fn readable_text(name: &str, text: &str) -> String {
    if is_hash(text) {
        return short(text);
    }
    if name.ends_with("_time") {
        // Without fractions of a second.
        if let Some((seconds, _)) = text.split_once('.') {
            return format!("{seconds}Z");
        }
    }
    if name == "ttl" || name == "duration" {
        let seconds = text.strip_suffix('s').and_then(|s| s.parse::<f64>().ok());
        return seconds.map_or_else(|| text.to_owned(), human::seconds);
    }
    let stripped = ENUM_PREFIXES
        .iter()
        .find_map(|prefix| text.strip_prefix(prefix));
    stripped.map_or_else(
        || text.to_owned(),
        |rest| rest.to_lowercase().replace('_', " "),
    )
}

/// Formats a loss mix as the flag `--loss` takes it: `sigmoid`, `sigmoid=0.8,sft=0.2`, or
/// with label smoothing `exo_pair=1:0.01`.
fn losses(items: &[Value]) -> String {
    let name = |item: &Value| plain(item.get("loss_type").unwrap_or(&Value::Null));
    let weight = |item: &Value| item.get("weight").and_then(Value::as_f64).unwrap_or(1.0);
    let smoothing = |item: &Value| item.get("label_smoothing").and_then(Value::as_f64);
    let term = |item: &Value| match smoothing(item) {
        Some(smoothing) => format!("{}={}:{smoothing}", name(item), weight(item)),
        None => format!("{}={}", name(item), weight(item)),
    };
    match items {
        [one] if weight(one) == 1.0 && smoothing(one).is_none() => name(one),
        many => many.iter().map(term).collect::<Vec<_>>().join(","),
    }
}

fn is_hash(text: &str) -> bool {
    text.len() == WHOLE_HASH && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Returns the first [`HASH_DIGITS`] digits of a hash, which suffice to distinguish models and
/// datasets.
pub fn short(hash: &str) -> String {
    hash.chars().take(HASH_DIGITS).collect()
}

/// Returns a resource's fields as a section of a view for people. Empty values are left out, and
/// lists of objects have a line each.
pub fn section(title: &str, value: &Value) -> Section {
    let mut section = Section::new(title);
    for (path, value) in fields(value) {
        match &value {
            Value::Array(items) if path != "dpo.losses" && is_long(items) => {
                let lines = items.iter().map(list_line).collect();
                section.fields.push((path, Shown::Lines(lines)));
            }
            _ => section.add(&path, readable(&path, &value)),
        }
    }
    section
}

/// Returns true if the items of a list need a line each.
fn is_long(items: &[Value]) -> bool {
    /// Maximum number of characters of short texts, which share a line.
    const MAX_SHORT_CHARS: usize = 20;
    items.iter().any(|item| {
        item.is_object()
            || item
                .as_str()
                .is_some_and(|s| s.chars().count() > MAX_SHORT_CHARS)
    })
}

/// Formats an item of a list on one line. A finding about a row begins with its place.
fn list_line(item: &Value) -> String {
    let Value::Object(object) = item else {
        return plain(item);
    };
    let text = |key: &str| object.get(key).map(|value| readable(key, value));
    if let (Some(row), Some(message)) = (text("row"), text("message")) {
        let severity = text("severity").unwrap_or_default();
        let (field, reason) = (
            text("field").unwrap_or_default(),
            text("reason").unwrap_or_default(),
        );
        let parts = [severity, field, reason];
        let about: Vec<&str> = parts
            .iter()
            .map(String::as_str)
            .filter(|p| !p.is_empty())
            .collect();
        return format!("row {row}: {}: {message}", about.join(" "));
    }
    if let Some(path) = text("path") {
        return path;
    }
    let parts: Vec<String> = fields(item)
        .iter()
        .map(|(path, value)| format!("{path} {}", readable(path, value)))
        .collect();
    parts.join(", ")
}

/// Writes objects as CSV. The columns are `header`, or else every path that any object has.
pub fn csv(header: Option<&[&str]>, items: &[Value]) -> String {
    let rows: Vec<Map<String, Value>> = items
        .iter()
        .map(|item| match item {
            Value::Object(object) if header.is_some() => object.clone(),
            Value::Object(_) => fields(item).into_iter().collect(),
            scalar => Map::from_iter([("value".to_owned(), scalar.clone())]),
        })
        .collect();
    let mut columns: Vec<&str> = header.unwrap_or_default().to_vec();
    if header.is_none() {
        for key in rows.iter().flat_map(Map::keys) {
            if !columns.contains(&key.as_str()) {
                columns.push(key);
            }
        }
    }
    if columns.is_empty() {
        return String::new();
    }
    let mut writer = csv::Writer::from_writer(Vec::new());
    // Writing to memory fails only if rows differ in length, and these do not.
    let _ = writer.write_record(&columns);
    for row in &rows {
        let cells = columns
            .iter()
            .map(|column| row.get(*column).map(plain).unwrap_or_default());
        let _ = writer.write_record(cells);
    }
    let bytes = writer.into_inner().unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Returns an object with the values at some paths of another one. `paths` are pairs of the new
/// name and the path. A path without a value becomes null.
pub fn select(value: &Value, paths: &[(&str, &str)]) -> Value {
    let chosen = paths.iter().map(|(title, path)| {
        let found = at(value, path).cloned().unwrap_or_else(|| json!(null));
        ((*title).to_owned(), found)
    });
    Value::Object(chosen.collect())
}
