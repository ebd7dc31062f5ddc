//! A run's complete state on disk: one folder per step, written under a temporary name, synced,
//! then renamed.
//!
//! ```text
//! <step>/adapter_config.json + adapter_model.safetensors    LoRA: loads in PEFT as it is
//! <step>/config.json + model.safetensors + tokenizer files  full: loads in transformers as it is
//! <step>/optimizer.safetensors                              AdamW's moments
//! <step>/reference.safetensors                              TR-DPO's moving reference, when there is one
//! <step>/trainer_state.json                                 counters, and a checksum of every file above
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::observe::Window;
use super::optimizer::AdamW;
use super::trainable::TrainablePolicy;
use crate::domain::identity::{Difference, ModelIdentity};
use crate::domain::job::Metrics;
use crate::domain::names::BaseName;
use crate::formats::export::Layout;
use crate::formats::tokenizer::ChatTokenizer;
use crate::formats::{export, peft};
use crate::model::decoder::Policy;
use crate::model::error::{ModelError, last_part};

/// The file that makes a folder a checkpoint; written last.
pub const STATE_FILE: &str = "trainer_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// TR-DPO's moving reference.
pub const REFERENCE_FILE: &str = "reference.safetensors";
const VERSION: u32 = 1;

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
    /// The checkpoint is damaged or belongs to another run.
    #[error("checkpoint {}: {reason}", path.display())]
    Damaged {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Its run was on another base model.
    #[error("checkpoint {}: it was trained on a base model whose {part} has the hash {pinned}, this one's is {found}", path.display())]
    OtherModel {
        /// The folder.
        path: PathBuf,
        /// The part of the model that differs.
        part: &'static str,
        /// The part's hash in the checkpoint.
        pinned: String,
        /// The part's hash in the model at hand.
        found: String,
    },
    /// Another build wrote it.
    #[error("checkpoint {}: its format is version {found}, this build reads version {VERSION}: use the build that wrote it", path.display())]
    Version {
        /// The folder.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// Its weights could not be written or read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Where a run stands, apart from tensors. The shuffle needs no generator state: an epoch's order
/// is a function of the seed and the epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Optimizer steps taken.
    pub step: u64,
    /// The epoch of the next micro-batch.
    pub epoch: u64,
    /// The next micro-batch within the epoch.
    pub micro_batch: usize,
    /// Tokens trained on.
    pub tokens: u64,
    /// The best evaluation so far and its step.
    pub best: Option<(f64, u64)>,
    /// The name of the metric that `best` is a value of; empty in checkpoints of version 0.2.
    #[serde(default)]
    pub best_metric: String,
    /// Evaluations since the best.
    pub stale_evaluations: u32,
    /// The step of the last evaluation: a run that was drained before one that was due makes up for
    /// it.
    pub evaluated: Option<u64>,
    /// TR-DPO syncs made.
    pub reference_syncs: u64,
    /// Metrics of the steps since the last log line.
    #[serde(default)]
    pub window: Window,
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    version: u32,
    adapter: bool,
    adam_updates: u64,
    /// The base model that it was trained on; none in checkpoints of version 0.1.
    #[serde(default)]
    base: Option<ModelIdentity>,
    /// The digest of the run's pairs; none in checkpoints of version 0.2.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pairs: Option<String>,
    state: RunState,
    metrics: Metrics,
    /// BLAKE3 of every other file.
    files: BTreeMap<String, String>,
}

/// Read first: another version may have other fields.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// What goes into a checkpoint.
pub struct CheckpointContents<'a> {
    /// The weights.
    pub policy: &'a TrainablePolicy,
    /// AdamW.
    pub optimizer: &'a AdamW,
    /// TR-DPO's moving reference.
    pub reference: Option<&'a Policy>,
    /// Counters.
    pub state: &'a RunState,
    /// The newest metrics.
    pub metrics: &'a Metrics,
    /// Written beside full weights.
    pub tokenizer: &'a ChatTokenizer,
    /// The base model's name, for adapter_config.json.
    pub base: &'a BaseName,
    /// The base model by content.
    pub identity: &'a ModelIdentity,
    /// The digest of the run's pairs.
    pub pairs: &'a str,
}

impl CheckpointError {
    /// Returns the message without folders of the server.
    pub fn for_clients(&self) -> String {
        let path = match self {
            CheckpointError::Io { path, .. }
            | CheckpointError::Damaged { path, .. }
            | CheckpointError::OtherModel { path, .. }
            | CheckpointError::Version { path, .. } => path,
            CheckpointError::Model(e) => return e.for_clients(),
            CheckpointError::Candle(e) => return e.to_string(),
        };
        self.to_string().replace(&path.display().to_string(), &last_part(path))
    }

