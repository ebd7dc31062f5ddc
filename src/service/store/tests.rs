//! Tests of jobs that wait, of expired jobs, of jobs that another version wrote, of the size of an
//! owner's datasets, and of pages.

use std::collections::BTreeMap;

use serde_json::Value;

use super::jobs::{Creation, ExpiredPosition};
use super::*;
use crate::domain::access::Caller;
use crate::domain::dataset::{Dataset, DatasetFormat, ValidationReport};
use crate::domain::dpo::{Divergence, ReferenceSync};
use crate::domain::identity::{ModelIdentity, Pins};
use crate::domain::job::{Evaluation, Job, JobRequest, JobState, Metrics, Progress, RowPolicy};
use crate::domain::names::{CheckpointRef, PolicyName};
use crate::domain::reason::Reason;
use crate::domain::training::{LoraConfig, Method, ScheduleKind, TrainingSpec};
use crate::service::in_use::{Needed, check};

const DATASET: &str = "0f0e0d0c";

/// Opens a store with one dataset in a folder of its own.
async fn open() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), &StoreOptions::default())
        .await
        .unwrap();
    let insert = "INSERT INTO datasets (id, display_name, format, size_bytes, content_hash, \
                  report, create_time, owner)
                  VALUES ($1, '', '\"jsonl\"', 0, '', '{}', 0, '')";
    sqlx::query(insert)
        .bind(DATASET)
        .execute(&store.writer)
        .await
        .unwrap();
    (dir, store)
}

fn request(priority: i32) -> JobRequest {
    JobRequest {
        display_name: String::new(),
        labels: BTreeMap::new(),
        priority,
        model: None,
        pins: None,
        policy: PolicyName::Model("tiny".into()),
        reference: None,
        dataset: DATASET.into(),
        evaluation: Evaluation::None,
        spec: TrainingSpec::default(),
        row_policy: RowPolicy::Reject,
        given_lora: Default::default(),
        chat_template_kwargs: Default::default(),
        ttl_ms: None,
    }
}

fn job(id: &str, request: JobRequest) -> Job {
    Job {
        id: id.into(),
        version: 1,
        request,
        state: JobState::Queued,
        error: None,
        progress: Progress::default(),
        latest_metrics: Metrics::new(),
        skipped_rows: Vec::new(),
        create_time: 1,
        start_time: None,
        end_time: None,
        queued_since: 1,
        worker: None,
        owner: "a".into(),
        trace: None,
    }
}

async fn insert(store: &Store, job: &Job, request_id: Option<&str>) {
    let creation = Creation {
        request_id,
        request_hash: "",
        quota: None,
    };
    assert_eq!(store.insert_job(job, creation).await.unwrap().id, job.id);
}

