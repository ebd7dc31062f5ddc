//! docs/operations.md: its tables of settings are those of the program, its commands run, and the
//! metrics that it names exist.

use std::fs;
use std::path::Path;
use std::process::Command;

use bradley::cli::settings::SETTINGS;

use crate::models_page::with_table;
use crate::pages::{fenced, read};
use crate::server::{Server, finish, id, job, submit, upload};
use crate::support::binary;

const PAGE: &str = "docs/operations.md";
/// Limits whose names do not begin with `max_`.
const LIMITS: [&str; 8] = [
    "memory_limit",
    "device_memory_limit",
    "queue_tokens",
    "batch_tokens",
    "reference_cache_tokens",
    "generation_cache_tokens",
    "resident_policies",
    "events_kept",
];
const PORTS: [&str; 2] = ["listen", "http_listen"];
const TIMES: [&str; 3] = ["drain_timeout", "lease", "time_slice"];

/// Returns the table of the settings that `is_listed` selects, in the order of the program.
fn settings_table(is_listed: impl Fn(&str) -> bool) -> String {
    let rows = SETTINGS.iter().filter(|(name, ..)| is_listed(name));
    let rows: String = rows
        .map(|(name, default, help)| {
            let default = match *default {
                "" => "–".to_owned(),
                default => format!("`{default}`"),
            };
            format!("| `{name}` | {default} | {help} |\n")
        })
        .collect();
    format!("| setting | default | effect |\n|---|---|---|\n{rows}")
}

#[test]
fn limits_ports_and_times_on_the_page_are_those_of_the_program() {
    let is_limit = |name: &str| name.starts_with("max_") || LIMITS.contains(&name);
    for name in LIMITS.iter().chain(&PORTS).chain(&TIMES) {
        assert!(
            SETTINGS.iter().any(|(known, ..)| known == name),
            "{name} is no setting"
        );
    }
    let page = read(PAGE);
    let mut expected = page.clone();
    for (name, table) in [
        ("ports", settings_table(|name| PORTS.contains(&name))),
        ("limits", settings_table(is_limit)),
        ("times", settings_table(|name| TIMES.contains(&name))),
    ] {
        expected = with_table(&expected, name, &table);
    }
    if page != expected {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("operations.md");
        fs::write(&path, &expected).unwrap();
        panic!("{PAGE} is out of date: copy {} to it", path.display());
    }
}

/// Returns the default address of the HTTP port.
fn http_address() -> &'static str {
    let mut settings = SETTINGS.iter();
    settings
        .find(|(name, ..)| *name == "http_listen")
        .unwrap()
        .1
}

#[tokio::test(flavor = "multi_thread")]
async fn the_five_commands_of_the_page_run() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"));
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let job = submit(&client, job(&dataset, 1)).await;
    finish(&client, &job).await;

    let page = read(PAGE);
    let commands = fenced(&page).remove(0).lines;
    assert_eq!(commands.len(), 5, "{commands:?}");
    let curl = format!("curl -fsS http://{}/", http_address());
    let body = |path: &str| {
        let answer = server.http_get(&format!("/{path}"));
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "/{path}: {head}");
        body.to_owned()
    };
    let programs = dir.path().join("programs");
    fs::create_dir(&programs).unwrap();
    std::os::unix::fs::symlink(binary(), programs.join("bradley")).unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let mut said = String::new();
    for command in commands {
        // curl may be missing on this machine.
        let script = match command.strip_prefix(&curl) {
            Some(rest) => {
                let (path, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                fs::write(dir.path().join("body"), body(path)).unwrap();
                format!("cat body {rest}")
            }
            None => {
                assert!(command.starts_with("bradley "), "{command}");
                command.replace("JOB", id(&job))
            }
        };
        let out = Command::new("bash")
            .args(["-euo", "pipefail", "-c", &script])
            .current_dir(dir.path())
            .env("PATH", &path)
            .env("BRADLEY_SERVER", &server.address)
            .env_remove("BRADLEY_OUTPUT")
            .output()
            .unwrap();
        said += &String::from_utf8(out.stdout).unwrap();
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{command}: {said}{errors}");
    }
    for expected in [&job, "succeeded", "ok\n", "bradley_store_up 1"] {
        assert!(said.contains(expected), "{expected:?} is not in\n{said}");
    }

    let metrics = body("metrics");
    let named: Vec<&str> = page
        .split('`')
        .filter(|span| span.starts_with("bradley_"))
        .collect();
    assert!(!named.is_empty());
    for name in named {
        assert!(metrics.contains(name), "there is no metric {name}");
    }
}
