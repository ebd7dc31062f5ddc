//! Commands in the documents. Every `bradley …` in a code block is parsed with the program's own
//! definition of its command line, and every command and flag that a text mentions must exist.
//! Further tests of pages read them with the functions of this file.

use std::fs;
use std::path::Path;

use bradley::cli::command;
use clap::error::ErrorKind;

use crate::documents::documents;

/// Documents that name commands of other versions.
const HISTORY: [&str; 1] = ["CHANGELOG.md"];
/// Flags of other programs that the documents name in their text.
const FOREIGN_FLAGS: [&str; 9] = [
    "--cascade",
    "--force-conflicts",
    "--include-ignored",
    "--only",
    "--reset-then-reuse-values",
    "--set",
    "--timeout",
    "--train-steps",
    "--trl",
];

/// Returns the text of a document.
pub fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// Returns the rows of the first table whose first line begins with `header`.
pub fn table(page: &str, header: &str) -> Vec<Vec<String>> {
    let lines = page.lines().skip_while(|line| !line.starts_with(header));
    let rows: Vec<Vec<String>> = lines
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells = line.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().to_owned()).collect()
        })
        .collect();
    assert!(!rows.is_empty(), "no table begins with {header}");
    rows
}

/// Returns the text between backquotes, if a cell of a table is code.
pub fn code(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?.strip_suffix('`')
}

/// A fenced code block.
#[derive(Debug, PartialEq)]
pub struct Fenced {
    /// Word after the opening backquotes; empty if there is none.
    pub language: String,
    /// Lines of the block. A line that ends with `\` is joined with the next one.
    pub lines: Vec<String>,
}

/// Returns the fenced code blocks of a page, in order.
pub fn fenced(page: &str) -> Vec<Fenced> {
    let mut blocks: Vec<Fenced> = Vec::new();
    let mut is_inside = false;
    for line in page.lines() {
        if let Some(language) = line.trim_start().strip_prefix("```") {
            if !is_inside {
                blocks.push(Fenced {
                    language: language.trim().to_owned(),
                    lines: Vec::new(),
                });
            }
            is_inside = !is_inside;
        } else if is_inside {
            let lines = &mut blocks.last_mut().unwrap().lines;
            match lines.last_mut() {
                Some(last) if last.ends_with('\\') => {
                    last.pop();
                    *last += line.trim_start();
                }
                _ => lines.push(line.to_owned()),
            }
        }
    }
    assert!(!is_inside, "a code block is not closed");
    blocks
}

/// Splits a line of a shell script into words. Operators are words of their own, and a comment is
/// left out.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, '|' | '&' | ';' | '>' | '<' | '(' | ')') => {
                words.extend(word.take());
                words.push(c.to_string());
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Returns true if a word is an assignment before a command: `NAME=value`.
fn is_assignment(word: &str) -> bool {
    let is_name = |name: &str| {
        let mut chars = name.chars();
        !name.is_empty() && chars.all(|c| c.is_ascii_uppercase() || c == '_')
    };
    word.split_once('=').is_some_and(|(name, _)| is_name(name))
}

/// Returns the arguments of each call of the program in a line of a shell script. It may be called
/// through `kubectl exec … --` or `cargo run … --`.
fn calls(line: &str) -> Vec<Vec<String>> {
    const OPERATORS: [&str; 7] = ["|", "&", ";", ">", "<", "(", ")"];
    let words = words(line);
    let commands = words.split(|word| OPERATORS.contains(&word.as_str()));
    commands
        .filter_map(|command| {
            let start = command.iter().position(|word| !is_assignment(word))?;
            let arguments = match command[start].as_str() {
                "bradley" => &command[start + 1..],
                "cargo" if command.get(start + 1).is_some_and(|word| word == "run") => {
                    command.rsplit(|word| word == "--").next()?
                }
                "kubectl" => {
                    let inner = command.rsplit(|word| word == "--").next()?;
                    match inner.split_first()? {
                        (program, arguments) if program == "bradley" => arguments,
                        _ => return None,
                    }
                }
                _ => return None,
            };
            // "…" stands for further flags.
            Some(arguments.iter().filter(|a| *a != "…").cloned().collect())
        })
        .collect()
}

/// Parses arguments. Returns the first line of the error.
fn parse(arguments: &[String]) -> Result<(), (ErrorKind, String)> {
    let all = std::iter::once("bradley").chain(arguments.iter().map(String::as_str));
    match command().try_get_matches_from(all) {
        Ok(_) => Ok(()),
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => Ok(()),
        Err(e) => {
            let text = e.to_string();
            Err((e.kind(), text.lines().next().unwrap_or_default().to_owned()))
        }
    }
}

/// Returns true if a word stands for a value: `JOB`.
fn is_placeholder(word: &str) -> bool {
    !word.is_empty() && word.chars().all(|c| c.is_ascii_uppercase() || c == '_')
}