async fn run(store: &Store, sql: &str) {
    sqlx::query(AssertSqlSafe(sql.to_owned()))
        .execute(&store.writer)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_job_that_waits_for_something_preempts_nobody_and_is_still_tried() {
    let (_dir, store) = open().await;
    insert(&store, &job("low", request(1)), None).await;
    insert(&store, &job("high", request(9)), None).await;
    let next = async || store.next_queued(&[]).await.unwrap().map(|job| job.id);
    assert_eq!(next().await.as_deref(), Some("high"));
    run(
        &store,
        r#"UPDATE jobs SET error = '{"reason":"MODEL_CHANGED","message":"?"}' WHERE id = 'high'"#,
    )
    .await;
    assert_eq!(next().await.as_deref(), Some("low"));
    run(&store, "UPDATE jobs SET state = 'paused' WHERE id = 'low'").await;
    assert_eq!(next().await, None);
    // A free device claims the job, which clears its error.
    let (claimed, ..) = store.claim(&[]).await.unwrap().unwrap();
    assert_eq!((claimed.id.as_str(), claimed.error), ("high", None));
}

#[tokio::test]
async fn the_newest_events_are_those_that_are_still_stored() {
    let (_dir, store) = open().await;
    insert(&store, &job("j", request(0)), None).await;
    for sequence in 2..=9 {
        let event = format!("INSERT INTO events VALUES ('j', {sequence}, 0, '{{}}')");
        run(&store, &event).await;
    }
    run(&store, "DELETE FROM events WHERE sequence <= 4").await;
    let before = async |job, n| store.sequence_before_newest(job, n).await.unwrap();
    assert_eq!(before("j", 1).await, 8);
    assert_eq!(before("j", 3).await, 6);
    assert_eq!(before("j", 100).await, 4, "older ones are deleted");
    assert_eq!(before("another", 5).await, 0);
}

#[tokio::test]
async fn a_request_id_is_known_to_its_owner_alone() {
    let (_dir, store) = open().await;
    insert(&store, &job("one", request(0)), Some("once")).await;
    assert!(store.has_created("a", Some("once")).await.unwrap());
    assert!(!store.has_created("a", Some("twice")).await.unwrap());
    assert!(!store.has_created("b", Some("once")).await.unwrap());
    assert!(!store.has_created("a", None).await.unwrap());
}

#[tokio::test]
async fn expired_jobs_are_listed_page_by_page_though_none_of_them_is_deleted() {
    let (_dir, store) = open().await;
    for i in 0..7 {
        insert(&store, &job(&format!("job-{i}"), request(0)), None).await;
    }
    // Two jobs expired at the same time; one has not expired yet.
    run(
        &store,
        "UPDATE jobs SET state = 'succeeded', expire_time = CASE WHEN seq < 4 THEN 3 ELSE seq END",
    )
    .await;
    run(
        &store,
        "UPDATE jobs SET expire_time = 9000000000000 WHERE id = 'job-6'",
    )
    .await;
    let (mut after, mut pages) = (ExpiredPosition::default(), Vec::new());
    for _ in 0..4 {
        let (page, next) = store.expired_jobs(after, 2).await.unwrap();
        pages.push(page);
        after = next;
    }
    let expected = [
        &["job-0", "job-1"][..],
        &["job-2", "job-3"],
        &["job-4", "job-5"],
        &[],
    ];
    assert_eq!(pages, expected);
    assert_eq!(
        after,
        ExpiredPosition::default(),
        "after the last page it begins anew"
    );
    let (all, after) = store.expired_jobs(after, 100).await.unwrap();
    assert_eq!((all.len(), after), (6, ExpiredPosition::default()));
}

#[tokio::test]
async fn a_job_that_kills_its_workers_fails_with_the_farthest_step() {
    let (_dir, store) = open().await;
    insert(&store, &job("j", request(0)), None).await;
    // An earlier run reached step 50. The last one continued from a checkpoint before it.
    run(
        &store,
        "UPDATE jobs SET state = 'running', progress = json_set(progress, '$.step', 42), \
         reclaims = 5, reclaim_step = 50 WHERE id = 'j'",
    )
    .await;
    let reclaimed = store.reclaim(true).await.unwrap();
    assert_eq!(reclaimed[0].0.state, JobState::Failed);
    let error = reclaimed[0].0.error.as_ref().unwrap();
    assert_eq!(error.reason, Reason::WorkerLost);
    assert!(
        error.message.contains("beyond step 50"),
        "{}",
        error.message
    );
}

// ---- jobs written by another version

/// Returns a request in which every optional part is present.
fn whole_request() -> JobRequest {
    let mut whole = request(0);
    whole.labels.insert("a".into(), "b".into());
    whole.model = Some("tiny".into());
    whole.pins = Some(Pins {
        base: ModelIdentity::default(),
        init_adapter: Some("c".into()),
        ..Pins::default()
    });
    whole.policy = PolicyName::Checkpoint {
        job: "first".into(),
        which: CheckpointRef::Step(3),
    };
    whole.reference = Some(PolicyName::Checkpoint {
        job: "other".into(),
        which: CheckpointRef::Step(4),
    });
    whole.evaluation = Evaluation::Dataset("held-out".into());
    whole.spec.dpo.divergence = Divergence::Alpha { alpha: 0.5 };
    whole.spec.dpo.reference_sync = Some(ReferenceSync {
        alpha: 0.5,
        every_steps: 2,
    });
    whole.spec.optimizer.schedule = ScheduleKind::CosineWithFloor { min_ratio: 0.1 };
    whole.spec.method = Method::Lora(LoraConfig {
        init_adapter: Some("x".into()),
        ..LoraConfig::default()
    });
    whole.ttl_ms = Some(1);
    whole
}

/// Collects the paths of all objects in a JSON value.
fn objects(value: &Value, path: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            found.push(path.to_owned());
            fields
                .iter()
                .for_each(|(name, field)| objects(field, &format!("{path}/{name}"), found));
        }
        Value::Array(items) => {
            items
                .iter()
                .enumerate()
                .for_each(|(i, item)| objects(item, &format!("{path}/{i}"), found));
        }
        _ => {}
    }
}

