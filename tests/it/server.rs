//! The real binary as a child process, on loopback ports of its own.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use bradley::rpc::client::{Client, Status, Target};
use bradley::rpc::pb::{self, training_event::Event};
use tonic::Code;
use tonic_types::{RpcStatusExt as _, StatusExt as _};

use crate::support::{golden, hashes};
use crate::wait::{until_blocking, until_ok};

/// Time limit for a connection, on a busy machine.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(60);

/// A running server; killed when dropped.
pub struct Server {
    child: Child,
    /// `http://127.0.0.1:PORT` of the gRPC port.
    pub address: String,
    /// `127.0.0.1:PORT` of the HTTP port.
    pub http: String,
    pub data_dir: PathBuf,
    /// Lines of its log at other levels than INFO.
    log: Arc<Mutex<Vec<String>>>,
    /// All lines of its log.
    lines: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Starts a server on the tiny Llama.
    pub fn start(data_dir: &Path) -> Self {
        Self::start_with(
            data_dir,
            &format!("tiny={}", golden("models/llama").display()),
            &[],
        )
    }

    /// Starts a server and waits until it serves.
    pub fn start_with(data_dir: &Path, models: &str, flags: &[&str]) -> Self {
        Self::start_in(data_dir, models, flags, &[])
    }

    /// Starts a server with environment variables, and waits until it serves.
    pub fn start_in(
        data_dir: &Path,
        models: &str,
        flags: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        Self::start_as(data_dir, models, flags, |command| {
            command.envs(environment.iter().copied());
        })
    }

