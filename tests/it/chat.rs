//! `bradley chat` through the real binary: its answers are those of GenerateCompletions with the
//! same messages and seed.

use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bradley::rpc::client::Client;
use bradley::rpc::pb;
use rustix::termios::{
    Action, InputModes, LocalModes, OptionalActions, tcflow, tcgetattr, tcsetattr,
};
use serde_json::{Value, json};
use unicode_width::UnicodeWidthStr as _;

use crate::backends::signal;
use crate::people::{Terminal, bradley, status};
use crate::server::{Server, free_port};
use crate::support::golden;
use crate::wait::until_blocking;

/// Limit for what takes seconds at most, on a busy machine.
const SOON: Duration = Duration::from_secs(120);
const MAX_TOKENS: u32 = 120;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Starts a server with two models.
fn two_models(data_dir: &Path, flags: &[&str]) -> Server {
    let models = format!(
        "tiny={},other={}",
        golden("models/llama").display(),
        golden("models/qwen2").display()
    );
    Server::start_with(data_dir, &models, flags)
}

fn command(address: &str, more: &[&str]) -> Command {
    let tokens = MAX_TOKENS.to_string();
    let fixed = ["chat", "--max-tokens", &tokens, "--ignore-eos"];
    let mut command = bradley(address, &[&fixed[..], more].concat());
    command.env_remove("COLUMNS");
    command
}

