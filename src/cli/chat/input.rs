//! Reads the user's messages from standard input.

use std::io::{self, BufRead, IsTerminal as _, Read as _, Write as _};

use tokio::task::JoinHandle;

use super::editor::{ChatLine, LineEditor};
use crate::cli::failure::Failure;

/// Maximum size of a message in bytes, far above what a model reads.
const MAX_MESSAGE_BYTES: u64 = 4 << 20;
/// The error about a longer one.
const TOO_LONG: &str = "a message has more than 4 MiB: send a shorter one";

/// Number of bytes after which Linux cuts a line of a terminal that has no line editor.
const TERMINAL_LINE_BYTES: usize = 4095;

/// Remark about a line that may have been cut.
const CUT_LINE: &str = "the terminal cuts lines after 4095 bytes: divide the message with a \
    backslash at the end of each line, or send it through a pipe";

/// The editor, given back by the thread that used it, and the line that was read.
type LineWithEditor = (Option<LineEditor>, io::Result<ChatLine>);

/// The lines of standard input.
pub(super) struct ChatInput {
    /// True to show a prompt before each line.
    has_prompt: bool,
    /// True if a person edits the lines.
    has_editor: bool,
    /// The editor, unless a thread uses it.
    editor: Option<LineEditor>,
    /// Number of lines that were read.
    lines: u64,
    /// The lines of the message so far. Each ended with a backslash.
    begun: Vec<u8>,
    /// The line that a thread reads. It is kept here, because a call of [`ChatInput::message`] that
    /// Ctrl-C ends must not lose the line.
    reading: Option<JoinHandle<LineWithEditor>>,
}

impl ChatInput {
    /// Begins with the first line. With a prompt, standard input is a terminal, and its lines can
    /// be edited if it allows this.
    pub fn new(has_prompt: bool) -> Self {
        let editor = has_prompt.then(LineEditor::open).flatten();
        ChatInput {
            has_prompt,
            has_editor: editor.is_some(),
            editor,
            lines: 0,
            begun: Vec::new(),
            reading: None,
        }
    }

    /// Returns true if a person edits the lines.
    pub fn has_editor(&self) -> bool {
        self.has_editor
    }

    /// Returns true if the cursor may be behind a prompt. The editor moves it to the next line when
    /// it has read one.
    pub fn is_line_open(&self) -> bool {
        !self.has_editor || self.reading.is_some()
    }

    /// Returns the number of lines that were read.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// Reads a message, which may have several lines: one that ends with a backslash goes on in the
    /// next.
    ///
    /// The next line is not read before it is asked for, so that no thread waits for it when the
    /// command ends. If the returned future is dropped, the next call continues.
    ///
    /// # Errors
    /// Returns a failure if the input cannot be read, or has a message that is too long. A person
    /// with an editor is told so instead.
    pub async fn message(&mut self) -> Result<ChatLine, Failure> {
        loop {
            let line = match self.line().await? {
                ChatLine::Text(line) => line,
                ChatLine::End if !self.begun.is_empty() => {
                    return Ok(ChatLine::Text(std::mem::take(&mut self.begun)));
                }
                other => {
                    self.begun.clear();
                    return Ok(other);
                }
            };
            self.lines += 1;
            self.begun.extend(line);
            if self.begun.len() as u64 > MAX_MESSAGE_BYTES {
                self.begun.clear();
                return match self.has_editor {
                    true => Ok(ChatLine::Refused(TOO_LONG)),
                    false => Err(unread(&too_long())),
                };
            }
            if self.begun.last() != Some(&b'\\') {
                let message = std::mem::take(&mut self.begun);
                if let (Some(editor), Ok(text)) = (&mut self.editor, std::str::from_utf8(&message))
                {
                    editor.remember(text);
                }
                return Ok(ChatLine::Text(message));
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
    async fn line(&mut self) -> Result<ChatLine, Failure> {
        let prompt = match (self.has_prompt, self.begun.is_empty()) {
            (false, _) => "",
            (true, true) => "> ",
            (true, false) => "… ",
        };
        if !self.has_editor {
            show_prompt(prompt);
        }
        let editor = &mut self.editor;
        let start = || {
            let editor = editor.take();
            tokio::task::spawn_blocking(move || match editor {
                Some(mut editor) => {
                    let line = editor.read(prompt);
                    (Some(editor), line)
                }
                None => (None, plain_line()),
            })
        };
        let read = self.reading.get_or_insert_with(start).await;
        self.reading = None;
        let (editor, line) = read?;
        self.editor = editor;
        line.map_err(|e| unread(&e))
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
    io::Error::other(TOO_LONG)
}

/// Reads a line that nobody can edit.
fn plain_line() -> io::Result<ChatLine> {
    let line = next_line(&mut io::stdin().lock())?;
    Ok(match line {
        None => ChatLine::End,
        Some(line) if line.len() >= TERMINAL_LINE_BYTES && io::stdin().is_terminal() => {
            ChatLine::Refused(CUT_LINE)
        }
        Some(line) => ChatLine::Text(line),
    })
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

    #[tokio::test]
    async fn a_message_that_is_too_long_ends_only_a_conversation_without_an_editor() {
        for has_editor in [true, false] {
            let line = vec![b'a'; MAX_MESSAGE_BYTES as usize + 1];
            let read: LineWithEditor = (None, Ok(ChatLine::Text(line)));
            let mut input = ChatInput {
                has_prompt: false,
                has_editor,
                editor: None,
                lines: 0,
                begun: Vec::new(),
                reading: Some(tokio::spawn(async move { read })),
            };
            let (is_failure, said) = match input.message().await {
                Ok(ChatLine::Refused(reason)) => (false, reason.to_owned()),
                Ok(_) => panic!("a message of more than 4 MiB is taken"),
                Err(failure) => (true, failure.message().to_owned()),
            };
            assert_eq!(is_failure, !has_editor, "{said}");
            assert!(said.contains("more than 4 MiB"), "{said}");
            assert!(input.begun.is_empty());
        }
    }
}
