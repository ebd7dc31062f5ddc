//! `bradley backup`, `restore` and `migrate`: nothing that was acknowledged before a backup began is
//! missing after its restore, and jobs continue as if nothing had happened.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bradley::rpc::client::Client;
use bradley::rpc::pb;

use crate::backends::{Postgres, signal};
use crate::replicas::{adapter, check_history, checkpointing};
use crate::server::{
    Server, events, finish, is_step, job, losses, pause, resume, state, submit, until_event, upload,
};
use crate::store_safety::{
    LIMIT, STEPS, another_succeeds, expected, files, models, refused_start, replica, url_of,
};
use crate::wait::{until, until_blocking};

/// Runs a command.
fn bradley(args: &[&str]) -> Output {
    Command::new(crate::support::binary())
        .args(args)
        .env_remove("BRADLEY_DATA_DIR")
        .env_remove("BRADLEY_DATABASE_URL")
        .output()
        .unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn back_up(data_dir: &Path, to: &Path) -> Output {
    bradley(&["backup", text(to), "--data-dir", text(data_dir)])
}

fn restore(backup: &Path, data_dir: &Path) -> Output {
    bradley(&["restore", text(backup), "--data-dir", text(data_dir)])
}

fn assert_succeeds(done: &Output) {
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
}

/// Checks that a command ended with an exit code and a message that contains each of `parts`.
fn assert_fails(done: &Output, code: i32, parts: &[&str]) {
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(code), "{said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

/// Returns a job that writes a checkpoint after each step and keeps only the newest.
fn rotating(dataset: &str, steps: u64) -> pb::TrainingJob {
    let mut wanted = job(dataset, steps);
    wanted.run = Some(pb::RunConfig {
        save_steps: Some(1),
        save_total_limit: Some(1),
        ..Default::default()
    });
    wanted
}

/// Uploads the same rows again and again until `stop` is set or the server has ended.
async fn keep_uploading(client: Client, stop: Arc<AtomicBool>) {
    let rows = crate::support::golden("pairs.jsonl");
    while !stop.load(Ordering::SeqCst) {
        let metadata = pb::UploadMetadata::default();
        if client
            .upload_dataset(&rows, metadata, |_| {})
            .await
            .is_err()
        {
            break;
        }
    }
}

async fn datasets(client: &Client) -> Vec<pb::Dataset> {
    let mut all = Vec::new();
    let mut request = pb::ListDatasetsRequest::default();
    loop {
        let page = client
            .datasets()
            .list_datasets(request.clone())
            .await
            .unwrap()
            .into_inner();
        all.extend(page.datasets);
        if page.next_page_token.is_empty() {
            return all;
        }
        request.page_token = page.next_page_token;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_has_everything_that_was_acknowledged_before_it() {
    let (expected, weights) = expected().await;
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (backup, restored) = (other.path().join("backup"), other.path().join("data"));
    let mut server = Server::start_with(dir.path(), &models(), &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let stop = Arc::new(AtomicBool::new(false));
    let uploads = tokio::spawn(keep_uploading(server.client().await, stop.clone()));
    until("the first uploads", LIMIT, async || {
        datasets(&client).await.len() > 1
    })
    .await;
    let name = submit(&client, checkpointing(&dataset.name, STEPS)).await;
    let waiting = submit(&client, job(&dataset.name, 3)).await;
    until_event(&client, &name, |e| is_step(e, 15)).await;

    // Everything that is known before the backup begins must be in it.
    let (known, history) = (datasets(&client).await, events(&client, &name).await);
    let (from, to) = (dir.path().to_owned(), backup.clone());
    let done = tokio::task::spawn_blocking(move || back_up(&from, &to))
        .await
        .unwrap();
    assert_succeeds(&done);
    assert_eq!(state(&client, &name).await, pb::JobState::Running);
    until("more uploads", LIMIT, async || {
        datasets(&client).await.len() > known.len()
    })
    .await;
    stop.store(true, Ordering::SeqCst);
    server.kill();
    uploads.await.unwrap();

    assert_succeeds(&restore(&backup, &restored));
    let server = Server::start_with(&restored, &models(), &[]);
    let client = server.client().await;
    let found = datasets(&client).await;
    for dataset in &known {
        assert!(found.contains(dataset), "{} is missing", dataset.name);
    }
    let now = events(&client, &name).await;
    assert!(now.len() >= history.len());
    assert_eq!(now[..history.len()], history, "events are missing");
    let events = finish(&client, &name).await;
    check_history(&events);
    assert_eq!(state(&client, &name).await, pb::JobState::Succeeded);
    assert_eq!(
        losses(&events),
        *expected,
        "other losses than those of an undisturbed run"
    );
    assert!(
        adapter(&client, &name).await == *weights,
        "other weights than those of an undisturbed run"
    );
    finish(&client, &waiting).await;
    assert_eq!(state(&client, &waiting).await, pb::JobState::Succeeded);
    // The file of a dataset that was uploaded under load is there, too.
    another_succeeds(&client, &known[0].name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_are_complete_though_checkpoints_are_removed_all_the_time() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start_with(dir.path(), &models(), &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, rotating(&dataset, 100_000)).await;
    until_event(&client, &name, |e| is_step(e, 3)).await;
    for i in 0..5 {
        let (backup, restored) = (
            other.path().join(format!("backup-{i}")),
            other.path().join(format!("data-{i}")),
        );
        let from = dir.path().to_owned();
        let done = tokio::task::spawn_blocking(move || {
            let done = back_up(&from, &backup);
            (done, restore(&backup, &restored))
        });
        let (made, restored) = done.await.unwrap();
        // A checkpoint that is missing would be a failure.
        assert_succeeds(&made);
        assert_succeeds(&restored);
    }
    assert_eq!(state(&client, &name).await, pb::JobState::Running);
    let left: Vec<_> = files(&dir.path().join("tmp"));
    assert!(left.is_empty(), "a backup leaves files: {left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_restored_whole_or_not_at_all() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (backup, restored) = (other.path().join("backup"), other.path().join("data"));
    assert_fails(&back_up(dir.path(), &backup), 2, &["has no bradley.db"]);
    let mut server = Server::start_with(dir.path(), &models(), &[]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, job(&dataset, 2)).await;
    finish(&client, &name).await;
    assert_succeeds(&back_up(dir.path(), &backup));
    assert_fails(
        &back_up(dir.path(), &backup),
        2,
        &["is not empty", "name a new folder"],
    );
    assert_fails(
        &back_up(dir.path(), &dir.path().join("new")),
        2,
        &["is inside the data directory"],
    );
    let refused = bradley(&["backup", "x", "--database-url", "postgres://localhost/x"]);
    assert_fails(&refused, 2, &["pg_dump"]);

    // The target is refused while a server runs in it, and if it has files.
    let running = restore(&backup, dir.path());
    assert_fails(&running, 1, &["already uses the data directory"]);
    assert!(server.terminate(LIMIT).success());
    assert_fails(&restore(&backup, dir.path()), 2, &["is not empty"]);
    assert_fails(&restore(dir.path(), &restored), 2, &["manifest.json"]);

    // Each file of the backup is compared with its hash before anything is in its place.
    let all = files(&backup);
    assert!(
        all.len() > 4,
        "the backup has no database, dataset and checkpoint: {all:?}"
    );
    for file in all.iter().filter(|f| !f.ends_with("manifest.json")) {
        let original = std::fs::read(file).unwrap();
        let mut changed = original.clone();
        changed[original.len() / 2] ^= 1;
        std::fs::write(file, changed).unwrap();
        let refused = restore(&backup, &restored);
        assert_fails(&refused, 1, &[text(file), "has changed since the backup"]);
        std::fs::write(file, original).unwrap();
        assert_eq!(files(&restored), [restored.join("bradley.lock")]);
    }
    std::fs::rename(&all[1], other.path().join("aside")).unwrap();
    assert_fails(&restore(&backup, &restored), 1, &["is missing"]);
    std::fs::rename(other.path().join("aside"), &all[1]).unwrap();
    assert_succeeds(&restore(&backup, &restored));

    // A restore that was killed leaves a folder that no server uses.
    std::fs::create_dir(restored.join("restoring")).unwrap();
    let said = refused_start(&restored, &[]);
    assert!(said.contains("was interrupted"), "{said}");
    std::fs::remove_dir(restored.join("restoring")).unwrap();
    let server = Server::start_with(&restored, &models(), &[]);
    another_succeeds(&server.client().await, &dataset).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_names_what_the_data_directory_itself_lacks() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start_with(dir.path(), &models(), &[]);
    let client = server.client().await;
    let lost = upload(&client, "pairs.jsonl").await.name;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, job(&dataset, 2)).await;
    finish(&client, &name).await;
    std::fs::remove_file(dir.path().join(&lost)).unwrap();
    let weights = files(&dir.path().join("jobs"))
        .into_iter()
        .find(|f| f.ends_with("adapter_model.safetensors"))
        .unwrap();
    crate::support::perturb_weights(weights);
    let backup = other.path().join("backup");
    let checkpoint = format!("{name}/checkpoints/2: ");
    let said = back_up(dir.path(), &backup);
    assert_fails(
        &said,
        1,
        &["lacks 2 of the files", &lost, &checkpoint, "checksum"],
    );
    // The rest is in the backup.
    let restored = other.path().join("data");
    assert_succeeds(&restore(&backup, &restored));
    let server = Server::start_with(&restored, &models(), &[]);
    another_succeeds(&server.client().await, &dataset).await;
}

/// Returns the folders of unfinished backups below `folder`, as soon as each has its locked file.
fn unfinished(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut found: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "partial"))
        .filter(|path| path.join("in-use").exists())
        .collect();
    found.sort();
    found
}

/// Starts a backup and stops its process in the middle of its work.
fn stopped_backup(data_dir: &Path, target: &Path) -> Child {
    let folder = target.parent().unwrap();
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let before = unfinished(folder);
        let mut child = Command::new(crate::support::binary())
            .args(["backup", text(target), "--data-dir", text(data_dir)])
            .env_remove("BRADLEY_DATABASE_URL")
            .spawn()
            .unwrap();
        // A backup of so little takes milliseconds, so this does not sleep.
        while unfinished(folder).len() == before.len() && child.try_wait().unwrap().is_none() {
            std::hint::spin_loop();
        }
        if child.try_wait().unwrap().is_none() {
            signal(child.id(), libc::SIGSTOP);
            until_blocking("the stop", LIMIT, || "TZ".contains(state_of(&child)));
            if state_of(&child) == 'T' && unfinished(folder).len() > before.len() {
                return child;
            }
            signal(child.id(), libc::SIGCONT);
        }
        assert!(child.wait().unwrap().success());
        std::fs::remove_dir_all(target).unwrap();
    }
    panic!("every backup ended before it could be stopped");
}

/// Returns the state of a process: T if it is stopped, Z if it has ended.
fn state_of(child: &Child) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    rest.chars().next().unwrap()
}

#[test]
fn the_folder_of_a_killed_backup_is_removed_by_the_next_and_that_of_a_running_one_stays() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let token = [
        "tokens",
        "create",
        "--owner",
        "ops",
        "--data-dir",
        text(dir.path()),
    ];
    assert_succeeds(&bradley(&token));
    let target = |name: &str| other.path().join(name);
    let mut killed = stopped_backup(dir.path(), &target("killed"));
    let mut running = stopped_backup(dir.path(), &target("running"));
    killed.kill().unwrap();
    killed.wait().unwrap();
    let both = unfinished(other.path());
    assert_eq!(both.len(), 2, "{both:?}");

    assert_succeeds(&back_up(dir.path(), &target("next")));
    let left = unfinished(other.path());
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(text(&left[0]).contains("/.running."), "{left:?}");
    // The backup that was at work meanwhile is complete.
    signal(running.id(), libc::SIGCONT);
    assert!(running.wait().unwrap().success());
    for name in ["running", "next"] {
        assert_succeeds(&restore(&target(name), &target(&format!("{name}-data"))));
    }
    let left: Vec<_> = [other.path(), &dir.path().join("tmp")]
        .into_iter()
        .flat_map(|folder| std::fs::read_dir(folder).unwrap())
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.') || name.starts_with("backup-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!target("next").join("in-use").exists());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_server_moves_from_sqlite_to_postgresql_in_the_middle_of_a_job() {
    let (expected, weights) = expected().await;
    let postgres = Postgres::start();
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let share = tempfile::tempdir().unwrap();
    let (url, artifacts) = (postgres.url(), url_of(share.path()));
    let only_rows = ["migrate", "--to", &url, "--data-dir", text(dir.path())];
    let migrate = || bradley(&[&only_rows[..], &["--artifact-url", &artifacts]].concat());
    assert_fails(&migrate(), 2, &["has no bradley.db"]);
    let mut server = Server::start_with(dir.path(), &models(), &[]);
    assert_fails(&migrate(), 1, &["already uses the data directory"]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let done = submit(&client, job(&dataset.name, 2)).await;
    finish(&client, &done).await;
    let name = submit(&client, checkpointing(&dataset.name, STEPS)).await;
    until_event(&client, &name, |e| is_step(e, 15)).await;
    pause(&client, &name).await;
    until("the pause", LIMIT, async || {
        state(&client, &name).await == pb::JobState::Paused
    })
    .await;
    let histories = [events(&client, &done).await, events(&client, &name).await];
    assert!(server.terminate(LIMIT).success());
    let database = text(dir.path());
    let token = ["tokens", "create", "--owner", "ops", "--data-dir", database];
    assert_succeeds(&bradley(&token));

    // Errors name what was given, without the library's words.
    let nowhere = url.replace("/postgres", "/nosuch");
    let flags = ["--artifact-url", &artifacts, "--data-dir", database];
    let no_database = bradley(&[&["migrate", "--to", &nowhere][..], &flags].concat());
    let why = "\"nosuch\" does not exist: create it, or correct its name";
    assert_fails(
        &no_database,
        1,
        &["the database of --to at 127.0.0.1:", why],
    );
    let said = String::from_utf8_lossy(&no_database.stderr);
    assert!(
        !said.contains("error returned from") && !said.contains("at line"),
        "{said}"
    );

    // Replicas could not find the files, so rows alone are not copied.
    assert_fails(&bradley(&only_rows), 2, &["--artifact-url"]);
    // A database with other columns is refused before any file is copied, and before the SQLite
    // database knows a store.
    let list = [
        "tokens",
        "list",
        "--database-url",
        &url,
        "--data-dir",
        text(other.path()),
    ];
    assert_succeeds(&bradley(&list));
    postgres.sql("ALTER TABLE jobs RENAME COLUMN trace TO other");
    assert_fails(
        &migrate(),
        2,
        &["--to", "table jobs lacks the column trace"],
    );
    assert!(files(share.path()).is_empty());
    postgres.sql("ALTER TABLE jobs RENAME COLUMN other TO trace");
    let moved = migrate();
    assert_succeeds(&moved);
    let said = String::from_utf8_lossy(&moved.stdout);
    for table in ["jobs", "events", "checkpoints", "datasets", "tokens"] {
        assert!(said.contains(table), "{table} is not in {said}");
        let count = postgres.sql(&format!("SELECT COUNT(*) > 0 FROM {table}"));
        assert_eq!(count, ["t"], "{table} is empty");
    }
    let was_moved = ["this database was moved to PostgreSQL on 20", "--undo"];
    assert_fails(&migrate(), 1, &was_moved);
    let old_tokens = ["tokens", "list", "--data-dir", database];
    assert_fails(&bradley(&old_tokens), 1, &was_moved);
    // A copy would be one of a database that no longer changes.
    let refused = back_up(dir.path(), &other.path().join("backup"));
    assert_fails(&refused, 1, &[was_moved[0], "pg_dump", "docs/backup.md"]);
    let elsewhere = ["migrate", "--to", "mysql://x", "--data-dir", database];
    assert_fails(&bradley(&elsewhere), 2, &["postgres://"]);

    // A server on SQLite, even one with the store, would continue the same jobs in both databases.
    for flags in [&[][..], &["--artifact-url", &artifacts]] {
        let said = refused_start(dir.path(), flags);
        assert!(was_moved.iter().all(|part| said.contains(part)), "{said}");
        assert!(!said.contains("set artifact_url"), "{said}");
    }
    // After --undo the server on SQLite still needs the store, and a second move is refused because
    // the database of --to has rows.
    let undo = ["migrate", "--undo", "--data-dir", database];
    assert_succeeds(&bradley(&undo));
    assert_fails(&bradley(&undo), 2, &["was not moved"]);
    let said = refused_start(dir.path(), &[]);
    assert!(said.contains("set artifact_url"), "{said}");
    assert_fails(&migrate(), 2, &["--to", "is not empty"]);
    // A replica on another machine has every file.
    let server = replica(other.path(), &postgres, share.path(), &[]);
    let notices = server.lines_with("already exists, skipping");
    assert!(notices.is_empty(), "{notices:?}");
    let client = server.client().await;
    assert_eq!(
        [events(&client, &done).await, events(&client, &name).await],
        histories
    );
    assert_eq!(datasets(&client).await, std::slice::from_ref(&dataset));
    resume(&client, &name).await.unwrap();
    let events = finish(&client, &name).await;
    check_history(&events);
    assert_eq!(
        losses(&events),
        *expected,
        "other losses than those of an undisturbed run"
    );
    assert!(
        adapter(&client, &name).await == *weights,
        "other weights than those of an undisturbed run"
    );
    // New rows get numbers after the copied ones.
    upload(&client, "pairs.jsonl").await;
    another_succeeds(&client, &dataset.name).await;
}
