//! What a job was made from stays what it was: the adapter it starts from, and its base model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bradley::rpc::client::{Client, Status};
use bradley::rpc::pb::{self, training_event::Event};
use prost::Message as _;
use tempfile::TempDir;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::server::{Server, finish, job, pairs, score, scored, state, submit, upload};
use crate::support::golden;

/// Steps of a job that is paused on its way.
const STEPS: u64 = 120;
/// The loss of a pair whose policy is its reference: log 2.
const UNDECIDED: f64 = std::f64::consts::LN_2;

/// Waits until an event satisfies `enough`.
pub async fn until(client: &Client, name: &str, enough: impl Fn(&Event) -> bool) {
    let follow = client.follow(name, 0, |e| !e.event.as_ref().is_some_and(&enough));
    let followed = tokio::time::timeout(Duration::from_secs(60), follow).await;
    followed.expect("the event comes").unwrap();
}

pub fn is_step(event: &Event, from: u64) -> bool {
    matches!(event, Event::StepMetrics(s) if s.step >= from)
}

fn became(event: &Event, wanted: pb::JobState) -> bool {
    matches!(event, Event::StateChange(s) if s.to() == wanted)
}

/// Pauses a job after some steps.
pub async fn pause(client: &Client, name: &str) {
    until(client, name, |e| is_step(e, 3)).await;
    let request = pb::PauseTrainingJobRequest { name: name.into() };
    client.training().pause_training_job(request).await.unwrap();
    until(client, name, |e| became(e, pb::JobState::Paused)).await;
}

pub async fn resume(client: &Client, name: &str) -> Result<pb::TrainingJob, Status> {
    let request = pb::ResumeTrainingJobRequest { name: name.into() };
    client.training().resume_training_job(request).await.map(|r| r.into_inner())
}

pub async fn get(client: &Client, name: &str) -> pb::TrainingJob {
    let request = pb::GetTrainingJobRequest { name: name.into() };
    client.training().get_training_job(request).await.unwrap().into_inner()
}

/// Follows a job until it has succeeded; returns the bits of its losses by step.
pub async fn succeed(client: &Client, name: &str) -> BTreeMap<u64, u64> {
    let events = finish(client, name).await;
    let ended = get(client, name).await;
    assert_eq!(ended.state(), pb::JobState::Succeeded, "{:?}", ended.error);
    let step = |e: pb::TrainingEvent| match e.event {
        Some(Event::StepMetrics(s)) => Some((s.step, s.metrics["loss"].to_bits())),
        _ => None,
    };
    events.into_iter().filter_map(step).collect()
}

pub fn latest(job: &str) -> String {
    format!("{job}/checkpoints/latest")
}

// ---- adapters

const WEIGHTS: &str = "adapter_model.safetensors";

/// A server whose adapter folder holds one adapter, `x`; and the weights of another one.
struct Adapters {
    data: TempDir,
    adapters: TempDir,
    server: Server,
    client: Client,
    dataset: String,
    other: Vec<u8>,
}

impl Adapters {
    async fn start() -> Self {
        let (data, adapters) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let server = Self::serve(&data, &adapters);
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await.name;
        let first = submit(&client, job(&dataset, 2)).await;
        let second = pb::TrainingJob { seed: Some(7), ..job(&dataset, 6) };
        let second = submit(&client, second).await;
        let elsewhere = tempfile::tempdir().unwrap();
        for (name, folder) in [(&first, adapters.path().join("x")), (&second, elsewhere.path().into())] {
            succeed(&client, name).await;
            let format = pb::ExportFormat::Adapter;
            client.download_checkpoint(&latest(name), format, &folder).await.unwrap();
        }
        let other = std::fs::read(elsewhere.path().join(WEIGHTS)).unwrap();
        Adapters { data, adapters, server, client, dataset, other }
    }

    fn serve(data: &TempDir, adapters: &TempDir) -> Server {
        let models = format!("tiny={}", golden("models/llama").display());
        let folder = adapters.path().to_str().unwrap();
        Server::start_with(data.path(), &models, &["--adapter-dir", folder])
    }

    /// A job that starts from `x`.
    fn job(&self, steps: u64) -> pb::TrainingJob {
        let init_adapter = "x".to_owned();
        let lora = pb::LoraConfig { rank: Some(4), init_adapter, ..Default::default() };
        let method = Some(pb::training_job::Method::Lora(lora));
        pb::TrainingJob { method, ..job(&self.dataset, steps) }
    }

    /// Puts other weights in the place of those of `x`.
    fn overwrite(&self) {
        let file = self.adapters.path().join("x").join(WEIGHTS);
        assert_ne!(std::fs::read(&file).unwrap(), self.other);
        std::fs::write(file, &self.other).unwrap();
    }

