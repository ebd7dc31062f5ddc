//! Shows answers while they come: one alone, or two in columns or one under the other.

use unicode_width::UnicodeWidthStr;

use crate::cli::failure::Outcome;
use crate::cli::generate::{printable, shown};
use crate::cli::output;
use crate::cli::output::table::elide;
use crate::cli::output::wrap::TextWrap;

/// Least width of a terminal with two columns.
const MIN_WIDTH: usize = 40;
/// Text between two columns.
const SEPARATOR: &str = " │ ";
/// The same in the line below the names of the policies.
const CROSSING: &str = "─┼─";

/// One of two policies that answer the same message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The policy with whose answers the conversation goes on.
    Left,
    /// The policy beside it.
    Right,
}

/// The answers to one message, as far as they have come, and the way in which they are shown.
pub(super) struct AnswerView {
    layout: ChatLayout,
    left: AnswerText,
    right: AnswerText,
}

/// An answer as it grows.
#[derive(Default)]
struct AnswerText {
    text: String,
    ended: bool,
}

/// The way in which answers are shown.
enum ChatLayout {
    /// Not while they come.
    Hidden,
    /// One answer, as it comes.
    Single,
    /// The right answer below the left one.
    Stacked(Stacked),
    /// Two columns.
    Columns(SideBySide),
}

impl AnswerView {
    fn new(layout: ChatLayout) -> Self {
        AnswerView {
            layout,
            left: AnswerText::default(),
            right: AnswerText::default(),
        }
    }

    /// Returns a view that shows nothing, and only collects the answers.
    pub fn hidden() -> Self {
        Self::new(ChatLayout::Hidden)
    }

    /// Returns a view of one answer.
    pub fn single() -> Self {
        Self::new(ChatLayout::Single)
    }

    /// Returns a view of the answers of two policies with these names, in columns if the terminal
    /// has the width for them. `terminal` is its width; `None` stands for an output that is no
    /// terminal, where texts are not divided.
    pub fn pair(names: [&str; 2], terminal: Option<usize>) -> Self {
        Self::new(match terminal.filter(|width| *width >= MIN_WIDTH) {
            Some(width) => ChatLayout::Columns(SideBySide::new(names, width)),
            None => ChatLayout::Stacked(Stacked::new(names)),
        })
    }

    /// Returns the text of an answer so far.
    pub fn text(&self, side: Side) -> &str {
        match side {
            Side::Left => &self.left.text,
            Side::Right => &self.right.text,
        }
    }

    fn answer(&mut self, side: Side) -> &mut AnswerText {
        match side {
            Side::Left => &mut self.left,
            Side::Right => &mut self.right,
        }
    }

    /// Adds text to an answer, and prints what can be shown now.
    ///
    /// # Errors
    /// Returns a failure if the output cannot be written.
    pub fn add(&mut self, side: Side, text: &str) -> Outcome {
        if text.is_empty() {
            return Ok(());
        }
        self.answer(side).text.push_str(text);
        print(&match &mut self.layout {
            ChatLayout::Hidden => String::new(),
            ChatLayout::Single => text.to_owned(),
            ChatLayout::Stacked(stacked) => stacked.add(side, text),
            ChatLayout::Columns(columns) => columns.add(side, text),
        })
    }

    /// Ends an answer, and prints what can be shown now.
    ///
    /// # Errors
    /// Returns a failure if the output cannot be written.
    pub fn end(&mut self, side: Side) -> Outcome {
        self.answer(side).ended = true;
        print(&match (&mut self.layout, side) {
            (ChatLayout::Hidden, _) | (ChatLayout::Single, Side::Right) => String::new(),
            (ChatLayout::Single, Side::Left) => "\n".to_owned(),
            (ChatLayout::Stacked(stacked), _) => stacked.end(side),
            (ChatLayout::Columns(columns), _) => columns.end(side),
        })
    }

    /// Ends the answers that were stopped, unless there is nothing of any answer.
    ///
    /// # Errors
    /// Returns a failure if the output cannot be written.
    pub fn finish(&mut self) -> Outcome {
        let has_begun = |answer: &AnswerText| answer.ended || !answer.text.is_empty();
        if !has_begun(&self.left) && !has_begun(&self.right) {
            return Ok(());
        }
        for side in [Side::Left, Side::Right] {
            if !self.answer(side).ended {
                self.end(side)?;
            }
        }
        Ok(())
    }
}

/// Prints text of a model, without control characters on a terminal.
fn print(text: &str) -> Outcome {
    match text.is_empty() {
        true => Ok(()),
        false => output::write(shown(text).as_bytes()),
    }
}

/// Two answers, one below the other. The right one waits until the left one has ended.
struct Stacked {
    /// Names of the policies.
    names: [String; 2],
    has_title: bool,
    left_ended: bool,
    right_ended: bool,
    /// Text of the right answer that waits.
    waiting: String,
}

impl Stacked {
    fn new(names: [&str; 2]) -> Self {
        Stacked {
            names: names.map(str::to_owned),
            has_title: false,
            left_ended: false,
            right_ended: false,
            waiting: String::new(),
        }
    }

    /// Returns the title of the left answer before its first text.
    fn title(&mut self) -> String {
        match std::mem::replace(&mut self.has_title, true) {
            true => String::new(),
            false => format!("--- {}\n", self.names[0]),
        }
    }

    fn add(&mut self, side: Side, text: &str) -> String {
        match side {
            Side::Left => self.title() + text,
            Side::Right if self.left_ended => text.to_owned(),
            Side::Right => {
                self.waiting.push_str(text);
                String::new()
            }
        }
    }

