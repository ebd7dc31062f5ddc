//! Reads the user's messages from standard input.

use std::io::{self, BufRead, Read as _, Write as _};

use crate::cli::failure::Failure;

/// Maximum size of a message in bytes, far above what a model reads.
const MAX_MESSAGE_BYTES: u64 = 4 << 20;

/// The lines of standard input.
pub(super) struct ChatInput {
    /// True to show a prompt before each line.
    has_prompt: bool,
    /// Number of lines that were read.
    lines: u64,
}

impl ChatInput {
    /// Begins with the first line.
    pub fn new(has_prompt: bool) -> Self {
        ChatInput {
            has_prompt,
            lines: 0,
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
    /// command ends.
    ///
    /// # Errors
    /// Returns a failure if the input cannot be read, or the message is too long.
    pub async fn message(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        let mut message = Vec::new();
        loop {
            if self.has_prompt {
                show_prompt(if message.is_empty() { "> " } else { "… " });
            }
            let Some(line) = read_line().await? else {
                return Ok((!message.is_empty()).then_some(message));
            };
            self.lines += 1;
            message.extend(line);
            if message.len() as u64 > MAX_MESSAGE_BYTES {
                return Err(unread(&too_long()));
            }
            if message.last() != Some(&b'\\') {
                return Ok(Some(message));
            }
            message.pop();
            message.push(b'\n');
        }
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

/// Reads a line on a thread that may wait.
async fn read_line() -> Result<Option<Vec<u8>>, Failure> {
    let reading = tokio::task::spawn_blocking(|| next_line(&mut io::stdin().lock()));
    reading.await?.map_err(|e| unread(&e))
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