    /// Starts the server anew, without what it remembers in memory or in its cache: everything in
    /// a cache may be computed anew at any time.
    async fn restart(&mut self) {
        self.server.kill();
        let _ = std::fs::remove_file(self.data.path().join("reference-cache.redb"));
        self.server = Self::serve(&self.data, &self.adapters);
        self.client = self.server.client().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_from_an_overwritten_adapter_is_measured_against_the_new_one() {
    let it = Adapters::start().await;
    for overwritten in [false, true] {
        if overwritten {
            it.overwrite();
        }
        let name = submit(&it.client, it.job(3)).await;
        let first = f64::from_bits(succeed(&it.client, &name).await[&1]);
        // Nothing is trained yet: the policy is its reference.
        assert!((first - UNDECIDED).abs() < 1e-6, "overwritten: {overwritten}, loss {first}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_job_goes_on_from_the_adapter_that_it_started_from() {
    let mut it = Adapters::start().await;
    let undisturbed = submit(&it.client, it.job(STEPS)).await;
    let wanted = succeed(&it.client, &undisturbed).await;
    let name = submit(&it.client, it.job(STEPS)).await;
    pause(&it.client, &name).await;
    it.overwrite();
    it.restart().await;
    resume(&it.client, &name).await.unwrap();
    let losses = succeed(&it.client, &name).await;
    assert_eq!(losses.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
    let apart = wanted.iter().find(|(step, loss)| losses[step] != **loss);
    let shown = apart.map(|(s, l)| (s, f64::from_bits(*l), f64::from_bits(losses[s])));
    assert_eq!(shown, None, "the first step that is not the undisturbed run's");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_job_goes_on_without_the_folder_of_its_adapter() {
    let it = Adapters::start().await;
    let name = submit(&it.client, it.job(STEPS)).await;
    pause(&it.client, &name).await;
    std::fs::remove_dir_all(it.adapters.path().join("x")).unwrap();
    resume(&it.client, &name).await.unwrap();
    succeed(&it.client, &name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_scored_against_the_adapter_that_its_job_started_from() {
    let mut it = Adapters::start().await;
    let name = submit(&it.client, it.job(3)).await;
    succeed(&it.client, &name).await;
    let before = score(&it.client, &latest(&name), pairs()).await;
    it.overwrite();
    it.restart().await;
    let after = score(&it.client, &latest(&name), pairs()).await;
    for (a, b) in before.results.iter().zip(&after.results) {
        assert_eq!(scored(a).margin.to_bits(), scored(b).margin.to_bits(), "{}", a.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_names_its_adapter_as_the_client_did() {
    let it = Adapters::start().await;
    let request = pb::CreateTrainingJobRequest { training_job: Some(it.job(1)), ..Default::default() };
    let made = it.client.training().create_training_job(request).await.unwrap().into_inner();
    let list = pb::ListTrainingJobsRequest::default();
    let mut listed = it.client.training().list_training_jobs(list).await.unwrap().into_inner();
    for shown in [get(&it.client, &made.name).await, made, listed.training_jobs.remove(0)] {
        let Some(pb::training_job::Method::Lora(lora)) = shown.method else { panic!("{shown:?}") };
        assert_eq!(lora.init_adapter, "x");
    }
}

// ---- base models

/// Replaces `old` wherever it occurs in a text file.
pub fn replace(file: PathBuf, old: &str, new: &str) {
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(old), "{} has no {old:?}", file.display());
    std::fs::write(file, text.replace(old, new)).unwrap();
}

/// Changes some weights a little: the file stays valid, the numbers finite.
pub fn perturb_weights(file: PathBuf) {
    let mut bytes = std::fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let data = &mut bytes[8 + header..];
    let middle = data.len() / 8 * 4;
    for number in data[middle..].chunks_exact_mut(4).take(2000) {
        // An upper bit of the mantissa of a little-endian f32.
        number[2] ^= 0x20;
    }
    std::fs::write(file, bytes).unwrap();
}

pub fn copy_files(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// The words in a message that may be hashes: at least 12 hexadecimal digits. Parts of a job's id
/// have dashes around them.
pub fn hashes(message: &str) -> BTreeSet<&str> {
    let words = message.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    words.filter(|w| w.len() >= 12 && w.bytes().all(|b| b.is_ascii_hexdigit())).collect()
}

/// Checks that an error is about the change of `part` of a model, and says from what to what.
fn assert_changed(what: &str, code: Code, reason: &str, message: &str, part: &str) {
    assert_eq!(code, Code::FailedPrecondition, "{what}: {message}");
    assert_eq!(reason, "MODEL_CHANGED", "{what}: {message}");
    assert!(hashes(message).len() >= 2, "{what}: two hashes are expected: {message}");
    assert!(message.to_lowercase().contains(part), "{what}: {part} is not named: {message}");
}

pub fn assert_refused<T>(what: &str, answer: Result<T, Status>, part: &str) {
    let Err(status) = answer else { panic!("{what} is accepted although the {part} changed") };
    let reason = status.get_details_error_info().map(|i| i.reason).unwrap_or_default();
    assert_changed(what, status.code(), &reason, status.message(), part);
}

/// Waits until a job waits for its model, and checks what it says.
pub async fn assert_waits(client: &Client, name: &str, part: &str) {
    let start = Instant::now();
    loop {
        let shown = get(client, name).await;
        if let (pb::JobState::Queued, Some(error)) = (shown.state(), &shown.error) {
            let details = error.encode_to_vec().into();
            let status = Status::with_details(error.code.into(), error.message.clone(), details);
            let reason = status.get_details_error_info().map(|i| i.reason).unwrap_or_default();
            return assert_changed("a waiting job", status.code(), &reason, &error.message, part);
        }
        let late = start.elapsed() > Duration::from_secs(30);
        assert!(!late, "it should wait: {:?}, {:?}", shown.state(), shown.error);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn events(client: &Client, name: &str) -> Vec<pb::TrainingEvent> {
    let request = pb::ListTrainingEventsRequest { parent: name.into(), ..Default::default() };
    client.training().list_training_events(request).await.unwrap().into_inner().events
}

/// A server on a copy of a model is stopped while one job has ended, one is paused, one runs and
/// one waits for the device. `change` then changes a `part` of the model.
async fn nothing_goes_on_with_another(part: &str, change: impl FnOnce(&Path)) {
    let (data, model) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let original = golden("models/llama");
    copy_files(&original, model.path());
    let models = format!("tiny={}", model.path().display());
    let serve = || Server::start_with(data.path(), &models, &["--lease", "2"]);
    let mut server = serve();
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await.name;
    let ended = submit(&client, job(&dataset, 3)).await;
    succeed(&client, &ended).await;
    let before = score(&client, &latest(&ended), pairs()).await;
    let paused = submit(&client, job(&dataset, STEPS)).await;
    pause(&client, &paused).await;
    let running = submit(&client, job(&dataset, 100_000)).await;
    until(&client, &running, |e| is_step(e, 1)).await;
    let queued = submit(&client, job(&dataset, 2)).await;
    assert_eq!(state(&client, &queued).await, pb::JobState::Queued);
    server.kill();

    change(model.path());
    let mut server = serve();
    let client = server.client().await;
    let scoring = async || {
        let policy = latest(&ended);
        let options = Some(pb::ScoringOptions { policy, ..Default::default() });
        let request = pb::ScorePairsRequest { options, pairs: pairs() };
        client.scoring().score_pairs(request).await
    };
    let merged = async |client: &Client| {
        let format = pb::ExportFormat::Merged.into();
        let request = pb::ExportCheckpointRequest { name: latest(&ended), format, ..Default::default() };
        client.checkpoints().export_checkpoint(request).await
    };
    assert_refused("scoring", scoring().await, part);
    assert_refused("a merged export", merged(&client).await, part);
    assert_refused("going on", resume(&client, &paused).await, part);
    assert_eq!(state(&client, &paused).await, pb::JobState::Paused);
    for waiting in [&running, &queued] {
        assert_waits(&client, waiting, part).await;
    }
    // Whoever wants the model that is there now can have it.
    let new = submit(&client, job(&dataset, 2)).await;
    succeed(&client, &new).await;
    score(&client, &latest(&new), pairs()).await;
    // What waits can be given up, and has not been run meanwhile.
    let cancel = pb::CancelTrainingJobRequest { name: running.clone() };
    client.training().cancel_training_job(cancel).await.unwrap();
    finish(&client, &running).await;
    assert_eq!(state(&client, &running).await, pb::JobState::Cancelled);
    assert_waits(&client, &queued, part).await;
    let ran = |e: &pb::TrainingEvent| e.event.as_ref().is_some_and(|e| is_step(e, 0) || became(e, pb::JobState::Running));
    let told = events(&client, &queued).await;
    assert!(!told.iter().any(ran), "{told:?}");
    server.kill();

    copy_files(&original, model.path());
    let server = serve();
    let client = server.client().await;
    let after = score(&client, &latest(&ended), pairs()).await;
    for (a, b) in before.results.iter().zip(&after.results) {
        assert_eq!(scored(a), scored(b), "the scores are what they were");
    }
    merged(&client).await.unwrap();
    // It goes on without anybody's help, once its model is back.
    assert_eq!(succeed(&client, &queued).await.len(), 2);
    assert_eq!(get(&client, &queued).await.error, None);
    resume(&client, &paused).await.unwrap();
    assert_eq!(succeed(&client, &paused).await.len() as u64, STEPS);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_on_with_other_weights() {
    nothing_goes_on_with_another("weights", |m| perturb_weights(m.join("model.safetensors"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_on_with_another_configuration() {
    let change = |model: &Path| {
        let (old, new) = ("\"rope_theta\": 10000.0", "\"rope_theta\": 20000.0");
        replace(model.join("config.json"), old, new);
    };
    nothing_goes_on_with_another("config", change).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_on_with_another_tokenizer() {
    let change = |model: &Path| {
        // In the vocabulary and among the added tokens: the template's header gets other tokens.
        replace(model.join("tokenizer.json"), "<|end_header_id|>", "<|end_of_header|>");
    };
    nothing_goes_on_with_another("tokenizer", change).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_on_with_another_chat_template() {
    let change = |model: &Path| {
        let (old, new) = ("message['content'] | trim", "message['content']");
        replace(model.join("chat_template.jinja"), old, new);
    };
    nothing_goes_on_with_another("chat template", change).await;
}
