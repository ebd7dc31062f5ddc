//! docs/tutorial.md: its commands run as they stand on the page, one after another, against the
//! server that the page starts. A few lines are replaced: those that build the program, and names
//! of the model, for which a tiny one stands.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::Duration;

use serde_json::Value;

use crate::pages::{fenced, read};
use crate::server::free_port;
use crate::support::{binary, golden, needed};
use crate::wait::until_blocking;

const HUB_MODEL: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
/// ID of the model on the server, which the commands of the page use.
const MODEL: &str = "SmolLM2-135M-Instruct";
/// Lines that are not run: the test has built the program.
const BUILD: [&str; 3] = [
    "git clone https://github.com/bradley-dpo/bradley",
    "cd bradley",
    "cargo build --release",
];
/// Time limit for the start and the end of the server.
const LIMIT: Duration = Duration::from_secs(120);

/// A process that is killed when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder that looks like a clone of the repository after the build, and a shell in it.
struct Clone {
    folder: PathBuf,
    port: u16,
    /// Lines that set variables. Blocks of the page share a terminal, here each has a shell.
    variables: Vec<String>,
}

impl Clone {
    fn new(folder: &Path) -> Self {
        for inner in ["src/cli/demo", "target/release"] {
            fs::create_dir_all(folder.join(inner)).unwrap();
        }
        let pairs = "src/cli/demo/pairs.jsonl";
        fs::copy(
            Path::new(env!("CARGO_MANIFEST_DIR")).join(pairs),
            folder.join(pairs),
        )
        .unwrap();
        symlink(binary(), folder.join("target/release/bradley")).unwrap();
        Clone {
            folder: folder.to_owned(),
            port: free_port(),
            variables: Vec::new(),
        }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(&self.folder)
            .env("BRADLEY_SERVER", format!("http://127.0.0.1:{}", self.port))
            .env("BRADLEY_LISTEN", format!("127.0.0.1:{}", self.port))
            .env("BRADLEY_HTTP_LISTEN", "off")
            .env_remove("BRADLEY_CONFIG")
            .env_remove("BRADLEY_TOKEN")
            .env_remove("BRADLEY_OUTPUT");
        command
    }

    /// Returns the shell's command for some lines.
    fn shell(&self, lines: &[String]) -> Command {
        let script = [&self.variables, lines].concat().join("\n");
        let mut command = self.command("bash");
        command.args(["-euo", "pipefail", "-c", &script]);
        command
    }

    /// Runs lines that must succeed, and returns their output.
    fn run(&self, lines: &[String]) -> String {
        let said = self.shell(lines).output().unwrap();
        checked(&lines.join("\n"), said)
    }
}

/// Returns the standard output of a command that must have succeeded.
fn checked(what: &str, said: Output) -> String {
    let text = String::from_utf8(said.stdout).unwrap();
    assert!(
        said.status.success(),
        "{what}\nended with {}:\n{text}{}",
        said.status,
        String::from_utf8_lossy(&said.stderr)
    );
    text
}

fn is_variable(line: &str) -> bool {
    line.starts_with("export ") || line.starts_with("JOB=")
}

