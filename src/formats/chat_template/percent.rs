//! Python's string formatting with `%`: the operator after a string literal, as in
//! `'%s: %d' % (name, n)`, and the filter `format`.
//!
//! minijinja's operator takes only numbers and cannot be replaced. So [`rewrite`] turns each
//! operator after a string literal into a call of a filter before the template is compiled. If the
//! left operand is another expression with a string value, e.g. a variable, rendering fails.

use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State};

use super::python::{pay, refused, represent, text};

/// Name of the filter that replaces the operator.
const OPERATOR: &str = "__percent__";
/// Maximum width and precision of a field. Both let a small template produce large output.
const MAX_WIDTH: usize = 10_000;
/// Maximum nesting of brackets in which operators are rewritten. minijinja's own limit is also 150.
const MAX_DEPTH: usize = 150;

/// Adds the filters to the environment.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.add_filter(OPERATOR, |state: &State, format: Value, value: Value| {
        percent(state, &format, &value)
    });
    environment.add_filter(
        "format",
        |state: &State, format: Value, arguments: Rest<ValueOrKwargs>| -> Result<Value, Error> {
            let arguments = arguments.into_values();
            let (positional, named): (&[Value], Kwargs) = from_args(&arguments)?;
            let mut fields = Vec::new();
            for name in named.args() {
                fields.push((name, named.get::<Value>(name)?));
            }
            match (positional.is_empty(), fields.is_empty()) {
                (false, false) => Err(refused(
                    "format: arguments must be either all positional or all named",
                )),
                (_, false) => percent(state, &format, &Value::from_pairs(fields)),
                (_, true) => {
                    let values = Arguments {
                        values: positional.to_vec(),
                        next: 0,
                        mapping: None,
                    };
                    formatted(state, &format, values)
                }
            }
        },
    );
}

/// Returns Python's `format % value`.
fn percent(state: &State, format: &Value, value: &Value) -> Result<Value, Error> {
    let arguments = if value.is_tuple() {
        Arguments {
            values: value.try_iter()?.collect(),
            next: 0,
            mapping: None,
        }
    } else {
        // As in Python, a value that supports access by key may stay unused.
        let is_mapping = matches!(
            value.kind(),
            ValueKind::Map | ValueKind::Seq | ValueKind::Undefined
        ) || (value.kind() == ValueKind::Iterable && value.len().is_some());
        Arguments {
            values: vec![value.clone()],
            next: 0,
            mapping: is_mapping.then(|| value.clone()),
        }
    };
    formatted(state, format, arguments)
}

fn formatted(state: &State, format: &Value, mut arguments: Arguments) -> Result<Value, Error> {
    let format = text(state, format)?;
    let mut out = String::new();
    let mut rest = format.as_str();
    while let Some(start) = rest.find('%') {
        out.push_str(&rest[..start]);
        rest = &rest[start + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            out.push('%');
            rest = after;
            continue;
        }
        let (field, after) = Field::read(rest)?;
        let value = arguments.value(field.key)?;
        pay(state, field.width.max(field.precision.unwrap_or(0)))?;
        field.write(state, &value, &mut out)?;
        rest = after;
    }
    out.push_str(rest);
    arguments.finish()?;
    Ok(Value::from(out))
}

/// The right operand of the operator, or the arguments of the filter.
struct Arguments {
    values: Vec<Value>,
    next: usize,
    /// The right operand if it supports access by key. Fields with a key read from it.
    mapping: Option<Value>,
}

impl Arguments {
    fn value(&mut self, key: Option<&str>) -> Result<Value, Error> {
        let Some(key) = key else {
            let value = self
                .values
                .get(self.next)
                .cloned()
                .ok_or_else(|| refused("not enough arguments for format string"))?;
            self.next += 1;
            return Ok(value);
        };
        // After a field with a key, a field without one finds no values any more.
        self.next = self.values.len();
        let mapping = self.mapping.as_ref().filter(|m| m.kind() == ValueKind::Map);
        let mapping = mapping.ok_or_else(|| refused("format requires a mapping"))?;
        let value = mapping.get_item(&Value::from(key))?;
        if value.is_undefined() {
            Err(refused(format!("format: there is no key '{key}'")))
        } else {
            Ok(value)
        }
    }

