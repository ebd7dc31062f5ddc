//! Collects every bad field of a request or a settings file, so that all are reported at once.

use std::fmt;

/// One field that cannot be accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The path of the field, e.g. `training_job.dpo.beta`.
    pub field: String,
    /// What is wrong with it and what would be right.
    pub description: String,
}

/// All violations found so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Violations(pub Vec<Violation>);

impl Violations {
    /// Adds one.
    pub fn push(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.0.push(Violation { field: field.into(), description: description.into() });
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
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, v) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{} {}", v.field, v.description)?;
        }
        Ok(())
    }
}

impl std::error::Error for Violations {}
