//! The servers that score: calls go to the one with the fewest calls in flight, and a call that
//! fails for a passing reason is repeated, if possible at another server.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::weights::{IDENTITY_LIMIT, WeightsIdentity, calibration, identify};
use crate::cli::args::FleetArgs;
use crate::cli::failure::Failure;
use crate::cli::progress::say;
use crate::cli::remote::{connect, open};
use crate::rpc::client::{
    Client, ClientError, Code, Status, is_bradleys, is_server_failure, is_transient, message_bytes,
    retry_after,
};
use crate::rpc::pb;

/// Number of calls in flight on one connection.
const CALLS_PER_CONNECTION: usize = 2;
/// Time limit for a call. A server that has died is noticed much earlier, by the connection.
const CALL_LIMIT: Duration = Duration::from_secs(1800);
/// Time for which a server that failed gets no calls, and after which rows that it refused are sent
/// again. It doubles with each failure up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Limits of this time if the server asks for one.
const SHORTEST_ASKED_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_ASKED_PAUSE: Duration = Duration::from_secs(60);
/// Time between two looks for a server, if none was freed meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Time between two attempts to reach a first server.
const WAIT_INTERVAL: Duration = Duration::from_secs(2);
/// Number of server failures (exhausted memory, internal errors) of one call after which its
/// content counts as their reason. If nothing else succeeds meanwhile, the pauses between them add
/// up to about 40 seconds.
const MAX_SERVER_FAILURES: u32 = 10;
/// Size in bytes up to which gRPC servers and proxies take a message, unless they are told another
/// limit. A larger call that a proxy refuses with RESOURCE_EXHAUSTED was too large for it.
const DEFAULT_MESSAGE_LIMIT: usize = 4 << 20;
/// Prefix of names that are resolved to all of their addresses.
const DNS: &str = "dns:///";
/// Time between two resolutions of such a name.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(10);

/// A call that scores.
#[derive(Clone, Debug)]
pub(super) enum ScoringCall {
    Pairs(pb::ScorePairsRequest),
    Answers(pb::ScoreCompletionsRequest),
}

impl ScoringCall {
    /// Returns the size of the request's message in bytes.
    fn encoded_len(&self) -> usize {
        match self {
            ScoringCall::Pairs(request) => message_bytes(request),
            ScoringCall::Answers(request) => message_bytes(request),
        }
    }
}

/// The answer to a call.
#[derive(Debug)]
pub(super) enum ScoringAnswer {
    Pairs(pb::ScorePairsResponse),
    Answers(pb::ScoreCompletionsResponse),
}

/// The reason why a call was not answered.
#[derive(Debug)]
pub(super) enum CallError {
    /// The server refuses the content of this call, or fails each time that it gets it.
    Refused(String),
    /// The whole run fails.
    Fatal(Failure),
}

/// Servers with the same weights.
pub(in crate::cli) struct Fleet {
    args: FleetArgs,
    replicas: Mutex<Vec<Arc<Replica>>>,
    /// Options with pinned names, and the identity of the weights at the start.
    expected: Mutex<Option<(pb::ScoringOptions, WeightsIdentity)>>,
    /// Wakes calls that wait for a server.
    freed: Notify,
    /// Time of the first failure or refusal since the last result of a row.
    failing_since: Mutex<Option<Instant>>,
    last_resolution: Mutex<Instant>,
}

/// A server, or several behind one address.
struct Replica {
    address: String,
    /// Connections, each opened when it is needed first.
    connections: Vec<tokio::sync::Mutex<Option<Client>>>,
    /// Number of times that a connection was chosen.
    next: AtomicUsize,
    /// Number of open calls.
    in_flight: AtomicUsize,
    /// Number of failures since the last answer.
    failures: AtomicU32,
    paused_until: Mutex<Option<Instant>>,
    /// True if its weights must be identified before its next call: at first, and after a failure,
    /// because another process may have taken its place.
    is_unverified: AtomicBool,
    /// Held by the one call that identifies its weights.
    verifying: tokio::sync::Mutex<()>,
}

/// A call's place at a replica.
struct CallSlot<'a> {
    fleet: &'a Fleet,
    replica: Arc<Replica>,
}