    fn finish(&self) -> Result<(), Error> {
        match self.next < self.values.len() && self.mapping.is_none() {
            true => Err(refused(
                "not all arguments converted during string formatting",
            )),
            false => Ok(()),
        }
    }
}

/// A conversion specifier, e.g. `%(name)-8.3f`.
#[derive(Debug, Default)]
struct Field<'a> {
    key: Option<&'a str>,
    is_left: bool,
    has_plus: bool,
    has_space: bool,
    is_alternate: bool,
    has_zeros: bool,
    width: usize,
    precision: Option<usize>,
    conversion: char,
}

impl<'a> Field<'a> {
    /// Reads the specifier after its `%`; also returns the rest of the text.
    fn read(text: &'a str) -> Result<(Self, &'a str), Error> {
        let mut field = Field::default();
        let mut rest = text;
        if let Some(keyed) = rest.strip_prefix('(') {
            let (key, after) = keyed
                .split_once(')')
                .ok_or_else(|| refused("incomplete format key"))?;
            if key.contains('(') {
                return Err(refused(format!(
                    "format: the key '{key}' has a parenthesis in it"
                )));
            }
            (field.key, rest) = (Some(key), after);
        }
        while let Some(flag) = rest.chars().next().filter(|c| "-+ #0".contains(*c)) {
            match flag {
                '-' => field.is_left = true,
                '+' => field.has_plus = true,
                ' ' => field.has_space = true,
                '#' => field.is_alternate = true,
                _ => field.has_zeros = true,
            }
            rest = &rest[1..];
        }
        (field.width, rest) = digits(rest)?;
        if let Some(after) = rest.strip_prefix('.') {
            let (precision, after) = digits(after)?;
            (field.precision, rest) = (Some(precision), after);
        }
        // Python accepts C's length modifiers and ignores them.
        rest = rest.strip_prefix(['h', 'l', 'L']).unwrap_or(rest);
        field.conversion = rest
            .chars()
            .next()
            .ok_or_else(|| refused("incomplete format"))?;
        let after = &rest[field.conversion.len_utf8()..];
        Ok((field, after))
    }