#[test]
fn a_setting_that_this_version_does_not_know_makes_a_request_unreadable_wherever_it_is() {
    let whole = serde_json::to_value(whole_request()).unwrap();
    serde_json::from_value::<JobRequest>(whole.clone()).unwrap();
    let mut parts = Vec::new();
    objects(&whole, "", &mut parts);
    let expected = [
        "/spec/dpo/losses/0",
        "/spec/dpo/divergence",
        "/spec/method",
        "/pins/base",
        "/policy/checkpoint",
        "/spec/run",
    ];
    assert!(
        expected
            .iter()
            .all(|part| parts.iter().any(|found| found == part)),
        "{parts:?}"
    );
    for part in parts.iter().filter(|part| *part != "/labels") {
        let mut newer = whole.clone();
        newer.pointer_mut(part).unwrap()["from_the_future"] = 1.into();
        let read = serde_json::from_value::<JobRequest>(newer);
        assert!(
            read.is_err(),
            "an unknown field in {part:?} is accepted and lost: add deny_unknown_fields to its type"
        );
    }
}

#[tokio::test]
async fn an_unreadable_job_stays_and_keeps_what_it_needs() {
    let (_dir, store) = open().await;
    for (first, step) in [("first", 3), ("other", 4)] {
        insert(&store, &job(first, request(0)), None).await;
        run(
            &store,
            &format!("UPDATE jobs SET state = 'succeeded' WHERE id = '{first}'"),
        )
        .await;
        let row =
            format!("INSERT INTO checkpoints VALUES ('{first}', {step}, 0, 1, 1, '{{}}', 1, '')");
        run(&store, &row).await;
    }
    let held_out = "INSERT INTO datasets (id, display_name, format, size_bytes, content_hash, \
                    report, create_time, owner)
                    SELECT 'held-out', '', format, 0, '', report, 0, '' FROM datasets";
    run(&store, held_out).await;
    run(
        &store,
        &held_out
            .replace("'held-out'", "'unused'")
            .replace("FROM datasets", "FROM datasets LIMIT 1"),
    )
    .await;
    insert(&store, &job("newer", whole_request()), None).await;
    run(
        &store,
        "UPDATE jobs SET request = json_set(request, '$.spec.batch.from_the_future', 1) WHERE id = \
         'newer'",
    )
    .await;

    let unreadable = |e: ServiceError| {
        matches!(
            e,
            ServiceError::FailedPrecondition {
                reason: Reason::JobUnreadable,
                ..
            }
        )
    };
    assert!(unreadable(store.job("newer").await.unwrap_err()));
    assert!(
        store.claim(&[]).await.unwrap().is_none(),
        "a job is claimed although its setting is unknown"
    );
    assert_eq!(store.unreadable_jobs().await.unwrap(), 1);

    let in_use = |r: Result<()>| {
        assert!(
            matches!(
                &r,
                Err(ServiceError::FailedPrecondition {
                    reason: Reason::InUse,
                    ..
                })
            ),
            "{r:?}"
        )
    };
    let admin = Caller::unrestricted();
    for dataset in [DATASET, "held-out"] {
        in_use(
            store
                .delete_dataset(dataset, |users| {
                    check(&admin, users, Needed::Dataset(dataset))
                })
                .await,
        );
    }
    for (job, step) in [("first", 3), ("other", 4)] {
        let needed = |step| Needed::Weights { job, step };
        in_use(
            store
                .delete_checkpoint(job, step, |users| check(&admin, users, needed(Some(step))))
                .await,
        );
        in_use(
            store
                .delete_job(job, false, |_, users| check(&admin, users, needed(None)))
                .await,
        );
        assert_eq!(store.checkpoints(job).await.unwrap().len(), 1);
    }
    store
        .delete_dataset("unused", |users| {
            check(&admin, users, Needed::Dataset("unused"))
        })
        .await
        .unwrap();
}