impl Drop for CallSlot<'_> {
    fn drop(&mut self) {
        self.replica.in_flight.fetch_sub(1, Ordering::AcqRel);
        self.fleet.freed.notify_one();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the time to wait after a failure: the one that the server asked for, within limits, or
/// else one that grows with the number of failures before.
fn pause_time(asked: Option<Duration>, failures: u32) -> Duration {
    match asked {
        Some(asked) => asked.clamp(SHORTEST_ASKED_PAUSE, LONGEST_ASKED_PAUSE),
        None => (FIRST_PAUSE * (1 << failures.min(8))).min(LONGEST_PAUSE),
    }
}

impl Replica {
    fn new(address: String, connections: u8) -> Arc<Self> {
        Arc::new(Replica {
            address,
            connections: (0..connections).map(|_| Default::default()).collect(),
            next: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            failures: AtomicU32::new(0),
            paused_until: Mutex::new(None),
            is_unverified: AtomicBool::new(true),
            verifying: tokio::sync::Mutex::new(()),
        })
    }

    fn capacity(&self) -> usize {
        self.connections.len() * CALLS_PER_CONNECTION
    }

    fn is_paused(&self) -> bool {
        locked(&self.paused_until).is_some_and(|until| Instant::now() < until)
    }

    /// Gives it no calls for a while: for the time that it asked for, if it did.
    fn pause(&self, asked: Option<Duration>) {
        let failures = self.failures.fetch_add(1, Ordering::AcqRel);
        *locked(&self.paused_until) = Some(Instant::now() + pause_time(asked, failures));
    }

    /// Returns one of its connections, in turn.
    async fn client(&self, args: &FleetArgs) -> Result<Client, ClientError> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.connections.len().max(1);
        let mut connection = self.connections[turn].lock().await;
        if let Some(client) = &*connection {
            return Ok(client.clone());
        }
        let client = open(&args.target(&self.address)).await?;
        *connection = Some(client.clone());
        Ok(client)
    }
}

impl Fleet {
    /// Finds the servers and connects to the first one that answers.
    ///
    /// # Errors
    /// Returns a failure if an address is wrong, or no server is reached within
    /// `--wait-for-server`.
    pub(in crate::cli) async fn connect(args: FleetArgs) -> Result<(Arc<Self>, Client), Failure> {
        let (started, wait) = (Instant::now(), Duration::from_secs(args.wait_for_server));
        let mut is_told = false;
        let (addresses, client) = loop {
            let failure = match first(&args).await {
                Ok(found) => break found,
                Err(failure @ Failure::Unreachable(_)) if started.elapsed() < wait => failure,
                Err(failure) => return Err(failure),
            };
            if !std::mem::replace(&mut is_told, true) {
                say(&format!("waiting for a server: {}", failure.message()));
            }
            tokio::time::sleep(WAIT_INTERVAL).await;
        };
        let replicas = addresses
            .into_iter()
            .map(|address| Replica::new(address, args.connections))
            .collect();
        let fleet = Fleet {
            args,
            replicas: Mutex::new(replicas),
            expected: Mutex::new(None),
            freed: Notify::new(),
            failing_since: Mutex::new(None),
            last_resolution: Mutex::new(Instant::now()),
        };
        Ok((Arc::new(fleet), client))
    }

    /// Sets the options, and the weights that every server must have.
    pub(super) fn set_expected(&self, options: pb::ScoringOptions, weights: WeightsIdentity) {
        *locked(&self.expected) = Some((options, weights));
    }

    /// Returns the number of calls that all servers together take.
    pub(super) fn capacity(&self) -> usize {
        locked(&self.replicas).iter().map(|r| r.capacity()).sum()
    }

