//! Finds the files that the arguments of `--data` name: paths, patterns, folders of Hugging Face's
//! datasets, data sets on the hub, and the standard input.

use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::formats::hub_dataset::{DatasetId, download};
use crate::formats::source::HubOptions;
use crate::train::rows::names::similar;

/// Prefix of a data set on the hub.
const HUB: &str = "hf://";
/// Maximum number of files of one command.
const MAX_FILES: usize = 10_000;

/// Where rows come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DataPlace {
    StandardInput,
    File(PathBuf),
}

impl DataPlace {
    /// Returns the name for messages.
    pub(super) fn name(&self) -> String {
        match self {
            DataPlace::StandardInput => "standard input".to_owned(),
            DataPlace::File(path) => path.display().to_string(),
        }
    }
}

/// Finds the files of all arguments, in their order. The files of a pattern are sorted by name,
/// those of a folder have the order of its state.json.
///
/// # Errors
/// Returns a text that names the argument and what to do.
pub(super) fn find(arguments: &[String], hub: &HubOptions) -> Result<Vec<DataPlace>, String> {
    let mut places = Vec::new();
    for argument in arguments {
        let found = match argument.strip_prefix(HUB) {
            Some(id) => on_hub(id, hub).map_err(|e| format!("{argument}: {e}"))?,
            None if argument == "-" => vec![DataPlace::StandardInput],
            None => local(argument)?,
        };
        places.extend(found);
        if places.len() > MAX_FILES {
            return Err(format!("more than {MAX_FILES} files: merge them"));
        }
    }
    if places
        .iter()
        .filter(|p| **p == DataPlace::StandardInput)
        .count()
        > 1
    {
        return Err("- stands for the standard input and can be named once".to_owned());
    }
    Ok(places)
}

fn on_hub(id: &str, hub: &HubOptions) -> Result<Vec<DataPlace>, String> {
    let Some(id) = id.strip_prefix("datasets/").and_then(DatasetId::parse) else {
        return Err(
            "name a data set as hf://datasets/OWNER/NAME[@REVISION][/CONFIG][/SPLIT]".into(),
        );
    };
    Ok(download(&id, hub)?
        .into_iter()
        .map(DataPlace::File)
        .collect())
}

fn local(argument: &str) -> Result<Vec<DataPlace>, String> {
    let path = Path::new(argument);
    if path.is_dir() {
        return folder(path);
    }
    if path.exists() {
        return Ok(vec![DataPlace::File(path.to_owned())]);
    }
    if !argument.contains(['*', '?', '[']) {
        return Err(format!(
            "{argument}: there is no such file{}",
            neighbour(path)
        ));
    }
    let wrong = |e: &dyn std::fmt::Display| format!("{argument}: {e}");
    let mut files = Vec::new();
    for found in glob::glob(argument).map_err(|e| wrong(&e))? {
        let found = found.map_err(|e| wrong(&e))?;
        if found.is_file() {
            files.push(DataPlace::File(found));
        }
    }
    if files.is_empty() {
        return Err(format!("{argument}: no file matches this pattern"));
    }
    Ok(files)
}

/// Returns the end of the message about a missing file: a file with a similar name in the same
/// folder, or that the folder is missing, too.
fn neighbour(path: &Path) -> String {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return String::new();
    };
    let Ok(entries) = std::fs::read_dir(folder) else {
        return format!(", nor the folder {}", folder.display());
    };
    let names: Vec<String> = entries
        .take(MAX_FILES)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    match similar(&names, name) {
        Some(similar) => format!("; did you mean {}?", path.with_file_name(similar).display()),
        None => String::new(),
    }
}