/// Runs a conversation from a pipe.
fn run(address: &str, more: &[&str], input: &[u8]) -> Output {
    let mut child = command(address, more)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that refuses its arguments does not read.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// Runs a conversation that must succeed, and returns what it prints.
#[track_caller]
fn succeed(address: &str, more: &[&str], input: &str) -> String {
    let out = run(address, more, input.as_bytes());
    assert!(out.status.success(), "{more:?}: {}", text(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Runs a conversation and returns its answers as objects.
#[track_caller]
fn items(address: &str, more: &[&str], input: &str) -> Vec<Value> {
    let printed = succeed(address, &[more, &["--format", "json"]].concat(), input);
    let lines = printed.lines();
    lines.map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Returns the rows of a file.
fn rows(path: &Path) -> Vec<Value> {
    let lines = std::fs::read_to_string(path).unwrap_or_default();
    let lines = lines.lines();
    lines.map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Returns the answer of GenerateCompletions.
async fn generated(client: &Client, policy: &str, messages: &[Value], seed: u64) -> String {
    let messages = messages.iter().map(|m| pb::Message {
        role: m["role"].as_str().unwrap().into(),
        content: m["content"].as_str().unwrap().into(),
        ..Default::default()
    });
    let list = pb::MessageList {
        messages: messages.collect(),
    };
    let request = pb::GenerateCompletionsRequest {
        policy: policy.into(),
        prompt: Some(pb::Text {
            form: Some(pb::text::Form::Chat(list)),
        }),
        max_tokens: MAX_TOKENS,
        ignore_eos: true,
        seed: Some(seed),
        ..Default::default()
    };
    let answer = client.generation().generate_completions(request).await;
    let mut stream = answer.unwrap().into_inner();
    let mut text = String::new();
    while let Some(response) = stream.message().await.unwrap() {
        text.extend(response.deltas.into_iter().map(|delta| delta.text));
    }
    text
}

fn said(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_has_the_answers_of_the_service() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let users = ["Water boils", " Name a colour. ", "/ is a slash"];
    let mut messages = vec![said("system", "Be brief.")];
    let (mut expected, mut answers) = (String::new(), Vec::new());
    for (user, seed) in users.into_iter().zip(5..) {
        messages.push(said("user", user));
        let answer = generated(&client, "models/tiny", &messages, seed).await;
        expected += &format!("{answer}\n");
        messages.push(said("assistant", &answer));
        answers.push(answer);
    }
    let flags = ["--policy", "tiny", "--system", "Be brief.", "--seed", "5"];
    let input = "Water boils\n\n Name a colour. \n// is a slash";
    assert_eq!(succeed(&server.address, &flags, input), expected);

    // The commands.
    let file = dir.path().join("chats.jsonl");
    let file_name = file.display();
    let input = format!(
        "Water boils\n Name a colour. \n/retry\n/save {file_name}\n/reset\n/system\n/seed 5\n\
         Water \\\nboils\n/save {file_name}\n/quit\nnot read\n"
    );
    let turns = items(&server.address, &flags, &input);
    assert_eq!(turns.len(), 4, "{turns:?}");
    assert_eq!(
        (&turns[0]["answer"], &turns[1]["answer"]),
        (&json!(answers[0]), &json!(answers[1]))
    );
    let again = generated(&client, "models/tiny", &messages[..4], 7).await;
    assert_ne!(again, answers[1]);
    let expected = json!({
        "message": " Name a colour. ",
        "seed": 7,
        "answer": again,
        "finish_reason": "length",
        "prompt_tokens": turns[1]["prompt_tokens"],
        "tokens": MAX_TOKENS,
        "policy": "models/tiny",
    });
    assert_eq!(turns[2], expected);
    let alone = [said("user", "Water \nboils")];
    let alone_answer = generated(&client, "models/tiny", &alone, 5).await;
    assert_eq!(turns[3]["answer"], alone_answer.as_str());
    let saved = rows(&file);
    messages[4] = said("assistant", &again);
    assert_eq!(saved[0]["messages"], json!(messages[..5]));
    assert_eq!(saved[0]["chat"]["seeds"], json!([5, 7]));
    let [question] = alone;
    assert_eq!(
        saved[1]["messages"],
        json!([question, said("assistant", &alone_answer)])
    );
    assert_eq!(saved.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_conversation_loses_its_oldest_turns() {
    let dir = tempfile::tempdir().unwrap();
    let server = two_models(dir.path(), &["--max-row-tokens", "300"]);
    let file = dir.path().join("chat.jsonl");
    let questions = (1..=12).map(|i| format!("Say something about the number {i}.\n"));
    let input = format!(
        "{}/save {}\n",
        questions.collect::<String>(),
        file.display()
    );
    let out = run(&server.address, &["--policy", "tiny"], input.as_bytes());
    let stderr = text(&out.stderr);
    assert!(out.status.success(), "{stderr}");
    let note = "too long for one prompt: turn";
    assert!(
        stderr.contains(note) && stderr.contains("the number 1.”"),
        "{stderr}"
    );
    let row = &rows(&file)[0];
    let (messages, chat) = (row["messages"].as_array().unwrap(), &row["chat"]);
    let left_out = chat["left_out_turns"].as_u64().unwrap() as usize;
    assert!(left_out > 0 && messages.len() == 24, "{row}");
    let (answer, prompt) = messages[2 * left_out..].split_last().unwrap();
    let seed = chat["seeds"][11].as_u64().unwrap();
    let want = generated(&server.client().await, "models/tiny", prompt, seed).await;
    assert_eq!(answer["content"], want.as_str());
}

/// Returns a model's text as a terminal shows it, without spaces.
fn dense(text: &str) -> String {
    let is_shown = |c: &char| !matches!(c, '\n' | '\t') && (c.is_control() || !c.is_whitespace());
    let shown = text.chars().filter(is_shown);
    shown
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_policies_answer_beside_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let server = two_models(dir.path(), &[]);
    let client = server.client().await;
    let flags = [
        "--policy",
        "tiny",
        "--beside",
        "models/other",
        "--seed",
        "9",
    ];
    let input = "Water boils\nName a colour.\n";
    let turns = items(&server.address, &flags, input);
    let mut messages = Vec::new();
    let mut below = String::new();
    for (turn, (user, seed)) in turns
        .iter()
        .zip([("Water boils", 9), ("Name a colour.", 10)])
    {
        messages.push(said("user", user));
        let left = generated(&client, "models/tiny", &messages, seed).await;
        let right = generated(&client, "models/other", &messages, seed).await;
        assert_eq!(turn["answer"], left.as_str());
        assert_eq!(turn["beside"]["answer"], right.as_str());
        assert_eq!(turn["beside"]["policy"], "models/other");
        below += &format!("--- models/tiny\n{left}\n--- models/other\n{right}\n");
        messages.push(said("assistant", &left));
    }
    assert_eq!(turns.len(), 2);
    // Without a terminal the texts are whole, one below the other.
    let out = run(&server.address, &flags, input.as_bytes());
    assert_eq!(text(&out.stdout), below);
    let said = text(&out.stderr);
    for policy in ["models/tiny", "models/other"] {
        let note = format!("the answer of {policy} is cut off after {MAX_TOKENS} tokens");
        assert_eq!(said.matches(&note).count(), 2, "{said}");
    }

    let (terminal, stdout) = Terminal::open();
    let mut columns = command(&server.address, &flags);
    let mut child = columns
        .stdin(Stdio::piped())
        .stdout(stdout)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(columns);
    let mut keyboard = child.stdin.take().unwrap();
    keyboard.write_all(b"Water boils\n").unwrap();
    drop(keyboard);
    assert!(status(&mut child).success(), "{}", terminal.shows());
    let [left, right] = [&turns[0]["answer"], &turns[0]["beside"]["answer"]]
        .map(|answer| dense(answer.as_str().unwrap()));
    let (mut shown, mut cells) = (String::new(), [String::new(), String::new()]);
    until_blocking("the end of both answers", SOON, || {
        shown = terminal.shows().replace("\r\n", "\n");
        cells = [String::new(), String::new()];
        for row in shown.lines().skip(2) {
            let (left, right) = row.split_once('│').unwrap_or((row, ""));
            cells[0] += &dense(left);
            cells[1] += &dense(right);
        }
        cells == [left.as_str(), right.as_str()]
    });
    let header = shown.lines().next().unwrap();
    assert!(
        header.starts_with("models/tiny ") && header.ends_with("│ models/other"),
        "{shown}"
    );
    let widest = shown.lines().map(|row| row.width()).max();
    assert!(widest <= Some(79), "{widest:?}: {shown}");
}

/// Starts a conversation whose answers take long. Returns it with its outputs as far as they came.
fn with_long_answers(server: &Server, stdin: Stdio, more: &[&str]) -> (Child, Bytes, Bytes) {
    let mut child = bradley(&server.address, &["chat", "--policy", "tiny"])
        .args(["--max-tokens", "16000", "--ignore-eos", "--seed", "1"])
        .args(more)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = collect(child.stdout.take().unwrap());
    let stderr = collect(child.stderr.take().unwrap());
    (child, stdout, stderr)
}

type Bytes = Arc<Mutex<Vec<u8>>>;

/// Reads everything in the background.
fn collect(mut from: impl Read + Send + 'static) -> Bytes {
    let read = Arc::new(Mutex::new(Vec::new()));
    let copy = read.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            copy.lock().unwrap().extend(&buffer[..n]);
        }
    });
    read
}

/// Returns the number of samples that the server generates.
fn sequences(server: &Server) -> Option<f64> {
    server.metric("bradley_generation_sequences")
}

#[test]
fn ctrl_c_stops_the_answer_and_twice_at_the_prompt_ends_the_command() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let (terminal, stdin) = Terminal::open();
    let (mut child, stdout, stderr) = with_long_answers(&server, stdin, &[]);
    terminal.types("/rest\nWater boils\n");
    until_blocking("the first text", SOON, || {
        !stdout.lock().unwrap().is_empty()
    });
    until_blocking("the server's work", SOON, || {
        sequences(&server) == Some(1.0)
    });
    // The second one may come when the answer has ended, and must not end the conversation.
    signal(child.id(), libc::SIGINT);
    signal(child.id(), libc::SIGINT);
    until_blocking("the end of the server's work", SOON, || {
        sequences(&server) == Some(0.0)
    });
    let file = dir.path().join("chat.jsonl");
    terminal.types(&format!("/save {}\n", file.display()));
    let path = file.clone();
    until_blocking("the conversation", SOON, || {
        std::fs::read_to_string(&path).is_ok_and(|row| row.ends_with('\n'))
    });
    let row = &rows(&file)[0];
    let answer = row["messages"][1]["content"].as_str().unwrap();
    assert!(!answer.is_empty());
    until_blocking("the answer as far as it came", SOON, || {
        text(&stdout.lock().unwrap()) == format!("{answer}\n")
    });
    // The first Ctrl-C at the prompt only says how to leave, and the next line is read as before.
    let hint = "Ctrl-C again within 2 seconds ends the conversation";
    let hints = || text(&stderr.lock().unwrap()).matches(hint).count();
    let before = hints();
    signal(child.id(), libc::SIGINT);
    until_blocking("the hint", SOON, || hints() > before);
    terminal.types("/seed 7\n");
    until_blocking("the command after the hint", SOON, || {
        text(&stderr.lock().unwrap()).contains("the next answer has the seed 7")
    });
    assert!(child.try_wait().unwrap().is_none());
    // The second one within 2 seconds ends the conversation.
    let mut ended = None;
    until_blocking("the end after two of them", SOON, || {
        signal(child.id(), libc::SIGINT);
        std::thread::sleep(Duration::from_millis(100));
        ended = child.try_wait().unwrap();
        ended.is_some()
    });
    assert_eq!(ended.and_then(|status| status.code()), Some(130));
    for part in [
        "models/tiny answers",
        "error: /rest is no command: did you mean /reset?",
        "stopped; the conversation goes on with this part",
        "appended to",
    ] {
        until_blocking(part, SOON, || text(&stderr.lock().unwrap()).contains(part));
    }
}

#[test]
fn the_part_of_an_answer_stays_when_the_server_ends() {
    for format in ["table", "json"] {
        let dir = tempfile::tempdir().unwrap();
        let mut server = Server::start(dir.path());
        let (terminal, stdin) = Terminal::open();
        let (mut child, stdout, stderr) = with_long_answers(&server, stdin, &["--format", format]);
        terminal.types("Water boils\n");
        // With JSON no text is shown while it comes. The first of so many tokens was sent long ago.
        until_blocking("many tokens", SOON, || {
            server.metric("bradley_generated_tokens_total") >= Some(300.0)
        });
        server.kill();
        let kept = "goes on with the part of the answer that came";
        until_blocking("the remark", SOON, || {
            text(&stderr.lock().unwrap()).contains(kept)
        });
        let file = dir.path().join("chat.jsonl");
        terminal.types(&format!("/save {}\n/quit\n", file.display()));
        assert!(status(&mut child).success());
        let messages = &rows(&file)[0]["messages"];
        assert_eq!(messages[0], said("user", "Water boils"));
        let answer = messages[1]["content"].as_str().unwrap();
        until_blocking("the answer as far as it came", SOON, || {
            let printed = text(&stdout.lock().unwrap());
            match format {
                "json" => serde_json::from_str::<Value>(&printed)
                    .is_ok_and(|item| item["answer"] == answer && item["finish_reason"].is_null()),
                _ => printed == format!("{answer}\n"),
            }
        });
    }
}

/// The part of a repeated answer is not one that the conversation goes on with, so it is no item of
/// the output.
#[test]
fn the_old_answer_stays_when_the_server_ends_during_a_retry() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    let (terminal, stdin) = Terminal::open();
    let args = ["chat", "--policy", "tiny", "--max-tokens", "16000"];
    let mut command = bradley(&server.address, &args);
    let mut child = command
        .args(["--ignore-eos", "--seed", "1", "--format", "json"])
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(command);
    let stdout = collect(child.stdout.take().unwrap());
    let stderr = collect(child.stderr.take().unwrap());
    let has_said = |part: &str| {
        until_blocking(part, SOON, || text(&stderr.lock().unwrap()).contains(part));
    };
    let generated = || {
        server
            .metric("bradley_generated_tokens_total")
            .unwrap_or(0.0)
    };
    terminal.types("Water boils\n");
    until_blocking("many tokens", SOON, || generated() >= 300.0);
    signal(child.id(), libc::SIGINT);
    has_said("stopped; the conversation goes on with this part");
    let before = generated();
    terminal.types("/retry\n");
    until_blocking("many tokens of the retry", SOON, || {
        generated() >= before + 300.0
    });
    server.kill();
    has_said("error: ");
    let file = dir.path().join("chat.jsonl");
    terminal.types(&format!("/save {}\n/quit\n", file.display()));
    assert!(status(&mut child).success());
    let answer = &rows(&file)[0]["messages"][1]["content"];
    until_blocking("one answer on the standard output", SOON, || {
        let printed = text(&stdout.lock().unwrap());
        serde_json::from_str::<Value>(&printed).is_ok_and(|item| item["answer"] == *answer)
    });
}

/// Flags of short answers.
const SHORT: [&str; 2] = ["--max-tokens", "4"];

/// Starts a conversation whose input and outputs are all a terminal.
fn at_terminal(address: &str, device: &OwnedFd, flags: &[&str]) -> Child {
    let stdio = || Stdio::from(device.try_clone().unwrap());
    bradley(address, &["chat", "--policy", "tiny", "--seed", "1"])
        .args(flags)
        .env("TERM", "xterm")
        .stdin(stdio())
        .stdout(stdio())
        .stderr(stdio())
        .spawn()
        .unwrap()
}

/// Returns the flags of a terminal's mode.
fn mode(device: &OwnedFd) -> (InputModes, LocalModes) {
    let mode = tcgetattr(device).unwrap();
    (mode.input_modes, mode.local_modes)
}

/// Waits for a prompt after the last `text`. Keys are then read by the editor.
fn prompt_after(terminal: &Terminal, text: &str) {
    until_blocking(&format!("a prompt after {text:?}"), SOON, || {
        let shown = terminal.shows();
        shown
            .rsplit_once(text)
            .is_some_and(|(_, rest)| rest.contains("> "))
    });
}

#[test]
fn a_terminal_edits_long_and_pasted_lines_and_repeats_messages() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = dir.path().join("chat.jsonl");
    let (terminal, device) = Terminal::open_device();
    let before = mode(&device);
    let mut child = at_terminal(&server.address, &device, &SHORT);
    prompt_after(&terminal, "Ctrl-D ends.");
    assert_ne!(mode(&device), before);
    // Left and Backspace edit the first message. The keys after it wait for their prompts.
    terminal.types("Watxr\x1b[D\x7fe\r");
    terminal.types("\x1b[A\r");
    terminal.types("\x1b[200~two\rlines\r\x1b[201~\r");
    // A mode with lines would cut this one after 4095 bytes.
    let long = format!("{}end", "word ".repeat(1200));
    terminal.types(&format!("\x1b[200~/system {long}\x1b[201~\r"));
    terminal.types(&format!("/save {}\r", file.display()));
    let path = file.clone();
    until_blocking("the conversation", SOON, || {
        std::fs::read_to_string(&path).is_ok_and(|row| row.ends_with('\n'))
    });
    let row = &rows(&file)[0];
    let messages = row["messages"].as_array().unwrap();
    let of = |role: &str| -> Vec<&str> {
        let with_role = messages.iter().filter(|m| m["role"] == role);
        with_role.map(|m| m["content"].as_str().unwrap()).collect()
    };
    assert_eq!(of("system"), [long.as_str()]);
    assert_eq!(of("user"), ["Water", "Water", "two\nlines"]);

    prompt_after(&terminal, "appended to");
    terminal.types("\x03");
    prompt_after(
        &terminal,
        "Ctrl-C again within 2 seconds ends the conversation",
    );
    let mut ended = None;
    until_blocking("the end after two of them", SOON, || {
        terminal.types("\x03");
        std::thread::sleep(Duration::from_millis(100));
        ended = child.try_wait().unwrap();
        ended.is_some()
    });
    assert_eq!(ended.and_then(|status| status.code()), Some(130));
    assert_eq!(mode(&device), before);
}

#[test]
fn a_terminal_gets_its_mode_back_at_every_end() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let (terminal, device) = Terminal::open_device();
    let before = mode(&device);
    // Keys, or a signal without them.
    let ends = [
        ("Ctrl-D", Some("\x04"), 0),
        ("/quit", Some("/quit\r"), 0),
        ("SIGTERM", None, 143),
    ];
    for (number, (name, keys, code)) in ends.into_iter().enumerate() {
        let mut child = at_terminal(&server.address, &device, &SHORT);
        until_blocking("the prompt", SOON, || {
            let shown = terminal.shows();
            let greetings = shown.matches("Ctrl-D ends.").count();
            let last = shown.rsplit_once("Ctrl-D ends.");
            greetings == number + 1 && last.is_some_and(|(_, rest)| rest.contains("> "))
        });
        assert_ne!(mode(&device), before, "{name}");
        match keys {
            Some(keys) => terminal.types(keys),
            None => signal(child.id(), libc::SIGTERM),
        }
        assert_eq!(status(&mut child).code(), Some(code), "{name}");
        assert_eq!(mode(&device), before, "{name}");
    }
}

#[test]
fn the_rest_of_pasted_text_that_is_not_utf_8_is_no_message() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let file = dir.path().join("chat.jsonl");
    let (terminal, device) = Terminal::open_device();
    let mut child = at_terminal(&server.address, &device, &SHORT);
    prompt_after(&terminal, "Ctrl-D ends.");
    // Longer than the part that the editor reads at a time.
    terminal.types_bytes(&[&b"\xff"[..], "x".repeat(2000).as_bytes(), b"\r"].concat());
    prompt_after(&terminal, "convert it first");
    terminal.types(&format!("Water\r/save {}\r/quit\r", file.display()));
    assert!(status(&mut child).success());
    let row = &rows(&file)[0];
    let messages = row["messages"].as_array().unwrap();
    let asked: Vec<&Value> = messages.iter().filter(|m| m["role"] == "user").collect();
    assert_eq!(asked, [&said("user", "Water")]);
}