    fn write(&self, state: &State, value: &Value, out: &mut String) -> Result<(), Error> {
        match self.conversion {
            's' => {
                let written = text(state, value)?;
                pay(state, written.len())?;
                self.put_text(&written, out);
            }
            'r' => {
                let mut written = String::new();
                represent(state, value, 0, &mut written)?;
                self.put_text(&written, out);
            }
            'd' | 'i' | 'u' => {
                let (is_negative, digits) =
                    whole(value).ok_or_else(|| self.wrong("a number", value))?;
                self.put_number(is_negative, "", &self.with_precision(&digits), out);
            }
            'x' | 'X' | 'o' => {
                let number = integer(value).ok_or_else(|| self.wrong("an integer", value))?;
                let size = number.unsigned_abs();
                let (prefix, digits) = match self.conversion {
                    'x' => ("0x", format!("{size:x}")),
                    'X' => ("0X", format!("{size:X}")),
                    _ => ("0o", format!("{size:o}")),
                };
                let prefix = if self.is_alternate { prefix } else { "" };
                self.put_number(number < 0, prefix, &self.with_precision(&digits), out);
            }
            'f' | 'F' => {
                let number = float(value).ok_or_else(|| self.wrong("a number", value))?;
                let precision = self.precision.unwrap_or(6);
                let mut digits = match number {
                    n if n.is_nan() => "nan".to_owned(),
                    n if n.is_infinite() => "inf".to_owned(),
                    n => format!("{:.precision$}", n.abs()),
                };
                if self.is_alternate && precision == 0 && number.is_finite() {
                    digits.push('.');
                }
                if self.conversion == 'F' {
                    digits.make_ascii_uppercase();
                }
                self.put_number(
                    number.is_sign_negative() && !number.is_nan(),
                    "",
                    &digits,
                    out,
                );
            }
            'e' | 'E' | 'g' | 'G' => {
                let number = float(value).ok_or_else(|| self.wrong("a number", value))?;
                let precision = self.precision.unwrap_or(6);
                let mut digits = match number.abs() {
                    n if n.is_nan() => "nan".to_owned(),
                    n if n.is_infinite() => "inf".to_owned(),
                    n if matches!(self.conversion, 'e' | 'E') => {
                        scientific(n, precision, self.is_alternate)
                    }
                    n => general(n, precision.max(1), self.is_alternate),
                };
                if self.conversion.is_ascii_uppercase() {
                    digits.make_ascii_uppercase();
                }
                self.put_number(
                    number.is_sign_negative() && !number.is_nan(),
                    "",
                    &digits,
                    out,
                );
            }
            'c' => {
                let written = match value.as_str() {
                    Some(text) => text.to_owned(),
                    None => integer(value)
                        .and_then(|n| char::from_u32(u32::try_from(n).ok()?))
                        .map(String::from)
                        .unwrap_or_default(),
                };
                if written.chars().count() != 1 {
                    return Err(self.wrong("an integer or a single character", value));
                }
                self.put(&written, self.width.saturating_sub(1), out);
            }
            other => {
                return Err(refused(format!(
                    "format: the conversion '%{other}' is not supported; supported are %s, %r, %d, \
                     %i, %u, %x, %X, %o, %f, %F, %e, %E, %g, %G, %c and %%, \
                     with a width and a precision in digits"
                )));
            }
        }
        Ok(())
    }

    fn wrong(&self, wanted: &str, value: &Value) -> Error {
        refused(format!(
            "%{} format: {wanted} is required, not {}",
            self.conversion,
            value.kind()
        ))
    }

    fn with_precision(&self, digits: &str) -> String {
        let missing = self.precision.unwrap_or(0).saturating_sub(digits.len());
        "0".repeat(missing) + digits
    }

    fn put_text(&self, text: &str, out: &mut String) {
        let end = self
            .precision
            .and_then(|precision| text.char_indices().nth(precision));
        let text = end.map_or(text, |(end, _)| &text[..end]);
        self.put(text, self.width.saturating_sub(text.chars().count()), out);
    }

    fn put_number(&self, is_negative: bool, prefix: &str, digits: &str, out: &mut String) {
        let sign = match () {
            () if is_negative => "-",
            () if self.has_plus => "+",
            () if self.has_space => " ",
            () => "",
        };
        let missing = self
            .width
            .saturating_sub(sign.len() + prefix.len() + digits.len());
        if self.has_zeros && !self.is_left {
            self.put(
                &format!("{sign}{prefix}{}{digits}", "0".repeat(missing)),
                0,
                out,
            );
        } else {
            self.put(&format!("{sign}{prefix}{digits}"), missing, out);
        }
    }

    fn put(&self, text: &str, missing: usize, out: &mut String) {
        let padding = " ".repeat(missing);
        let (before, after) = if self.is_left {
            ("", padding.as_str())
        } else {
            (padding.as_str(), "")
        };
        out.extend([before, text, after]);
    }
}

/// Reads a width or a precision; it is 0 if there are no digits.
fn digits(text: &str) -> Result<(usize, &str), Error> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let number = if number.is_empty() {
        Some(0)
    } else {
        number.parse().ok()
    };
    match number.filter(|n| *n <= MAX_WIDTH) {
        Some(number) => Ok((number, rest)),
        None => Err(refused(format!(
            "format: a width or a precision is more than {MAX_WIDTH}"
        ))),
    }
}

