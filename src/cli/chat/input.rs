//! Reads the user's messages from standard input.

use std::io::{self, BufRead, Read as _, Write as _};

use tokio::task::JoinHandle;

use crate::cli::failure::Failure;

/// Maximum size of a message in bytes, far above what a model reads.
const MAX_MESSAGE_BYTES: u64 = 4 << 20;

/// The lines of standard input.
pub(super) struct ChatInput {
    /// True to show a prompt before each line.
    has_prompt: bool,
    /// Number of lines that were read.
    lines: u64,
    /// The lines of the message so far. Each ended with a backslash.
    begun: Vec<u8>,
    /// The line that a thread reads. It is kept here, because a call of [`ChatInput::message`] that
    /// Ctrl-C ends must not lose the line.
    reading: Option<JoinHandle<io::Result<Option<Vec<u8>>>>>,
}

impl ChatInput {
    /// Begins with the first line.
    pub fn new(has_prompt: bool) -> Self {
        ChatInput {
            has_prompt,
            lines: 0,
            begun: Vec::new(),
            reading: None,
        }
    }

    /// Returns the number of lines that were read.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// Reads a message, which may have several lines: one that ends with a backslash goes on in the
    /// next. Returns nothing at the end of the input.
    ///
    /// The next line is not read before it is asked for, so that no thread waits for it when the
    /// command ends. If the returned future is dropped, the next call continues.
    ///
    /// # Errors
    /// Returns a failure if the input cannot be read, or the message is too long.
    pub async fn message(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            if self.has_prompt {
                show_prompt(if self.begun.is_empty() { "> " } else { "… " });
            }
            let Some(line) = self.line().await? else {
                let message = std::mem::take(&mut self.begun);
                return Ok((!message.is_empty()).then_some(message));
            };
            self.lines += 1;
            self.begun.extend(line);
            if self.begun.len() as u64 > MAX_MESSAGE_BYTES {
                self.begun.clear();
                return Err(unread(&too_long()));
            }
            if self.begun.last() != Some(&b'\\') {
                return Ok(Some(std::mem::take(&mut self.begun)));
            }
            self.begun.pop();
            self.begun.push(b'\n');
        }
    }

    /// Discards the lines of a message whose end was not read yet.
    pub fn discard(&mut self) {
        self.begun.clear();
    }

    /// Reads a line on a thread that may wait.
    async fn line(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        let start = || tokio::task::spawn_blocking(|| next_line(&mut io::stdin().lock()));
        let read = self.reading.get_or_insert_with(start).await;
        self.reading = None;
        read?.map_err(|e| unread(&e))
    }
}

fn show_prompt(prompt: &str) {
    // Without standard error there is nobody to ask.
    let _ = io::stderr().write_all(prompt.as_bytes());
}

fn unread(e: &io::Error) -> Failure {
    Failure::Failed(format!("standard input: {e}"))
}

fn too_long() -> io::Error {
    io::Error::other(format!(
        "a message has more than {} MiB: send a shorter one",
        MAX_MESSAGE_BYTES >> 20
    ))
}

/// Reads a line and removes its end. Returns nothing at the end of the input.
fn next_line(input: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut limited = input.take(MAX_MESSAGE_BYTES + 1);
    if limited.read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
    } else if line.len() as u64 > MAX_MESSAGE_BYTES {
        return Err(too_long());
    }
    Ok(Some(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_lose_their_end_and_the_last_needs_none() {
        let mut input = &b"a \r\n\n\\\nlast"[..];
        let mut lines = Vec::new();
        while let Some(line) = next_line(&mut input).unwrap() {
            lines.push(String::from_utf8(line).unwrap());
        }
        assert_eq!(lines, ["a ", "", "\\", "last"]);
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut endless = io::BufReader::new(io::repeat(b'a'));
        let e = next_line(&mut endless).unwrap_err();
        assert!(e.to_string().contains("more than 4 MiB"), "{e}");
    }
}
