//! The memory limits, the devices and the data volume of a server, as its log and its metrics show
//! them.

use std::ffi::CString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::server::{Server, job, submit, upload};
use crate::support::golden;
use crate::wait::{until, until_blocking};

/// Maximum time until a metric has the expected value.
const PATIENCE: Duration = Duration::from_secs(60);

const GIB: u64 = 1 << 30;

fn models() -> String {
    format!("tiny={}", golden("models/llama").display())
}

/// Returns the value of a metric that has no labels.
fn metric(server: &Server, name: &str) -> u64 {
    let text = server.metrics();
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .unwrap_or_else(|| panic!("{name} is not in {text}"));
    value.parse::<f64>().unwrap() as u64
}

/// Returns the memory of this machine in bytes.
fn machine_memory() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = meminfo.lines().find(|line| line.starts_with("MemTotal:"));
    let kib = total.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() * 1024
}

#[test]
fn a_memory_limit_above_the_machines_memory_is_lowered_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(dir.path(), &models(), &["--memory-limit", "512TiB"]);
    assert!(metric(&server, "bradley_memory_limit_bytes") <= machine_memory());
    assert!(server.has_logged("memory_limit is lowered"));

    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(dir.path(), &models(), &["--memory-limit", "1GiB"]);
    assert_eq!(metric(&server, "bradley_memory_limit_bytes"), GIB);
    assert!(!server.has_logged("memory_limit is lowered"));
}

/// Makes the command see `folder` at /sys/fs/cgroup, in a mount namespace of its own.
fn with_control_groups(command: &mut Command, folder: &Path) {
    let path = |text: &str| CString::new(text).unwrap();
    let (from, to) = (path(folder.to_str().unwrap()), path("/sys/fs/cgroup"));
    let root = path("/");
    let done = |code: i32| match code {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    let mount = move |from: &CString, to: &CString, flags| {
        let (none, data) = (std::ptr::null(), std::ptr::null());
        // SAFETY: both paths are strings that live as long as the call.
        done(unsafe { libc::mount(from.as_ptr(), to.as_ptr(), none, flags, data) })
    };
    let prepare = move || {
        // SAFETY: the call has no preconditions.
        done(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
        mount(&root, &root, libc::MS_REC | libc::MS_PRIVATE)?;
        mount(&from, &to, libc::MS_BIND)
    };
    // SAFETY: the closure only makes system calls, with strings that exist before the fork.
    unsafe { command.pre_exec(prepare) };
}

#[test]
#[ignore = "needs root, to mount control groups"]
fn a_server_in_a_container_of_4_gib_plans_with_nine_tenths_of_it() {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    // Each version of control groups: its line in /proc/self/cgroup, and the file with the limit,
    // as a container sees it.
    let versions = [
        ("0::", "memory.max"),
        (":memory:", "memory/memory.limit_in_bytes"),
    ];
    let mut tried = 0;
    for (line, file) in versions {
        if !groups.contains(line) {
            continue;
        }
        tried += 1;
        let mounted = tempfile::tempdir().unwrap();
        let file = mounted.path().join(file);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, format!("{}\n", 4 * GIB)).unwrap();
        for (flags, expected) in [
            (&[][..], 4 * GIB / 10 * 9),
            (&["--memory-limit", "100GiB"][..], 4 * GIB),
            (&["--memory-limit", "2GiB"][..], 2 * GIB),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let server = Server::start_as(dir.path(), &models(), flags, |command| {
                with_control_groups(command, mounted.path());
            });
            let limit = metric(&server, "bradley_memory_limit_bytes");
            assert_eq!(limit, expected, "{line} {flags:?}");
            let said = server.lines_with("limit on host memory");
            assert!(said[0].contains("\"container_mib\":4096"), "{said:?}");
        }
    }
    assert!(tried > 0, "no version of control groups in {groups}");
}

#[test]
fn the_default_device_is_chosen_automatically_and_the_log_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_as(dir.path(), &models(), &[], |command| {
        command.env_remove("BRADLEY_DEVICE");
        // The emulator's libraries.
        command.env_remove("LD_LIBRARY_PATH");
    });
    let said = server.lines_with("computing on these devices");
    assert_eq!(said.len(), 1, "{said:?}");
    let line: serde_json::Value = serde_json::from_str(&said[0]).unwrap();
    let field = |name: &str| line["fields"][name].as_str().unwrap();
    assert!(field("because").starts_with("device is auto: "), "{line}");
    if !cfg!(feature = "cuda") {
        assert_eq!(field("devices"), "cpu");
        assert!(field("because").contains("no GPU support"), "{line}");
    }

    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(dir.path(), &models(), &["--device", "cpu"]);
    let said = server.lines_with("computing on these devices");
    assert!(
        said[0].contains("the setting device names them"),
        "{said:?}"
    );
}

#[test]
fn a_misspelt_variable_is_a_warning_with_the_right_name() {
    let dir = tempfile::tempdir().unwrap();
    let variables = [("BRADLEY_QUUE_TOKENS", "7"), ("BRADLEY_TOKEN", "x")];
    let server = Server::start_in(dir.path(), &models(), &[], &variables);
    let said = server.lines_with("is unknown and has no effect");
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].contains("did you mean BRADLEY_QUEUE_TOKENS?"),
        "{said:?}"
    );
}

#[test]
fn the_data_volume_has_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let folder = CString::new(dir.path().to_str().unwrap()).unwrap();
    // SAFETY: zeros are a valid value of this struct of numbers.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one struct that lives as long as it.
    assert_eq!(unsafe { libc::statvfs(folder.as_ptr(), &raw mut found) }, 0);
    until_blocking("the first reading", PATIENCE, || {
        server.metrics().contains("\nbradley_data_volume_bytes ")
    });
    let total = metric(&server, "bradley_data_volume_bytes");
    assert_eq!(total, found.f_blocks * found.f_frsize);
    let free = metric(&server, "bradley_data_volume_free_bytes");
    assert!(free > 0 && free < total);
}

#[tokio::test]
async fn the_metrics_say_which_device_trains() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(dir.path(), &models(), &["--device", "cpu,cpu"]);
    let training = || {
        let text = server.metrics();
        let of = |device: &str| {
            let name = format!("bradley_device_training{{device=\"{device}\"}} ");
            text.lines()
                .find_map(|line| line.strip_prefix(&name)?.parse::<u8>().ok())
        };
        ["cpu:0", "cpu:1"].map(of)
    };
    until("both devices are idle", PATIENCE, async || {
        training() == [Some(0), Some(0)]
    })
    .await;
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    submit(&client, job(&dataset.name, 100_000)).await;
    until("one device trains", PATIENCE, async || {
        matches!(training(), [Some(0), Some(1)] | [Some(1), Some(0)])
    })
    .await;
}