/// Truncates a number to an integer. Returns its sign (true if it is negative) and its digits.
fn whole(value: &Value) -> Option<(bool, String)> {
    if value.kind() == ValueKind::Number && !value.is_integer() {
        let number = f64::try_from(value.clone())
            .ok()
            .filter(|n| n.is_finite())?
            .trunc();
        return Some((number < 0.0, format!("{:.0}", number.abs())));
    }
    let number = if value.kind() == ValueKind::Bool {
        i32::from(value.is_true()).to_string()
    } else {
        value.to_string()
    };
    match (value.kind(), number.strip_prefix('-')) {
        (ValueKind::Number, Some(digits)) => Some((true, digits.to_owned())),
        (ValueKind::Number | ValueKind::Bool, _) => Some((false, number)),
        _ => None,
    }
}

/// Writes a non-negative number as C's `%e` does, e.g. `1.50e+03`.
fn scientific(number: f64, precision: usize, keeps_point: bool) -> String {
    let written = format!("{number:.precision$e}");
    let (digits, exponent) = written.split_once('e').unwrap_or((&written, "0"));
    let (sign, exponent) = exponent
        .strip_prefix('-')
        .map_or(('+', exponent), |positive| ('-', positive));
    let point = if keeps_point && precision == 0 {
        "."
    } else {
        ""
    };
    format!("{digits}{point}e{sign}{exponent:0>2}")
}

/// Writes a non-negative number with at most `significant` digits, as C's `%g` does.
fn general(number: f64, significant: usize, keeps_zeros: bool) -> String {
    let written = format!("{number:.*e}", significant - 1);
    let exponent: i32 = written
        .split_once('e')
        .and_then(|(_, exponent)| exponent.parse().ok())
        .unwrap_or_default();
    let is_fixed = exponent >= -4 && exponent < significant as i32;
    let written = if is_fixed {
        let precision = (significant as i32 - 1 - exponent).max(0) as usize;
        let point = if keeps_zeros && precision == 0 {
            "."
        } else {
            ""
        };
        format!("{number:.precision$}{point}")
    } else {
        scientific(number, significant - 1, keeps_zeros)
    };
    if keeps_zeros {
        return written;
    }
    let (digits, exponent) = written.split_at(written.find('e').unwrap_or(written.len()));
    let digits = if digits.contains('.') {
        digits.trim_end_matches('0').trim_end_matches('.')
    } else {
        digits
    };
    format!("{digits}{exponent}")
}

fn integer(value: &Value) -> Option<i128> {
    match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    }
}