    /// Sends a call to a server. If that fails for a passing reason, the call is repeated, if
    /// possible at another server. The caller reports with [`Fleet::answered`] that the answer has
    /// the result of a row.
    ///
    /// # Errors
    /// [`CallError::Refused`] if the content of the call is the reason. [`CallError::Fatal`] if a
    /// server has other weights or refuses the caller, or if no row has got a result for
    /// `--retry-timeout`.
    pub(super) async fn call(&self, call: &ScoringCall) -> Result<ScoringAnswer, CallError> {
        let mut server_failures = 0;
        loop {
            let slot = self.slot().await.map_err(CallError::Fatal)?;
            let (code, after, reason) = match self.try_call(&slot.replica, call).await {
                Ok(answer) => {
                    slot.replica.failures.store(0, Ordering::Release);
                    return Ok(answer);
                }
                Err(AttemptError::Fatal(failure)) => return Err(CallError::Fatal(failure)),
                Err(AttemptError::Silent(reason)) => (Code::Unavailable, None, reason),
                Err(AttemptError::Refused(status)) => {
                    let code = status.code();
                    let is_too_large = code == Code::ResourceExhausted
                        && !is_bradleys(&status)
                        && call.encoded_len() > DEFAULT_MESSAGE_LIMIT;
                    server_failures += u32::from(is_server_failure(&status));
                    if matches!(code, Code::InvalidArgument | Code::OutOfRange)
                        || is_too_large
                        || server_failures == MAX_SERVER_FAILURES
                    {
                        // Such a refusal is a result, too.
                        self.answered();
                        let message = ClientError::from(*status).to_string();
                        return Err(CallError::Refused(message));
                    }
                    if !is_transient(code) {
                        return Err(CallError::Fatal((*status).into()));
                    }
                    let after = retry_after(&status);
                    (code, after, ClientError::from(*status).to_string())
                }
            };
            let address = &slot.replica.address;
            slot.replica.pause(after);
            // A server that is busy is the same process as before.
            if code != Code::ResourceExhausted {
                slot.replica.is_unverified.store(true, Ordering::Release);
            }
            self.check_patience(Instant::now(), &format!("{address}: {reason}"))
                .map_err(CallError::Fatal)?;
            tracing::debug!(%address, reason, "a call is repeated");
        }
    }

