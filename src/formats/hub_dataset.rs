//! Data sets on the Hugging Face hub: chooses the files of a configuration or split, and downloads
//! them to the hub's cache.

use std::collections::BTreeSet;
use std::fmt;
use std::io::IsTerminal;
use std::path::PathBuf;

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Repo, RepoType};

use super::source::HubOptions;
use crate::domain::names::is_hub_id;

/// Formats of data files that are considered, without the ending of a compression.
const FORMATS: [&str; 6] = [".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow"];
const COMPRESSIONS: [&str; 2] = [".gz", ".zst"];
/// JSON files that describe a data set instead of holding rows.
const DESCRIPTIONS: [&str; 4] = [
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
];
/// Beginnings of the names of splits.
const SPLITS: [&str; 5] = ["train", "test", "valid", "dev", "eval"];
/// Maximum number of parts that a message lists.
const MAX_LISTED: usize = 20;

/// A data set, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetId {
    /// `owner/name`.
    pub name: String,
    /// A branch, tag or commit.
    pub revision: String,
    /// A configuration, a split or both.
    pub parts: Vec<String>,
}

impl DatasetId {
    /// Parses `owner/name[@revision][/config][/split]`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split('/');
        let (owner, rest) = (words.next()?, words.next()?);
        let (name, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let name = format!("{owner}/{name}");
        let parts: Vec<String> = words.map(str::to_owned).collect();
        let is_valid = is_hub_id(&name)
            && !revision.is_empty()
            && parts.len() <= 2
            && parts.iter().all(|part| !part.is_empty());
        is_valid.then(|| DatasetId {
            name,
            revision: revision.to_owned(),
            parts,
        })
    }
}

impl fmt::Display for DatasetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf://datasets/{}", self.name)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        self.parts.iter().try_for_each(|part| write!(f, "/{part}"))
    }
}

/// Downloads the files of a data set, unless the cache has them, and returns their paths.
///
/// # Errors
/// Returns a text that says what was tried, or which parts the data set has.
pub fn download(id: &DatasetId, hub: &HubOptions) -> Result<Vec<PathBuf>, String> {
    let cache = hub.cache()?;
    if hub.offline {
        return Err(format!(
            "offline mode (HF_HUB_OFFLINE) forbids the hub: name the files themselves, e.g. those \
             in {}",
            cache.path().display()
        ));
    }
    let endpoint = hub.endpoint.as_deref().unwrap_or("https://huggingface.co");
    let failed = |e: &dyn fmt::Display| {
        let hint = match &hub.token {
            Some(_) => "",
            None => "; a private or gated data set needs HF_TOKEN",
        };
        format!("the hub {endpoint} ({e}){hint}")
    };
    // The cache may have the token that `hf auth login` has stored.
    let mut api = ApiBuilder::from_cache(cache.clone());
    if hub.token.is_some() {
        api = api.with_token(hub.token.clone());
    }
    let api = api
        .with_endpoint(endpoint.to_owned())
        .with_progress(std::io::stderr().is_terminal())
        .build()
        .map_err(|e| failed(&e))?;
    let repo_at =
        |revision: &str| Repo::with_revision(id.name.clone(), RepoType::Dataset, revision.into());
    let info = api
        .repo(repo_at(&id.revision))
        .info()
        .map_err(|e| failed(&e))?;
    if info.sha.is_empty() || !info.sha.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Err(failed(&"its answer names no commit"));
    }
    let files: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    let chosen = choose(&files, id)?;
    // The branch may move meanwhile. The files must all be of one commit.
    let repo = repo_at(&info.sha);
    let folder = cache.repo(repo.clone()).pointer_path(&info.sha);
    let remote = api.repo(repo);
    chosen
        .iter()
        .map(|file| {
            let path = folder.join(file);
            if path.is_file() {
                return Ok(path);
            }
            remote.download(file).map_err(|e| failed(&e))
        })
        .collect()
}

/// A data file, with the words that name its configuration and split.
struct DataFile<'a> {
    path: &'a str,
    folders: Vec<&'a str>,
    /// Its name without endings and without the number of the shard; empty if it is only a number.
    stem: &'a str,
}

impl<'a> DataFile<'a> {
    /// Returns `None` for a file that is no data file.
    fn parse(path: &'a str) -> Option<Self> {
        let words: Vec<&str> = path.split('/').collect();
        let is_hidden = |word: &&str| word.starts_with('.') || word.is_empty();
        let (name, folders) = words.split_last()?;
        if words.iter().any(is_hidden) || DESCRIPTIONS.contains(name) {
            return None;
        }
        let bare = COMPRESSIONS
            .iter()
            .find_map(|ending| name.strip_suffix(ending))
            .unwrap_or(name);
        let stem = FORMATS
            .iter()
            .find_map(|ending| bare.strip_suffix(ending))?;
        let stem = without_shard(stem);
        // 0000 is a shard of its folder.
        Some(DataFile {
            path,
            folders: folders.to_vec(),
            stem: if is_number(stem) { "" } else { stem },
        })
    }

    fn is_of(&self, part: &str) -> bool {
        self.stem == part || self.folders.contains(&part)
    }

    /// Returns the configuration and split in the form in which they are named.
    fn part(&self) -> String {
        let folders = self.folders.iter().filter(|folder| **folder != "data");
        let mut words: Vec<&str> = folders.copied().collect();
        words.extend(Some(self.stem).filter(|stem| !stem.is_empty()));
        words.join("/")
    }

    fn is_split(&self) -> bool {
        let last = match self.stem {
            "" => self.folders.last().copied().unwrap_or_default(),
            stem => stem,
        };
        SPLITS.iter().any(|split| last.starts_with(split))
    }
}

