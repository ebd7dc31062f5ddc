//! Collects every bad field of a request or a settings file, so that all are reported at once.

use std::fmt;

/// Violations that are kept; further ones are counted.
pub const MAX_LISTED: usize = 50;
/// Characters of a client's own text that an error repeats.
const MAX_QUOTED: usize = 100;

/// One field that cannot be accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The path of the field, e.g. `training_job.dpo.beta`.
    pub field: String,
    /// What is wrong with it and what would be right.
    pub description: String,
}

/// The violations found so far: the first [`MAX_LISTED`], and how many there were besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Violations {
    listed: Vec<Violation>,
    more: usize,
}

impl Violations {
    /// A single violation.
    pub fn one(field: impl Into<String>, description: impl Into<String>) -> Self {
        let mut violations = Violations::default();
        violations.push(field, description);
        violations
    }

    /// Adds one.
    pub fn push(&mut self, field: impl Into<String>, description: impl Into<String>) {
        if self.listed.len() < MAX_LISTED {
            self.listed.push(Violation { field: field.into(), description: description.into() });
        } else {
            self.more += 1;
        }
    }

    /// The first [`MAX_LISTED`].
    pub fn listed(&self) -> &[Violation] {
        &self.listed
    }

    /// The number of violations found besides the listed ones.
    pub fn more(&self) -> usize {
        self.more
    }

    /// Returns true if no violation was found.
    pub fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    /// Adds one unless a repeated field has at most `limit` elements; returns whether it has.
    pub fn at_most(&mut self, field: &str, elements: usize, limit: usize) -> bool {
        if elements > limit {
            self.push(field, format!("has {elements} elements: at most {limit} are accepted"));
        }
        elements <= limit
    }

    /// Adds one unless `value` is finite and above 0.
    pub fn positive(&mut self, field: impl Into<String>, value: f64) {
        if !(value.is_finite() && value > 0.0) {
            self.push(field, format!("is {value}: it must be a finite number above 0"));
        }
    }

    /// Adds one unless `value` is finite and at least 0.
    pub fn non_negative(&mut self, field: impl Into<String>, value: f64) {
        if !(value.is_finite() && value >= 0.0) {
            self.push(field, format!("is {value}: it must be a finite number, 0 or above"));
        }
    }

    /// `Ok` when nothing was added.
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

/// A client's text in quotation marks, for an error message; a long one is cut and its length
/// given.
pub fn quoted(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED) {
        Some((end, _)) => format!("{:?}… ({} bytes)", &text[..end], text.len()),
        None => format!("{text:?}"),
    }
}

/// The first `limit` characters of a text that is shown to people.
pub fn shortened(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(long.chars().count() < 130 && long.ends_with("… (10000 bytes)"), "{long}");
        assert_eq!(shortened("abc", 3), "abc");
        assert_eq!(shortened("abcd", 3), "abc…");
    }
}
