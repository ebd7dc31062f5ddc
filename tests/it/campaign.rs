//! A seeded campaign of faults: every round disturbs a job in one way at a random moment, then
//! compares it with an undisturbed run.
//!
//!   BRADLEY_TEST_CAMPAIGN=200 BRADLEY_TEST_SEED=7 \
//!     cargo test --test it campaign -- --ignored --nocapture
//!
//! It needs PostgreSQL and moto; CONTRIBUTING.md says how to get them.
//!
//! Rounds alternate between two replicas on PostgreSQL and S3, and one server on SQLite and a
//! folder (on a small file system of its own if the test may mount one; if not, rounds of
//! `DiskFull` become rounds of `KillInTraining`). BRADLEY_TEST_FAULT names a [`Disturbance`],
//! `DiskFull` for example: the rounds in which it is possible then cause no other.
//!
//! Every round asserts that nothing is lost or done twice. The table at the end counts what was
//! checked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bradley::rpc::client::{Client, Target};
use bradley::rpc::pb::{self, training_event::Event};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::backends::{Fault, Postgres, Proxy, S3, signal};
use crate::replicas::{adapter, check_history, checkpointing, undisturbed};
use crate::server::{Server, checkpoints_folder, events, get, is_final, losses, upload};
use crate::support::golden;
use crate::wait::until;

/// Steps of a round's job, which take about a second.
const STEPS: u64 = 150;
/// Duration of a lease in seconds.
const LEASE: &str = "2";
/// Number of rounds without BRADLEY_TEST_CAMPAIGN: as many as cause every disturbance.
const ROUNDS: usize = 2 * CLUSTER.len();
/// Maximum time of a round's job.
const LIMIT: Duration = Duration::from_secs(90);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Disturbance {
    /// A server is killed and restarted while the job trains.
    KillInTraining,
    /// The same while the call that creates the job is open.
    KillInCreate,
    /// The same while a dataset is uploaded.
    KillInUpload,
    /// A server is stopped with SIGSTOP, mostly for longer than its lease.
    Freeze,
    /// PostgreSQL crashes and comes back.
    DatabaseAway,
    /// S3 answers 503.
    S3Errors,
    S3Slow,
    /// Connections to S3 are closed.
    S3Resets,
    /// A server is killed, and a bit of the job's newest checkpoint is flipped.
    Damage,
    DiskFull,
    /// A server is stopped with SIGTERM and restarted.
    Drain,
}

/// Disturbances of the two replicas, in the order of their rounds.
const CLUSTER: [Disturbance; 9] = [
    Disturbance::KillInTraining,
    Disturbance::Freeze,
    Disturbance::DatabaseAway,
    Disturbance::S3Errors,
    Disturbance::KillInCreate,
    Disturbance::S3Slow,
    Disturbance::KillInUpload,
    Disturbance::S3Resets,
    Disturbance::Drain,
];
/// Disturbances of the single server, in the order of their rounds.
const SINGLE: [Disturbance; 5] = [
    Disturbance::KillInTraining,
    Disturbance::DiskFull,
    Disturbance::Damage,
    Disturbance::KillInCreate,
    Disturbance::KillInUpload,
];

/// Counts of what the rounds so far have checked.
#[derive(Debug, Default)]
struct Tally {
    rounds: BTreeMap<Disturbance, usize>,
    jobs_acknowledged: usize,
    jobs_present: usize,
    uploads_acknowledged: usize,
    uploads_present: usize,
    events_delivered: usize,
    events_persisted: usize,
    workers_replaced: usize,
    weights_equal: usize,
}