    fn end(&mut self, side: Side) -> String {
        let end_of_right = |ended: bool| if ended { "\n" } else { "" };
        match side {
            Side::Left => {
                self.left_ended = true;
                let waiting = std::mem::take(&mut self.waiting);
                let end = end_of_right(self.right_ended);
                format!("{}\n--- {}\n{waiting}{end}", self.title(), self.names[1])
            }
            Side::Right => {
                self.right_ended = true;
                end_of_right(self.left_ended).to_owned()
            }
        }
    }
}

/// Two answers in columns. A row is printed when both answers have its line, or have ended.
struct SideBySide {
    /// Names of the policies.
    names: [String; 2],
    /// Width of each column.
    width: usize,
    has_title: bool,
    left: ChatColumn,
    right: ChatColumn,
}

/// A column with an answer.
struct ChatColumn {
    text: TextWrap,
    ended: bool,
}

impl ChatColumn {
    fn new(width: usize) -> Self {
        ChatColumn {
            text: TextWrap::new(width),
            ended: false,
        }
    }

    /// Returns true if it is known whether there is a next line.
    fn is_ready(&self) -> bool {
        self.ended || self.text.has_line()
    }
}

impl SideBySide {
    fn new(names: [&str; 2], terminal: usize) -> Self {
        // The last column of the terminal stays free, because some wrap when it is filled.
        let width = terminal.saturating_sub(SEPARATOR.width() + 1) / 2;
        SideBySide {
            names: names.map(str::to_owned),
            width,
            has_title: false,
            left: ChatColumn::new(width),
            right: ChatColumn::new(width),
        }
    }

    fn column(&mut self, side: Side) -> &mut ChatColumn {
        match side {
            Side::Left => &mut self.left,
            Side::Right => &mut self.right,
        }
    }

    fn add(&mut self, side: Side, text: &str) -> String {
        self.column(side).text.push(&printable(text));
        self.rows()
    }

    fn end(&mut self, side: Side) -> String {
        let column = self.column(side);
        column.text.finish();
        column.ended = true;
        self.rows()
    }

    /// Returns the rows that are complete, the names of the policies before the first.
    fn rows(&mut self) -> String {
        let mut rows = String::new();
        while self.left.is_ready() && self.right.is_ready() {
            if !std::mem::replace(&mut self.has_title, true) {
                let [left, right] = self.names.each_ref().map(|name| elide(name, self.width));
                let rule = "─".repeat(self.width);
                rows.push_str(&self.row(&left, &right));
                rows.push_str(&format!("{rule}{CROSSING}{rule}\n"));
            }
            match (self.left.text.next_line(), self.right.text.next_line()) {
                (None, None) => break,
                (left, right) => {
                    let (left, right) = (left.unwrap_or_default(), right.unwrap_or_default());
                    rows.push_str(&self.row(&left, &right));
                }
            }
        }
        rows
    }

    fn row(&self, left: &str, right: &str) -> String {
        let space = " ".repeat(self.width.saturating_sub(left.width()));
        let row = format!("{left}{space}{SEPARATOR}{right}");
        format!("{}\n", row.trim_end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_printed_when_both_answers_have_them() {
        let mut columns = SideBySide::new(["models/a", "models/with a long name"], 44);
        assert_eq!(columns.width, 20);
        assert_eq!(columns.add(Side::Left, "one two three four five six"), "");
        let begun = columns.add(Side::Right, "水は沸騰する\n\u{1b}[2J");
        let rows: Vec<&str> = begun.lines().collect();
        assert_eq!(rows.len(), 3, "{begun}");
        assert_eq!(rows[0], "models/a             │ models/wit…long name");
        assert_eq!(rows[1], format!("{}─┼─{}", "─".repeat(20), "─".repeat(20)));
        assert_eq!(rows[2], "one two three four   │ 水は沸騰する");
        assert_eq!(columns.end(Side::Left), "");
        let rest = columns.end(Side::Right);
        assert_eq!(rest, "five six             │ \u{fffd}[2J\n");
        for row in begun.lines().chain(rest.lines()) {
            assert!(row.width() < 44, "{row}");
        }
    }

    #[test]
    fn a_longer_answer_goes_on_alone_and_two_empty_ones_have_a_title() {
        let mut columns = SideBySide::new(["a", "b"], 40);
        columns.add(Side::Right, "1\n2\n");
        assert!(
            columns
                .end(Side::Left)
                .ends_with(" │ 1\n                   │ 2\n")
        );
        assert_eq!(columns.add(Side::Right, "3"), "");
        assert_eq!(columns.end(Side::Right), "                   │ 3\n");
        let mut empty = SideBySide::new(["a", "b"], 40);
        let shown = empty.end(Side::Right) + &empty.end(Side::Left);
        assert_eq!(shown.lines().count(), 2, "{shown}");
    }

    #[test]
    fn the_right_answer_waits_below_the_left_one() {
        let mut stacked = Stacked::new(["a", "b"]);
        let mut shown = stacked.add(Side::Right, "x");
        shown += &stacked.add(Side::Left, "1");
        shown += &stacked.end(Side::Left);
        shown += &stacked.add(Side::Right, "y");
        shown += &stacked.end(Side::Right);
        assert_eq!(shown, "--- a\n1\n--- b\nxy\n");
        let mut stacked = Stacked::new(["a", "b"]);
        let mut shown = stacked.add(Side::Right, "x");
        shown += &stacked.end(Side::Right);
        shown += &stacked.end(Side::Left);
        assert_eq!(shown, "--- a\n\n--- b\nx\n");
    }
}