/// Returns what is wrong with a command in the text, where arguments may be left out.
fn wrong_mention(arguments: &[String]) -> Option<String> {
    if arguments.first().is_some_and(|word| is_placeholder(word)) {
        return None;
    }
    match parse(arguments) {
        Err((ErrorKind::MissingRequiredArgument | ErrorKind::MissingSubcommand, _)) => None,
        Err((ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand, _)) => None,
        Err((ErrorKind::ValueValidation | ErrorKind::InvalidValue, _))
            if arguments.iter().any(|word| is_placeholder(word)) =>
        {
            None
        }
        // The flag alone is mentioned, without its value.
        Err((ErrorKind::InvalidValue, text)) if text.ends_with("none was supplied") => None,
        Err((_, text)) => Some(text),
        Ok(()) => None,
    }
}

/// Returns the long flags of a command and of its subcommands.
fn flags(command: &clap::Command, found: &mut Vec<String>) {
    let long = command.get_arguments().filter_map(clap::Arg::get_long);
    found.extend(long.map(|flag| format!("--{flag}")));
    for subcommand in command.get_subcommands() {
        flags(subcommand, found);
    }
}

/// Returns the code of a document: lines of blocks, fenced or indented, and spans in the text.
fn code_of(page: &str) -> (Vec<String>, Vec<String>) {
    let mut lines: Vec<String> = fenced(page)
        .into_iter()
        .flat_map(|block| block.lines)
        .collect();
    let mut spans = Vec::new();
    let mut is_inside = false;
    for line in page.lines() {
        if line.trim_start().starts_with("```") {
            is_inside = !is_inside;
        } else if !is_inside && line.starts_with("    ") {
            lines.push(line.trim().to_owned());
        } else if !is_inside {
            spans.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    (lines, spans)
}

/// Returns what is wrong with the commands and flags of a document, and the number of commands.
fn problems(page: &str, known_flags: &[String]) -> (Vec<String>, usize) {
    let (lines, spans) = code_of(page);
    let mut found = Vec::new();
    let mut seen = 0;
    for line in &lines {
        for arguments in calls(line) {
            seen += 1;
            if let Err((_, text)) = parse(&arguments) {
                found.push(format!("{line}: {text}"));
            }
        }
    }
    for span in &spans {
        for arguments in calls(span) {
            seen += 1;
            found.extend(wrong_mention(&arguments).map(|text| format!("{span}: {text}")));
        }
        let flag = span.split([' ', '=']).next().unwrap_or_default();
        let is_flag = flag.len() > 2 && flag.starts_with("--");
        if is_flag && !FOREIGN_FLAGS.contains(&flag) && !known_flags.iter().any(|f| f == flag) {
            found.push(format!("{span}: no command has this flag"));
        }
    }
    (found, seen)
}

fn known_flags() -> Vec<String> {
    let mut known = vec!["--help".to_owned(), "--version".to_owned()];
    flags(&command(), &mut known);
    known
}

#[test]
fn commands_in_the_documents_are_ones_that_the_program_has() {
    let known = known_flags();
    let (mut found, mut seen) = (Vec::new(), 0);
    for document in documents() {
        let name = document
            .strip_prefix(env!("CARGO_MANIFEST_DIR"))
            .unwrap()
            .display()
            .to_string();
        if HISTORY.contains(&name.as_str()) {
            continue;
        }
        let (wrong, commands) = problems(&fs::read_to_string(&document).unwrap(), &known);
        found.extend(wrong.into_iter().map(|text| format!("{name}: {text}")));
        seen += commands;
    }
    assert!(
        seen > 40,
        "only {seen} commands seen: the search for them is broken"
    );
    assert!(
        found.is_empty(),
        "{} commands or flags do not exist:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn a_command_or_a_flag_that_does_not_exist_is_found() {
    let known = known_flags();
    let fine = "\
`bradley jobs get JOB`, `bradley train --estimate`, `bradley COMMAND --help`, `--models`, `--only x`
```sh
BRADLEY_TOKEN=x bradley jobs list --server http://h:1 | head -n 2   # bradley nothing
kubectl -n N exec POD -- bradley health
helm install bradley deploy/helm/bradley --set image.tag=x
bradley train --data pairs.jsonl \\
  --loss 'sigmoid=0.8,sft=0.2' > out.txt
cargo run --release -- demo
```
    bradley serve --auth tokens …
";
    assert_eq!(problems(fine, &known), (Vec::new(), 8));
    let broken = "\
`bradley jobs gte JOB`, `bradley train --estimates`, `--modells`
```
bradley train
bradley train --data x --no-such-flag
kubectl exec POD -- bradley jobs get
cargo run -- demos
bradley serve && bradley nothing
```
";
    let (found, seen) = problems(broken, &known);
    assert_eq!((found.len(), seen), (8, 8), "{found:#?}");
}
