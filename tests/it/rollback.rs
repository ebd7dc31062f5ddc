//! Rollback by one version: a newer version has migrated the database while a job runs, and this
//! version continues the job. The newer version is this binary on a database with migrations that
//! it does not know. One of them allows this version, another does not.

use std::path::Path;

use sqlx::Connection as _;
use sqlx::migrate::Migrator;

use bradley::rpc::pb;

use crate::backends::Postgres;
use crate::replicas::{adapter, check_history, checkpointing};
use crate::server::{Server, finish, is_step, losses, state, submit, until_event, upload};
use crate::store_safety::{
    LIMIT, STEPS, another_succeeds, expected, models, refused_start, replica, url_of,
};
use crate::support::copy_files;

/// Statements of a migration that only adds something.
const ADDITIVE: &str = "
    CREATE TABLE future (id TEXT NOT NULL PRIMARY KEY);
    ALTER TABLE jobs ADD COLUMN future TEXT NOT NULL DEFAULT 'x';
    ALTER TABLE events ADD COLUMN future TEXT;
    ALTER TABLE checkpoints ADD COLUMN future TEXT NOT NULL DEFAULT 'x';
    ALTER TABLE datasets ADD COLUMN future TEXT;
    CREATE INDEX jobs_by_future ON jobs (future);";
/// Statements of a migration with which this version could not work.
const BREAKING: &str = "ALTER TABLE jobs RENAME COLUMN turn TO place;";

/// A database of either kind.
enum Database {
    Sqlite,
    Postgres(Postgres),
}

/// A server's folders and its database.
struct Installation {
    database: Database,
    dir: tempfile::TempDir,
    share: tempfile::TempDir,
}

impl Installation {
    fn new(database: Database) -> Self {
        Installation {
            database,
            dir: tempfile::tempdir().unwrap(),
            share: tempfile::tempdir().unwrap(),
        }
    }

    fn start(&self) -> Server {
        match &self.database {
            Database::Sqlite => Server::start_with(self.dir.path(), &models(), &[]),
            Database::Postgres(postgres) => {
                replica(self.dir.path(), postgres, self.share.path(), &[])
            }
        }
    }

    /// Starts a server that must refuse to serve, and returns its log.
    fn refused(&self) -> String {
        match &self.database {
            Database::Sqlite => refused_start(self.dir.path(), &[]),
            Database::Postgres(postgres) => {
                let (database, artifacts) = (postgres.url(), url_of(self.share.path()));
                let flags = ["--database-url", &database, "--artifact-url", &artifacts];
                refused_start(self.dir.path(), &flags)
            }
        }
    }

    /// Applies this version's migrations and then newer ones, each with the statement that says who
    /// may still use the database, as a newer version does when it starts.
    async fn migrate(&self, newer: &[(&str, Reader)]) {
        let (dialect, url) = match &self.database {
            Database::Sqlite => {
                let file = self.dir.path().join("bradley.db");
                ("sqlite", format!("sqlite://{}", file.display()))
            }
            Database::Postgres(postgres) => ("postgres", postgres.url()),
        };
        let ours = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("src/service/migrations")
            .join(dialect);
        let folder = tempfile::tempdir().unwrap();
        copy_files(&ours, folder.path());
        let newest = std::fs::read_dir(ours).unwrap().count();
        for (i, (statements, reader)) in newer.iter().enumerate() {
            let number = newest + 1 + i;
            let insert = match reader {
                Reader::This => format!(
                    "INSERT INTO migration_readers (migration, reader, reader_release)
                     VALUES ({number}, {newest}, '0.2.0');"
                ),
                Reader::Newer(release) => format!(
                    "INSERT INTO migration_readers (migration, reader, reader_release)
                     VALUES ({number}, {number}, '{release}');"
                ),
                Reader::Unsaid => String::new(),
            };
            let file = folder.path().join(format!("{number:04}_newer.sql"));
            std::fs::write(file, format!("{statements}\n{insert}")).unwrap();
        }
        sqlx::any::install_default_drivers();
        let mut connection = sqlx::AnyConnection::connect(&url).await.unwrap();
        let migrator = Migrator::new(folder.path()).await.unwrap();
        assert_eq!(migrator.iter().count(), newest + newer.len());
        migrator.run(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }
}

/// The oldest version that may use the database after a migration.
#[derive(Clone, Copy)]
enum Reader {
    /// This version.
    This,
    /// A newer one, by its release.
    Newer(&'static str),
    /// The migration does not say.
    Unsaid,
}

/// Checks that a job continues bit for bit when its server is upgraded and rolled back.
async fn assert_job_survives_rollback(installation: &Installation) {
    let (expected, weights) = expected().await;
    let mut server = installation.start();
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let name = submit(&client, checkpointing(&dataset, STEPS)).await;
    until_event(&client, &name, |e| is_step(e, 12)).await;
    assert_eq!(state(&client, &name).await, pb::JobState::Running);

    // The upgrade: the old server is stopped, and the newer one continues the job.
    assert!(server.terminate(LIMIT).success());
    installation.migrate(&[(ADDITIVE, Reader::This)]).await;
    let mut newer = installation.start();
    let client = newer.client().await;
    until_event(&client, &name, |e| is_step(e, 42)).await;
    assert_eq!(state(&client, &name).await, pb::JobState::Running);

    // The rollback, while the job runs; the newer server ends by a crash.
    newer.kill();
    let mut server = installation.start();
    assert!(server.has_logged("this version may still use it"));
    let client = server.client().await;
    let events = finish(&client, &name).await;
    assert_eq!(state(&client, &name).await, pb::JobState::Succeeded);
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
    another_succeeds(&client, &dataset).await;
    assert!(server.terminate(LIMIT).success());
}

/// Checks that a server does not start on a database that it could not use, and says what to do.
async fn assert_refused(installation: &Installation) {
    assert!(installation.start().terminate(LIMIT).success());
    let additive = (ADDITIVE, Reader::This);
    let breaking = (BREAKING, Reader::Newer("9.8.0"));
    installation.migrate(&[additive, breaking]).await;
    let said = installation.refused();
    for part in [
        "a newer version of Bradley has migrated this database",
        "start Bradley 9.8.0 or newer",
        "restore the backup",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_continues_bit_for_bit_after_a_rollback_on_sqlite() {
    assert_job_survives_rollback(&Installation::new(Database::Sqlite)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_job_continues_bit_for_bit_after_a_rollback_on_postgresql() {
    let postgres = Database::Postgres(Postgres::start());
    assert_job_survives_rollback(&Installation::new(postgres)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_names_the_release_that_a_newer_sqlite_database_needs() {
    assert_refused(&Installation::new(Database::Sqlite)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES)"]
async fn a_server_names_the_release_that_a_newer_postgresql_database_needs() {
    assert_refused(&Installation::new(Database::Postgres(Postgres::start()))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_does_not_start_on_a_migration_that_does_not_name_its_readers() {
    let installation = Installation::new(Database::Sqlite);
    assert!(installation.start().terminate(LIMIT).success());
    installation.migrate(&[(ADDITIVE, Reader::Unsaid)]).await;
    let said = installation.refused();
    assert!(said.contains("does not say that this version"), "{said}");
}