    /// Does the same; `prepare` changes how the process is started, e.g. limits its resources.
    pub fn start_as(
        data_dir: &Path,
        models: &str,
        flags: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = Command::new(crate::support::binary());
        command
            .args([
                "serve",
                "--http-listen",
                "127.0.0.1:0",
                "--log-format",
                "json",
                "--models",
                models,
            ])
            .args(flags)
            .arg("--data-dir")
            .arg(data_dir)
            .env_remove("BRADLEY_CONFIG")
            // A build with the feature `cuda` would otherwise choose an emulated GPU.
            .env("BRADLEY_DEVICE", "cpu")
            .stderr(Stdio::piped());
        if !flags.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        prepare(&mut command);
        let mut child = command.spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let log_of_reader = log.clone();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let lines_of_reader = lines.clone();
        let (sender, addresses) = mpsc::channel();
        let errors = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in errors.lines().map_while(Result::ok) {
                let json: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                lines_of_reader.lock().unwrap().push(line.clone());
                match json["fields"]["message"].as_str() {
                    Some("serving") => {
                        let address =
                            |name: &str| json["fields"][name].as_str().unwrap().to_owned();
                        let _ = sender.send((address("address"), address("http_address")));
                    }
                    _ if json["level"] != "INFO" => {
                        eprintln!("server: {line}");
                        log_of_reader.lock().unwrap().push(line);
                    }
                    _ => {}
                }
            }
        });
        let (address, http) = addresses
            .recv_timeout(Duration::from_secs(120))
            .expect("the server does not start");
        Server {
            child,
            address: format!("http://{address}"),
            http,
            data_dir: data_dir.to_owned(),
            log,
            lines,
        }
    }

    /// Returns its exit status, or `None` while it runs.
    pub fn exit_status(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Returns its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns true if `text` is in a line of its log at another level than INFO: in a warning, an
    /// error, or the message of a panic.
    pub fn has_logged(&self, text: &str) -> bool {
        self.log
            .lock()
            .unwrap()
            .iter()
            .any(|line| line.contains(text))
    }

    /// Returns the lines of its log that contain `text`.
    pub fn lines_with(&self, text: &str) -> Vec<String> {
        let lines = self.lines.lock().unwrap();
        lines
            .iter()
            .filter(|line| line.contains(text))
            .cloned()
            .collect()
    }

    /// Returns a connected client.
    pub async fn client(&self) -> Client {
        connected(&Target::plain(&self.address)).await
    }

    /// Returns a connected client with a token.
    pub async fn client_with(&self, token: &str) -> Client {
        let target = Target {
            token: Some(token.to_owned()),
            ..Target::plain(&self.address)
        };
        connected(&target).await
    }

    /// Returns the answer of `/metrics`, with its HTTP headers.
    pub fn metrics(&self) -> String {
        self.http_get("/metrics")
    }

    /// Returns the value of the first metric whose line begins with `name`, or `None` if there is
    /// none yet.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let metrics = self.metrics();
        let line = metrics.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    /// Returns the number of pairs that it has scored.
    pub fn scored_pairs(&self) -> u64 {
        let scored = self.metric("bradley_scored_pairs_total ");
        scored.unwrap_or_default() as u64
    }

    /// Returns the answer of the HTTP port to a GET request, with its headers.
    pub fn http_get(&self, path: &str) -> String {
        let mut connection = TcpStream::connect(&self.http).unwrap();
        write!(
            connection,
            "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGTERM; the exit status must come within `limit`.
    pub fn terminate(&mut self, limit: Duration) -> std::process::ExitStatus {
        // SAFETY: signals the child that this struct owns and has not reaped.
        let sent = unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        assert_eq!(sent, 0);
        let mut status = None;
        until_blocking("the end after SIGTERM", limit, || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn connected(target: &Target) -> Client {
    Client::connect(target, CONNECT_LIMIT).await.unwrap()
}

/// Returns a port on which nobody listens, another one at each call. It lies below the range from
/// which systems assign free ports, so that nobody takes it meanwhile.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let port =
            10_000 + (97 * std::process::id() + NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000;
        if TcpListener::bind(("127.0.0.1", port as u16)).is_ok() {
            return port as u16;
        }
    }
}

/// Creates a token with the command line, and returns its text.
pub fn create_token(data_dir: &Path, owner: &str, roles: &str) -> String {
    create_token_with_id(data_dir, owner, roles).1
}

/// Creates a token with the command line, and returns its id and its text.
pub fn create_token_with_id(data_dir: &Path, owner: &str, roles: &str) -> (String, String) {
    let made = Command::new(crate::support::binary())
        .args(["--output", "json", "tokens", "create", "--owner", owner])
        .args(["--roles", roles, "--data-dir"])
        .arg(data_dir)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let made: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    let field = |name: &str| made[name].as_str().unwrap().to_owned();
    (field("id"), field("token"))
}

/// Uploads a golden file.
pub async fn upload(client: &Client, file: &str) -> pb::Dataset {
    let metadata = pb::UploadMetadata {
        display_name: file.into(),
        ..Default::default()
    };
    client
        .upload_dataset(&golden(file), metadata, |_| {})
        .await
        .unwrap()
}

/// Returns a LoRA job of `steps` steps on the tiny model.
pub fn job(dataset: &str, steps: u64) -> pb::TrainingJob {
    pb::TrainingJob {
        display_name: "test".into(),
        policy: "models/tiny".into(),
        dataset: dataset.into(),
        method: Some(pb::training_job::Method::Lora(pb::LoraConfig {
            rank: Some(4),
            ..Default::default()
        })),
        optimizer: Some(pb::OptimizerConfig {
            learning_rate: Some(1e-2),
            ..Default::default()
        }),
        batch: Some(pb::BatchConfig {
            batch_size: Some(2),
            max_length: Some(256),
            max_steps: Some(steps),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Asks for a job's creation.
pub async fn create(client: &Client, job: pb::TrainingJob) -> Result<pb::TrainingJob, Status> {
    let request = pb::CreateTrainingJobRequest {
        training_job: Some(job),
        ..Default::default()
    };
    client
        .training()
        .create_training_job(request)
        .await
        .map(|r| r.into_inner())
}

/// Creates a job and returns its name.
pub async fn submit(client: &Client, job: pb::TrainingJob) -> String {
    create(client, job).await.unwrap().name
}

/// Follows a job to its end, and returns its events.
pub async fn finish(client: &Client, job: &str) -> Vec<pb::TrainingEvent> {
    let mut events = Vec::new();
    let all = client.follow(job, 0, |e| {
        events.push(e);
        true
    });
    tokio::time::timeout(Duration::from_secs(300), all)
        .await
        .expect("the job does not end")
        .unwrap();
    events
}

/// Trains an adapter and returns the name of its checkpoint.
pub async fn trained_adapter(client: &Client) -> String {
    let dataset = upload(client, "pairs.jsonl").await;
    let name = submit(client, job(&dataset.name, 4)).await;
    finish(client, &name).await;
    format!("{name}/checkpoints/4")
}

/// Returns the state of a job.
pub async fn state(client: &Client, job: &str) -> pb::JobState {
    get(client, job).await.state()
}

/// Returns true if a job in this state has ended.
pub fn is_final(state: pb::JobState) -> bool {
    matches!(
        state,
        pb::JobState::Succeeded | pb::JobState::Failed | pb::JobState::Cancelled
    )
}

/// Returns the golden chat rows as pairs to score.
pub fn pairs() -> Vec<pb::Pair> {
    let text = |t: &bradley::domain::dataset::Text| {
        let bradley::domain::dataset::Text::Chat(messages) = t else {
            panic!("not a chat row")
        };
        let messages = messages
            .iter()
            .map(|m| pb::Message {
                role: m.role().into(),
                content: m.fields()["content"].as_str().unwrap().into(),
                ..Default::default()
            })
            .collect();
        Some(pb::Text {
            form: Some(pb::text::Form::Chat(pb::MessageList { messages })),
        })
    };
    let rows = crate::support::rows("pairs.jsonl");
    rows.iter()
        .map(|r| pb::Pair {
            id: r.id.clone().unwrap(),
            prompt: text(&r.prompt),
            a: text(&r.chosen),
            b: text(&r.rejected),
            ..Default::default()
        })
        .collect()
}

/// Scores the golden pairs with these options.
pub async fn score_with(
    client: &Client,
    options: pb::ScoringOptions,
) -> Result<pb::ScorePairsResponse, Status> {
    let request = pb::ScorePairsRequest {
        options: Some(options),
        pairs: pairs(),
    };
    client
        .scoring()
        .score_pairs(request)
        .await
        .map(|r| r.into_inner())
}

/// Scores pairs in one call, with the log-prob of each token.
pub async fn score(client: &Client, policy: &str, pairs: Vec<pb::Pair>) -> pb::ScorePairsResponse {
    let options = pb::ScoringOptions {
        policy: policy.into(),
        per_token_logprobs: true,
        ..Default::default()
    };
    client
        .scoring()
        .score_pairs(pb::ScorePairsRequest {
            options: Some(options),
            pairs,
        })
        .await
        .unwrap()
        .into_inner()
}

/// Returns the score of a result that must not be an error.
pub fn scored(result: &pb::PairResult) -> &pb::PairScore {
    match &result.result {
        Some(pb::pair_result::Result::Score(score)) => score,
        other => panic!("{}: {other:?}", result.id),
    }
}

/// Follows a job until one of its events satisfies `enough`.
pub async fn until_event(client: &Client, name: &str, enough: impl Fn(&Event) -> bool) {
    let follow = client.follow(name, 0, |e| !e.event.as_ref().is_some_and(&enough));
    let followed = tokio::time::timeout(Duration::from_secs(180), follow).await;
    followed.expect("the event does not come").unwrap();
}

/// Returns true if an event reports the step `from` or a later one.
pub fn is_step(event: &Event, from: u64) -> bool {
    matches!(event, Event::StepMetrics(s) if s.step >= from)
}

/// Returns true if an event says that a job has reached the state `wanted`.
pub fn became(event: &Event, wanted: pb::JobState) -> bool {
    matches!(event, Event::StateChange(s) if s.to() == wanted)
}

/// Pauses a job after its third step.
pub async fn pause(client: &Client, name: &str) {
    until_event(client, name, |e| is_step(e, 3)).await;
    let request = pb::PauseTrainingJobRequest { name: name.into() };
    client.training().pause_training_job(request).await.unwrap();
    until_event(client, name, |e| became(e, pb::JobState::Paused)).await;
}

/// Asks to resume a job.
pub async fn resume(client: &Client, name: &str) -> Result<pb::TrainingJob, Status> {
    let request = pb::ResumeTrainingJobRequest { name: name.into() };
    client
        .training()
        .resume_training_job(request)
        .await
        .map(|r| r.into_inner())
}

/// Asks for a job.
pub async fn try_get(client: &Client, name: &str) -> Result<pb::TrainingJob, Status> {
    let request = pb::GetTrainingJobRequest { name: name.into() };
    client
        .training()
        .get_training_job(request)
        .await
        .map(|r| r.into_inner())
}

/// Returns a job as it is now.
pub async fn get(client: &Client, name: &str) -> pb::TrainingJob {
    try_get(client, name).await.unwrap()
}

/// Follows a job until it has succeeded, and returns the bits of its losses by step.
pub async fn succeed(client: &Client, name: &str) -> BTreeMap<u64, u64> {
    let events = finish(client, name).await;
    let ended = get(client, name).await;
    assert_eq!(ended.state(), pb::JobState::Succeeded, "{:?}", ended.error);
    losses(&events)
}

/// Returns the bits of the losses in a job's events, by step.
pub fn losses(events: &[pb::TrainingEvent]) -> BTreeMap<u64, u64> {
    let loss = |e: &pb::TrainingEvent| match &e.event {
        Some(Event::StepMetrics(s)) => Some((s.step, s.metrics["loss"].to_bits())),
        _ => None,
    };
    events.iter().filter_map(loss).collect()
}

/// Returns the steps in a job's events, in the order of the events.
pub fn steps(events: &[pb::TrainingEvent]) -> Vec<u64> {
    let step = |e: &pb::TrainingEvent| match &e.event {
        Some(Event::StepMetrics(s)) => Some(s.step),
        _ => None,
    };
    events.iter().filter_map(step).collect()
}

/// Returns true if a line of the server's log says that an action was done, in the audit log.
pub fn is_audited(line: &str, action: &str) -> bool {
    let line: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
    let fields = &line["fields"];
    line["target"] == "audit" && fields["message"] == "done" && fields["action"] == action
}

/// Returns the name of a job's last checkpoint.
pub fn latest(job: &str) -> String {
    format!("{job}/checkpoints/latest")
}

/// Returns the id in the name of a job or of a dataset.
pub fn id(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Returns the folder of a job's checkpoints below a data directory or an artifact store.
pub fn checkpoints_folder(root: &Path, job: &str) -> PathBuf {
    root.join("jobs").join(id(job)).join("checkpoints")
}

/// Returns the reason in the details of an error.
pub fn reason(status: &Status) -> String {
    let info = status.get_details_error_info();
    info.map(|info| info.reason).unwrap_or_default()
}

/// Returns the reason in the details of a job's error.
pub fn job_error_reason(error: &tonic_types::Status) -> String {
    let info = error.get_details_error_info();
    info.map(|info| info.reason).unwrap_or_default()
}

/// Checks that an error says that `part` of a model has changed, and that it names both hashes.
fn assert_changed(what: &str, code: Code, reason: &str, message: &str, part: &str) {
    assert_eq!(code, Code::FailedPrecondition, "{what}: {message}");
    assert_eq!(reason, "MODEL_CHANGED", "{what}: {message}");
    assert!(
        hashes(message).len() >= 2,
        "{what}: two hashes are expected: {message}"
    );
    assert!(
        message.to_lowercase().contains(part),
        "{what}: {part} is not named: {message}"
    );
}

/// Checks that an answer is a refusal because `part` of a model changed.
pub fn assert_refused<T>(what: &str, answer: Result<T, Status>, part: &str) {
    let Err(status) = answer else {
        panic!("{what} is accepted although the {part} changed")
    };
    assert_changed(
        what,
        status.code(),
        &reason(&status),
        status.message(),
        part,
    );
}

/// Waits until a job waits for its model, and checks the error.
pub async fn assert_waits(client: &Client, name: &str, part: &str) {
    let limit = Duration::from_secs(60);
    until_ok("a job's wait for its model", limit, async || {
        let shown = get(client, name).await;
        if let (pb::JobState::Queued, Some(error)) = (shown.state(), &shown.error) {
            assert_changed(
                "a waiting job",
                Code::from(error.code),
                &job_error_reason(error),
                &error.message,
                part,
            );
            return Ok(());
        }
        Err(format!("{:?}, {:?}", shown.state(), shown.error))
    })
    .await;
}

/// Returns a job's events so far, from all pages.
pub async fn events(client: &Client, name: &str) -> Vec<pb::TrainingEvent> {
    let mut all: Vec<pb::TrainingEvent> = Vec::new();
    loop {
        let request = pb::ListTrainingEventsRequest {
            parent: name.into(),
            after_sequence: all.last().map_or(0, |e| e.sequence),
            page_size: 1000,
        };
        let page = client
            .training()
            .list_training_events(request)
            .await
            .unwrap()
            .into_inner();
        all.extend(page.events);
        if !page.more {
            return all;
        }
    }
}
