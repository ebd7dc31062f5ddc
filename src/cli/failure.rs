//! Failures of commands, with their exit codes.

use std::future::Future;

use crate::rpc::client::{ClientError, Status};

/// The reason why a command failed. `--help` lists the exit codes.
#[derive(Debug)]
pub(super) enum Failure {
    /// A job, a file or the server failed: exit code 1.
    Failed(String),
    /// Wrong arguments or settings: exit code 2.
    Usage(String),
    /// No server was reached: exit code 3.
    Unreachable(String),
    /// The user ended the command with Ctrl-C: exit code 130, as shells have it.
    Interrupted(String),
}

impl Failure {
    /// Returns the message.
    pub fn message(&self) -> &str {
        match self {
            Failure::Failed(m)
            | Failure::Usage(m)
            | Failure::Unreachable(m)
            | Failure::Interrupted(m) => m,
        }
    }

    /// Puts `context` before the message.
    pub fn with_context(self, context: &str) -> Self {
        self.map(|message| format!("{context}: {message}"))
    }

    /// Adds a line after the message.
    pub fn with_remark(self, remark: &str) -> Self {
        self.map(|message| format!("{message}\n{remark}"))
    }

    /// Replaces a part of the message.
    pub fn replacing(self, from: &str, to: &str) -> Self {
        self.map(|message| message.replace(from, to))
    }

    fn map(self, with: impl Fn(String) -> String) -> Self {
        match self {
            Failure::Failed(m) => Failure::Failed(with(m)),
            Failure::Usage(m) => Failure::Usage(with(m)),
            Failure::Unreachable(m) => Failure::Unreachable(with(m)),
            Failure::Interrupted(m) => Failure::Interrupted(with(m)),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(e: anyhow::Error) -> Self {
        // The text of an error may end with that of its cause.
        let text = e.chain().fold(String::new(), |text, cause| {
            let cause = cause.to_string();
            match (text.is_empty(), text.ends_with(&cause)) {
                (true, _) => cause,
                (false, true) => text,
                (false, false) => format!("{text}: {cause}"),
            }
        });
        Failure::Failed(text)
    }
}

impl From<Status> for Failure {
    fn from(s: Status) -> Self {
        ClientError::from(s).into()
    }
}

impl From<tokio::task::JoinError> for Failure {
    fn from(e: tokio::task::JoinError) -> Self {
        Failure::Failed(e.to_string())
    }
}

/// The result of a command.
pub(super) type Outcome = Result<(), Failure>;

/// Does `work` until it ends, or until Ctrl-C, which drops it. `said` is the message then.
///
/// # Errors
/// Returns the failure of the work, or [`Failure::Interrupted`].
pub(super) async fn unless_interrupted<T>(
    said: &str,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted(said.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use anyhow::Context as _;

    use super::*;
    use crate::model::error::ModelError;

    #[test]
    fn causes_are_listed_once() {
        let missing = || std::io::Error::other("no such file");
        let repeated: anyhow::Error = ModelError::io(Path::new("a"))(missing()).into();
        assert_eq!(Failure::from(repeated).message(), "a: no such file");
        let chain = Err::<(), _>(missing()).context("data_dir d").unwrap_err();
        assert_eq!(Failure::from(chain).message(), "data_dir d: no such file");
    }
}
