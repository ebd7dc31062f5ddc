//! Python semantics in templates: the printed form of values, the methods of strings, and the
//! template language's filters and tests (such as `is iterable`) that jinja2 and minijinja define
//! differently.

use std::fmt::Write;

use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, escape_formatter};
use minijinja_contrib::pycompat;

use super::json;

/// Maximum nesting of containers that are printed.
const MAX_DEPTH: usize = 100;
/// Bytes of output that cost one unit of fuel, as in minijinja.
const BYTES_PER_FUEL: usize = 64;

/// Makes the environment behave as transformers' jinja2 environment.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.set_formatter(print);
    environment.set_unknown_method_callback(call_method);
    environment.add_filter(
        "string",
        |state: &State, value: Value| -> Result<Value, Error> {
            if value.as_str().is_some() {
                Ok(value)
            } else {
                Ok(Value::from(text(state, &value)?))
            }
        },
    );
    environment.add_filter("trim", trim);
    // Unlike in minijinja, None is not iterable. An undefined value is.
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    // Everything with a length and items is a sequence, including strings and mappings.
    environment.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined
        ) || (value.kind() == ValueKind::Iterable && value.len().is_some())
    });
}

/// Prints numbers and containers as Python's `str` does.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            Ok(out.write_str(&text(state, value)?)?)
        }
        _ => escape_formatter(out, state, value),
    }
}

/// Returns Python's `str` of a value.
pub(super) fn text(state: &State, value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None if value.is_undefined() => Ok(String::new()),
        None => {
            let mut out = String::new();
            represent(state, value, 0, &mut out)?;
            Ok(out)
        }
    }
}

/// Writes Python's `repr` of a value.
pub(super) fn represent(
    state: &State,
    value: &Value,
    depth: usize,
    out: &mut String,
) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(refused(format!(
            "containers are nested more than {MAX_DEPTH} deep"
        )));
    }
    // Each value costs fuel, because containers may hold the same value many times.
    state.consume_fuel(1)?;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::String => represent_string(state, value.as_str().unwrap_or_default(), out)?,
        ValueKind::Number if !value.is_integer() => {
            let number = f64::try_from(value.clone())?;
            match number.is_finite() {
                true => out.push_str(&json::float(number)),
                // inf, -inf, nan
                false => out.push_str(&number.to_string().to_lowercase()),
            }
        }
        ValueKind::Seq | ValueKind::Iterable if value.len().is_some() => {
            let (open, close) = if value.is_tuple() {
                ('(', ')')
            } else {
                ('[', ']')
            };
            out.push(open);
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                represent(state, &item, depth + 1, out)?;
            }
            if value.is_tuple() && value.len() == Some(1) {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                represent(state, &key, depth + 1, out)?;
                out.push_str(": ");
                represent(state, &value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        _ => write!(out, "{value}")?,
    }
    Ok(())
}

fn represent_string(state: &State, text: &str, out: &mut String) -> Result<(), Error> {
    pay(state, text.len())?;
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c if u32::from(c) < 0x100 => write!(out, "\\x{:02x}", u32::from(c))?,
            c if u32::from(c) < 0x10000 => write!(out, "\\u{:04x}", u32::from(c))?,
            c => write!(out, "\\U{:08x}", u32::from(c))?,
        }
    }
    out.push(quote);
    Ok(())
}

/// Returns true if Python's `repr` writes the character itself instead of an escape. It escapes
/// control, format and private-use characters, and all separators except the space. Python also
/// escapes unassigned characters; this function does not.
fn is_printable(c: char) -> bool {
    let is_format = matches!(
        c,
        '\u{ad}'
            | '\u{600}'..='\u{605}'
            | '\u{61c}'
            | '\u{6dd}'
            | '\u{70f}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0001}'..='\u{e007f}'
    );
    let is_private = matches!(c, '\u{e000}'..='\u{f8ff}' | '\u{f0000}'..);
    !(c.is_control() || (c.is_whitespace() && c != ' ') || is_format || is_private)
}

/// The filter `trim`, which converts any value to a string first.
fn trim(state: &State, value: Value, characters: Option<String>) -> Result<Value, Error> {
    let stripped = strip(&text(state, &value)?, characters.as_deref(), true, true).to_owned();
    Ok(if value.is_safe() {
        Value::from_safe_string(stripped)
    } else {
        Value::from(stripped)
    })
}

