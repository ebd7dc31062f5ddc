//! Rules of style for the text below `src`: the beginning of a doc comment, the length of a line,
//! and one meaning for each name of a type. The source is scanned as in `layers.rs`.

use std::collections::BTreeMap;

use crate::layers::scan::{is_name, tokens};
use crate::layers::sources_with;

/// Words that begin a noun clause ("What is freed …") in place of a sentence.
const NOUN_CLAUSES: [&str; 6] = ["What", "Whether", "Whose", "So many", "Which", "How many"];
/// Maximum length of a line in bytes. rustfmt counts characters, so it accepts longer lines with
/// formulas.
const MAX_BYTES: usize = 100;
/// Number of lines that may be longer: rows of JSONL in tests, which cannot be broken.
const LONG_LINES: usize = 3;
/// File that mirrors the types of the feature `cuda` in a build without it.
const MIRROR: &str = "model/cuda/absent.rs";

#[test]
fn doc_comments_begin_with_a_sentence() {
    let sources = sources_with(&["rs"]);
    let found: Vec<String> = sources
        .iter()
        .flat_map(|(file, source)| at_lines(file, noun_clauses(source)))
        .collect();
    assert!(
        found.is_empty(),
        "{} doc comments begin with a noun clause; write a sentence (\"Returns …\") or name the \
         thing:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn few_lines_are_longer_than_100_bytes() {
    let sources = sources_with(&["rs", "cu", "cuh"]);
    let found: Vec<String> = sources
        .iter()
        .flat_map(|(file, source)| at_lines(file, long_lines(source)))
        .collect();
    assert!(
        found.len() <= LONG_LINES,
        "{} lines are longer than {MAX_BYTES} bytes, {LONG_LINES} may be:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn a_name_of_a_type_means_one_thing() {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (file, source) in sources_with(&["rs"])
        .iter()
        .filter(|(file, _)| file != MIRROR)
    {
        for (line, name) in types(source) {
            places
                .entry(name)
                .or_default()
                .push(format!("src/{file}:{line}"));
        }
    }
    assert!(
        places.len() > 200,
        "only {} types seen: the scan is broken",
        places.len()
    );
    let found: Vec<String> = places
        .iter()
        .filter(|(_, places)| places.len() > 1)
        .map(|(name, places)| format!("{name}: {}", places.join(", ")))
        .collect();
    assert!(
        found.is_empty(),
        "{} names of types are defined more than once:\n{}",
        found.len(),
        found.join("\n")
    );
}

fn at_lines(file: &str, lines: Vec<(usize, String)>) -> Vec<String> {
    lines
        .into_iter()
        .map(|(line, text)| format!("src/{file}:{line}: {text}"))
        .collect()
}

/// Returns the doc comments that begin with one of [`NOUN_CLAUSES`], each with its line.
fn noun_clauses(source: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut is_inside = false;
    for (i, line) in source.lines().enumerate() {
        let line = line.trim_start();
        let is_doc =
            line.starts_with("//!") || line.starts_with("///") && !line.starts_with("////");
        if !is_doc {
            is_inside = false;
            continue;
        }
        let text = line[3..].trim();
        // The first line of a paragraph; later lines may continue a sentence.
        let begins = !is_inside;
        is_inside = !text.is_empty();
        let is_noun_clause = NOUN_CLAUSES.iter().any(|words| {
            text.strip_prefix(words)
                .is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()))
        });
        if begins && is_noun_clause {
            found.push((i + 1, line.to_owned()));
        }
    }
    found
}

fn long_lines(source: &str) -> Vec<(usize, String)> {
    let numbered = source.lines().enumerate();
    let long = numbered.filter(|(_, line)| line.len() > MAX_BYTES);
    long.map(|(i, line)| (i + 1, line.trim().to_owned()))
        .collect()
}

/// Kind of the code between two braces.
#[derive(Clone, Copy, PartialEq)]
enum Block {
    Module,
    Trait,
    /// A function, an `impl`, the fields of a struct, or an expression.
    Other,
}

/// Returns the types that a file defines, each with its line: structs, enums, unions, traits, type
/// aliases at the level of a module, and associated types that a trait declares. Types inside
/// functions and the associated types of `impl` blocks are left out.
fn types(source: &str) -> Vec<(usize, String)> {
    let tokens = tokens(source);
    let text = |i: usize| tokens.get(i).map_or("", |token| token.text.as_str());
    let mut found = Vec::new();
    // The open blocks, and the kind of the next one.
    let mut open: Vec<Block> = Vec::new();
    let mut next = Block::Other;
    for (i, token) in tokens.iter().enumerate() {
        let block = open.last().copied().unwrap_or(Block::Module);
        let names_type = match (block, token.text.as_str()) {
            (_, "{") => {
                open.push(std::mem::replace(&mut next, Block::Other));
                false
            }
            (_, "}") => {
                open.pop();
                false
            }
            // Ends `mod x;`, which opens no block.
            (_, ";") => {
                next = Block::Other;
                false
            }
            (Block::Module, "mod") => {
                next = Block::Module;
                false
            }
            (Block::Module, "trait") => {
                next = Block::Trait;
                true
            }
            (Block::Module, "struct" | "enum" | "type") | (Block::Trait, "type") => true,
            // Elsewhere `union` is an ordinary name.
            (Block::Module, "union") => matches!(text(i + 2), "{" | "<" | "where"),
            _ => false,
        };
        if names_type && is_name(text(i + 1)) {
            found.push((token.line, text(i + 1).to_owned()));
        }
    }
    found
}

#[test]
fn the_scans_find_what_breaks_a_rule_and_nothing_else() {
    let doc = "/// What is freed.\n/// Which is wrapped.\nfn a() {}\n//! Whether it is.\n\n\
               /// Whichever.\n/// Reads.\n///\n/// So many rows.\n// What else\n";
    let lines: Vec<usize> = noun_clauses(doc)
        .into_iter()
        .map(|(line, _)| line)
        .collect();
    assert_eq!(lines, [1, 4, 9]);

    let source = "
        struct A<'a>(&'a str); // struct No1;
        mod x { pub enum B { C { d: u8 } } mod y; fn f() { struct No2; type No3 = u8; } }
        pub(crate) trait T: Sized { type O; fn g() { enum No4 {} } }
        impl T for A<'_> { type No5 = \"struct No6;\"; }
        type F = fn(impl Copy) -> u8; union U { u: u8 } fn h() { union(a, b) }
        const K: char = '{'; unsafe trait V {} struct r#type;
    ";
    let names: Vec<String> = types(source).into_iter().map(|(_, name)| name).collect();
    assert_eq!(names, ["A", "B", "T", "O", "F", "U", "V", "type"]);
    assert_eq!(types(source)[3].0, 4);

    // "é" has 2 bytes.
    let text = format!("{0}\nx{0}\n", "é".repeat(MAX_BYTES / 2));
    let lines: Vec<usize> = long_lines(&text)
        .into_iter()
        .map(|(line, _)| line)
        .collect();
    assert_eq!(lines, [2]);
}
