//! A soak test under twice the load that the server can serve: a training job, and fifty clients, a
//! third of which read slowly or disconnect without notice.
//!
//!   BRADLEY_TEST_SOAK=1800 cargo test --test it soak -- --nocapture
//!
//! Memory must not grow, every accepted request must be answered, and every refusal must have a
//! reason, and a time to retry or a quota.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bradley::rpc::client::Client;
use bradley::rpc::pb;
use rand::{Rng, SeedableRng};
use tonic::Code;
use tonic_types::StatusExt;

use crate::hostile::resident_kib;
use crate::server::{CONNECT_LIMIT, Server, job, pairs, submit, upload};
use crate::support::golden;

/// Number of clients that send requests at fixed times.
const STEADY: usize = 34;
/// Number of clients that read a stream slowly.
const SLOW: usize = 8;
/// Number of clients that disconnect without notice.
const VANISHING: usize = 8;
/// Number of pairs in a request.
const BATCH: usize = 8;
/// Duration in seconds without BRADLEY_TEST_SOAK.
const SHORT: u64 = 12;
/// Number of times that the load is repeated while memory grows.
const MOST_ROUNDS: usize = 4;
/// Maximum number of waiting tokens, which limits the waiting time.
const QUEUE_TOKENS: usize = 6000;

/// Counts of what the clients have seen.
#[derive(Default)]
struct Seen {
    /// Requests of which at least one pair was scored.
    accepted: AtomicU64,
    pairs: AtomicU64,
    refused: AtomicU64,
    /// Pairs that slow clients have read.
    streamed: AtomicU64,
    /// Calls that were dropped with their connection.
    vanished: AtomicU64,
    /// Of accepted requests, in seconds.
    latencies: Mutex<Vec<f64>>,
    /// Number of each unexpected answer; must be empty at the end.
    wrong: Mutex<BTreeMap<String, u64>>,
}

impl Seen {
    fn wrong(&self, what: String) {
        *self.wrong.lock().unwrap().entry(what).or_default() += 1;
    }

    /// Counts a refusal, which must have a reason, and a time to retry or a quota.
    fn count_refusal(&self, status: &tonic::Status) {
        let retry = status.get_details_retry_info().is_some()
            || status.get_details_quota_failure().is_some();
        let reasoned = status
            .get_details_error_info()
            .is_some_and(|i| !i.reason.is_empty());
        if matches!(status.code(), Code::Unavailable | Code::ResourceExhausted) && retry && reasoned
        {
            self.refused.fetch_add(1, Ordering::Relaxed);
        } else {
            self.wrong(format!("{status:?}"));
        }
    }
}

fn request(n: usize) -> pb::ScorePairsRequest {
    let options = Some(pb::ScoringOptions {
        policy: "models/tiny".into(),
        ..Default::default()
    });
    let all = pairs();
    let pairs = (0..BATCH)
        .map(|i| all[(n + i) % all.len()].clone())
        .collect();
    pb::ScorePairsRequest { options, pairs }
}

/// Sends one request. It is accepted if any of its pairs is scored; every other pair must have a
/// reason.
async fn score_once(client: &Client, n: usize, seen: &Seen) {
    let start = Instant::now();
    match client.scoring().score_pairs(request(n)).await {
        Ok(answer) => {
            let results = answer.into_inner().results;
            if results.len() != BATCH {
                seen.wrong(format!("{} results", results.len()));
            }
            let mut scored = 0;
            for r in &results {
                if let Some(pb::pair_result::Result::Score(s)) = &r.result {
                    scored += u64::from(s.probability > 0.0);
                } else if let Some(pb::pair_result::Result::Error(e)) = &r.result {
                    seen.count_refusal(&tonic::Status::with_details(
                        Code::from(e.code),
                        e.message.clone(),
                        prost::Message::encode_to_vec(e).into(),
                    ));
                }
            }
            if scored > 0 {
                seen.accepted.fetch_add(1, Ordering::Relaxed);
                seen.pairs.fetch_add(scored, Ordering::Relaxed);
                seen.latencies
                    .lock()
                    .unwrap()
                    .push(start.elapsed().as_secs_f64());
            }
        }
        Err(status) => seen.count_refusal(&status),
    }
}

