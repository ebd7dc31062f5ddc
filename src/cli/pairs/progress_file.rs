//! The file beside the output with the outcome of each prompt, from which an interrupted run
//! continues.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, BufWriter, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::rank::{Dropped, NoPair};
use crate::cli::args::DEFAULT_MIN_MARGIN;
use crate::cli::failure::{Failure, Outcome};
use crate::cli::synced_file::check_part;
use crate::domain::violation::counted;

/// End of the name of the file of outcomes, after that of the output.
const PROGRESS_ENDING: &str = ".progress";
/// The same for the output until it is complete.
const PART_ENDING: &str = ".part";
/// The remedy for an output that exists and is not of the run that is continued.
const EXISTS: &str = "exists: remove it, or name another file";

/// Result of a prompt: a pair, or the reason why there is none.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PromptOutcome {
    /// Version of the policy's weights.
    pub policy: String,
    /// Versions of the judge's weights and of its reference's; `None` if nothing was scored.
    pub judge: Option<String>,
    /// Number of tokens that were generated.
    pub tokens: u64,
    /// The row of the pair, or the reason why there is none.
    pub result: Result<Map<String, Value>, NoPair>,
}

/// An outcome as a line of the file.
#[derive(Serialize, Deserialize)]
struct OutcomeLine {
    policy: String,
    judge: Option<String>,
    tokens: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pair: Option<Map<String, Value>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dropped: Option<Dropped>,
    /// Margin of a near tie, which older versions do not write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    margin: Option<f64>,
}

/// The first line of the file.
#[derive(Serialize, Deserialize)]
struct Header {
    settings: Value,
    seed: u64,
}

/// The outcomes of a run, which no other process may write meanwhile.
#[derive(Debug)]
pub(super) struct Outcomes {
    out: PathBuf,
    path: PathBuf,
    file: File,
    seed: u64,
    /// The bound below which a margin is a near tie.
    min_margin: f64,
    done: usize,
    /// True if this run has begun the file.
    is_new: bool,
    /// Versions of the first outcome that has them: of the policy and of the judge.
    versions: [Option<String>; 2],
}

/// Numbers about a finished run.
#[derive(Debug, Default)]
pub(in crate::cli) struct PairsReport {
    prompts: usize,
    pairs: usize,
    few_answers: usize,
    not_scored: usize,
    near_ties: usize,
    /// The largest margin of the near ties; `None` if none is known.
    largest_near_tie: Option<f64>,
    /// The bound below which they are.
    min_margin: f64,
    tokens: u64,
    /// Sums over the pairs.
    margin: f64,
    chosen_tokens: f64,
    rejected_tokens: f64,
    seed: u64,
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> Failure {
    move |e| Failure::Failed(format!("{}: {e}", path.display()))
}

fn beside(out: &Path, ending: &str) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Returns the file to write: the target of a symbolic link is replaced, not the link.
fn target(out: &Path) -> PathBuf {
    out.canonicalize().unwrap_or_else(|_| out.to_owned())
}

/// Checks that the output can be created, and that it replaces no file but those of an interrupted
/// run.
///
/// # Errors
/// Returns a failure that says why another output must be named.
pub(super) fn check_output(out: &Path) -> Outcome {
    let wrong = |reason: &str| {
        let out = out.display();
        Err(Failure::Usage(format!("--out {out} {reason}")))
    };
    if out.as_os_str() == "-" {
        return wrong("is standard output: name a file, beside which the progress is stored");
    }
    if out.is_dir() || out.file_name().is_none() {
        return wrong("is a folder: name a file");
    }
    if out.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return wrong("ends with a slash: name a file");
    }
    let target = target(out);
    if fs::metadata(&target).is_ok_and(|m| !m.is_file()) {
        return wrong("is a pipe or a device: name a file");
    }
    let folder = target.parent().filter(|f| !f.as_os_str().is_empty());
    if let Some(missing) = folder.filter(|folder| !folder.is_dir()) {
        return wrong(&format!(
            "cannot be created: the folder {} does not exist",
            missing.display()
        ));
    }
    if target.exists() && !beside(&target, PROGRESS_ENDING).exists() {
        return wrong(EXISTS);
    }
    let is_pair = |row: &Map<String, Value>| row.get("generated").is_some_and(Value::is_object);
    check_part(&beside(&target, PART_ENDING), "bradley pairs", is_pair)
}

