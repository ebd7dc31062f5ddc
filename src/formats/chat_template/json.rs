//! The filter `tojson`: Python's `json.dumps`, as transformers provides it to templates.

use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind};

/// Maximum nesting of objects and lists.
const MAX_DEPTH: usize = 500;
/// Maximum size of the JSON, in bytes. With indentation a small value can take a multiple of its
/// size.
const MAX_JSON: usize = 32 << 20;
/// Maximum number of characters per level of indentation.
const MAX_INDENT: usize = 64;

/// Names of the arguments after the value, in their positional order.
const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];

/// Options of `json.dumps`, under its names.
struct Style {
    ensure_ascii: bool,
    /// One level of indentation; `None` writes everything on one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// Implements `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn to_json(value: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let arguments = arguments.into_values();
    let (positional, options): (&[Value], Kwargs) = from_args(&arguments)?;
    if positional.len() > NAMES.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let option = |name: &str| -> Result<Option<Value>, Error> {
        let place = NAMES
            .iter()
            .position(|n| *n == name)
            .and_then(|i| positional.get(i));
        let given: Option<Value> = options.get(name)?;
        Ok(place
            .cloned()
            .or(given)
            .filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let indent = option("indent")?.map(|v| indentation(&v)).transpose()?;
    let (item_separator, key_separator) = match option("separators")? {
        Some(pair) => both_separators(&pair)?,
        None => (
            if indent.is_some() { "," } else { ", " }.to_owned(),
            ": ".to_owned(),
        ),
    };
    let style = Style {
        ensure_ascii: option("ensure_ascii")?.is_some_and(|v| v.is_true()),
        sort_keys: option("sort_keys")?.is_some_and(|v| v.is_true()),
        indent,
        item_separator,
        key_separator,
    };
    options.assert_all_used()?;
    let mut out = String::new();
    style.dump(&value, 0, &mut out)?;
    Ok(Value::from(out))
}

fn indentation(value: &Value) -> Result<String, Error> {
    let text = match value.as_str() {
        Some(text) => text.to_owned(),
        None => {
            let width = i64::try_from(value.clone())?.max(0);
            " ".repeat(
                usize::try_from(width)
                    .unwrap_or(usize::MAX)
                    .min(MAX_INDENT + 1),
            )
        }
    };
    if text.len() > MAX_INDENT {
        return Err(refused(format!(
            "tojson: indent is more than {MAX_INDENT} characters wide"
        )));
    }
    Ok(text)
}

fn both_separators(pair: &Value) -> Result<(String, String), Error> {
    let parts: Vec<String> = pair
        .try_iter()?
        .filter_map(|part| part.as_str().map(str::to_owned))
        .collect();
    match <[String; 2]>::try_from(parts) {
        Ok([item, key]) => Ok((item, key)),
        Err(_) => Err(refused("tojson: separators must be two strings".into())),
    }
}

impl Style {
    fn dump(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(refused(format!(
                "tojson: objects and lists are nested more than {MAX_DEPTH} deep"
            )));
        }
        if out.len() > MAX_JSON {
            return Err(refused(format!(
                "tojson: the text has more than {} MiB",
                MAX_JSON >> 20
            )));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                let write = |item: &Value, out: &mut String| self.dump(item, depth + 1, out);
                self.container(['[', ']'], &items, depth, out, write)?;
            }
            ValueKind::Map => {
                let mut fields = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    fields.push((key_text(&key)?, item));
                }
                if self.sort_keys {
                    fields.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                let write = |(key, item): &(String, Value), out: &mut String| {
                    self.string(key, out);
                    out.push_str(&self.key_separator);
                    self.dump(item, depth + 1, out)
                };
                self.container(['{', '}'], &fields, depth, out, write)?;
            }
            kind => return Err(refused(format!("tojson: {kind} cannot be written as JSON"))),
        }
        Ok(())
    }

    fn container<T>(
        &self,
        [open, close]: [char; 2],
        items: &[T],
        depth: usize,
        out: &mut String,
        write: impl Fn(&T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item_separator);
            }
            self.newline(depth + 1, out);
            write(item, out)?;
        }
        if !items.is_empty() {
            self.newline(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn newline(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// Writes a key as Python does: `json.dumps` accepts numbers, booleans and None as keys.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number => number(key),
        kind => Err(refused(format!("tojson: {kind} cannot be a key"))),
    }
}

fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        Ok(value.to_string())
    } else {
        Ok(float(f64::try_from(value.clone())?))
    }
}

/// Writes a float as `json.dumps` does: Python's `repr`, or `NaN`, `Infinity` and `-Infinity`.
pub(super) fn float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "NaN"
        } else if x > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    // The shortest digits that are read as the same number, as d.ddde±x.
    let scientific = format!("{x:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(e) if !(-4..16).contains(&e) => {
            format!("{mantissa}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs())
        }
        _ => {
            let plain = x.to_string();
            if plain.contains('.') {
                plain
            } else {
                plain + ".0"
            }
        }
    }
}

fn refused(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