/// Servers that come and go. Followers always use the current addresses.
struct Fleet {
    servers: Vec<Option<Server>>,
    dirs: Vec<PathBuf>,
    flags: Vec<String>,
    environment: Vec<(&'static str, String)>,
    addresses: Arc<Mutex<Vec<String>>>,
}

impl Fleet {
    fn start(
        dirs: Vec<PathBuf>,
        flags: Vec<String>,
        environment: Vec<(&'static str, String)>,
    ) -> Self {
        let mut fleet = Fleet {
            servers: dirs.iter().map(|_| None).collect(),
            dirs,
            flags,
            environment,
            addresses: Arc::default(),
        };
        (0..fleet.servers.len()).for_each(|i| fleet.restart(i));
        fleet
    }

    fn restart(&mut self, i: usize) {
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        let environment: Vec<(&str, &str)> = self
            .environment
            .iter()
            .map(|(k, v)| (*k, v.as_str()))
            .collect();
        let models = format!("tiny={}", golden("models/llama").display());
        self.servers[i] = Some(Server::start_in(
            &self.dirs[i],
            &models,
            &flags,
            &environment,
        ));
        *self.addresses.lock().unwrap() = self
            .servers
            .iter()
            .flatten()
            .map(|s| s.address.clone())
            .collect();
    }

    fn kill(&mut self, i: usize) {
        self.servers[i].take().unwrap().kill();
    }

    async fn client(&self) -> Client {
        loop {
            if let Some(client) = connect(&self.addresses).await {
                return client;
            }
        }
    }
}

/// Tries to connect to one of the servers.
async fn connect(addresses: &Mutex<Vec<String>>) -> Option<Client> {
    let address = {
        let all = addresses.lock().unwrap();
        all[rand::rng().random_range(0..all.len())].clone()
    };
    match Client::connect(&Target::plain(address), Duration::from_secs(1)).await {
        Ok(client) => Some(client),
        Err(_) => {
            tokio::time::sleep(Duration::from_millis(30)).await;
            None
        }
    }
}

/// Follows a job through every fault. Each event must come once and in order.
async fn follow(addresses: Arc<Mutex<Vec<String>>>, job: String) -> Vec<pb::TrainingEvent> {
    let mut seen: Vec<pb::TrainingEvent> = Vec::new();
    loop {
        let Some(client) = connect(&addresses).await else {
            continue;
        };
        let request = pb::StreamTrainingEventsRequest {
            parent: job.clone(),
            after_sequence: seen.len() as u64,
            ..Default::default()
        };
        let asked = tokio::time::timeout(
            Duration::from_secs(3),
            client.training().stream_training_events(request),
        )
        .await;
        let Ok(Ok(stream)) = asked else { continue };
        let mut stream = stream.into_inner();
        // A frozen server does not answer: continue with another one.
        while let Ok(Ok(Some(event))) =
            tokio::time::timeout(Duration::from_secs(4), stream.message()).await
        {
            assert_eq!(
                event.sequence,
                seen.len() as u64 + 1,
                "an event is lost or is delivered twice"
            );
            let is_last = matches!(&event.event, Some(Event::StateChange(s)) if is_final(s.to()));
            seen.push(event);
            if is_last {
                return seen;
            }
        }
    }
}

/// Lets a fault last for `time`, or until the followed job ends.
async fn lasts<T>(time: Duration, following: &tokio::task::JoinHandle<T>) {
    let end = until("the end of the job", LIMIT, async || {
        following.is_finished()
    });
    let _ = tokio::time::timeout(time, end).await;
}

/// Creates a job: repeats the call with the same request_id until it is acknowledged.
async fn create(addresses: Arc<Mutex<Vec<String>>>, dataset: String, request_id: String) -> String {
    loop {
        let Some(client) = connect(&addresses).await else {
            continue;
        };
        let job = Some(checkpointing(&dataset, STEPS));
        let request = pb::CreateTrainingJobRequest {
            training_job: job,
            request_id: request_id.clone(),
            ..Default::default()
        };
        match tokio::time::timeout(
            Duration::from_secs(3),
            client.training().create_training_job(request),
        )
        .await
        {
            Ok(Ok(created)) => return created.into_inner().name,
            Ok(Err(e)) if e.code() == tonic::Code::InvalidArgument => panic!("{e}"),
            _ => tokio::time::sleep(Duration::from_millis(30)).await,
        }
    }
}

/// A small file system, or a plain folder if none may be mounted.
struct Disk {
    folder: tempfile::TempDir,
    mounted: bool,
}

impl Disk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=48m", "tmpfs"])
            .arg(folder.path())
            .output()
            .is_ok_and(|o| o.status.success());
        Disk { folder, mounted }
    }

    /// Fills the file system completely.
    fn fill(&self) {
        use std::io::Write;
        let mut file = std::fs::File::create(self.folder.path().join("filler")).unwrap();
        for size in [1 << 20, 4096, 1] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
    }

    /// Removes what [`Disk::fill`] wrote.
    fn free(&self) {
        std::fs::remove_file(self.folder.path().join("filler")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount")
                .arg("-l")
                .arg(self.folder.path())
                .status();
        }
    }
}

/// Flips a bit of the newest checkpoint that a job below a data directory may continue from. Does
/// nothing if there is none. The last checkpoint is spared: a fast job has already ended, and the
/// weights of its end are compared.
fn damage(dir: &Path, job: &str, rng: &mut StdRng) {
    let folder = checkpoints_folder(dir, job);
    let steps = std::fs::read_dir(&folder)
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u64>().ok())
        .filter(|step| *step < STEPS);
    let Some(newest) = steps.max() else {
        return;
    };
    let files = [
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    ];
    let file = folder
        .join(newest.to_string())
        .join(files[rng.random_range(0..files.len())]);
    let Ok(mut bytes) = std::fs::read(&file) else {
        return;
    };
    let at = rng.random_range(0..bytes.len());
    bytes[at] ^= 1 << rng.random_range(0..8);
    let _ = std::fs::write(&file, bytes);
}