/// Returns the name of the split of which a file is a shard: `train` for `train-00000-of-00002`,
/// also with a hash behind it. Other names are returned unchanged.
fn without_shard(stem: &str) -> &str {
    let Some((before, after)) = stem.rsplit_once("-of-") else {
        return stem;
    };
    let (count, _hash) = after.split_once('-').unwrap_or((after, ""));
    match before.rsplit_once('-') {
        Some((split, number)) if is_number(number) && is_number(count) => split,
        _ => stem,
    }
}

fn is_number(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit())
}

/// Chooses the files of the named parts.
fn choose(files: &[String], id: &DatasetId) -> Result<Vec<String>, String> {
    let all: Vec<DataFile<'_>> = files.iter().filter_map(|f| DataFile::parse(f)).collect();
    if all.is_empty() {
        return Err(format!(
            "it has no data file ({}, also with .gz or .zst)",
            FORMATS.join(", ")
        ));
    }
    let parts = |files: &[&DataFile<'_>]| -> BTreeSet<String> {
        files.iter().map(|file| file.part()).collect()
    };
    let listed = |parts: &BTreeSet<String>| {
        let names: Vec<&str> = parts.iter().map(String::as_str).take(MAX_LISTED).collect();
        let more = match parts.len().saturating_sub(MAX_LISTED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("{}{more}", names.join(", "))
    };
    let mut chosen: Vec<&DataFile<'_>> = all.iter().collect();
    for part in &id.parts {
        let before = parts(&chosen);
        chosen.retain(|file| file.is_of(part));
        if chosen.is_empty() {
            return Err(format!(
                "it has no part {part:?}: it has {}",
                listed(&before)
            ));
        }
    }
    let found = parts(&chosen);
    if found.len() > 1 && chosen.iter().any(|file| file.is_split()) {
        let first = found.first().cloned().unwrap_or_default();
        let whole = DatasetId {
            parts: Vec::new(),
            ..id.clone()
        };
        return Err(format!(
            "it has several parts: {}: name one, such as {whole}/{first}",
            listed(&found)
        ));
    }
    let mut chosen: Vec<String> = chosen.iter().map(|file| file.path.to_owned()).collect();
    chosen.sort();
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(files: &[&str], id: &str) -> Result<Vec<String>, String> {
        let files: Vec<String> = files.iter().map(|f| (*f).to_owned()).collect();
        choose(&files, &DatasetId::parse(id).unwrap())
    }

    #[test]
    fn ids_have_a_revision_and_up_to_two_parts() {
        let id = DatasetId::parse("o/n@v1/c/train").unwrap();
        assert_eq!((id.name.as_str(), id.revision.as_str()), ("o/n", "v1"));
        assert_eq!(id.parts, ["c", "train"]);
        assert_eq!(id.to_string(), "hf://datasets/o/n@v1/c/train");
        for bad in ["o", "o/n@", "o/n/a/b/c", "o/n//train", "../n/x"] {
            assert_eq!(DatasetId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_files_of_a_configuration_and_split_are_chosen() {
        let ultrafeedback = [
            ".gitattributes",
            "README.md",
            "data/train_prefs-00000-of-00002.parquet",
            "data/train_prefs-00001-of-00002.parquet",
            "data/train_sft-00000-of-00001.parquet",
        ];
        assert_eq!(
            chosen(&ultrafeedback, "o/n/train_prefs").unwrap(),
            ultrafeedback[2..4]
        );
        let said = chosen(&ultrafeedback, "o/n").unwrap_err();
        assert!(
            said.contains("train_prefs, train_sft") && said.ends_with("o/n/train_prefs"),
            "{said}"
        );
        let said = chosen(&ultrafeedback, "o/n/train").unwrap_err();
        assert!(
            said.contains("no part \"train\": it has train_prefs"),
            "{said}"
        );
        let hh = [
            "harmless-base/test.jsonl.gz",
            "harmless-base/train.jsonl.gz",
            "helpful-base/train.jsonl.gz",
        ];
        assert_eq!(chosen(&hh, "o/n/harmless-base/train").unwrap(), hh[1..2]);
        assert!(
            chosen(&hh, "o/n/train")
                .unwrap_err()
                .contains("several parts")
        );
        assert_eq!(
            chosen(&["orca_rlhf.jsonl", "dataset_infos.json"], "o/n").unwrap(),
            ["orca_rlhf.jsonl"]
        );
        let converted = ["default/train/0001.parquet", "default/train/0000.parquet"];
        assert_eq!(
            chosen(&converted, "o/n/train").unwrap(),
            [converted[1], converted[0]]
        );
        let named = [
            "data/state-of-the-art-00000-of-00002.parquet",
            "data/state-of-the-art-00001-of-00002-a09b74b3ef9c3b56.parquet",
            "data/second-part-of-it.parquet",
        ];
        assert_eq!(chosen(&named, "o/n/state-of-the-art").unwrap(), named[..2]);
        assert_eq!(chosen(&named, "o/n/second-part-of-it").unwrap(), named[2..]);
        let shards = ["data/b.csv", "data/a.csv"];
        assert_eq!(chosen(&shards, "o/n").unwrap(), [shards[1], shards[0]]);
        assert!(
            chosen(&["README.md"], "o/n")
                .unwrap_err()
                .contains("no data file")
        );
    }

    #[test]
    fn a_cache_without_a_folder_is_an_error_that_names_the_variables() {
        let id = DatasetId::parse("o/n").unwrap();
        let said = download(&id, &HubOptions::default()).unwrap_err();
        assert!(said.contains("set HOME, HF_HOME or HF_HUB_CACHE"), "{said}");
    }
}
