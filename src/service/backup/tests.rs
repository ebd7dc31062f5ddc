//! Tests of parts of a backup that need no server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use sqlx::{Connection as _, Executor as _};

use super::*;
use crate::domain::reason::Reason;
use crate::formats::peft;
use crate::service::store::{Store, StoreOptions, moved, sqlite_url};

#[test]
fn only_a_folder_with_a_file_system_on_it_is_a_mount_point() {
    let dir = tempfile::tempdir().unwrap();
    assert!(is_mount_point(Path::new("/proc")));
    assert!(!is_mount_point(dir.path()) && !is_mount_point(&dir.path().join("new")));
    let refused = refuse_mount_point(Path::new("/proc")).unwrap_err();
    assert!(
        refused.to_string().contains("name a new folder below it"),
        "{refused}"
    );
}

#[test]
fn a_target_inside_the_data_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (data, link) = (dir.path().join("data"), dir.path().join("link"));
    fs::create_dir(&data).unwrap();
    std::os::unix::fs::symlink(&data, &link).unwrap();
    for inside in [data.join("new"), data.join("a/b"), link.join("new")] {
        let said = refuse_inside(&data, &inside).unwrap_err().to_string();
        assert!(said.contains("is inside the data directory"), "{said}");
    }
    for outside in ["data-2", "a/b", "data/../new"] {
        refuse_inside(&data, &dir.path().join(outside)).unwrap();
    }
}

/// The complete backup could not take the place of a folder with a file.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_with_the_lock_file_of_a_data_directory_is_refused_before_the_copy() {
    let dir = tempfile::tempdir().unwrap();
    let (data, target) = (dir.path().join("data"), dir.path().join("backup"));
    fs::create_dir(&data).unwrap();
    let options = StoreOptions::default();
    Store::open(&data, &options).await.unwrap().close().await;
    fs::create_dir(&target).unwrap();
    fs::write(target.join(LOCK_FILE), "").unwrap();
    let refused = back_up(&data, &target).await.unwrap_err().to_string();
    assert!(
        refused.contains("is not empty (it has bradley.lock)"),
        "{refused}"
    );
    check_empty("--data-dir", &target, &IGNORED).unwrap();
    fs::remove_file(target.join(LOCK_FILE)).unwrap();
    back_up(&data, &target).await.unwrap();
    assert!(target.join(MANIFEST_FILE).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_was_moved_to_postgresql_is_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    let (data, target) = (dir.path().join("data"), dir.path().join("backup"));
    fs::create_dir(&data).unwrap();
    let options = StoreOptions::default();
    let store = Store::open(&data, &options).await.unwrap();
    let mark = moved::mark("2026-11-30T10:00:00Z", "postgres://a:secret@db/jobs");
    store.set_property_once(moved::MOVED, &mark).await.unwrap();
    store.close().await;
    match back_up(&data, &target).await {
        Err(ServiceError::FailedPrecondition { reason, message }) => {
            assert_eq!(reason, Reason::DatabaseMoved);
            let wanted = "moved to PostgreSQL on 2026-11-30 (db:5432/jobs): back up that";
            assert!(message.contains(wanted), "{message}");
        }
        other => panic!("{other:?}"),
    }
    assert!(!target.exists());
}

#[test]
fn an_adapter_that_a_job_starts_from_is_compared_with_its_hash() {
    let dir = tempfile::tempdir().unwrap();
    let (links, backup) = (dir.path().join("links"), dir.path().join("backup"));
    fs::create_dir_all(&backup).unwrap();
    fs::write(backup.join(DATABASE_FILE), "rows").unwrap();
    let mut jobs = Vec::new();
    for job in ["same", "changed", "lost", "without"] {
        let folder = links.join(format!("{JOBS_FOLDER}/{job}/{INIT_ADAPTER}"));
        fs::create_dir_all(&folder).unwrap();
        for name in [peft::CONFIG_FILE, peft::WEIGHTS_FILE] {
            fs::write(folder.join(name), format!("{name} of {job}")).unwrap();
        }
        let hash = hash_adapter(&folder).unwrap();
        jobs.push((job.to_owned(), (job != "without").then_some(hash)));
        match job {
            "changed" => fs::write(folder.join(peft::WEIGHTS_FILE), "other").unwrap(),
            "lost" => fs::remove_dir_all(&folder).unwrap(),
            _ => {}
        }
    }
    let snapshot = Snapshot {
        migration: 1,
        artifact_store: None,
        jobs,
        datasets: Vec::new(),
        checkpoints: Vec::new(),
    };
    let (files, missing) = copy_files(&snapshot, &links, &backup).unwrap();
    assert_eq!(
        missing,
        [
            "trainingJobs/changed's init_adapter: its files have changed",
            "trainingJobs/lost's init_adapter: its files are missing or cannot be read",
        ]
    );
    assert_eq!(files.len(), 1 + 3 * 2, "{files:?}");
}

/// Writers wait while links are made, and go on while a large database is copied.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_attempt_lets_the_server_write_once_the_copy_has_begun() {
    let dir = tempfile::tempdir().unwrap();
    Store::open(dir.path(), &StoreOptions::default())
        .await
        .unwrap()
        .close()
        .await;
    let url = sqlite_url(&dir.path().join(DATABASE_FILE), "rw");
    let mut writer = sqlx::AnyConnection::connect(&url).await.unwrap();
    for statement in [
        "PRAGMA busy_timeout = 30000",
        "PRAGMA synchronous = OFF",
        "CREATE TABLE filler (text TEXT)",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)
         INSERT INTO filler SELECT hex(randomblob(1500)) FROM n",
    ] {
        writer.execute(statement).await.unwrap();
    }
    let live = LiveDatabase::open(dir.path()).await.unwrap();
    let copy = dir.path().join("copy.db");
    let (is_over, during) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU32::new(0)),
    );
    let writing = {
        let (is_over, during, copy) = (is_over.clone(), during.clone(), copy.clone());
        tokio::spawn(async move {
            while !is_over.load(Ordering::SeqCst) {
                let has_begun = fs::metadata(&copy).is_ok_and(|m| m.len() > 0);
                writer
                    .execute("INSERT INTO filler VALUES ('late')")
                    .await
                    .unwrap();
                if has_begun && !is_over.load(Ordering::SeqCst) {
                    during.fetch_add(1, Ordering::SeqCst);
                }
            }
        })
    };
    copy_blocked(&live, &copy, async || Ok(())).await.unwrap();
    is_over.store(true, Ordering::SeqCst);
    writing.await.unwrap();
    let written = during.load(Ordering::SeqCst);
    assert!(written >= 3, "{written} writes during the copy");
    Snapshot::read(&copy).await.unwrap();
}
