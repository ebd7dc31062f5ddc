//! docs/glossary.md: terms are in order and explained, other pages use them, and the settings and
//! fields that it names exist.

use std::collections::BTreeSet;
use std::fs;

use bradley::cli::settings::SETTINGS;

use crate::documents::documents;
use crate::losses_page::messages;
use crate::pages::read;

const PAGE: &str = "docs/glossary.md";

/// Returns each term with its text.
fn terms(page: &str) -> Vec<(String, String)> {
    let sections = page.split("\n## ").skip(1);
    sections
        .map(|section| {
            let (term, text) = section.split_once('\n').unwrap();
            (term.to_owned(), text.trim().to_owned())
        })
        .collect()
}

#[test]
fn terms_are_in_order_and_explained_in_few_words() {
    let terms = terms(&read(PAGE));
    let keys: Vec<String> = terms
        .iter()
        .map(|(term, _)| term.to_lowercase().replace('β', "beta"))
        .collect();
    let ordered: BTreeSet<String> = keys.iter().cloned().collect();
    assert_eq!(keys, ordered.into_iter().collect::<Vec<_>>());
    for (term, text) in &terms {
        let words = text.split_whitespace().count();
        assert!((4..=60).contains(&words), "{term} has {words} words");
    }
    for needed in [
        "policy",
        "reference",
        "beta",
        "implicit reward",
        "margin",
        "lease",
        "time slice",
        "scoring share",
        "micro-batch",
        "packing",
        "tape",
        "pin",
    ] {
        assert!(keys.iter().any(|key| key == needed), "{needed} is missing");
    }
}

/// A term that nothing uses need not be explained.
#[test]
fn other_documents_use_every_term() {
    let others: Vec<String> = documents()
        .into_iter()
        .filter(|path| !path.ends_with(PAGE))
        .map(|path| fs::read_to_string(path).unwrap().to_lowercase())
        // `scoring_share` is a use of "scoring share".
        .map(|text| text.replace('_', " "))
        .collect();
    let unused: Vec<String> = terms(&read(PAGE))
        .into_iter()
        .map(|(term, _)| term)
        .filter(|term| {
            // A longer form counts, too: "preempt" is part of "preempts".
            let term = term.to_lowercase();
            let stem = term.trim_end_matches("ion").trim_end_matches("ing");
            !others.iter().any(|text| text.contains(stem))
        })
        .collect();
    assert!(unused.is_empty(), "no other page has {unused:?}");
}

/// tests/it/documents.rs checks that links lead to headings; here pages must have such links.
#[test]
fn other_pages_link_to_terms() {
    let terms: BTreeSet<String> = terms(&read(PAGE))
        .into_iter()
        .map(|(term, _)| term.to_lowercase().replace(' ', "-"))
        .collect();
    let mut links = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for link in text.split("glossary.md#").skip(1) {
            let (term, _) = link.split_once(')').unwrap();
            links += 1;
            assert!(
                terms.contains(term),
                "{} links to {term}, which {PAGE} does not explain",
                document.display()
            );
        }
    }
    assert!(links >= 5, "only {links} links");
}

#[test]
fn settings_and_fields_in_the_glossary_exist() {
    let page = read(PAGE);
    let fields: BTreeSet<String> = messages()
        .into_iter()
        .flat_map(|message| message.field)
        .map(|field| field.name().to_owned())
        .collect();
    let mut seen = 0;
    for line in page.lines().filter(|line| !line.starts_with("Names in ")) {
        for name in line.split('`').skip(1).step_by(2) {
            seen += 1;
            let is_known = SETTINGS.iter().any(|(setting, ..)| *setting == name)
                || fields.contains(name)
                || name.starts_with("models/");
            assert!(is_known, "`{name}` is neither a setting nor a field");
        }
    }
    assert!(seen > 10);
}