/// Calls a Python method that minijinja lacks or for which it gives another result.
fn call_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let result = match (value.as_str(), value.kind()) {
        (Some(text), _) => string_method(state, text, method, args)?,
        (None, ValueKind::Seq) if method == "index" => {
            let (item,): (&Value,) = from_args(args)?;
            let place = value.try_iter()?.position(|other| other == *item);
            Some(Value::from(
                place.ok_or_else(|| refused("list.index(x): x not in list"))?,
            ))
        }
        (None, ValueKind::Map) if method == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        _ => None,
    };
    match result {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// Returns the result of a string's method, or `None` for methods that are left to minijinja.
fn string_method(
    state: &State,
    text: &str,
    method: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let is_left = method != "rstrip";
    let is_right = method != "lstrip";
    let result = match method {
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, characters, is_left, is_right))
        }
        "split" | "rsplit" => {
            let (separator, limit, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
            let separator = separator.or(named.get("sep")?).filter(|s| !s.is_none());
            let limit = limit
                .or(named.get("maxsplit")?)
                .and_then(|n| usize::try_from(n).ok());
            named.assert_all_used()?;
            let separator = separator
                .map(|s| {
                    s.to_str()
                        .ok_or_else(|| refused("split: the separator must be a string"))
                })
                .transpose()?;
            split(text, separator.as_deref(), limit, method == "rsplit")?
                .into_iter()
                .map(Value::from)
                .collect()
        }
        "splitlines" => {
            let (keep_ends, named): (Option<bool>, Kwargs) = from_args(args)?;
            let keep_ends = keep_ends.or(named.get("keepends")?).unwrap_or(false);
            named.assert_all_used()?;
            split_lines(text, keep_ends)
                .into_iter()
                .map(Value::from)
                .collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let separator = Some(separator)
                .filter(|s| !s.is_empty())
                .ok_or_else(|| refused("empty separator"))?;
            let parts = match (
                method,
                text.split_once(separator),
                text.rsplit_once(separator),
            ) {
                ("partition", Some((before, after)), _)
                | ("rpartition", _, Some((before, after))) => [before, separator, after],
                ("partition", ..) => [text, "", ""],
                _ => ["", "", text],
            };
            Value::from(Tuple::new(parts.into_iter().map(Value::from).collect()))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "index" => {
            let (part,): (&str,) = from_args(args)?;
            let place = text
                .find(part)
                .ok_or_else(|| refused("substring not found"))?;
            Value::from(text[..place].chars().count())
        }
        "ljust" | "rjust" | "zfill" => {
            let (width, filler): (usize, Option<char>) = from_args(args)?;
            pay(state, width)?;
            Value::from(justify(text, method, width, filler.unwrap_or(' ')))
        }
        "isspace" => {
            let () = from_args(args)?;
            Value::from(!text.is_empty() && text.chars().all(is_space))
        }
        "isdecimal" => {
            let () = from_args(args)?;
            Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit()))
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}

/// Returns true for Python's white space: that of Unicode, and the ASCII separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

fn strip<'a>(text: &'a str, characters: Option<&str>, left: bool, right: bool) -> &'a str {
    let is_stripped = |c: char| characters.map_or_else(|| is_space(c), |set| set.contains(c));
    let text = if left {
        text.trim_start_matches(is_stripped)
    } else {
        text
    };
    if right {
        text.trim_end_matches(is_stripped)
    } else {
        text
    }
}

fn split<'a>(
    text: &'a str,
    separator: Option<&str>,
    limit: Option<usize>,
    from_right: bool,
) -> Result<Vec<&'a str>, Error> {
    let limit = limit.unwrap_or(usize::MAX - 1);
    if separator == Some("") {
        return Err(refused("empty separator"));
    }
    let mut parts = match (separator, from_right) {
        (Some(separator), false) => text.splitn(limit + 1, separator).collect(),
        (Some(separator), true) => text.rsplitn(limit + 1, separator).collect::<Vec<_>>(),
        (None, _) => {
            let mut parts = Vec::new();
            let mut rest = strip(text, None, !from_right, from_right);
            while !rest.is_empty() {
                let gap = if from_right {
                    rest.rfind(is_space)
                } else {
                    rest.find(is_space)
                };
                let Some(gap) = gap.filter(|_| parts.len() < limit) else {
                    parts.push(rest);
                    break;
                };
                let after = gap + rest[gap..].chars().next().map_or(0, char::len_utf8);
                let (part, other) = if from_right {
                    (&rest[after..], &rest[..gap])
                } else {
                    (&rest[..gap], &rest[after..])
                };
                parts.push(part);
                rest = strip(other, None, !from_right, from_right);
            }
            parts
        }
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts)
}

/// Returns true for the characters at which Python's `str.splitlines` ends a line.
fn is_line_end(c: char) -> bool {
    matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(end) = rest.find(is_line_end) {
        let width = if rest[end..].starts_with("\r\n") {
            2
        } else {
            rest[end..].chars().next().map_or(0, char::len_utf8)
        };
        lines.push(&rest[..if keep_ends { end + width } else { end }]);
        rest = &rest[end + width..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn justify(text: &str, method: &str, width: usize, filler: char) -> String {
    let missing = width.saturating_sub(text.chars().count());
    let padding = |c: char| std::iter::repeat_n(c, missing).collect::<String>();
    match method {
        "ljust" => text.to_owned() + &padding(filler),
        "rjust" => padding(filler) + text,
        // The method `zfill` puts the zeros between a sign and the digits.
        _ => {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", padding('0'))
        }
    }
}

/// Consumes fuel for `bytes` of output, before they are allocated.
pub(super) fn pay(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel((bytes / BYTES_PER_FUEL) as u64)
}

pub(super) fn refused(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

#[cfg(test)]
mod tests;