impl Outcomes {
    /// Begins a run with `settings`, or continues an interrupted one. If the settings name no seed,
    /// the seed is that of the interrupted run, or a random one.
    ///
    /// # Errors
    /// Returns a failure if the file cannot be read or written, is of a run with other settings, or
    /// another process writes it.
    pub fn open(out: &Path, settings: &Value) -> Result<Self, Failure> {
        check_output(out)?;
        let out = &target(out);
        let path = beside(out, PROGRESS_ENDING);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| Failure::Failed(format!("--out {}: {e}", path.display())))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(Failure::Failed(format!(
                    "another bradley pairs works on {}: wait for it, or name another file with \
                     --out",
                    out.display()
                )));
            }
            Err(fs::TryLockError::Error(e)) => return Err(failed(&path)(e)),
        }
        let mut lines = Vec::new();
        // A line without an end was being written when the process was killed.
        let mut complete = 0;
        let mut reader = BufReader::new(&file);
        let rest = loop {
            // Bytes, because the last line may end within a character.
            let mut line = Vec::new();
            let read = reader.read_until(b'\n', &mut line).map_err(failed(&path))?;
            if !line.ends_with(b"\n") {
                break line;
            }
            complete += read as u64;
            lines.push(line);
        };
        drop(reader);
        // The file is not changed before this, because it may be somebody else's.
        let unreadable = |e: serde_json::Error| {
            Failure::Failed(format!("{}: {e}; delete it to begin again", path.display()))
        };
        let header: Option<Header> = match lines.first() {
            Some(first) => Some(serde_json::from_slice(first).map_err(unreadable)?),
            None if rest.is_empty() || rest.starts_with(b"{") => None,
            None => {
                return Err(Failure::Failed(format!(
                    "{} is not of bradley pairs; delete it to begin again, or name another file \
                     with --out",
                    path.display()
                )));
            }
        };
        // Without an outcome there is nothing to continue.
        if lines.len() < 2 {
            if out.exists() {
                return Err(Failure::Usage(format!("--out {} {EXISTS}", out.display())));
            }
            (complete, lines) = (0, Vec::new());
        }
        file.set_len(complete).map_err(failed(&path))?;
        file.seek(std::io::SeekFrom::End(0))
            .map_err(failed(&path))?;
        let mut outcomes = Outcomes {
            out: out.to_owned(),
            path: path.clone(),
            file,
            seed: 0,
            min_margin: settings["min_margin"].as_f64().unwrap_or_default(),
            done: 0,
            is_new: false,
            versions: [None, None],
        };
        let mut lines = lines.iter();
        let (Some(_), Some(header)) = (lines.next(), header) else {
            outcomes.is_new = true;
            let seed = settings["seed"].as_u64();
            outcomes.seed = seed.unwrap_or_else(rand::random);
            outcomes.write(&json!({"settings": settings, "seed": outcomes.seed}))?;
            return Ok(outcomes);
        };
        let differing = differing(&header.settings, settings);
        if !differing.is_empty() {
            return Err(Failure::Usage(format!(
                "{} is of a run with another value of {}: give the same flags and prompts to \
                 continue it, delete it to begin again, or name another file with --out",
                path.display(),
                differing.join(", ")
            )));
        }
        outcomes.seed = header.seed;
        for line in lines {
            let line: OutcomeLine = serde_json::from_slice(line).map_err(unreadable)?;
            outcomes.check_versions([Some(line.policy), line.judge])?;
            outcomes.done += 1;
        }
        Ok(outcomes)
    }

    /// Returns the seed of the first prompt.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Returns the number of prompts that have an outcome.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Adds the outcome of the next prompt.
    ///
    /// # Errors
    /// Returns a failure if the weights have changed since the first prompt, or the file cannot be
    /// written.
    pub fn add(&mut self, outcome: PromptOutcome) -> Outcome {
        self.check_versions([Some(outcome.policy.clone()), outcome.judge.clone()])?;
        let (pair, no_pair) = match outcome.result {
            Ok(pair) => (Some(pair), None),
            Err(no_pair) => (None, Some(no_pair)),
        };
        self.write(&OutcomeLine {
            policy: outcome.policy,
            judge: outcome.judge,
            tokens: outcome.tokens,
            pair,
            dropped: no_pair.map(|no_pair| no_pair.reason),
            margin: no_pair.and_then(|no_pair| no_pair.margin),
        })?;
        self.done += 1;
        Ok(())
    }

    /// Refuses to mix the answers or the rewards of different weights.
    fn check_versions(&mut self, versions: [Option<String>; 2]) -> Outcome {
        let words = ["the policy", "the judge or its reference"];
        for ((known, version), word) in self.versions.iter_mut().zip(versions).zip(words) {
            match (&known, version) {
                (Some(known), Some(version)) if **known != version => {
                    return Err(Failure::Failed(format!(
                        "the weights of {word} have changed since the first prompt ({known}, now \
                         {version}): name a step instead of latest, and delete {} to begin again",
                        self.path.display()
                    )));
                }
                (None, Some(version)) => *known = Some(version),
                _ => {}
            }
        }
        Ok(())
    }

    fn write(&mut self, value: &impl Serialize) -> Outcome {
        let mut line = serde_json::to_vec(value)
            .map_err(|e| Failure::Failed(format!("{}: {e}", self.path.display())))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(failed(&self.path))
    }

    /// Writes the pairs to the output, which gets its name when it is complete, and removes the
    /// file of outcomes.
    ///
    /// # Errors
    /// Returns a failure if a file cannot be read or written.
    pub fn finish(mut self) -> Result<PairsReport, Failure> {
        let mut report = PairsReport {
            prompts: self.done,
            seed: self.seed,
            min_margin: self.min_margin,
            ..PairsReport::default()
        };
        let part = beside(&self.out, PART_ENDING);
        let created = File::create(&part).map_err(failed(&part))?;
        let mut written = BufWriter::new(created);
        self.file.rewind().map_err(failed(&self.path))?;
        for line in BufReader::new(&self.file).lines().skip(1) {
            let line = line.map_err(failed(&self.path))?;
            let line: OutcomeLine = serde_json::from_str(&line)
                .map_err(|e| Failure::Failed(format!("{}: {e}", self.path.display())))?;
            report.add(&line);
            if let Some(pair) = line.pair {
                writeln!(written, "{}", Value::Object(pair)).map_err(failed(&part))?;
            }
        }
        let written = written
            .into_inner()
            .map_err(|e| failed(&part)(e.into_error()))?;
        written.sync_all().map_err(failed(&part))?;
        fs::rename(&part, &self.out).map_err(failed(&self.out))?;
        // The name must be on disk before the only other copy is removed.
        let folder = self.out.parent().filter(|f| !f.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))
            .and_then(|folder| folder.sync_all())
            .map_err(failed(&self.out))?;
        fs::remove_file(&self.path).map_err(failed(&self.path))?;
        Ok(report)
    }
}