fn float(value: &Value) -> Option<f64> {
    match (integer(value), value.kind()) {
        (Some(number), _) => Some(number as f64),
        (None, ValueKind::Number) => f64::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// A token of a template expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TemplateToken {
    Space,
    Text,
    Word,
    Open,
    Close,
    /// An operator that binds at least as strongly as `%`: `*`, `/`, `//`, `%` or `**`.
    Times,
    Other,
}

/// Returns the token at the start of a non-empty text, and its length in bytes.
fn token(text: &str) -> (TemplateToken, usize) {
    let first = text.chars().next().unwrap_or(' ');
    let until = |is_end: &dyn Fn(char) -> bool| text.find(is_end).unwrap_or(text.len());
    match first {
        c if c.is_whitespace() => (TemplateToken::Space, until(&|c| !c.is_whitespace())),
        '\'' | '"' => (TemplateToken::Text, string_length(text, first)),
        c if c.is_alphanumeric() || c == '_' => (TemplateToken::Word, word_length(text)),
        '(' | '[' | '{' => (TemplateToken::Open, 1),
        ')' | ']' | '}' => (TemplateToken::Close, 1),
        '*' | '/' => (
            TemplateToken::Times,
            if text[1..].starts_with(first) { 2 } else { 1 },
        ),
        '%' => (TemplateToken::Times, 1),
        other => (TemplateToken::Other, other.len_utf8()),
    }
}

fn string_length(text: &str, quote: char) -> usize {
    let mut is_escaped = true;
    for (at, c) in text.char_indices() {
        if c == quote && !is_escaped && at > 0 {
            return at + 1;
        }
        is_escaped = at > 0 && c == '\\' && !is_escaped;
    }
    text.len()
}

/// Returns the length in bytes of a name or a number, e.g. of `1.5e-3`.
fn word_length(text: &str) -> usize {
    let is_number = text.starts_with(|c: char| c.is_ascii_digit());
    let bytes = text.as_bytes();
    let is_digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let mut end = text.len();
    for (at, c) in text.char_indices() {
        let is_fraction = is_number && c == '.' && is_digit(at + 1);
        let is_exponent = is_number
            && matches!(c, '+' | '-')
            && matches!(bytes[at - 1], b'e' | b'E')
            && is_digit(at + 1);
        if !(c.is_alphanumeric() || c == '_' || is_fraction || is_exponent) {
            end = at;
            break;
        }
    }
    end
}

fn space(text: &str) -> usize {
    text.len() - text.trim_start().len()
}

/// Rewrites every operator `%` after a string literal as a call of the filter [`OPERATOR`].
pub(super) fn rewrite(source: &str) -> String {
    // Start and end of a range of bytes in the source, and its replacement.
    let mut edits: Vec<(usize, usize, String)> = Vec::new();
    let mut at = 0;
    while let Some(start) = source[at..].find('{') {
        at += start;
        let tag = &source[at..];
        at += match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").unwrap_or(tag.len()),
            Some(b'{') => expression(source, at + 2, "}}", &mut edits) - at,
            Some(b'%') if is_raw(&tag[2..]) => tag.find("endraw").unwrap_or(tag.len()),
            Some(b'%') => expression(source, at + 2, "%}", &mut edits) - at,
            _ => 1,
        };
    }
    edits.sort_by_key(|(start, ..)| *start);
    let mut out = String::with_capacity(source.len());
    let mut done = 0;
    for (start, end, replacement) in edits {
        out.push_str(&source[done..start]);
        out.push_str(&replacement);
        done = end;
    }
    out + &source[done..]
}

fn is_raw(tag: &str) -> bool {
    let name = tag.trim_start_matches(['-', '+']).trim_start();
    name.strip_prefix("raw").is_some_and(|rest| {
        rest.trim_start()
            .trim_start_matches(['-', '+'])
            .starts_with("%}")
    })
}

/// Finds the operators in the tag with content from `at`. Returns the position of the tag's end.
fn expression(
    source: &str,
    mut at: usize,
    end: &str,
    edits: &mut Vec<(usize, usize, String)>,
) -> usize {
    let mut depth = 0_usize;
    let mut last = TemplateToken::Other;
    while at < source.len() {
        let rest = &source[at..];
        if depth == 0
            && rest
                .strip_prefix(['-', '+'])
                .unwrap_or(rest)
                .starts_with(end)
        {
            return at;
        }
        let (token, length) = token(rest);
        // Adjacent literals count as one literal.
        if token == TemplateToken::Text
            && !matches!(last, TemplateToken::Times | TemplateToken::Text)
            && depth <= MAX_DEPTH
        {
            operators(source, at, edits);
        }
        match token {
            TemplateToken::Open => depth += 1,
            TemplateToken::Close => depth = depth.saturating_sub(1),
            _ => {}
        }
        // A minus sign is part of the operand, so a literal after it still belongs to the operator
        // before the sign.
        let is_sign = last == TemplateToken::Times && rest.starts_with('-');
        if token != TemplateToken::Space && !is_sign {
            last = token;
        }
        at += length;
    }
    at
}

