//! Tests of the rule for migrations: each names the oldest version that may use the database.

use std::path::Path;

use super::super::{Store, StoreOptions};
use super::*;

/// The migration that creates the table `migration_readers`, in SQLite and in PostgreSQL. It and
/// every later one must insert its row there.
const FIRST: [(&str, i64); 2] = [("sqlite", 6), ("postgres", 4)];

fn reader(migration: i64, reader: i64, release: &str) -> (i64, i64, String) {
    (migration, reader, release.to_owned())
}

/// Returns number and text of the migrations that must name a reader.
fn migrations(dialect: &str, first: i64) -> Vec<(i64, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/service/migrations")
        .join(dialect);
    let mut all: Vec<(i64, String)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let number = name.split_once('_').unwrap().0.parse().unwrap();
            (number, std::fs::read_to_string(path).unwrap())
        })
        .filter(|(number, _)| *number >= first)
        .collect();
    all.sort();
    all
}

/// Returns the reader and its release that a migration inserts for itself.
fn inserted(number: i64, text: &str) -> (i64, String) {
    const INSERT: &str =
        "INSERT INTO migration_readers (migration, reader, reader_release) VALUES (";
    let values = text
        .split_once(INSERT)
        .and_then(|(_, rest)| rest.split_once(')'))
        .unwrap_or_else(|| panic!("migration {number} does not insert its row: {INSERT}…)"))
        .0;
    let values: Vec<&str> = values.split(',').map(str::trim).collect();
    assert_eq!(values[0].parse(), Ok(number), "the row is another's");
    let release = values[2].trim_matches('\'').to_owned();
    (values[1].parse().unwrap(), release)
}

#[test]
fn every_migration_names_its_oldest_reader_in_both_databases() {
    let [sqlite, postgres] = FIRST.map(|(dialect, first)| {
        let all = migrations(dialect, first);
        assert_eq!(all[0].0, first, "{dialect}");
        all.iter()
            .map(|(number, text)| {
                let (reader, release) = inserted(*number, text);
                assert!(reader <= *number, "{dialect}: migration {number}");
                (reader - first, release)
            })
            .collect::<Vec<_>>()
    });
    assert_eq!(
        sqlite, postgres,
        "the databases disagree on the versions that may use them"
    );
}

#[tokio::test]
async fn a_new_database_names_a_reader_for_each_migration() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), &StoreOptions::default())
        .await
        .unwrap();
    let select = "SELECT COUNT(*) FROM _sqlx_migrations m LEFT JOIN migration_readers r
                  ON r.migration = m.version WHERE m.version >= $1 AND r.migration IS NULL";
    let silent: i64 = sqlx::query_scalar(select)
        .bind(FIRST[0].1)
        .fetch_one(&store.writer)
        .await
        .unwrap();
    assert_eq!(silent, 0);
}

#[test]
fn a_newer_migration_decides_whether_this_version_may_use_the_database() {
    let additive = [reader(7, 5, "0.2.0"), reader(8, 6, "0.3.0")];
    assert_eq!(refusal(6, &[7, 8], &additive), None);

    let breaking = [reader(7, 5, "0.2.0"), reader(8, 8, "0.5.0")];
    let message = refusal(6, &[7, 8], &breaking).unwrap();
    assert!(
        message.contains("migration 8") && message.contains("start Bradley 0.5.0 or newer"),
        "{message}"
    );

    // An additive migration does not hide the breaking one before it.
    let later = [reader(7, 7, "0.4.0"), reader(8, 6, "0.3.0")];
    let message = refusal(6, &[7, 8], &later).unwrap();
    assert!(message.contains("start Bradley 0.4.0"), "{message}");

    let message = refusal(6, &[7, 8], &additive[..1]).unwrap();
    assert!(message.contains("migration 8"), "{message}");
    assert!(message.contains("does not say"), "{message}");
}
