//! Names of columns: those that a file must have, and suggestions for misspelt ones.

use crate::domain::logged::{POLICY_COLUMNS, REFERENCE_COLUMNS};
use crate::domain::similar::nearest;
use crate::domain::violation::shortened;

/// Column names of OpenAI's format.
pub(super) const OPENAI_COLUMNS: [&str; 3] = ["input", "preferred_output", "non_preferred_output"];
/// Column with the prompt of the shape `orca`.
pub(super) const QUESTION_COLUMN: &str = "question";
/// Columns with images, video or audio, which the models cannot process.
pub(super) const MEDIA_COLUMNS: [&str; 6] =
    ["images", "image", "videos", "video", "audios", "audio"];

/// Column with several answers to one prompt, which are scored and ranked but not trained on.
pub const COMPLETIONS_COLUMN: &str = "completions";

/// Columns of a row in our own format.
pub const COLUMNS: [&str; 12] = [
    "prompt",
    "chosen",
    "rejected",
    "weight",
    "id",
    "system",
    "tools",
    "chat_template_kwargs",
    REFERENCE_COLUMNS[0],
    REFERENCE_COLUMNS[1],
    POLICY_COLUMNS[0],
    POLICY_COLUMNS[1],
];
/// Maximum number of columns that a message lists.
const MAX_LISTED: usize = 12;
/// Maximum number of characters of a name in a message.
const MAX_NAME_CHARS: usize = 40;

/// Checks that a file with these columns has the answers of pairs.
///
/// # Errors
/// Returns a text that names the missing column, those that there are, and a misspelt one.
pub fn check(columns: &[String]) -> Result<(), String> {
    let needed = if is_openai(columns) {
        &OPENAI_COLUMNS[..]
    } else {
        &["chosen", "rejected"]
    };
    match needed.iter().find(|name| !has(columns, name)) {
        Some(missing) => Err(format!(
            "no column {missing:?}; {}",
            found(columns, missing)
        )),
        None => Ok(()),
    }
}

/// Returns true if the columns are those of OpenAI's format.
pub(super) fn is_openai(columns: &[String]) -> bool {
    !has(columns, "chosen")
        && !has(columns, "rejected")
        && OPENAI_COLUMNS.iter().any(|name| has(columns, name))
}

fn has(columns: &[String], name: &str) -> bool {
    columns.iter().any(|column| column == name)
}

/// Lists the columns of a row or file that lacks the column `missing`, and says which of them is
/// probably meant.
pub fn found(columns: &[String], missing: &str) -> String {
    if columns.is_empty() {
        return "there is no column of a preference pair".to_owned();
    }
    let list = listed(columns);
    match similar(columns, missing) {
        Some(column) => format!("found: {list}; did you mean {missing} instead of {column}?"),
        None => format!(
            "found: {list}; a row has prompt, chosen and rejected, or OpenAI's input, \
             preferred_output and non_preferred_output"
        ),
    }
}

/// Lists the first columns, separated by commas.
pub fn listed(columns: &[String]) -> String {
    let mut list = columns
        .iter()
        .take(MAX_LISTED)
        .map(|name| shortened(name, MAX_NAME_CHARS))
        .collect::<Vec<_>>()
        .join(", ");
    if columns.len() > MAX_LISTED {
        list.push_str(&format!(" and {} more", columns.len() - MAX_LISTED));
    }
    list
}

/// Returns our name of a column of a file, or `None` if another column has taken its name.
/// `renames` has pairs of our name and the file's.
pub fn renamed<'a>(renames: &'a [(String, String)], name: &'a str) -> Option<&'a str> {
    if let Some((ours, _)) = renames.iter().find(|(_, theirs)| theirs == name) {
        return Some(ours);
    }
    let is_taken = renames.iter().any(|(ours, _)| ours == name);
    (!is_taken).then_some(name)
}

/// Returns true if a column is used, or leads to a finding if it is not empty.
pub fn is_used(column: &str) -> bool {
    COLUMNS.contains(&column)
        || column == QUESTION_COLUMN
        || OPENAI_COLUMNS.contains(&column)
        || MEDIA_COLUMNS.contains(&column)
}

/// Returns what a column of our own format may hold.
pub fn legal(column: &str) -> &'static str {
    match column {
        "weight" => "a number",
        "id" => "text or a number",
        "system" => "text",
        "tools" => "text or a list of tools",
        "chat_template_kwargs" => "the text of a JSON object",
        _ => "text or a list of messages",
    }
}

/// Returns the name that is most similar to `wanted`, if it is similar enough and no legal name
/// itself.
pub fn similar<'a>(names: &'a [String], wanted: &str) -> Option<&'a str> {
    let candidates = names
        .iter()
        .map(String::as_str)
        .filter(|name| name.len() <= 64)
        .filter(|name| !COLUMNS.contains(name) && !OPENAI_COLUMNS.contains(name));
    nearest(wanted, candidates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_column_is_recognised_and_an_unrelated_one_is_not() {
        let names =
            |list: &[&str]| -> Vec<String> { list.iter().map(|name| (*name).to_owned()).collect() };
        assert_eq!(
            check(&names(&["prompt", "choosen", "rejected"])).unwrap_err(),
            "no column \"chosen\"; found: prompt, choosen, rejected; did you mean chosen instead \
             of choosen?"
        );
        let e = check(&names(&["question", "good", "bad"])).unwrap_err();
        assert!(
            e.contains("found: question, good, bad; a row has prompt"),
            "{e}"
        );
        let e = check(&names(&[
            "input",
            "prefered_output",
            "non_preferred_output",
        ]))
        .unwrap_err();
        assert!(
            e.ends_with("did you mean preferred_output instead of prefered_output?"),
            "{e}"
        );
        check(&names(&["question", "chosen", "rejected"])).unwrap();
        assert_eq!(similar(&names(&["prompt"]), "prompts"), None);
    }
}