/// Adds a dataset of 60 bytes, with which the owner's datasets may have at most 100.
async fn insert_within_100(store: &Store, id: &str, owner: &str) -> Result<()> {
    let dataset = Dataset {
        id: id.into(),
        display_name: String::new(),
        format: DatasetFormat::Jsonl,
        size_bytes: 60,
        content_hash: String::new(),
        report: ValidationReport::default(),
        create_time: 0,
        owner: owner.into(),
    };
    let refuse = |used: u64| match used + 60 <= 100 {
        true => Ok(()),
        false => Err(ServiceError::internal(format!("{used} bytes are used"))),
    };
    store.insert_dataset(&dataset, refuse).await
}

#[tokio::test]
async fn datasets_that_are_stored_at_the_same_moment_stay_within_the_limit_together() {
    let (_dir, store) = open().await;
    let (a, b, other) = tokio::join!(
        insert_within_100(&store, "1", "a"),
        insert_within_100(&store, "2", "a"),
        insert_within_100(&store, "3", "b"),
    );
    other.unwrap();
    assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
    let refused = a.and(b).unwrap_err().to_string();
    assert_eq!(refused, "60 bytes are used", "without its own");
    assert_eq!(store.dataset_bytes("a").await.unwrap(), 60);
    assert_eq!(store.dataset_bytes("b").await.unwrap(), 60);
}

#[tokio::test]
async fn only_postgresql_may_still_store_a_row_after_its_connection_broke() {
    let (_dir, sqlite) = open().await;
    let postgres = Store {
        dialect: Dialect::Postgres,
        ..sqlite.clone()
    };
    let broken = ServiceError::from(sqlx::Error::WorkerCrashed);
    assert!(postgres.may_still_insert(&broken));
    assert!(!postgres.may_still_insert(&ServiceError::DeadlineExceeded));
    assert!(!sqlite.may_still_insert(&broken));
}