/// Sends requests at fixed times, even if earlier ones are not answered.
async fn steady(client: Client, id: usize, interval: Duration, until: Instant, seen: Arc<Seen>) {
    let mut open = tokio::task::JoinSet::new();
    let mut due = tokio::time::interval(interval);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut n = id;
    while Instant::now() < until {
        due.tick().await;
        n += STEADY;
        let (client, seen) = (client.clone(), seen.clone());
        open.spawn(async move { score_once(&client, n, &seen).await });
        while open.try_join_next().is_some() {}
    }
    // Every accepted request gets an answer.
    if tokio::time::timeout(Duration::from_secs(60), async {
        while open.join_next().await.is_some() {}
    })
    .await
    .is_err()
    {
        seen.wrong("no answer".into());
    }
}

/// Streams pairs and reads the answers slowly.
async fn slow(client: Client, until: Instant, seen: Arc<Seen>) {
    use pb::stream_score_pairs_request::Part;
    while Instant::now() < until {
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let writer = tokio::spawn(async move {
            let message = |part| pb::StreamScorePairsRequest { part: Some(part) };
            let options = pb::ScoringOptions {
                policy: "models/tiny".into(),
                ..Default::default()
            };
            let _ = sender.send(message(Part::Options(options))).await;
            for pair in pairs().into_iter().cycle().take(600) {
                if sender.send(message(Part::Pair(pair))).await.is_err() {
                    return;
                }
            }
        });
        let stream = client
            .scoring()
            .stream_score_pairs(tokio_stream::wrappers::ReceiverStream::new(receiver))
            .await;
        match stream {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                while Instant::now() < until {
                    match stream.message().await {
                        Ok(Some(_)) => seen.streamed.fetch_add(1, Ordering::Relaxed),
                        Ok(None) => break,
                        Err(status) => {
                            seen.count_refusal(&status);
                            break;
                        }
                    };
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            Err(status) => seen.count_refusal(&status),
        }
        writer.abort();
    }
}

/// Begins calls and drops them together with the connection.
async fn vanishing(address: String, seed: u64, until: Instant, seen: Arc<Seen>) {
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    while Instant::now() < until {
        let target = bradley::rpc::client::Target::plain(&address);
        let Ok(client) = Client::connect(&target, CONNECT_LIMIT).await else {
            seen.wrong("no connection".into());
            continue;
        };
        let patience = Duration::from_millis(rng.random_range(0..300));
        let n = rng.random_range(0..1000);
        let mut scoring = client.scoring();
        let _ = tokio::time::timeout(patience, scoring.score_pairs(request(n))).await;
        seen.vanished.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(patience).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn under_twice_the_load_memory_does_not_grow_and_refusals_say_why() {
    let seconds = std::env::var("BRADLEY_TEST_SOAK")
        .ok()
        .map_or(SHORT, |v| v.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let queue = QUEUE_TOKENS.to_string();
    let flags = [
        "--queue-tokens",
        &queue,
        "--reference-cache-tokens",
        "0",
        "--events-kept",
        "2000",
    ];
    let server = Server::start_with(
        dir.path(),
        &format!("tiny={}", golden("models/llama").display()),
        &flags,
    );
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    submit(&client, job(&dataset.name, 100_000_000)).await;

    // Capacity: requests per second of a few clients that send one request after another while the
    // job trains.
    let probe = Arc::new(Seen::default());
    let until = Instant::now() + Duration::from_secs((seconds / 20).clamp(2, 20));
    let start = Instant::now();
    let mut probes = tokio::task::JoinSet::new();
    for id in 0..4 {
        let (client, probe) = (client.clone(), probe.clone());
        probes.spawn(async move {
            let mut n = id;
            while Instant::now() < until {
                score_once(&client, n, &probe).await;
                n += 4;
            }
        });
    }
    while probes.join_next().await.is_some() {}
    let capacity = probe.accepted.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64();
    assert!(
        capacity > 0.0 && probe.wrong.lock().unwrap().is_empty(),
        "{:?}",
        probe.wrong.lock().unwrap()
    );

    let seen = Arc::new(Seen::default());
    let start = Instant::now();
    let interval = Duration::from_secs_f64(STEADY as f64 / (2.0 * capacity));
    let median = |samples: &[u64]| {
        let mut samples = samples.to_vec();
        samples.sort();
        samples[samples.len() / 2]
    };
    // Pools and caches fill at first. On a slow machine they also do after the quarter of the time
    // that is left out. Then the load is repeated: memory that leaks grows every time.
    let mut rounds = 0;
    let (memory, early, late) = loop {
        let until = Instant::now() + Duration::from_secs(seconds);
        let mut clients = tokio::task::JoinSet::new();
        for id in 0..STEADY {
            clients.spawn(steady(
                server.client().await,
                id,
                interval,
                until,
                seen.clone(),
            ));
        }
        for _ in 0..SLOW {
            clients.spawn(slow(server.client().await, until, seen.clone()));
        }
        for id in 0..VANISHING {
            clients.spawn(vanishing(
                server.address.clone(),
                id as u64,
                until,
                seen.clone(),
            ));
        }
        let mut memory = Vec::new();
        while Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(500)).await;
            memory.push(resident_kib(server.pid()));
        }
        while let Some(done) = clients.join_next().await {
            done.unwrap();
        }
        let early = median(&memory[memory.len() / 4..memory.len() / 2]);
        let late = median(&memory[memory.len() * 3 / 4..]);
        rounds += 1;
        if late < early + early / 20 + (8 << 10) {
            break (memory, early, late);
        }
        assert!(
            rounds < MOST_ROUNDS,
            "memory grew in {rounds} rounds, in the last one from {early} to {late} KiB"
        );
    };

    let mut latencies = seen.latencies.lock().unwrap().clone();
    latencies.sort_by(f64::total_cmp);
    let quantile = |q: f64| latencies[((latencies.len() - 1) as f64 * q) as usize];
    let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
    let lasted = start.elapsed().as_secs_f64();
    let clients = STEADY + SLOW + VANISHING;
    println!(
        "| soak | {rounds} x {seconds} s, {clients} clients; capacity {:.0} pairs/s, twice that \
         offered |\n|---|---|",
        capacity * BATCH as f64
    );
    println!(
        "| requests answered, pairs in them | {}, {} ({:.0}/s) |",
        count(&seen.accepted),
        count(&seen.pairs),
        count(&seen.pairs) as f64 / lasted
    );
    println!(
        "| refusals, each with its reason and a time or a quota | {} |",
        count(&seen.refused)
    );
    println!(
        "| pairs streamed to slow clients, calls left without a word | {}, {} |",
        count(&seen.streamed),
        count(&seen.vanished)
    );
    println!(
        "| latency of answered requests: p50, p99, most | {:.2}, {:.2}, {:.2} s |",
        quantile(0.5),
        quantile(0.99),
        quantile(1.0)
    );
    println!(
        "| memory: second quarter, last quarter, most | {}, {}, {} MiB |",
        early >> 10,
        late >> 10,
        memory.iter().max().unwrap() >> 10
    );
    println!("| other answers | {:?} |", seen.wrong.lock().unwrap());
    assert!(
        seen.wrong.lock().unwrap().is_empty(),
        "{:?}",
        seen.wrong.lock().unwrap()
    );
    assert!(
        count(&seen.accepted) > 0 && count(&seen.refused) > 0,
        "the load is not too high for the server"
    );
}