/// Runs the commands of the page. `python` runs the Python code, too.
fn follow(python: Option<&str>) {
    let dir = tempfile::tempdir().unwrap();
    let mut clone = Clone::new(dir.path());
    let model = golden("models/llama").display().to_string();
    let mut server = None;
    let mut job = None;
    let mut replaced = 0;
    let mut scripts = String::new();
    for block in fenced(&read("docs/tutorial.md")) {
        if block.language == "python" {
            replaced += block.lines.iter().filter(|l| l.contains(HUB_MODEL)).count();
            // The blocks are one session.
            scripts += &block.lines.join("\n").replace(HUB_MODEL, &model);
            scripts += "\n";
            if let Some(python) = python {
                let mut command = clone.command(python);
                checked(&scripts, command.args(["-c", &scripts]).output().unwrap());
            }
            continue;
        }
        assert_eq!(block.language, "sh", "{block:?}");
        let all = block.lines.len();
        let lines: Vec<String> = block
            .lines
            .into_iter()
            .filter(|line| !BUILD.contains(&line.as_str()))
            .collect();
        replaced += all - lines.len();
        if let Some(line) = lines.iter().find(|line| line.starts_with("bradley serve ")) {
            assert_eq!(lines.len(), 1, "the server has a terminal of its own");
            replaced += 1;
            let line = line.replace(HUB_MODEL, &format!("{MODEL}={model}"));
            let child = clone.shell(&[format!("exec {line}")]).spawn().unwrap();
            server = Some(Running(child));
            until_blocking("the start of the server", LIMIT, || {
                let health = clone.shell(&["bradley health".into()]).output().unwrap();
                health.status.success()
            });
            continue;
        }
        let (variables, commands): (Vec<String>, Vec<String>) =
            lines.into_iter().partition(|line| is_variable(line));
        for line in variables {
            replaced += usize::from(line.contains("trainingJobs/ID"));
            let id: &Option<String> = &job;
            clone.variables.push(match line.as_str() {
                "JOB=trainingJobs/ID" => format!("JOB={}", id.as_ref().unwrap()),
                _ => line,
            });
        }
        let said = clone.run(&commands);
        if commands.iter().any(|line| line.ends_with("--watch")) {
            // The page says that the command prints the name.
            let name = said
                .split_whitespace()
                .find(|word| word.starts_with("trainingJobs/") && !word.contains("checkpoints"));
            job = Some(
                name.unwrap_or_else(|| panic!("no job in:\n{said}"))
                    .to_owned(),
            );
            assert!(said.contains("succeeded"), "{said}");
        }
        check_claims(&clone.folder, &commands, &said);
    }
    assert_eq!(replaced, BUILD.len() + 3, "lines that were replaced");

    let mut server = server.unwrap();
    // SAFETY: signals the child that this test owns and has not reaped.
    assert_eq!(unsafe { libc::kill(server.0.id() as i32, libc::SIGINT) }, 0);
    let mut status = None;
    until_blocking("the end of the server after Ctrl-C", LIMIT, || {
        status = server.0.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success(), "{status:?}");
    assert!(dir.path().join("bradley-data").is_dir());
}

/// Checks what the page says about the result of a block.
fn check_claims(folder: &Path, commands: &[String], said: &str) {
    let has = |part: &str| commands.iter().any(|line| line.contains(part));
    if has("wc -l") {
        assert!(said.contains("93 ") && said.contains("31 "), "{said}");
    }
    if has("datasets upload") {
        assert!(said.contains("93") && said.contains("split"), "{said}");
    }
    if has("score --policy models/") {
        assert!(said.contains("mean probability 0.500"), "{said}");
    }
    if has("score --policy $JOB") && !has("json") {
        assert!(said.lines().last().unwrap().contains("accuracy"), "{said}");
    }
    if has("scores.jsonl") {
        let scores = fs::read_to_string(folder.join("tutorial/scores.jsonl")).unwrap();
        assert_eq!(scores.lines().count(), 31);
        let first: Value = serde_json::from_str(said.trim()).unwrap();
        assert!(first["probability"].is_f64(), "{said}");
    }
    if has("checkpoints download") {
        for file in [
            "adapter/adapter_model.safetensors",
            "model/model.safetensors",
        ] {
            assert!(folder.join("tutorial").join(file).is_file(), "{file}");
        }
    }
}

#[test]
fn the_commands_of_the_tutorial_lead_to_a_trained_model() {
    follow(None);
}

#[test]
#[ignore = "needs Python with transformers and peft (BRADLEY_TEST_PYTHON)"]
fn the_model_of_the_tutorial_loads_in_python() {
    follow(Some(&needed("BRADLEY_TEST_PYTHON")));
}