    /// Whether a file is not there, rather than wrong.
    pub fn is_missing_file(&self) -> bool {
        matches!(self, CheckpointError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether the files are at fault for good, rather than this build or a disk that may answer
    /// later. A file that is not there may come back, and proves no damage.
    pub fn is_damage(&self) -> bool {
        match self {
            CheckpointError::Damaged { .. } => true,
            CheckpointError::Io { source, .. } => source.kind() == io::ErrorKind::UnexpectedEof,
            CheckpointError::OtherModel { .. }
            | CheckpointError::Version { .. }
            | CheckpointError::Model(_)
            | CheckpointError::Candle(_) => false,
        }
    }
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError + '_ {
    move |source| CheckpointError::Io { path: path.to_owned(), source }
}

/// Writes `<folder>/<step>` atomically and returns its size in bytes. After it returns the
/// checkpoint survives a crash of the machine.
pub fn save(folder: &Path, contents: &CheckpointContents) -> Result<u64, CheckpointError> {
    let target = folder.join(contents.state.step.to_string());
    let temporary = folder.join(format!(".{}.tmp", contents.state.step));
    // A step's tensors are a function of the run, so one that is there and whole need not be
    // replaced: there is no moment without it.
    if verify(&target).is_ok() {
        return size(&target);
    }
    remove_if_present(&temporary)?;
    if let Err(e) = write(&temporary, contents) {
        // On a full disk half a checkpoint is in the way of everyone.
        let _ = fs::remove_dir_all(&temporary);
        return Err(e);
    }
    // Only a damaged one can be in the way.
    remove_if_present(&target)?;
    fs::rename(&temporary, &target).map_err(io_at(&target))?;
    sync_folder(folder)?;
    size(&target)
}

/// Writes and syncs a checkpoint's files into a new folder.
fn write(temporary: &Path, contents: &CheckpointContents) -> Result<(), CheckpointError> {
    fs::create_dir_all(temporary).map_err(io_at(temporary))?;
    match &contents.policy.policy.adapter {
        Some(adapter) => peft::save(temporary, adapter, contents.base)?,
        None => save_full(temporary, &contents.policy.policy, contents.tokenizer)?,
    }
    peft::save_tensors(&temporary.join(OPTIMIZER_FILE), &moments(contents)?)?;
    if let Some(reference) = contents.reference {
        peft::save_tensors(&temporary.join(REFERENCE_FILE), &reference.parameters.named())?;
    }
    let mut files = BTreeMap::new();
    for name in file_names(temporary)? {
        let path = temporary.join(&name);
        files.insert(name, checksum(&path)?);
        File::open(&path).and_then(|f| f.sync_all()).map_err(io_at(&path))?;
    }
    let state = StateFile {
        version: VERSION,
        adapter: contents.policy.is_lora(),
        adam_updates: contents.optimizer.updates,
        base: Some(contents.identity.clone()),
        pairs: Some(contents.pairs.to_owned()),
        state: contents.state.clone(),
        metrics: contents.metrics.clone(),
        files,
    };
    let path = temporary.join(STATE_FILE);
    fs::write(&path, serde_json::to_vec_pretty(&state).map_err(|e| damaged(&path, e.to_string()))?)
        .map_err(io_at(&path))?;
    File::open(&path).and_then(|f| f.sync_all()).map_err(io_at(&path))?;
    sync_folder(temporary)
}

/// Writes full weights with what transformers needs to load them, as files without folders.
fn save_full(dir: &Path, policy: &Policy, tokenizer: &ChatTokenizer) -> Result<(), ModelError> {
    export::save_merged(
        dir,
        &policy.config,
        None,
        Layout::CHECKPOINT,
        &policy.parameters.reader(),
    )?;
    export::save_companions(dir, &policy.config, tokenizer, |name| !name.contains('/'))
}

fn moments(contents: &CheckpointContents) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    let mut all = Vec::new();
    for (i, t) in contents.policy.trainables.iter().enumerate() {
        for (prefix, values) in
            [("m", &contents.optimizer.first[i]), ("v", &contents.optimizer.second[i])]
        {
            all.push((
                format!("{prefix}.{}", t.name),
                Tensor::from_slice(values, t.var.shape(), &Device::Cpu)?,
            ));
        }
    }
    Ok(all)
}

/// What [`restore`] gives back besides the tensors it puts in place.
pub struct Restored {
    /// Counters.
    pub state: RunState,
    /// The newest metrics.
    pub metrics: Metrics,
    /// TR-DPO's moving reference, if stored.
    pub reference: Option<Vec<(String, Tensor)>>,
}

/// Restores weights and moments into a policy and optimizer of the same shapes, on the base model
/// that the checkpoint was trained on.
pub fn restore(
    dir: &Path,
    base: &ModelIdentity,
    policy: &TrainablePolicy,
    optimizer: &mut AdamW,
) -> Result<Restored, CheckpointError> {
    let file = verify(dir)?;
    if let Some(Difference { part, hashes }) =
        file.base.as_ref().and_then(|pinned| pinned.difference(base))
    {
        let (pinned, found) = (hashes.0.to_owned(), hashes.1.to_owned());
        return Err(CheckpointError::OtherModel { path: dir.to_owned(), part, pinned, found });
    }
    if file.adapter != policy.is_lora() {
        return Err(damaged(
            dir,
            "it was written by a run of the other method (LoRA or full)".into(),
        ));
    }
    let weights = match file.adapter {
        true => load(&dir.join(peft::WEIGHTS_FILE))?,
        false => load(&dir.join(export::WEIGHTS_FILE))?,
    };
    let moments = load(&dir.join(OPTIMIZER_FILE))?;
    for (i, t) in policy.trainables.iter().enumerate() {
        t.var.set(&fetch(dir, &weights, &t.name, t.var.shape())?)?;
        optimizer.first[i] = fetch(dir, &moments, &format!("m.{}", t.name), t.var.shape())?
            .flatten_all()?
            .to_vec1()?;
        optimizer.second[i] = fetch(dir, &moments, &format!("v.{}", t.name), t.var.shape())?
            .flatten_all()?
            .to_vec1()?;
    }
    optimizer.updates = file.adam_updates;
    let reference = match file.files.contains_key(REFERENCE_FILE) {
        true => Some(load(&dir.join(REFERENCE_FILE))?.into_iter().collect()),
        false => None,
    };
    Ok(Restored { state: file.state, metrics: file.metrics, reference })
}

type Tensors = std::collections::HashMap<String, Tensor>;

fn load(path: &Path) -> Result<Tensors, CheckpointError> {
    Ok(candle_core::safetensors::load(path, &Device::Cpu)?)
}

fn fetch(
    dir: &Path,
    tensors: &Tensors,
    name: &str,
    shape: &candle_core::Shape,
) -> Result<Tensor, CheckpointError> {
    match tensors.get(name) {
        Some(t) if t.shape() == shape && t.dtype() == DType::F32 => Ok(t.clone()),
        Some(t) => Err(damaged(
            dir,
            format!("tensor {name} is {:?} {:?}, expected f32 {shape:?}", t.dtype(), t.shape()),
        )),
        None => Err(damaged(dir, format!("tensor {name} is missing"))),
    }
}

/// Checks every file of a checkpoint against its checksum.
pub fn check(dir: &Path) -> Result<(), CheckpointError> {
    verify(dir).map(|_| ())
}

/// Returns the digest of the pairs of a checkpoint's run, if it has one, and where the run stands.
pub fn progress(dir: &Path) -> Result<(Option<String>, RunState), CheckpointError> {
    let file = read_state(dir)?;
    Ok((file.pairs, file.state))
}

/// What tells a checkpoint from any other: the hash of its state file, which lists the hashes of
/// its other files.
pub fn digest(dir: &Path) -> Result<String, CheckpointError> {
    checksum(&dir.join(STATE_FILE))
}

/// Reads a checkpoint's description and checks every file against its checksum.
fn verify(dir: &Path) -> Result<StateFile, CheckpointError> {
    let file = read_state(dir)?;
    for (name, expected) in &file.files {
        let found = checksum(&dir.join(name))?;
        if found != *expected {
            return Err(damaged(
                dir,
                format!(
                    "{name} does not match its checksum: the file was changed or damaged after it was written"
                ),
            ));
        }
    }
    Ok(file)
}

fn read_state(dir: &Path) -> Result<StateFile, CheckpointError> {
    let path = dir.join(STATE_FILE);
    let text = fs::read(&path).map_err(io_at(&path))?;
    let unreadable = |e: serde_json::Error| damaged(dir, format!("{STATE_FILE}: {e}"));
    let Versioned { version } = serde_json::from_slice(&text).map_err(unreadable)?;
    if version != VERSION {
        return Err(CheckpointError::Version { path: dir.to_owned(), found: version });
    }
    serde_json::from_slice(&text).map_err(unreadable)
}

/// The steps that have a folder, in no order; leftovers of interrupted writes are not among them.
pub fn steps(folder: &Path) -> Result<Vec<u64>, CheckpointError> {
    match fs::metadata(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        _ => Ok(file_names(folder)?.iter().filter_map(|name| name.parse().ok()).collect()),
    }
}

fn damaged(path: &Path, reason: String) -> CheckpointError {
    CheckpointError::Damaged { path: path.to_owned(), reason }
}

fn checksum(path: &Path) -> Result<String, CheckpointError> {
    let mut hash = blake3::Hasher::new();
    let mut file = File::open(path).map_err(io_at(path))?;
    io::copy(&mut file, &mut hash).map_err(io_at(path))?;
    Ok(hash.finalize().to_hex().to_string())
}

fn file_names(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_at(dir))? {
        names.push(entry.map_err(io_at(dir))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn size(dir: &Path) -> Result<u64, CheckpointError> {
    let mut total = 0;
    for name in file_names(dir)? {
        total += fs::metadata(dir.join(name)).map_err(io_at(dir))?.len();
    }
    Ok(total)
}

fn sync_folder(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir).and_then(|f| f.sync_all()).map_err(io_at(dir))
}

fn remove_if_present(dir: &Path) -> Result<(), CheckpointError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_at(dir)(e)),
        _ => Ok(()),
    }
}
