//! Tables that fit the terminal.
//!
//! On a terminal, values are cut in their middle until the table fits, and columns that still do
//! not fit are left out and named below it. Without a terminal nothing is cut, so that `grep` and
//! files get whole values.

use std::io::IsTerminal;

use comfy_table::{Table, presets};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::wrap::wrapped;
use crate::cli::settings;

/// Width of a terminal that does not tell its own, in columns.
const DEFAULT_WIDTH: usize = 80;
/// Width below which no column is cut.
const MIN_COLUMN: usize = 8;
/// No column is cut below the width of its title, unless the title is wider than this.
const MAX_TITLE: usize = 24;
/// Maximum number of lines of a value that are shown below the tables on a terminal.
const MAX_LINES: usize = 20;
/// Number of characters of an id that a table shows if the whole one does not fit: the time in a
/// UUID of version 7, to the millisecond.
const SHORT_ID: usize = 13;

/// Returns the width of the terminal that standard output goes to: that of the variable COLUMNS,
/// else the terminal's own. `None` if standard output is no terminal.
pub fn terminal_width() -> Option<usize> {
    if !std::io::stdout().is_terminal() {
        return None;
    }
    let own = || terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
    Some(
        settings::terminal_columns()
            .or_else(own)
            .filter(|width| *width > 0)
            .unwrap_or(DEFAULT_WIDTH),
    )
}

/// Renders a table with a header. The first column names the rows: it is cut last.
pub fn render(header: &[&str], mut rows: Vec<Vec<String>>, width: Option<usize>) -> String {
    let whole = draw(header, &rows);
    let Some(width) = width.filter(|width| drawn_width(&whole) > *width) else {
        return whole;
    };
    for row in &mut rows {
        row.resize(header.len(), String::new());
        for cell in row.iter_mut() {
            *cell = cell.replace('\n', " ");
        }
    }
    shorten_names(header, &mut rows);
    shorten_times(&mut rows);
    let natural: Vec<usize> = (0..header.len())
        .map(|i| column_width(header[i], rows.iter().map(|row| &row[i])))
        .collect();
    // The frame's sides, a space on both sides of each column, and one more between two.
    let frame = |columns: usize| 3 * columns + 1;
    let mut shown = header.len();
    let minimum = |i: usize| match i {
        0 => natural[0].min(width / 2),
        // A cut title or time says nothing, so that a column is rather left out.
        i if rows.iter().any(|row| is_short_time(&row[i])) => natural[i],
        i => natural[i].min(header[i].width().clamp(MIN_COLUMN, MAX_TITLE)),
    };
    while shown > 1 && (0..shown).map(minimum).sum::<usize>() + frame(shown) > width {
        shown -= 1;
    }
    let mut widths = natural[..shown].to_vec();
    while widths.iter().sum::<usize>() + frame(shown) > width {
        let widest = (0..shown)
            .filter(|i| widths[*i] > minimum(*i))
            .max_by_key(|i| (*i > 0, widths[*i]));
        let Some(i) = widest else { break };
        widths[i] -= 1;
    }
    let cut = |cells: &[String]| -> Vec<String> {
        cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| elide(cell, *width))
            .collect()
    };
    let header_cells: Vec<String> = header.iter().map(|h| h.to_string()).collect();
    let header_cells = cut(&header_cells);
    let titles: Vec<&str> = header_cells.iter().map(String::as_str).collect();
    let mut text = draw(
        &titles,
        &rows.iter().map(|row| cut(row)).collect::<Vec<_>>(),
    );
    if shown < header.len() {
        let left_out = format!("not shown: {}", header[shown..].join(", "));
        text.push('\n');
        text.push_str(&wrapped(&left_out, width).join("\n"));
    }
    text
}

fn draw(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    table.to_string()
}

fn drawn_width(text: &str) -> usize {
    text.lines().map(UnicodeWidthStr::width).max().unwrap_or(0)
}

fn column_width<'a>(title: &str, cells: impl Iterator<Item = &'a String>) -> usize {
    cells
        .map(|cell| cell.width())
        .chain([title.width()])
        .max()
        .unwrap_or(0)
}

/// Replaces resource names in the columns `name` and `policy` by short ones, which commands accept,
/// too: `0193c8e4-7a3f` for `trainingJobs/0193c8e4-7a3f-…`.
fn shorten_names(header: &[&str], rows: &mut [Vec<String>]) {
    if let Some(policy) = header.iter().position(|title| *title == "policy") {
        for row in rows.iter_mut() {
            row[policy] = short_name(&row[policy]);
        }
    }
    if header.first() != Some(&"name") {
        return;
    }
    let short: Vec<String> = rows.iter().map(|row| short_name(&row[0])).collect();
    for (i, row) in rows.iter_mut().enumerate() {
        // Two ids with the same beginning stay whole.
        if short.iter().filter(|name| **name == short[i]).count() == 1 {
            row[0] = short[i].clone();
        }
    }
}

