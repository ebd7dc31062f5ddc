//! Checks that links and paths in the documents lead to existing targets, and that rows of tables
//! are below a header.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders that hold no documents of the project.
const SKIPPED_FOLDERS: [&str; 3] = ["target", "node_modules", "venv"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns every Markdown file of the repository.
pub fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    collect_documents(root(), &mut found);
    found.sort();
    found
}

fn collect_documents(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with('.') || SKIPPED_FOLDERS.contains(&name.as_str()) {
            continue;
        }
        if path.is_dir() {
            collect_documents(&path, found);
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
}

/// Returns the lines outside of fenced code blocks.
fn prose(text: &str) -> Vec<&str> {
    let mut in_code = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        } else if !in_code {
            lines.push(line);
        }
    }
    lines
}

/// Returns the targets of the Markdown links in a line.
fn links(line: &str) -> Vec<&str> {
    let outside_of_code = line.split('`').step_by(2);
    let after_links = outside_of_code.flat_map(|part| part.split("](").skip(1));
    after_links
        .filter_map(|rest| Some(rest.split_once(')')?.0))
        .collect()
}

/// Returns the anchor that GitHub gives a heading.
fn anchor_of(heading: &str) -> String {
    let is_part = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    heading
        .to_lowercase()
        .chars()
        .filter(is_part)
        .collect::<String>()
        .replace(' ', "-")
}

/// Returns what is wrong with a link of a document, or `None` if it leads somewhere. Addresses of
/// other sites are not looked up.
fn broken_link(document: &Path, link: &str) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
    let target = match path {
        "" => document.to_owned(),
        _ => document.parent().unwrap().join(path),
    };
    if !target.exists() {
        return Some(format!("the link to {link} leads to no file"));
    }
    if anchor.is_empty() {
        return None;
    }
    let text = fs::read_to_string(&target).unwrap();
    let headings = prose(&text)
        .into_iter()
        .filter(|line| line.starts_with('#'));
    let mut anchors = headings.map(|line| anchor_of(line.trim_start_matches('#').trim()));
    match anchors.any(|known| known == anchor) {
        true => None,
        false => Some(format!("the link to {link} leads to no heading")),
    }
}

/// Returns the first word of a code span if it is a path of this repository: below a folder of its
/// root or of `src`, and without placeholders.
fn named_path(span: &str) -> Option<&str> {
    let word = span.split_whitespace().next()?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/');
    let (first, _) = word.split_once('/')?;
    let is_ours = !first.is_empty()
        && !SKIPPED_FOLDERS.contains(&first)
        && (root().join(first).is_dir() || root().join("src").join(first).is_dir());
    (is_ours && word.chars().all(is_plain)).then_some(word)
}

fn path_exists(path: &str) -> bool {
    let source = root().join("src").join(path);
    root().join(path).exists() || source.exists() || source.with_extension("rs").exists()
}

/// Returns the first row of each table without a header, such as a row that stands alone after a
/// paragraph.
fn tables_without_header(text: &str) -> Vec<&str> {
    let lines = prose(text);
    let is_row = |i: usize| lines.get(i).is_some_and(|line| line.starts_with('|'));
    let is_rule = |line: &str| line.chars().all(|c| matches!(c, '|' | '-' | ':' | ' '));
    let begins = |i: usize| is_row(i) && (i == 0 || !is_row(i - 1));
    let has_header = |i: usize| is_row(i + 1) && is_rule(lines[i + 1]);
    (0..lines.len())
        .filter(|i| begins(*i) && !has_header(*i))
        .map(|i| lines[i])
        .collect()
}

/// Returns what is wrong with the links, the paths and the tables of a document.
fn problems(document: &Path, text: &str) -> Vec<String> {
    let headless = tables_without_header(text).into_iter();
    let mut found: Vec<String> = headless
        .map(|row| format!("this row has no header above it: {row}"))
        .collect();
    for line in prose(text) {
        found.extend(
            links(line)
                .into_iter()
                .filter_map(|link| broken_link(document, link)),
        );
        let paths = line.split('`').skip(1).step_by(2).filter_map(named_path);
        for path in paths.filter(|path| !path_exists(path)) {
            found.push(format!("`{path}` does not exist"));
        }
    }
    found
}

#[test]
fn links_and_paths_of_the_documents_lead_somewhere() {
    let documents = documents();
    assert!(
        documents.len() > 20,
        "only {} documents seen: the scan is broken",
        documents.len()
    );
    let mut found = Vec::new();
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        let name = document.strip_prefix(root()).unwrap().display().to_string();
        found.extend(
            problems(&document, &text)
                .into_iter()
                .map(|p| format!("{name}: {p}")),
        );
    }
    assert!(
        found.is_empty(),
        "{} problems:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn a_link_or_a_path_that_leads_nowhere_is_found() {
    let document = root().join("README.md");
    let fine = "\
# Two commands
[a](ARCHITECTURE.md), [`b`](docs/usage.md#several-replicas), [c](#two-commands), [d](https://x.y/z)
`src/lib.rs`, `math/loss.rs`, `model/cuda`, `tests/cuda/run races`, `models/ID`, `target/debug/x`
```
[a](no_such_file.md) `src/no_such_file.rs`
| a |
```
| a | b |
|---|--:|
| c | d |
";
    assert_eq!(problems(&document, fine), [""; 0]);
    let broken = "\
[a](no_such_file.md), [b](docs/usage.md#no-such-heading), [c](#no-such-heading)
`src/no_such_file.rs`, `math/no_such_file`, `tests/cuda/no_such_file races`
| a | b |
";
    let found = problems(&document, broken);
    assert_eq!(found.len(), 7, "{found:#?}");
}

#[test]
fn every_decision_is_listed() {
    let folder = root().join("docs/decisions");
    let index = fs::read_to_string(folder.join("README.md")).unwrap();
    for entry in fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        let listed = index.contains(&format!("]({name})"));
        assert!(
            listed || name == "README.md",
            "docs/decisions/README.md does not list {name}"
        );
    }
}
