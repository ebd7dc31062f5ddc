//! Edits the lines of a person at a terminal, and gives the terminal its mode back at the end.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::getpgrp;
use rustix::termios::{
    LocalModes, OptionalActions, QueueSelector, Termios, tcflush, tcgetattr, tcgetpgrp, tcgetsid,
    tcsetattr,
};
use rustyline::error::ReadlineError;
use rustyline::{Behavior, Config, DefaultEditor};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::settings::is_dumb_terminal;

/// Tells the terminal not to mark pasted text any more.
const PASTE_MARKS_OFF: &[u8] = b"\x1b[?2004l";

/// Remark about a line that is not UTF-8.
pub(super) const NOT_UTF8: &str = "the message is not UTF-8 text: convert it first";

/// Added to the number of a signal for the exit code, as shells do.
const SIGNAL_EXIT: i32 = 128;

/// Maximum time for the last write to the terminal after a signal.
const LAST_WRITE_LIMIT: Duration = Duration::from_millis(200);

/// The mode of the terminal before the conversation.
static MODE_BEFORE: OnceLock<Termios> = OnceLock::new();

/// The next line of the user, or the reason why there is none.
pub(super) enum ChatLine {
    /// A line without its end. Pasted text may have several.
    Text(Vec<u8>),
    /// A line that cannot be used, and why.
    Refused(&'static str),
    /// Ctrl-C.
    Interrupt,
    /// The end of the input.
    End,
}

/// A line editor with the messages of the conversation as its history.
pub(super) struct LineEditor {
    editor: DefaultEditor,
    /// The mode of the terminal between two prompts.
    mode: Termios,
}

impl LineEditor {
    /// Takes the terminal over until the process ends. Returns nothing if there is none whose lines
    /// can be edited.
    pub fn open() -> Option<Self> {
        let behavior = match io::stdout().is_terminal() {
            true => Behavior::Stdio,
            // Standard output gets only answers, so the editor writes to the controlling terminal.
            // It can do so only if that is the terminal of standard input.
            false => tcgetsid(io::stdin()).ok().map(|_| Behavior::PreferTerm)?,
        };
        if !io::stdin().is_terminal() || is_dumb_terminal() {
            return None;
        }
        let config = Config::builder().behavior(behavior).build();
        let editor = DefaultEditor::with_config(config).ok()?;
        let mode = take_terminal().ok()?;
        Some(LineEditor { editor, mode })
    }

    /// Waits for a line.
    ///
    /// # Errors
    /// Returns an error if the terminal cannot be read.
    pub fn read(&mut self, prompt: &str) -> io::Result<ChatLine> {
        // After Ctrl-Z during an answer, the terminal has the mode of the shell.
        tcsetattr(io::stdin(), OptionalActions::Now, &self.mode)?;
        match self.editor.readline(prompt) {
            // Pasted text often ends with the end of its last line.
            Ok(text) => Ok(ChatLine::Text(text.trim_end_matches('\n').into())),
            Err(ReadlineError::Eof) => Ok(ChatLine::End),
            Err(ReadlineError::Interrupted) => Ok(ChatLine::Interrupt),
            Err(ReadlineError::Io(e)) if e.kind() == io::ErrorKind::InvalidData => {
                // The rest of the pasted text is discarded, because it would be sent as a message.
                tcflush(io::stdin(), QueueSelector::IFlush)?;
                Ok(ChatLine::Refused(NOT_UTF8))
            }
            Err(ReadlineError::Io(e)) => Err(e),
            Err(e) => Err(io::Error::other(e.to_string())),
        }
    }

    /// Adds a message to the history.
    pub fn remember(&mut self, message: &str) {
        // A history in memory has no errors.
        let _ = self.editor.add_history_entry(message);
    }
}

/// Sets the mode for the time between two prompts and returns it. The old one is restored when the
/// process ends.
///
/// Keys that are pressed during an answer are not shown, and wait for the next prompt. The terminal
/// does not collect them to lines, which it would cut.
fn take_terminal() -> io::Result<Termios> {
    let before = tcgetattr(io::stdin())?;
    let mut mode = before.clone();
    mode.local_modes
        .remove(LocalModes::ECHO | LocalModes::ICANON);
    if MODE_BEFORE.set(before).is_ok() {
        // SAFETY: the function has no arguments, does not unwind, and uses only statics that live
        // as long as the process.
        let registered = unsafe { libc::atexit(restore_terminal) };
        if registered != 0 {
            return Err(io::Error::other("the terminal could not be restored"));
        }
    }
    tcsetattr(io::stdin(), OptionalActions::Now, &mode)?;
    Ok(mode)
}

/// Gives the terminal its mode back.
extern "C" fn restore_terminal() {
    // This would stop a process in the background, whose terminal another one has.
    let is_background = tcgetpgrp(io::stdin()).is_ok_and(|group| group != getpgrp());
    if let Some(before) = MODE_BEFORE.get()
        && !is_background
    {
        // Nobody is left who could handle an error.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
    }
}

/// Ends the process, also while a thread waits for a line.
pub(super) fn leave(code: i32) -> ! {
    turn_paste_marks_off();
    std::process::exit(code)
}

fn turn_paste_marks_off() {
    if MODE_BEFORE.get().is_some() {
        // Without standard error there is no terminal, either.
        let _ = io::stderr().write_all(PASTE_MARKS_OFF);
    }
}

/// Signals that would end the process without giving the terminal its mode back.
pub(super) struct FatalSignals {
    hangup: Signal,
    quit: Signal,
    terminate: Signal,
}

impl FatalSignals {
    /// Takes the signals over. From now on they no longer end the process by themselves.
    ///
    /// # Errors
    /// Returns an error if the signals cannot be handled.
    pub fn take() -> io::Result<Self> {
        Ok(FatalSignals {
            hangup: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for a signal and ends the process, also while the terminal takes no text, as after
    /// Ctrl-S. For this it needs a task of its own: the one that prints may be blocked.
    pub async fn end_process(mut self) {
        let received = tokio::select! {
            _ = self.hangup.recv() => SignalKind::hangup(),
            _ = self.quit.recv() => SignalKind::quit(),
            _ = self.terminate.recv() => SignalKind::terminate(),
        };
        let last_write = tokio::task::spawn_blocking(turn_paste_marks_off);
        let _ = tokio::time::timeout(LAST_WRITE_LIMIT, last_write).await;
        std::process::exit(SIGNAL_EXIT + received.as_raw_value())
    }
}