    /// Checks that every server that has answered calls still has the weights of the start. One
    /// that does not answer now is checked before its next call.
    ///
    /// # Errors
    /// Returns a failure that names a server with other weights.
    pub(super) async fn verify(&self) -> Result<(), Failure> {
        let replicas = locked(&self.replicas).clone();
        for replica in replicas {
            let is_used = !replica.is_unverified.load(Ordering::Acquire);
            if is_used {
                match self.identify(&replica).await {
                    Ok(()) => {}
                    Err(AttemptError::Fatal(failure)) => return Err(failure),
                    Err(AttemptError::Refused(_) | AttemptError::Silent(_)) => {
                        replica.is_unverified.store(true, Ordering::Release);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes note that a row has got a result, so that the time for which calls are repeated starts
    /// again.
    pub(super) fn answered(&self) {
        *locked(&self.failing_since) = None;
    }

    /// Waits before rows that a server refused are sent again: for the time that it asked for, and
    /// else longer each time. `attempts` is the number of refusals before this one.
    ///
    /// # Errors
    /// Returns a failure with `reason` if no row has got a result for `--retry-timeout`.
    pub(super) async fn wait_after_refusal(
        &self,
        asked: Option<Duration>,
        attempts: u32,
        reason: &str,
    ) -> Result<(), Failure> {
        self.check_patience(Instant::now(), reason)?;
        tokio::time::sleep(pause_time(asked, attempts)).await;
        Ok(())
    }

    /// Takes note of a failure or refusal.
    ///
    /// # Errors
    /// Returns a failure with `reason` if there was nothing else for `--retry-timeout`.
    fn check_patience(&self, now: Instant, reason: &str) -> Result<(), Failure> {
        let since = *locked(&self.failing_since).get_or_insert(now);
        let seconds = now.saturating_duration_since(since).as_secs();
        if seconds < self.args.retry_timeout {
            return Ok(());
        }
        Err(Failure::Failed(format!(
            "no row was scored for {seconds} s (--retry-timeout): {reason}; run the command again \
             later: it continues"
        )))
    }

    /// Waits for a server that takes a call: it has room, and is not paused.
    async fn slot(&self) -> Result<CallSlot<'_>, Failure> {
        loop {
            let freed = self.freed.notified();
            {
                let replicas = locked(&self.replicas);
                let free = replicas
                    .iter()
                    .filter(|r| {
                        !r.is_paused() && r.in_flight.load(Ordering::Acquire) < r.capacity()
                    })
                    .min_by_key(|r| r.in_flight.load(Ordering::Acquire));
                if let Some(replica) = free {
                    replica.in_flight.fetch_add(1, Ordering::AcqRel);
                    return Ok(CallSlot {
                        fleet: self,
                        replica: Arc::clone(replica),
                    });
                }
            }
            self.resolve_again().await;
            let _ = tokio::time::timeout(LOOK_INTERVAL, freed).await;
        }
    }

    /// Looks for new addresses of names, at most every 10 seconds.
    async fn resolve_again(&self) {
        if !self.args.servers.iter().any(|s| s.starts_with(DNS)) {
            return;
        }
        {
            let mut last = locked(&self.last_resolution);
            if last.elapsed() < RESOLVE_INTERVAL {
                return;
            }
            *last = Instant::now();
        }
        // While the name does not resolve, the known addresses stay.
        let Ok(addresses) = addresses(&self.args).await else {
            return;
        };
        let mut replicas = locked(&self.replicas);
        replicas.retain(|r| addresses.contains(&r.address));
        for address in addresses {
            if !replicas.iter().any(|r| r.address == address) {
                replicas.push(Replica::new(address, self.args.connections));
            }
        }
    }

    async fn try_call(
        &self,
        replica: &Replica,
        call: &ScoringCall,
    ) -> Result<ScoringAnswer, AttemptError> {
        if replica.is_unverified.load(Ordering::Acquire) {
            let _one = replica.verifying.lock().await;
            if replica.is_unverified.load(Ordering::Acquire) {
                self.identify(replica)
                    .await
                    .map_err(AttemptError::before_the_call)?;
                replica.is_unverified.store(false, Ordering::Release);
            }
        }
        let client = replica.client(&self.args).await.map_err(AttemptError::of)?;
        let answer = async {
            Ok::<_, Status>(match call.clone() {
                ScoringCall::Pairs(request) => {
                    let answer = client.scoring().score_pairs(request).await?;
                    ScoringAnswer::Pairs(answer.into_inner())
                }
                ScoringCall::Answers(request) => {
                    let answer = client.scoring().score_completions(request).await?;
                    ScoringAnswer::Answers(answer.into_inner())
                }
            })
        };
        let answer = match tokio::time::timeout(CALL_LIMIT, answer).await {
            Ok(answer) => answer?,
            Err(_) => return Err(AttemptError::timeout(CALL_LIMIT)),
        };
        let (policy, reference) = match &answer {
            ScoringAnswer::Pairs(a) => (&a.policy_version, &a.reference_version),
            ScoringAnswer::Answers(a) => (&a.policy_version, &a.reference_version),
        };
        if let Some((_, expected)) = &*locked(&self.expected) {
            let now = WeightsIdentity {
                policy: policy.clone(),
                reference: reference.clone(),
                calibration: match &answer {
                    ScoringAnswer::Pairs(a) => calibration(a),
                    ScoringAnswer::Answers(_) => expected.calibration.clone(),
                },
                ..expected.clone()
            };
            now.check(expected, &replica.address)
                .map_err(AttemptError::Fatal)?;
        }
        Ok(answer)
    }

    /// Asks a server for the identity of its weights and compares it with the expected one.
    async fn identify(&self, replica: &Replica) -> Result<(), AttemptError> {
        let Some((options, expected)) = locked(&self.expected).clone() else {
            return Ok(());
        };
        let client = replica.client(&self.args).await.map_err(AttemptError::of)?;
        let answer = identify(&client, &options);
        let weights = match tokio::time::timeout(IDENTITY_LIMIT, answer).await {
            Ok(Ok(weights)) => weights,
            // At the start these names meant weights, so this server is another one.
            Ok(Err(status)) if status.code() == Code::NotFound => {
                return Err(AttemptError::Fatal(Failure::Failed(format!(
                    "{} does not have the weights of the start any more: {}",
                    replica.address,
                    ClientError::from(status)
                ))));
            }
            Ok(Err(status)) => return Err(status.into()),
            Err(_) => return Err(AttemptError::timeout(IDENTITY_LIMIT)),
        };
        weights
            .check(&expected, &replica.address)
            .map_err(AttemptError::Fatal)
    }
}

/// The reason why one attempt failed.
enum AttemptError {
    /// The server answered with an error.
    Refused(Box<Status>),
    /// The server is not reached or does not answer.
    Silent(String),
    /// The run cannot go on: the server has other weights, or the token or a file of the connection
    /// cannot be used.
    Fatal(Failure),
}

impl From<Status> for AttemptError {
    fn from(status: Status) -> Self {
        AttemptError::Refused(Box::new(status))
    }
}

impl AttemptError {
    fn of(error: ClientError) -> Self {
        match error {
            ClientError::Refused(status) => AttemptError::Refused(status),
            ClientError::Unreachable { .. }
            | ClientError::BadCertificate { .. }
            | ClientError::SilentTls { .. } => AttemptError::Silent(error.to_string()),
            other => AttemptError::Fatal(other.into()),
        }
    }

    /// Turns a failure of the server into silence, so that it does not count as one at the call.
    fn before_the_call(self) -> Self {
        match self {
            AttemptError::Refused(status) if is_server_failure(&status) => {
                AttemptError::Silent(ClientError::from(*status).to_string())
            }
            other => other,
        }
    }

    fn timeout(limit: Duration) -> Self {
        AttemptError::Silent(format!("no answer within {} seconds", limit.as_secs()))
    }
}

/// Returns the addresses of all servers, and a connection to the first one that answers.
async fn first(args: &FleetArgs) -> Result<(Vec<String>, Client), Failure> {
    let addresses = addresses(args).await?;
    let mut failure = Failure::Usage("--server names no server".to_owned());
    for address in &addresses {
        match connect(&args.target(address)).await {
            Ok(client) => return Ok((addresses, client)),
            Err(e @ Failure::Unreachable(_)) => failure = e,
            Err(e) => return Err(e),
        }
    }
    Err(failure)
}

/// Returns the addresses of all servers, without duplicates.
async fn addresses(args: &FleetArgs) -> Result<Vec<String>, Failure> {
    let mut all = Vec::new();
    for server in args.servers.iter().filter(|s| !s.is_empty()) {
        let Some(name) = server.strip_prefix(DNS) else {
            all.push(server.clone());
            continue;
        };
        let wrong = |e: &dyn std::fmt::Display| {
            Failure::Unreachable(format!(
                "--server {server}: {e}: the form is dns:///HOST:PORT with a name that this \
                 machine can resolve"
            ))
        };
        let found = tokio::net::lookup_host(name).await.map_err(|e| wrong(&e))?;
        let scheme = match args.tls_server_ca {
            Some(_) => "https",
            None => "http",
        };
        let mut found: Vec<String> = found.map(|a| format!("{scheme}://{a}")).collect();
        if found.is_empty() {
            return Err(wrong(&"the name has no address"));
        }
        found.sort();
        all.extend(found);
    }
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|address| seen.insert(address.clone()));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_paused_for_as_long_as_it_asks_and_else_longer_each_time() {
        let replica = Replica::new("http://a".to_owned(), 1);
        let pause = |asked| {
            let before = Instant::now();
            replica.pause(asked);
            locked(&replica.paused_until).unwrap() - before
        };
        let asked = Duration::from_secs(30);
        assert!((asked..LONGEST_ASKED_PAUSE).contains(&pause(Some(asked))));
        assert!(pause(Some(Duration::from_secs(9999))) < 2 * LONGEST_ASKED_PAUSE);
        let (third, fourth) = (pause(None), pause(None));
        assert!(
            third < fourth && third > FIRST_PAUSE,
            "{third:?} {fourth:?}"
        );
        assert!((0..99).all(|_| pause(None) < 2 * LONGEST_PAUSE));
        assert_eq!(pause_time(Some(Duration::ZERO), 0), SHORTEST_ASKED_PAUSE);
    }

    fn without_servers(retry_timeout: u64) -> Fleet {
        Fleet {
            args: FleetArgs {
                servers: Vec::new(),
                connections: 1,
                retry_timeout,
                wait_for_server: 0,
                token: None,
                tls_server_ca: None,
                tls_client_cert: None,
                tls_client_key: None,
            },
            replicas: Mutex::new(Vec::new()),
            expected: Mutex::new(None),
            freed: Notify::new(),
            failing_since: Mutex::new(None),
            last_resolution: Mutex::new(Instant::now()),
        }
    }

    #[test]
    fn calls_are_repeated_until_no_row_has_got_a_result_for_the_retry_timeout() {
        let (fleet, start) = (without_servers(600), Instant::now());
        let refused_at = |seconds| {
            let now = start + Duration::from_secs(seconds);
            fleet.check_patience(now, "the queue is full")
        };
        // The time begins with the first refusal, however many follow.
        assert!((100..700).all(|second| refused_at(second).is_ok()));
        fleet.answered();
        assert!(refused_at(700).is_ok() && refused_at(1299).is_ok());
        assert_eq!(
            refused_at(1300).unwrap_err().message(),
            "no row was scored for 600 s (--retry-timeout): the queue is full; run the command \
             again later: it continues"
        );
        assert!(without_servers(0).check_patience(start, "busy").is_err());
    }

    #[tokio::test]
    async fn refused_rows_are_sent_again_after_the_time_that_the_server_asked_for() {
        let (fleet, asked) = (without_servers(600), 2 * FIRST_PAUSE);
        let start = Instant::now();
        let waited = fleet.wait_after_refusal(Some(asked), 0, "busy").await;
        assert!(waited.is_ok() && start.elapsed() >= asked);
    }
}