#[test]
fn sigterm_ends_a_conversation_whose_terminal_takes_no_text() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let (terminal, device) = Terminal::open_device();
    let before = mode(&device);
    let long = ["--max-tokens", "16000", "--ignore-eos"];
    let mut child = at_terminal(&server.address, &device, &long);
    prompt_after(&terminal, "Ctrl-D ends.");
    terminal.types("Water boils\r");
    until_blocking("the answer", SOON, || sequences(&server) == Some(1.0));
    // Ctrl-S does this, too.
    tcflow(&device, Action::OOff).unwrap();
    let generated = || {
        server
            .metric("bradley_generated_tokens_total")
            .unwrap_or_default()
    };
    let at_stop = generated();
    until_blocking("text that waits", SOON, || generated() > at_stop + 50.0);
    signal(child.id(), libc::SIGTERM);
    assert_eq!(status(&mut child).code(), Some(143));
    assert_eq!(mode(&device), before);
}

#[test]
fn a_terminal_whose_mode_a_shell_has_set_gets_that_of_the_conversation_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let (terminal, device) = Terminal::open_device();
    let (before, of_shell) = (mode(&device), tcgetattr(&device).unwrap());
    let long = ["--max-tokens", "16000", "--ignore-eos"];
    let mut child = at_terminal(&server.address, &device, &long);
    let until_sequences = |number: f64| {
        until_blocking("the server's work", SOON, || {
            sequences(&server) == Some(number)
        });
    };
    prompt_after(&terminal, "Ctrl-D ends.");
    terminal.types("Water boils\r");
    until_sequences(1.0);
    // A shell does this when it continues a command after Ctrl-Z.
    tcsetattr(&device, OptionalActions::Now, &of_shell).unwrap();
    signal(child.id(), libc::SIGINT);
    prompt_after(&terminal, "stopped");
    until_sequences(0.0);
    terminal.types("Name a colour.\r");
    until_sequences(1.0);
    let (_, local) = mode(&device);
    assert!(
        !local.intersects(LocalModes::ECHO | LocalModes::ICANON),
        "{local:?}"
    );
    signal(child.id(), libc::SIGTERM);
    assert_eq!(status(&mut child).code(), Some(143));
    assert_eq!(mode(&device), before);
}

