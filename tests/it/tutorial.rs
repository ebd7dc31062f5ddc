//! Pages that a reader follows with a shell: docs/tutorial.md, and the first steps of README.md and
//! docs/usage.md. Their commands run as they stand there, one after another, against the server that
//! the page starts. A few lines are replaced: those that build the program, the ID of the job, and
//! names of the model, for which a tiny one stands. The file of pairs has fewer rows.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::Duration;

use serde_json::Value;

use crate::pages::{Fenced, fenced, read};
use crate::server::free_port;
use crate::support::{binary, golden, needed};
use crate::wait::until_blocking;

const HUB_MODEL: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
/// ID of the model on the server, which the commands of the page use.
const MODEL: &str = "SmolLM2-135M-Instruct";
/// Stands for the job in commands; a reader replaces it.
const JOB: &str = "trainingJobs/ID";
const PAIRS: &str = "src/cli/demo/pairs.jsonl";
/// Number of training pairs and of held-out pairs here: the first ones of the repository's file.
const ROWS: [(&str, usize); 2] = [("\"train\"", 16), ("\"heldout\"", 8)];
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
struct ClonedRepository {
    folder: PathBuf,
    port: u16,
    /// Lines that set variables. The lines of a page share a terminal. Here each line has a shell
    /// of its own, so a `cd` or a loop over several lines does not work in a page.
    variables: Vec<String>,
}

impl ClonedRepository {
    fn new(folder: &Path) -> Self {
        for inner in ["src/cli/demo", "target/release"] {
            fs::create_dir_all(folder.join(inner)).unwrap();
        }
        let rows = fewer_rows(&read(PAIRS));
        for name in [PAIRS, "pairs.jsonl"] {
            fs::write(folder.join(name), &rows).unwrap();
        }
        symlink(binary(), folder.join("target/release/bradley")).unwrap();
        ClonedRepository {
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

/// Returns the rows of a split in the repository's file of pairs.
fn rows_of<'a>(pairs: &'a str, split: &str) -> Vec<&'a str> {
    let mark = format!("\"split\": {split}");
    pairs.lines().filter(|line| line.contains(&mark)).collect()
}

/// Returns the rows that stand for the whole file, so that the training is short.
fn fewer_rows(pairs: &str) -> String {
    let first = ROWS.map(|(split, count)| rows_of(pairs, split)[..count].join("\n"));
    first.join("\n") + "\n"
}

fn is_variable(line: &str) -> bool {
    line.starts_with("export ") || line.starts_with("JOB=")
}

/// A page that is followed, or a part of it.
struct Guide {
    text: String,
    /// Number of lines of the page that do not run as they stand there.
    replaced: usize,
}

/// A reader who follows a guide.
struct Reader {
    clone: ClonedRepository,
    /// Folder of the model that stands for [`HUB_MODEL`].
    model: String,
    /// Python that runs the Python code. Without it, the code is left out.
    python: Option<String>,
    /// Python code so far: the blocks of a page share one session.
    session: String,
    server: Option<Running>,
    /// Name of the trained job.
    job: Option<String>,
    /// Number of lines that were replaced or left out.
    replaced: usize,
}

impl Reader {
    /// Returns a line as it runs here.
    fn line(&mut self, line: String) -> String {
        let mut changed = line.clone();
        if line.contains(JOB) {
            let job = self
                .job
                .as_ref()
                .expect("no job was trained before this line");
            changed = changed.replace(JOB, job);
        }
        let model = match line.starts_with("bradley serve ") {
            true => format!("{MODEL}={}", self.model),
            false => self.model.clone(),
        };
        changed = changed.replace(HUB_MODEL, &model);
        self.replaced += usize::from(changed != line);
        changed
    }

    /// Follows one block of a page.
    fn block(&mut self, block: Fenced) {
        let all = block.lines.len();
        let lines: Vec<String> = block
            .lines
            .into_iter()
            .filter(|line| !BUILD.contains(&line.as_str()))
            .collect();
        self.replaced += all - lines.len();
        if block.language == "python" {
            for line in lines {
                let line = self.line(line);
                self.session += &line;
                self.session += "\n";
            }
            if let Some(python) = &self.python {
                let mut command = self.clone.command(python);
                let said = command.args(["-c", &self.session]).output().unwrap();
                checked(&self.session, said);
            }
            return;
        }
        assert!(matches!(block.language.as_str(), "" | "sh"));
        // A line may need the result of the one before: the ID of the job.
        for line in lines {
            let line = self.line(line);
            if is_variable(&line) {
                self.clone.variables.push(line);
            } else if line.starts_with("bradley serve ") {
                self.start(&line);
            } else {
                let said = self.clone.run(std::slice::from_ref(&line));
                self.check_claims(&line, &said);
            }
        }
    }

    /// Starts the server, and waits until it serves.
    fn start(&mut self, line: &str) {
        let child = self.clone.shell(&[format!("exec {line}")]).spawn().unwrap();
        self.server = Some(Running(child));
        until_blocking("the start of the server", LIMIT, || {
            let health = self.clone.shell(&["bradley health".into()]).output();
            health.unwrap().status.success()
        });
    }