/// Rewrites the operators that follow the string literal at `at`, if any.
fn operators(source: &str, at: usize, edits: &mut Vec<(usize, usize, String)>) {
    let mut end = at + literals(&source[at..]);
    loop {
        let operator = end + space(&source[end..]);
        let Some(operand) = source[operator..]
            .strip_prefix('%')
            .filter(|rest| !rest.starts_with('}'))
        else {
            return;
        };
        let Some(length) = operand_length(operand) else {
            return;
        };
        end = operator + 1 + length;
        edits.push((operator, operator + 1, format!("|{OPERATOR}(")));
        edits.push((end, end, ")".to_owned()));
    }
}

/// Returns the length in bytes of adjacent string literals.
fn literals(text: &str) -> usize {
    let mut end = 0;
    loop {
        let next = end + if end > 0 { space(&text[end..]) } else { 0 };
        match text[next..].starts_with(['\'', '"']) {
            true => end = next + token(&text[next..]).1,
            false => return end,
        }
    }
}

/// Returns the length in bytes of the operator's right operand, with the space before it. The
/// operand may be a power, and each value may have attributes, items, calls and filters. Returns
/// `None` if the end of the operand cannot be determined.
fn operand_length(text: &str) -> Option<usize> {
    let mut at = unary_length(text)?;
    loop {
        let next = at + space(&text[at..]);
        let Some(exponent) = text[next..].strip_prefix("**") else {
            return Some(at);
        };
        at = next + 2 + unary_length(exponent)?;
    }
}

fn unary_length(text: &str) -> Option<usize> {
    let mut at = space(text);
    while text[at..].starts_with('-') {
        at += 1;
        at += space(&text[at..]);
    }
    let rest = text.get(at..).filter(|rest| !rest.is_empty())?;
    at += match token(rest) {
        (TemplateToken::Text, _) => literals(rest),
        (TemplateToken::Word, length)
            if !matches!(
                &rest[..length],
                "not" | "is" | "in" | "if" | "else" | "and" | "or"
            ) =>
        {
            length
        }
        (TemplateToken::Open, _) => brackets_length(rest)?,
        _ => return None,
    };
    // Attributes, items, calls and filters.
    loop {
        let next = at + space(&text[at..]);
        let rest = text.get(next..).filter(|rest| !rest.is_empty());
        let Some(rest) = rest else { return Some(at) };
        match rest.as_bytes()[0] {
            b'(' | b'[' => at = next + brackets_length(rest)?,
            b'.' | b'|' => {
                let name = 1 + space(&rest[1..]);
                let name_text = rest.get(name..).filter(|rest| !rest.is_empty())?;
                let (TemplateToken::Word, length) = token(name_text) else {
                    return None;
                };
                at = next + name + length;
            }
            // In jinja2 a test after the operand would be part of it.
            _ if token(rest) == (TemplateToken::Word, 2) && rest.starts_with("is") => return None,
            _ => return Some(at),
        }
    }
}

/// Returns the length in bytes of brackets and their content, or `None` if they are not closed.
fn brackets_length(text: &str) -> Option<usize> {
    let (mut at, mut depth) = (0, 0_usize);
    while at < text.len() {
        let (token, length) = token(&text[at..]);
        at += length;
        match token {
            TemplateToken::Open => depth += 1,
            TemplateToken::Close if depth == 1 => return Some(at),
            TemplateToken::Close => depth -= 1,
            _ => {}
        }
    }
    None
}

/// Returns true if the error is about the operator `%` with a string on its left. minijinja gives
/// only a text to recognise it by; the result only adds a hint to the error message.
pub(super) fn is_about_operator(error: &Error) -> bool {
    error.kind() == ErrorKind::InvalidOperation
        && error.detail().is_some_and(|detail| {
            detail.starts_with("tried to use % operator on unsupported types string")
        })
}

#[cfg(test)]
mod tests;