#[test]
fn a_database_without_a_connection_is_explained() {
    match ServiceError::from(sqlx::Error::PoolTimedOut) {
        ServiceError::Unavailable {
            reason, message, ..
        } => {
            assert_eq!(reason, Reason::StoreUnavailable);
            assert_eq!(
                message,
                "the database gave no connection within 5 seconds: check that it runs and answers, \
                 and how many connections it allows"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn lists_are_paged_newest_first_and_by_owner() {
    let (_dir, store) = open().await;
    for i in 0..5 {
        let owner = if i == 2 { "b" } else { "a" };
        insert(
            &store,
            &Job {
                owner: owner.into(),
                ..job(&format!("job-{i}"), request(0))
            },
            None,
        )
        .await;
    }
    let (mut token, mut pages) = (String::new(), Vec::new());
    loop {
        let page = store
            .jobs(Some("a"), &[JobState::Queued], 2, &token)
            .await
            .unwrap();
        pages.push(page.items.into_iter().map(|job| job.id).collect::<Vec<_>>());
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(pages, [["job-4", "job-3"], ["job-1", "job-0"]]);
    let everyone = store.jobs(None, &[], 5, "").await.unwrap();
    assert_eq!(
        (everyone.items.len(), everyone.next_page_token.as_str()),
        (5, "")
    );
    assert!(
        store
            .jobs(None, &[JobState::Paused], 5, "")
            .await
            .unwrap()
            .items
            .is_empty()
    );
    assert!(store.jobs(None, &[], 5, "x").await.is_err());
}

#[tokio::test]
async fn a_page_ends_before_its_rows_are_too_large_for_an_answer() {
    let (_dir, store) = open().await;
    let large = Value::String("x".repeat(PAGE_BYTES / 5 * 2));
    for i in 0..9 {
        let mut request = request(0);
        // The fifth job alone is larger than a page.
        let texts = if i == 4 { 4 } else { 1 };
        request.chat_template_kwargs = (0..texts)
            .map(|n| (format!("text{n}"), large.clone()))
            .collect();
        insert(&store, &job(&format!("job-{i}"), request), None).await;
    }
    let (mut token, mut pages) = (String::new(), Vec::new());
    loop {
        let page = store.jobs(None, &[], 1000, &token).await.unwrap();
        pages.push(page.items.into_iter().map(|job| job.id).collect::<Vec<_>>());
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    let expected: [&[&str]; 5] = [
        &["job-8", "job-7"],
        &["job-6", "job-5"],
        &["job-4"],
        &["job-3", "job-2"],
        &["job-1", "job-0"],
    ];
    assert_eq!(pages, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_was_moved_is_opened_only_after_its_mark_is_removed() {
    let (dir, store) = open().await;
    let mark = moved::mark("2026-11-30T10:00:00Z", "postgres://a:secret@db/jobs");
    store.set_property_once(moved::MOVED, &mark).await.unwrap();
    store.close().await;
    match Store::open(dir.path(), &StoreOptions::default()).await {
        Err(ServiceError::FailedPrecondition { reason, message }) => {
            assert_eq!(reason, Reason::DatabaseMoved);
            let wanted = "moved to PostgreSQL on 2026-11-30 (db:5432/jobs): start servers with";
            assert!(message.contains(wanted), "{message}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was opened"),
    }
    let live = snapshot::LiveDatabase::open(dir.path()).await.unwrap();
    assert!(live.check_not_moved().await.is_err());
    assert!(live.remove_moved_mark().await.unwrap());
    assert!(!live.remove_moved_mark().await.unwrap());
    live.check_not_moved().await.unwrap();
    let store = Store::open(dir.path(), &StoreOptions::default()).await;
    store.unwrap().close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_was_moved_is_not_migrated() {
    let (dir, store) = open().await;
    let mark = moved::mark("2026-11-30T10:00:00Z", "postgres://a:secret@db/jobs");
    store.set_property_once(moved::MOVED, &mark).await.unwrap();
    // As if the database had last been used by a version without the newest migration. To apply it
    // again would fail, because its table is there.
    let forget = "DELETE FROM _sqlx_migrations
                  WHERE version = (SELECT MAX(version) FROM _sqlx_migrations)";
    sqlx::query(forget).execute(&store.writer).await.unwrap();
    store.close().await;
    match Store::open(dir.path(), &StoreOptions::default()).await {
        Err(ServiceError::FailedPrecondition { reason, .. }) => {
            assert_eq!(reason, Reason::DatabaseMoved);
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was opened"),
    }
    let left = snapshot::Snapshot::read(&dir.path().join(DATABASE_FILE)).await;
    let known = newest(&Dialect::Sqlite.migrations());
    assert!(left.unwrap().migration < known);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_does_not_answer_is_noticed_within_the_limit_of_a_probe() {
    let (_dir, store) = open().await;
    let limit = Duration::from_millis(300);
    store.ping_within(Duration::from_secs(5)).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..SQLITE_READERS {
        held.push(store.readers.acquire().await.unwrap());
    }
    let start = std::time::Instant::now();
    let said = store.ping_within(limit).await.unwrap_err().to_string();
    assert!(start.elapsed() < ACQUIRE_TIMEOUT, "{:?}", start.elapsed());
    assert!(said.contains("did not answer within 300ms"), "{said}");
    drop(held);
    store.ping_within(Duration::from_secs(5)).await.unwrap();
}

#[tokio::test]
async fn a_closed_store_says_that_the_server_ends() {
    let (_dir, store) = open().await;
    assert!(!store.is_closed());
    store.close().await;
    assert!(store.is_closed());
    let failed = store.token("none").await.unwrap_err();
    assert!(failed.is_draining(), "{failed}");
}