/// Returns the files of a folder that `save_to_disk` wrote.
fn folder(path: &Path) -> Result<Vec<DataPlace>, String> {
    let shown = path.display();
    let json = |name: &str| -> Option<Value> {
        serde_json::from_slice(&std::fs::read(path.join(name)).ok()?).ok()
    };
    if let Some(state) = json("state.json") {
        let is_indexed = state["_indices_files"]
            .as_array()
            .is_some_and(|files| !files.is_empty());
        if is_indexed {
            return Err(format!(
                "{shown}: the data set is a selection of its rows: call flatten_indices() before \
                 save_to_disk()"
            ));
        }
        let files: Vec<DataPlace> = state["_data_files"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|file| Path::new(file["filename"].as_str()?).file_name())
            .map(|name| DataPlace::File(path.join(name)))
            .collect();
        if files.is_empty() {
            return Err(format!("{shown}: its state.json names no data file"));
        }
        return Ok(files);
    }
    if let Some(splits) = json("dataset_dict.json") {
        let splits: Vec<&str> = splits["splits"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        return match splits[..] {
            [one] if is_file_name(one) => folder(&path.join(one)),
            [one] => Err(format!(
                "{shown}: the split {one:?} in its dataset_dict.json is not the name of a folder"
            )),
            _ => Err(format!(
                "{shown}: the data set has the splits {}: name one of them, such as {}",
                splits.join(", "),
                path.join(splits.first().unwrap_or(&"train")).display()
            )),
        };
    }
    Err(format!(
        "{shown} is a folder, and none that save_to_disk() of Hugging Face's datasets wrote: name \
         files or a pattern, such as '{}'",
        path.join("*.jsonl").display()
    ))
}

/// Returns true if a text names something directly inside a folder.
fn is_file_name(text: &str) -> bool {
    let mut parts = Path::new(text).components();
    matches!(
        (parts.next(), parts.next()),
        (Some(Component::Normal(_)), None)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(arguments: &[&str]) -> Result<Vec<String>, String> {
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        let places = find(&arguments, &HubOptions::default())?;
        Ok(places.iter().map(DataPlace::name).collect())
    }

    #[test]
    fn paths_patterns_and_the_standard_input_are_found() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.jsonl", "a.jsonl", "c.csv"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let at = |name: &str| dir.path().join(name).display().to_string();
        let (c, pattern) = (at("c.csv"), at("*.jsonl"));
        assert_eq!(
            found(&[&c, &pattern, "-"]).unwrap(),
            [
                c.clone(),
                at("a.jsonl"),
                at("b.jsonl"),
                "standard input".into()
            ]
        );
        let refused = |arguments: &[&str]| found(arguments).unwrap_err();
        assert!(refused(&["-", "-"]).contains("once"));
        assert!(refused(&[&at("*.json")]).contains("no file matches"));
        assert!(refused(&[&at("a.jsnol")]).contains("did you mean"));
        assert!(refused(&[&at("x/a.jsonl")]).contains("nor the folder"));
        let said = refused(&[&at("")]);
        assert!(
            said.contains("is a folder") && said.contains("*.jsonl"),
            "{said}"
        );
        assert!(refused(&["hf://owner/name"]).contains("hf://datasets/OWNER"));
    }

    #[test]
    fn folders_of_saved_data_sets_name_their_files() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("d/dataset_dict.json", r#"{"splits": ["train", "test"]}"#);
        let state =
            r#"{"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]}"#;
        write("d/train/state.json", state);
        write(
            "i/state.json",
            r#"{"_indices_files": [{"filename": "i.arrow"}], "_data_files": []}"#,
        );
        let at = |name: &str| dir.path().join(name).display().to_string();
        assert_eq!(
            found(&[&at("d/train")]).unwrap(),
            [at("d/train/data-0.arrow"), at("d/train/data-1.arrow")]
        );
        let said = found(&[&at("d")]).unwrap_err();
        assert!(
            said.contains("splits train, test") && said.contains("d/train"),
            "{said}"
        );
        assert!(found(&[&at("i")]).unwrap_err().contains("flatten_indices"));
        for (folder, split) in [("e", ""), ("dot", "."), ("up", "../d/train")] {
            let names = serde_json::json!({ "splits": [split] });
            write(&format!("{folder}/dataset_dict.json"), &names.to_string());
            let said = found(&[&at(folder)]).unwrap_err();
            assert!(said.contains("is not the name of a folder"), "{said}");
        }
    }
}