impl Drop for Outcomes {
    fn drop(&mut self) {
        if self.is_new && self.done == 0 {
            // A run that was refused at its first prompt has nothing to continue.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Returns the names of the settings that differ, as flags.
pub(in crate::cli) fn differing(old: &Value, new: &Value) -> Vec<String> {
    let names = new.as_object().into_iter().flat_map(Map::keys);
    // Without the flag, the judge is the policy.
    let is_own_judge = |of: &Value| of["judge"] == of["policy"];
    names
        .filter(|name| *name != "judge" || !(is_own_judge(old) && is_own_judge(new)))
        // A seed that was chosen at random is continued without the flag.
        .filter(|name| !(*name == "seed" && new[*name].is_null()) && old[*name] != new[*name])
        .map(|name| match name.as_str() {
            "prompts" => "the prompts".to_owned(),
            name => format!("--{}", name.replace('_', "-")),
        })
        .collect()
}

impl PairsReport {
    fn add(&mut self, line: &OutcomeLine) {
        self.tokens += line.tokens;
        match line.dropped {
            Some(Dropped::FewAnswers) => self.few_answers += 1,
            Some(Dropped::NotScored) => self.not_scored += 1,
            Some(Dropped::NearTie) => {
                self.near_ties += 1;
                // `None` is below every number.
                if line.margin > self.largest_near_tie {
                    self.largest_near_tie = line.margin;
                }
            }
            None => {}
        }
        if let Some(pair) = &line.pair {
            let number = |name: &str| pair["generated"][name].as_f64().unwrap_or_default();
            self.pairs += 1;
            self.margin += number("margin");
            self.chosen_tokens += number("chosen_tokens");
            self.rejected_tokens += number("rejected_tokens");
        }
    }

    /// Returns the mean over the pairs; `None` if there are none.
    fn mean(&self, sum: f64) -> Option<f64> {
        (self.pairs > 0).then(|| sum / self.pairs as f64)
    }

    /// Returns true if a prompt has a pair.
    pub fn has_pairs(&self) -> bool {
        self.pairs > 0
    }

    /// Returns the numbers as a JSON object.
    pub fn to_json(&self) -> Value {
        json!({
            "prompts": self.prompts,
            "pairs": self.pairs,
            "few_answers": self.few_answers,
            "not_scored": self.not_scored,
            "near_ties": self.near_ties,
            "largest_near_tie": self.largest_near_tie,
            "min_margin": self.min_margin,
            "generated_tokens": self.tokens,
            "mean_margin": self.mean(self.margin),
            "mean_chosen_tokens": self.mean(self.chosen_tokens),
            "mean_rejected_tokens": self.mean(self.rejected_tokens),
            "seed": self.seed,
        })
    }

    /// Returns how near the near ties are, in parentheses. The text is empty if this is not known.
    fn nearness(&self) -> String {
        let (margin, bound) = match self.largest_near_tie {
            None => return String::new(),
            Some(0.0) => return " (equal rewards)".to_owned(),
            Some(margin) => (margin, self.min_margin),
        };
        // Three digits, unless these are not below the bound.
        let shown = match format!("{margin:.2e}").parse::<f64>() {
            Ok(rounded) if rounded < bound => rounded,
            _ => margin,
        };
        let default = match bound == DEFAULT_MIN_MARGIN {
            true => ", the default",
            false => "",
        };
        format!(" (largest margin {shown}, below --min-margin {bound}{default})")
    }

    /// Returns the numbers as a sentence.
    pub fn sentence(&self) -> String {
        let means = match self.mean(self.margin) {
            Some(margin) => format!(
                "; mean margin {margin:.3}, chosen {:.0} tokens, rejected {:.0}",
                self.chosen_tokens / self.pairs as f64,
                self.rejected_tokens / self.pairs as f64
            ),
            None => String::new(),
        };
        let not_scored = match self.not_scored {
            0 => String::new(),
            some => format!("{some} with answers that cannot be scored, "),
        };
        format!(
            "{} from {}, {}, seed {}; left out: {} with fewer than two different complete \
             answers, {not_scored}{}{}{means}",
            counted(self.pairs as u64, "pair"),
            counted(self.prompts as u64, "prompt"),
            counted(self.tokens, "token"),
            self.seed,
            self.few_answers,
            counted(self.near_ties as u64, "near tie"),
            self.nearness()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(policy: &str, pair: Option<f64>) -> PromptOutcome {
        PromptOutcome {
            policy: policy.into(),
            judge: pair.map(|_| "j r".into()),
            tokens: 5,
            result: match pair {
                Some(margin) => {
                    let row = json!({"prompt": "x", "generated": {"margin": margin}});
                    Ok(row.as_object().unwrap().clone())
                }
                None => Err(Dropped::NearTie.into()),
            },
        }
    }

    #[test]
    fn the_report_says_how_near_the_near_ties_are() {
        let dir = tempfile::tempdir().unwrap();
        let reported = |name: &str, min_margin: f64, margins: &[Option<f64>]| {
            let settings = json!({"seed": 1, "min_margin": min_margin});
            let mut run = Outcomes::open(&dir.path().join(name), &settings).unwrap();
            for margin in margins {
                let tie = NoPair {
                    reason: Dropped::NearTie,
                    margin: *margin,
                };
                let result = Err(tie);
                run.add(PromptOutcome {
                    result,
                    ..outcome("v", None)
                })
                .unwrap();
            }
            run.finish().unwrap()
        };
        let near = reported("a", 0.1, &[Some(0.01), Some(0.054321), None, Some(0.0)]);
        let said = near.sentence();
        let end = "4 near ties (largest margin 0.0543, below --min-margin 0.1, the default)";
        assert!(said.ends_with(end), "{said}");
        assert_eq!(near.to_json()["largest_near_tie"], 0.054321);
        let rounded = reported("b", 0.2, &[Some(0.1999)]).sentence();
        let end = "1 near tie (largest margin 0.1999, below --min-margin 0.2)";
        assert!(rounded.ends_with(end), "{rounded}");
        let equal = reported("c", 0.0, &[Some(0.0), Some(0.0)]).sentence();
        assert!(equal.ends_with("2 near ties (equal rewards)"), "{equal}");
        let unknown = reported("d", 0.1, &[None]).sentence();
        assert!(unknown.ends_with("1 near tie"), "{unknown}");
    }

    #[test]
    fn an_interrupted_run_continues_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("pairs.jsonl");
        let settings = json!({"policy": "p", "seed": null});
        let mut first = Outcomes::open(&out, &settings).unwrap();
        let seed = first.seed();
        first.add(outcome("v", Some(1.0))).unwrap();
        first.add(outcome("v", None)).unwrap();
        // The run is killed while it writes a line.
        first.file.write_all(b"{\"policy\":\"\xc3").unwrap();
        drop(first);
        let mut next = Outcomes::open(&out, &settings).unwrap();
        assert_eq!((next.done(), next.seed()), (2, seed));
        let e = Outcomes::open(&out, &settings).unwrap_err();
        assert!(
            e.message().contains("another bradley pairs"),
            "{}",
            e.message()
        );
        let e = next.add(outcome("w", None)).unwrap_err();
        assert!(e.message().contains("(v, now w)"), "{}", e.message());
        next.add(outcome("v", Some(2.0))).unwrap();
        let report = next.finish().unwrap();
        assert_eq!((report.prompts, report.pairs, report.near_ties), (3, 2, 1));
        assert_eq!(report.to_json()["mean_margin"], 1.5);
        let lines = fs::read_to_string(&out).unwrap();
        assert_eq!(lines.lines().count(), 2, "{lines}");
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
    }

    #[test]
    fn a_run_without_an_outcome_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("pairs.jsonl");
        let progress = dir.path().join("pairs.jsonl.progress");
        let settings = json!({"policy": "p", "seed": 1});
        let mut run = Outcomes::open(&out, &settings).unwrap();
        assert!(progress.exists());
        drop(run);
        assert!(!progress.exists());
        run = Outcomes::open(&out, &settings).unwrap();
        run.add(outcome("v", None)).unwrap();
        drop(run);
        // A refusal to continue it removes nothing.
        Outcomes::open(&out, &json!({"policy": "q", "seed": 1})).unwrap_err();
        drop(Outcomes::open(&out, &settings).unwrap());
        let lines = fs::read_to_string(&progress).unwrap();
        assert_eq!(lines.lines().count(), 2, "{lines}");
    }

    #[test]
    fn a_run_with_other_settings_is_not_continued() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("pairs.jsonl");
        let settings = json!({"policy": "p", "min_margin": 0.1, "seed": 1});
        let unused = json!({"policy": "q", "min_margin": 0.3, "seed": 7});
        drop(Outcomes::open(&out, &unused).unwrap());
        let mut first = Outcomes::open(&out, &settings).unwrap();
        first.add(outcome("v", None)).unwrap();
        drop(first);
        let other = json!({"policy": "p", "min_margin": 0.2, "seed": 2});
        let e = Outcomes::open(&out, &other).unwrap_err();
        assert!(
            e.message().contains("--min-margin, --seed"),
            "{}",
            e.message()
        );
        let same = json!({"policy": "p", "min_margin": 0.1, "seed": null});
        assert_eq!(Outcomes::open(&out, &same).unwrap().seed(), 1);
    }

    #[test]
    fn a_file_of_another_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("mine.jsonl");
        let settings = json!({"policy": "p", "seed": 1});
        fs::write(&out, "mine").unwrap();
        let e = Outcomes::open(&out, &settings).unwrap_err();
        assert!(e.message().contains("mine.jsonl exists"), "{}", e.message());
        let progress = dir.path().join("mine.jsonl.progress");
        assert!(!progress.exists());
        // A run that has stored no outcome has not written it either.
        fs::write(&progress, "{\"settings\": {}, \"seed\": 1}\n").unwrap();
        let e = Outcomes::open(&out, &settings).unwrap_err();
        assert!(e.message().contains("mine.jsonl exists"), "{}", e.message());
        assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
        // The run is killed after the output has its name and before the progress file is removed.
        fs::remove_file(&out).unwrap();
        let mut first = Outcomes::open(&out, &settings).unwrap();
        first.add(outcome("v", Some(1.0))).unwrap();
        drop(first);
        fs::write(&out, "of this run").unwrap();
        let report = Outcomes::open(&out, &settings).unwrap().finish().unwrap();
        assert!(report.has_pairs());
        assert!(
            report
                .sentence()
                .starts_with("1 pair from 1 prompt, 5 tokens")
        );
        // The file that becomes the output is not replaced, either.
        let part = dir.path().join("third.jsonl.part");
        fs::write(&part, "mine").unwrap();
        let e = Outcomes::open(&dir.path().join("third.jsonl"), &settings).unwrap_err();
        assert!(e.message().contains("third.jsonl.part is not of"), "{e:?}");
        assert_eq!(fs::read_to_string(&part).unwrap(), "mine");
        // The file of outcomes is not replaced, either.
        let out = dir.path().join("other.jsonl");
        let progress = dir.path().join("other.jsonl.progress");
        for foreign in ["mine", "mine\n", "mine\nand\nmore"] {
            fs::write(&progress, foreign).unwrap();
            let e = Outcomes::open(&out, &settings).unwrap_err();
            let part = "delete it to begin again";
            assert!(e.message().contains(part), "{}", e.message());
            assert_eq!(fs::read_to_string(&progress).unwrap(), foreign);
        }
        // The run is killed while it writes the settings.
        fs::write(&progress, "{\"sett").unwrap();
        assert_eq!(Outcomes::open(&out, &settings).unwrap().done(), 0);
    }
}