struct Campaign {
    cluster: Fleet,
    single: Fleet,
    postgres: Postgres,
    proxy: Proxy,
    disk: Disk,
    /// Losses and adapter of a job that nothing disturbs.
    expected: (BTreeMap<u64, u64>, Vec<u8>),
    tally: Tally,
}

impl Campaign {
    async fn round(&mut self, number: usize, datasets: &[String; 2], rng: &mut StdRng) {
        let on_cluster = number.is_multiple_of(2);
        let kinds = if on_cluster {
            &CLUSTER[..]
        } else {
            &SINGLE[..]
        };
        let only = std::env::var("BRADLEY_TEST_FAULT").ok();
        let named = kinds
            .iter()
            .find(|d| only.as_deref() == Some(format!("{d:?}").as_str()));
        let mut disturbance = named.copied().unwrap_or(kinds[number / 2 % kinds.len()]);
        if disturbance == Disturbance::DiskFull && !self.disk.mounted {
            disturbance = Disturbance::KillInTraining;
        }
        *self.tally.rounds.entry(disturbance).or_default() += 1;
        let fleet = if on_cluster {
            &mut self.cluster
        } else {
            &mut self.single
        };
        let dataset = datasets[usize::from(!on_cluster)].clone();
        let victim = rng.random_range(0..fleet.servers.len());

        let creation = tokio::spawn(create(
            fleet.addresses.clone(),
            dataset,
            format!("round-{number}"),
        ));
        if disturbance == Disturbance::KillInCreate {
            tokio::time::sleep(Duration::from_micros(rng.random_range(0..8000))).await;
            fleet.kill(victim);
            fleet.restart(victim);
        }
        let job = tokio::time::timeout(LIMIT, creation)
            .await
            .expect("the job is not acknowledged")
            .unwrap();
        self.tally.jobs_acknowledged += 1;
        let following = tokio::spawn(follow(fleet.addresses.clone(), job.clone()));
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..900))).await;
        let fault_time = Duration::from_millis(rng.random_range(200..2500));
        match disturbance {
            Disturbance::KillInCreate => {}
            Disturbance::KillInTraining => {
                fleet.kill(victim);
                fleet.restart(victim);
            }
            Disturbance::KillInUpload => {
                let client = fleet.client().await;
                let uploading = tokio::spawn(async move {
                    let metadata = pb::UploadMetadata {
                        display_name: "campaign".into(),
                        ..Default::default()
                    };
                    client
                        .upload_dataset(&golden("pairs.jsonl"), metadata, |_| {})
                        .await
                        .ok()
                });
                tokio::time::sleep(Duration::from_micros(rng.random_range(0..80_000))).await;
                fleet.kill(victim);
                let uploaded = uploading.await.unwrap();
                fleet.restart(victim);
                if let Some(dataset) = uploaded {
                    self.tally.uploads_acknowledged += 1;
                    // The server that is asked, which may be the other one, finds its row and its
                    // file.
                    let request = pb::EstimateTrainingJobRequest {
                        training_job: Some(checkpointing(&dataset.name, 2)),
                    };
                    fleet
                        .client()
                        .await
                        .training()
                        .estimate_training_job(request)
                        .await
                        .expect("the estimate for the new dataset fails");
                    self.tally.uploads_present += 1;
                }
            }
            Disturbance::Drain => {
                fleet.servers[victim]
                    .take()
                    .unwrap()
                    .terminate(Duration::from_secs(40));
                fleet.restart(victim);
            }
            Disturbance::Freeze => {
                let pid = fleet.servers[victim].as_ref().unwrap().pid();
                signal(pid, libc::SIGSTOP);
                // It stays frozen for 1.4 to 6 s, or until the job ends; its lease lasts 2 s.
                lasts(Duration::from_secs(1) + 2 * fault_time, &following).await;
                signal(pid, libc::SIGCONT);
            }
            Disturbance::DatabaseAway => {
                self.postgres.crash();
                lasts(fault_time, &following).await;
                self.postgres.resume();
            }
            Disturbance::S3Errors | Disturbance::S3Slow | Disturbance::S3Resets => {
                self.proxy.set(match disturbance {
                    Disturbance::S3Errors => Fault::Error,
                    Disturbance::S3Slow => Fault::Slow(Duration::from_millis(300)),
                    _ => Fault::Reset,
                });
                lasts(fault_time, &following).await;
                self.proxy.set(Fault::None);
            }
            Disturbance::Damage => {
                fleet.kill(victim);
                damage(&fleet.dirs[victim], &job, rng);
                fleet.restart(victim);
            }
            Disturbance::DiskFull => {
                self.disk.fill();
                lasts(fault_time, &following).await;
                self.disk.free();
            }
        }
        let Ok(delivered) = tokio::time::timeout(LIMIT, following).await else {
            let died: Vec<_> = fleet
                .servers
                .iter_mut()
                .flatten()
                .map(Server::exit_status)
                .collect();
            panic!(
                "round {number}, {disturbance:?}: {job} does not end; servers that ended: {died:?}"
            );
        };
        let delivered = delivered.unwrap();
        self.check(on_cluster, &job, delivered, disturbance).await;
    }

    async fn check(
        &mut self,
        on_cluster: bool,
        job: &str,
        delivered: Vec<pb::TrainingEvent>,
        disturbance: Disturbance,
    ) {
        let fleet = if on_cluster {
            &self.cluster
        } else {
            &self.single
        };
        let client = fleet.client().await;
        let stored = get(&client, job).await;
        assert_eq!(
            stored.state(),
            pb::JobState::Succeeded,
            "{disturbance:?}: {:?}",
            stored.error
        );
        self.tally.jobs_present += 1;
        let persisted = events(&client, job).await;
        self.tally.events_delivered += delivered.len();
        self.tally.events_persisted += persisted.len();
        assert!(
            delivered == persisted,
            "{disturbance:?}: the delivered events are not the stored ones"
        );
        check_history(&persisted);
        assert_eq!(
            losses(&persisted),
            self.expected.0,
            "{disturbance:?}: other losses"
        );
        assert!(
            adapter(&client, job).await == self.expected.1,
            "{disturbance:?}: other weights"
        );
        self.tally.weights_equal += 1;
        let replaces_worker = |e: &&pb::TrainingEvent| match &e.event {
            Some(Event::StateChange(s)) => s.reason.contains("worker is gone"),
            _ => false,
        };
        self.tally.workers_replaced += persisted.iter().filter(replaces_worker).count();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL (BRADLEY_TEST_POSTGRES) and Python with moto (BRADLEY_TEST_PYTHON)"]
async fn nothing_is_lost_or_done_twice_whatever_fails() {
    let (postgres, s3) = (Postgres::start(), S3::start());
    let number = |variable: &str, default: usize| {
        std::env::var(variable)
            .ok()
            .map_or(default, |v| v.parse().unwrap())
    };
    let (rounds, seed) = (
        number("BRADLEY_TEST_CAMPAIGN", ROUNDS),
        number("BRADLEY_TEST_SEED", 1),
    );
    let mut rng = StdRng::seed_from_u64(seed as u64);
    let proxy = Proxy::start(s3.port());
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let disk = Disk::new();
    let strings = |all: &[&str]| all.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    let flags = strings(&[
        "--database-url",
        &postgres.url(),
        "--artifact-url",
        "s3://bradley/runs",
        "--lease",
        LEASE,
    ]);
    let cluster = Fleet::start(
        dirs.iter().map(|d| d.path().to_owned()).collect(),
        flags,
        s3.environment_at(proxy.port()),
    );
    let single = Fleet::start(
        vec![disk.folder.path().to_owned()],
        strings(&["--lease", LEASE]),
        Vec::new(),
    );
    let mut datasets = [String::new(), String::new()];
    for (fleet, dataset) in [&cluster, &single].into_iter().zip(&mut datasets) {
        *dataset = upload(&fleet.client().await, "pairs.jsonl").await.name;
    }
    let expected = undisturbed(STEPS).await;
    let mut campaign = Campaign {
        cluster,
        single,
        postgres,
        proxy,
        disk,
        expected,
        tally: Tally::default(),
    };
    let start = Instant::now();
    for number in 0..rounds {
        campaign.round(number, &datasets, &mut rng).await;
    }
    let t = &campaign.tally;
    println!(
        "| fault campaign | seed {seed}, {rounds} rounds, {} s |\n|---|---|",
        start.elapsed().as_secs()
    );
    t.rounds
        .iter()
        .for_each(|(disturbance, n)| println!("| rounds with {disturbance:?} | {n} |"));
    println!(
        "| jobs acknowledged, present and succeeded | {}, {} |",
        t.jobs_acknowledged, t.jobs_present
    );
    println!(
        "| uploads acknowledged, present | {}, {} |",
        t.uploads_acknowledged, t.uploads_present
    );
    println!(
        "| events delivered, persisted | {}, {} |",
        t.events_delivered, t.events_persisted
    );
    // `check_history` fails the test if two workers run a job at the same time.
    println!(
        "| workers replaced, jobs executed twice | {}, 0 |",
        t.workers_replaced
    );
    println!(
        "| final weights equal to an undisturbed run's | {} of {} |",
        t.weights_equal, rounds
    );
    assert_eq!(
        (t.jobs_present, t.weights_equal, t.uploads_present),
        (rounds, rounds, t.uploads_acknowledged)
    );
}