/// Replaces times by shorter ones, to the minute: `2026-11-24 10:00` for `2026-11-24T10:00:59Z`.
fn shorten_times(rows: &mut [Vec<String>]) {
    for cell in rows.iter_mut().flatten() {
        let is_time = cell.len() == "2026-11-24T10:00:59Z".len()
            && cell.ends_with('Z')
            && cell.parse::<jiff::Timestamp>().is_ok();
        if let Some((date, time)) = cell.split_once('T').filter(|_| is_time) {
            *cell = format!("{date} {}", time.get(..5).unwrap_or(time));
        }
    }
}

/// Returns true for a time that [`shorten_times`] has made.
fn is_short_time(cell: &str) -> bool {
    let pattern = "0000-00-00 00:00";
    cell.len() == pattern.len()
        && cell.bytes().zip(pattern.bytes()).all(|(c, p)| match p {
            b'0' => c.is_ascii_digit(),
            other => c == other,
        })
}

/// Returns a name without its collection and with a shortened id.
fn short_name(name: &str) -> String {
    let Some((collection, rest)) = name.split_once('/') else {
        return name.to_owned();
    };
    if collection == "models" {
        return rest.to_owned();
    }
    if !["trainingJobs", "datasets"].contains(&collection) {
        return name.to_owned();
    }
    let (id, below) = match rest.split_once('/') {
        Some((id, below)) => (id, format!("/{below}")),
        None => (rest, String::new()),
    };
    let id: String = id.chars().take(SHORT_ID).collect();
    format!("{id}{below}")
}

/// Returns a text of at most `width` columns: if it is longer, `…` replaces its middle.
pub fn elide(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let room = width.saturating_sub(1);
    let take = |characters: &mut dyn Iterator<Item = char>, room: usize| {
        let mut used = 0;
        characters
            .take_while(|c| {
                used += c.width().unwrap_or(0);
                used <= room
            })
            .collect::<Vec<char>>()
    };
    let head = take(&mut text.chars(), room.div_ceil(2));
    let mut tail = take(&mut text.chars().rev(), room / 2);
    tail.reverse();
    head.into_iter().chain(['…']).chain(tail).collect()
}

/// A value of a resource for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// A value in a cell. If it does not fit, it is shown below the tables, too.
    Text(String),
    /// Lines that are shown below the tables.
    Lines(Vec<String>),
}

/// A part of a resource: a table of fields and values under a title.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Section {
    /// The title, in the table's header.
    pub title: String,
    /// Names and values, in order.
    pub fields: Vec<(String, Shown)>,
}

impl Section {
    /// Returns an empty section.
    pub fn new(title: &str) -> Self {
        Section {
            title: title.to_owned(),
            fields: Vec::new(),
        }
    }

    /// Adds a field, unless its value is empty.
    pub fn add(&mut self, name: &str, value: impl Into<String>) {
        let value = value.into();
        if !value.is_empty() {
            self.fields.push((name.to_owned(), Shown::Text(value)));
        }
    }
}

/// Renders the sections of a resource, one table each, with long values below them.
pub fn render_sections(sections: &[Section], width: Option<usize>) -> String {
    let filled = || sections.iter().filter(|s| !s.fields.is_empty());
    let names = filled().flat_map(|s| s.fields.iter().map(|(name, _)| name.width()));
    let titles = filled().map(|s| s.title.width());
    let name_width = names.chain(titles).max().unwrap_or(0);
    // The frame of two columns, as above.
    let room = width.map(|width| width.saturating_sub(name_width + 7).max(MIN_COLUMN));
    let (mut parts, mut below) = (Vec::new(), Vec::new());
    for section in filled() {
        let mut rows = Vec::new();
        for (name, value) in &section.fields {
            let cell = match value {
                Shown::Text(text) => {
                    let is_whole =
                        room.is_none_or(|room| text.width() <= room) && !text.contains('\n');
                    match (is_whole, room) {
                        (true, _) => text.clone(),
                        (false, None) => text.replace('\n', "; "),
                        (false, Some(room)) => {
                            below.push(format!("{name}: {text}"));
                            elide(&text.replace('\n', "; "), room)
                        }
                    }
                }
                Shown::Lines(lines) => {
                    let limit = if room.is_some() {
                        MAX_LINES
                    } else {
                        lines.len()
                    };
                    let mut text = format!("{name}:");
                    for line in lines.iter().take(limit) {
                        text.push_str(&format!("\n  {line}"));
                    }
                    if lines.len() > limit {
                        let more = lines.len() - limit;
                        text.push_str(&format!("\n  and {more} more: --format json shows all"));
                    }
                    below.push(text);
                    format!("{} below", lines.len())
                }
            };
            rows.push(vec![name.clone(), cell]);
        }
        let padding = " ".repeat(name_width - section.title.width());
        parts.push(draw(&[&format!("{}{padding}", section.title), ""], &rows));
    }
    parts.extend(below);
    parts.join("\n")
}
