//! Collects all invalid fields of a request or a settings file, so that they are reported together.

use std::fmt;

/// Maximum number of violations that are listed; further ones are only counted.
pub const MAX_LISTED: usize = 50;
/// Maximum number of characters of a client's text that an error quotes.
const MAX_QUOTED_CHARS: usize = 100;

/// One invalid field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field, e.g. `training_job.dpo.beta`.
    pub field: String,
    /// Description of the problem and the remedy.
    pub description: String,
}

/// Violations found so far: the first [`MAX_LISTED`], and the number of further ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Violations {
    listed: Vec<Violation>,
    more: usize,
}

impl Violations {
    /// Returns a single violation.
    pub fn one(field: impl Into<String>, description: impl Into<String>) -> Self {
        let mut violations = Violations::default();
        violations.push(field, description);
        violations
    }

    /// Adds a violation.
    pub fn push(&mut self, field: impl Into<String>, description: impl Into<String>) {
        if self.listed.len() < MAX_LISTED {
            self.listed.push(Violation {
                field: field.into(),
                description: description.into(),
            });
        } else {
            self.more += 1;
        }
    }

    /// Returns the first [`MAX_LISTED`] violations.
    pub fn listed(&self) -> &[Violation] {
        &self.listed
    }

    /// Returns the number of violations that are not listed.
    pub fn more(&self) -> usize {
        self.more
    }

    /// Returns true if no violation was found.
    pub fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    /// Adds a violation if a repeated field has more than `limit` elements. Returns true if it does
    /// not.
    pub fn at_most(&mut self, field: &str, elements: usize, limit: usize) -> bool {
        if elements > limit {
            self.push(
                field,
                format!("has {elements} elements: at most {limit} are accepted"),
            );
        }
        elements <= limit
    }

    /// Adds a violation unless `value` is finite and above 0.
    pub fn positive(&mut self, field: impl Into<String>, value: f64) {
        if !(value.is_finite() && value > 0.0) {
            self.push(
                field,
                format!("is {value}: it must be a finite number above 0"),
            );
        }
    }

    /// Adds a violation unless `value` is finite and at least 0.
    pub fn non_negative(&mut self, field: impl Into<String>, value: f64) {
        if !(value.is_finite() && value >= 0.0) {
            self.push(
                field,
                format!("is {value}: it must be a finite number, 0 or above"),
            );
        }
    }

    /// Returns the violations as an error, if there are any.
    ///
    /// # Errors
    /// The violations that were added.
    pub fn into_result(self) -> Result<(), Violations> {
        if self.is_empty() { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, v) in self.listed.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{} {}", v.field, v.description)?;
        }
        if self.more > 0 {
            write!(f, "; and {} more", self.more)?;
        }
        Ok(())
    }
}

impl std::error::Error for Violations {}

/// Returns a client's text in quotation marks for an error message. A long text is cut and its
/// length in bytes added.
pub fn quoted(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED_CHARS) {
        Some((end, _)) => format!("{:?}… ({} bytes)", &text[..end], text.len()),
        None => format!("{text:?}"),
    }
}

/// Returns the first `limit` characters of a text that is shown to people, with `…` if it
/// was cut.
pub fn shortened(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Returns a number with a noun whose plural ends in s: `1 pair`, `2 pairs`.
pub fn counted(number: u64, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        _ => format!("{number} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_has_no_plural() {
        let said = [0, 1, 2].map(|number| counted(number, "row"));
        assert_eq!(said, ["0 rows", "1 row", "2 rows"]);
    }

    #[test]
    fn further_violations_are_counted_and_long_quotations_cut() {
        let mut bad = Violations::default();
        for i in 0..MAX_LISTED + 7 {
            bad.push(format!("field[{i}]"), "is wrong");
        }
        assert_eq!((bad.listed().len(), bad.more()), (MAX_LISTED, 7));
        assert!(bad.to_string().ends_with("; and 7 more"));
        assert_eq!(quoted("é\""), r#""é\"""#);
        let long = quoted(&"é".repeat(5000));
        assert!(
            long.chars().count() < 130 && long.ends_with("… (10000 bytes)"),
            "{long}"
        );
        assert_eq!(shortened("abc", 3), "abc");
        assert_eq!(shortened("abcd", 3), "abc…");
    }
}
