//! Errors of conversions between messages and their canonical form.

use crate::domain::violation::Violations;

/// The reason why a message could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CanonicalError {
    /// The text is not JSON or YAML.
    #[error("not valid {format}: {reason}")]
    Syntax {
        /// JSON or YAML.
        format: &'static str,
        /// The parser's error, with line and column.
        reason: String,
    },
    /// Keys that the message does not have, and values that do not fit their fields.
    #[error(transparent)]
    Fields(Violations),
    /// The message cannot be converted, e.g. because a timestamp is out of range.
    #[error("the message cannot be converted: {0}")]
    Conversion(String),
}