#[test]
fn what_is_refused_has_its_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let server = two_models(dir.path(), &["--max-row-tokens", "300"]);
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let refused = |address: &str, more: &[&str], input: &[u8], code: i32, part: &str| {
        let out = run(address, more, input);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{more:?}: {said}");
        assert!(said.contains(part), "{part}: {said}");
    };
    let long = "word ".repeat(2000);
    let here = &server.address;
    refused(
        here,
        &["--policy", "tinny"],
        b"a",
        2,
        "did you mean models/tiny?",
    );
    let tiny = ["--policy", "tiny"];
    let with = |more: &[&'static str]| [&tiny[..], more].concat();
    refused(
        here,
        &with(&["--beside", "none"]),
        b"a",
        2,
        "--beside none does not exist",
    );
    refused(
        here,
        &with(&["--plain"]),
        b"a",
        2,
        "bradley generate --plain",
    );
    refused(
        here,
        &with(&["--format", "csv"]),
        b"a",
        2,
        "--format json or yaml",
    );
    refused(
        here,
        &with(&["--temperature", "-1"]),
        b"a",
        2,
        "line 1: --temperature is -1",
    );
    refused(here, &tiny, b"a\n/rest\n", 2, "line 2: /rest is no command");
    refused(here, &tiny, b"a\n/save /\n", 1, "line 2: /save /: ");
    refused(here, &tiny, b"/retry\n", 2, "there is no message yet");
    refused(
        here,
        &tiny,
        b"a\n\xff\n",
        1,
        "line 2: the message is not UTF-8",
    );
    refused(
        here,
        &tiny,
        long.as_bytes(),
        2,
        "line 1: prompt is too long",
    );
    refused(&nowhere, &tiny, b"a", 3, "nothing listens");
    // Nothing is said if nothing is asked.
    assert_eq!(succeed(here, &tiny, ""), "");
}