    /// Ends the server as with Ctrl-C.
    fn stop(&mut self) {
        let server = &mut self.server.as_mut().unwrap().0;
        // SAFETY: signals the child that this test owns and has not reaped.
        assert_eq!(unsafe { libc::kill(server.id() as i32, libc::SIGINT) }, 0);
        let mut status = None;
        until_blocking("the end of the server after Ctrl-C", LIMIT, || {
            status = server.try_wait().unwrap();
            status.is_some()
        });
        assert!(status.unwrap().success(), "{status:?}");
    }

    /// Checks what pages say about the result of a command.
    fn check_claims(&mut self, line: &str, said: &str) {
        let has = |part: &str| line.contains(part);
        if has("bradley train ") && has("--watch") {
            // The command prints the name of the job.
            let name = said
                .split_whitespace()
                .find(|word| word.starts_with("trainingJobs/") && !word.contains("checkpoints"));
            self.job = Some(
                name.unwrap_or_else(|| panic!("no job in:\n{said}"))
                    .to_owned(),
            );
            assert!(said.contains("succeeded"), "{said}");
        }
        if has("wc -l") {
            for (_, count) in ROWS {
                assert!(said.contains(&format!("{count} tutorial/")), "{said}");
            }
        }
        if has("datasets upload") {
            assert!(said.contains("16") && said.contains("split"), "{said}");
        }
        if has("score --policy models/") {
            assert!(said.contains("mean probability 0.500"), "{said}");
        }
        if has("score --policy $JOB") && !has("json ") {
            assert!(said.lines().last().unwrap().contains("accuracy"), "{said}");
        }
        if has("head -n 1 tutorial/scores.jsonl") {
            let scores = self.clone.folder.join("tutorial/scores.jsonl");
            assert_eq!(
                fs::read_to_string(scores).unwrap().lines().count(),
                ROWS[1].1
            );
            let first: Value = serde_json::from_str(said.trim()).unwrap();
            assert!(first["probability"].is_f64(), "{said}");
        }
        if has("checkpoints download") {
            let (_, out) = line.split_once("--out ").unwrap();
            let file = match has("merged") {
                true => "model.safetensors",
                false => "adapter_model.safetensors",
            };
            let path = self.clone.folder.join(out).join(file);
            assert!(path.is_file(), "{} is missing", path.display());
        }
    }
}

/// Runs the commands of a guide. `python` runs the Python code, too.
fn follow(guide: &Guide, python: Option<String>) {
    let dir = tempfile::tempdir().unwrap();
    let mut reader = Reader {
        clone: ClonedRepository::new(dir.path()),
        model: golden("models/llama").display().to_string(),
        python,
        session: String::new(),
        server: None,
        job: None,
        replaced: 0,
    };
    for block in fenced(&guide.text) {
        reader.block(block);
    }
    assert!(reader.job.is_some(), "no job was trained");
    assert_eq!(
        reader.replaced, guide.replaced,
        "another number of lines does not run as it stands; if that is meant, change `replaced`"
    );
    reader.stop();
    assert!(dir.path().join("bradley-data").is_dir());
}

fn tutorial() -> Guide {
    Guide {
        text: read("docs/tutorial.md"),
        // The model's name occurs twice, the job's ID once.
        replaced: BUILD.len() + 3,
    }
}

/// Returns the part of a page from one heading to the next of the same level.
fn section(page: &str, heading: &str) -> String {
    let page = read(page);
    let (_, rest) = page.split_once(&format!("\n## {heading}\n")).unwrap();
    rest.split("\n## ").next().unwrap().to_owned()
}

#[test]
fn the_tutorial_says_how_many_rows_there_are() {
    let (page, pairs) = (read("docs/tutorial.md"), read(PAIRS));
    let usable = rows_of(&pairs, ROWS[0].0).len();
    assert!(page.contains(&format!("all {usable} rows are usable")));
    assert!(page.contains(&format!("has {} such rows", pairs.lines().count())));
}

#[test]
fn the_commands_of_the_tutorial_lead_to_a_trained_model() {
    follow(&tutorial(), None);
}

#[test]
#[ignore = "needs Python with transformers and peft (BRADLEY_TEST_PYTHON)"]
fn the_model_of_the_tutorial_loads_in_python() {
    follow(&tutorial(), Some(needed("BRADLEY_TEST_PYTHON")));
}

#[test]
fn the_commands_of_the_quick_start_lead_to_a_trained_model() {
    let guide = Guide {
        text: section("README.md", "Quick start"),
        // The model's name occurs once, the job's ID three times.
        replaced: 4,
    };
    follow(&guide, None);
}

#[test]
fn the_commands_for_training_in_the_manual_run() {
    let serve = format!("```\nbradley serve --models {HUB_MODEL}\n```\n");
    let path = "```\nexport PATH=$PWD/target/release:$PATH\n```\n";
    let guide = Guide {
        text: path.to_owned() + &serve + &section("docs/usage.md", "Training"),
        // The line above that starts the server.
        replaced: 1,
    };
    follow(&guide, None);
}
