//! Checkpoints: the complete state of a run on disk. Each is a folder named after its step, written
//! under a temporary name, synced, then renamed.
//!
//! ```text
//! <step>/adapter_config.json + adapter_model.safetensors    LoRA: loads in PEFT as it is
//! <step>/config.json + model.safetensors + tokenizer files  full: loads in transformers as it is
//! <step>/optimizer.safetensors                              AdamW's moments
//! <step>/reference.safetensors                              TR-DPO's moving reference, if any
//! <step>/trainer_state.json                                 progress, checksums of all other files
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
use crate::model::params::text_peft_name;

/// File that marks a folder as a complete checkpoint; written last.
pub const STATE_FILE: &str = "trainer_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// File with the moving reference (TR-DPO).
pub const REFERENCE_FILE: &str = "reference.safetensors";
const FORMAT_VERSION: u32 = 1;

/// Reason why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file operation failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder of the operation.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The checkpoint is damaged or belongs to another run.
    #[error("checkpoint {}: {reason}", path.display())]
    Damaged {
        /// Folder of the checkpoint.
        path: PathBuf,
        /// Description of the damage.
        reason: String,
    },
    /// The checkpoint was trained on another base model.
    #[error(
        "checkpoint {}: it was trained on a base model whose {part} has the hash {pinned}, this \
         one's is {found}",
        path.display()
    )]
    OtherModel {
        /// Folder of the checkpoint.
        path: PathBuf,
        /// Part of the model that differs.
        part: &'static str,
        /// Hash of the part in the checkpoint.
        pinned: String,
        /// Hash of the part in the current model.
        found: String,
    },
    /// Another build wrote it, in a format that this build cannot read.
    #[error(
        "checkpoint {}: its format is version {found}, this build reads version \
         {FORMAT_VERSION}: use the build that wrote it",
        path.display()
    )]
    Version {
        /// Folder of the checkpoint.
        path: PathBuf,
        /// Format version of the checkpoint.
        found: u32,
    },
    /// Its weights could not be written or read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Progress of a run, without tensors. The shuffle needs no generator state, because an epoch's
/// order is a function of the seed and the epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Optimizer steps taken.
    pub step: u64,
    /// Epoch of the next micro-batch.
    pub epoch: u64,
    /// Index of the next micro-batch within the epoch.
    pub micro_batch: usize,
    /// Number of tokens trained on.
    pub tokens: u64,
    /// Value of the best evaluation so far, and its step.
    pub best: Option<(f64, u64)>,
    /// Name of the metric whose value is in `best`; empty in checkpoints of version 0.2.
    #[serde(default)]
    pub best_metric: String,
    /// Number of evaluations since the best one.
    pub stale_evaluations: u32,
    /// Step of the last evaluation. A run that was drained before an evaluation that was due makes
    /// it after continuing.
    pub evaluated: Option<u64>,
    /// Number of TR-DPO syncs.
    pub reference_syncs: u64,
    /// Metrics of the steps since the last logged step.
    #[serde(default)]
    pub window: Window,
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    version: u32,
    adapter: bool,
    adam_updates: u64,
    /// Base model that it was trained on; `None` in checkpoints of version 0.1.
    #[serde(default)]
    base: Option<ModelIdentity>,
    /// Digest of the run's pairs; `None` in checkpoints of version 0.2.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pairs: Option<String>,
    state: RunState,
    metrics: Metrics,
    /// BLAKE3 hash of every other file, by name.
    files: BTreeMap<String, String>,
}

/// Format version, read before the rest because other versions may have other fields.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// Contents of a checkpoint.
pub struct CheckpointContents<'a> {
    /// Weights that are trained.
    pub policy: &'a TrainablePolicy,
    /// Optimizer with its moments.
    pub optimizer: &'a AdamW,
    /// Moving reference (TR-DPO).
    pub reference: Option<&'a Policy>,
    /// Progress of the run.
    pub state: &'a RunState,
    /// Newest value of each metric.
    pub metrics: &'a Metrics,
    /// Tokenizer, written beside full weights.
    pub tokenizer: &'a ChatTokenizer,
    /// Name of the base model, for adapter_config.json.
    pub base: &'a BaseName,
    /// Content hashes of the base model.
    pub identity: &'a ModelIdentity,
    /// Digest of the run's pairs.
    pub pairs: &'a str,
}

impl CheckpointError {
    /// Returns the message without the server's folders.
    pub fn for_clients(&self) -> String {
        let path = match self {
            CheckpointError::Io { path, .. }
            | CheckpointError::Damaged { path, .. }
            | CheckpointError::OtherModel { path, .. }
            | CheckpointError::Version { path, .. } => path,
            CheckpointError::Model(e) => return e.for_clients(),
            CheckpointError::Candle(e) => return e.to_string(),
        };
        self.to_string()
            .replace(&path.display().to_string(), &last_part(path))
    }

    /// Returns true if a file is missing (as opposed to damaged).
    pub fn is_missing_file(&self) -> bool {
        matches!(
            self,
            CheckpointError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound
        )
    }

    /// Returns true if the files are damaged permanently. Errors that depend on this build or may
    /// be temporary do not count; neither does a missing file, which may come back.
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
    move |source| CheckpointError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Writes `<folder>/<step>` atomically and returns its size in bytes. After it has returned, the
/// checkpoint survives a crash of the machine.
///
/// # Errors
/// Fails if a file cannot be written; the temporary folder is then removed.
pub fn save(folder: &Path, contents: &CheckpointContents) -> Result<u64, CheckpointError> {
    let target = folder.join(contents.state.step.to_string());
    let temporary = folder.join(format!(".{}.tmp", contents.state.step));
    // A step's tensors are a function of the run, so an intact checkpoint of this step need not be
    // replaced. Thus there is always one on disk.
    if verify(&target).is_ok() {
        return size(&target);
    }
    remove_if_present(&temporary)?;
    if let Err(e) = write(&temporary, contents) {
        // A partial checkpoint would only fill the disk further.
        let _ = fs::remove_dir_all(&temporary);
        return Err(e);
    }
    // The function has returned above if the folder is intact, so one that exists is damaged.
    remove_if_present(&target)?;
    fs::rename(&temporary, &target).map_err(io_at(&target))?;
    sync_folder(folder)?;
    size(&target)
}

/// Writes and syncs a checkpoint's files into a new folder.
fn write(temporary: &Path, contents: &CheckpointContents) -> Result<(), CheckpointError> {
    fs::create_dir_all(temporary).map_err(io_at(temporary))?;
    match &contents.policy.policy.adapter {
        Some(adapter) => {
            peft::save(
                temporary,
                adapter,
                &contents.policy.policy.config,
                contents.base,
            )?;
        }
        None => save_full(temporary, &contents.policy.policy, contents.tokenizer)?,
    }
    peft::save_tensors(&temporary.join(OPTIMIZER_FILE), &moments(contents)?)?;
    if let Some(reference) = contents.reference {
        peft::save_tensors(
            &temporary.join(REFERENCE_FILE),
            &reference.parameters.named(),
        )?;
    }
    let mut files = BTreeMap::new();
    for name in file_names(temporary)? {
        let path = temporary.join(&name);
        files.insert(name, checksum(&path)?);
        File::open(&path)
            .and_then(|f| f.sync_all())
            .map_err(io_at(&path))?;
    }
    let state = StateFile {
        version: FORMAT_VERSION,
        adapter: contents.policy.is_lora(),
        adam_updates: contents.optimizer.updates,
        base: Some(contents.identity.clone()),
        pairs: Some(contents.pairs.to_owned()),
        state: contents.state.clone(),
        metrics: contents.metrics.clone(),
        files,
    };
    let path = temporary.join(STATE_FILE);
    fs::write(
        &path,
        serde_json::to_vec_pretty(&state).map_err(|e| damaged(&path, e.to_string()))?,
    )
    .map_err(io_at(&path))?;
    File::open(&path)
        .and_then(|f| f.sync_all())
        .map_err(io_at(&path))?;
    sync_folder(temporary)
}

/// Writes full weights and the files that transformers needs to load them. Companion files in
/// sub-folders are left out. Of a model of text and images only the language model is written.
fn save_full(dir: &Path, policy: &Policy, tokenizer: &ChatTokenizer) -> Result<(), ModelError> {
    export::save_merged(
        dir,
        &policy.config,
        None,
        Layout::CHECKPOINT,
        &policy.parameters.reader(),
        None,
    )?;
    export::save_companions(dir, &policy.config, tokenizer, |name| !name.contains('/'))
}

fn moments(contents: &CheckpointContents) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    let mut all = Vec::new();
    for (i, t) in contents.policy.trainables.iter().enumerate() {
        for (prefix, values) in [
            ("m", &contents.optimizer.first[i]),
            ("v", &contents.optimizer.second[i]),
        ] {
            all.push((
                format!("{prefix}.{}", t.name),
                Tensor::from_slice(values, t.var.shape(), &Device::Cpu)?,
            ));
        }
    }
    Ok(all)
}

/// Result of [`restore`], besides the tensors that it sets in place.
pub struct Restored {
    /// Progress of the run.
    pub state: RunState,
    /// Newest value of each metric.
    pub metrics: Metrics,
    /// Tensors of the moving reference (TR-DPO), if stored.
    pub reference: Option<Vec<(String, Tensor)>>,
}

/// Restores weights and moments into a policy and an optimizer with the same shapes. The base model
/// must have the content that the checkpoint was trained on.
///
/// # Errors
/// Fails if the checkpoint is damaged, was written for another model or method, or has an unknown
/// format version.
pub fn restore(
    dir: &Path,
    base: &ModelIdentity,
    policy: &TrainablePolicy,
    optimizer: &mut AdamW,
) -> Result<Restored, CheckpointError> {
    let file = verify(dir)?;
    if let Some(Difference { part, hashes }) = file
        .base
        .as_ref()
        .and_then(|pinned| pinned.difference(base))
    {
        let (pinned, found) = (hashes.0.to_owned(), hashes.1.to_owned());
        return Err(CheckpointError::OtherModel {
            path: dir.to_owned(),
            part,
            pinned,
            found,
        });
    }
    if file.adapter != policy.is_lora() {
        return Err(damaged(
            dir,
            "it was written by a run of the other method (LoRA or full)".into(),
        ));
    }
    let weights = match file.adapter {
        // A model of text and images has other names in the file, as PEFT expects them.
        true => load(&dir.join(peft::WEIGHTS_FILE))?
            .into_iter()
            .map(|(name, tensor)| (text_peft_name(&name).into_owned(), tensor))
            .collect(),
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
    Ok(Restored {
        state: file.state,
        metrics: file.metrics,
        reference,
    })
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
            format!(
                "tensor {name} is {:?} {:?}, expected f32 {shape:?}",
                t.dtype(),
                t.shape()
            ),
        )),
        None => Err(damaged(dir, format!("tensor {name} is missing"))),
    }
}

/// Checks every file of a checkpoint against its checksum.
///
/// # Errors
/// Fails if a file is missing, unreadable or changed.
pub fn check(dir: &Path) -> Result<(), CheckpointError> {
    verify(dir).map(|_| ())
}

/// Returns the digest of the run's pairs, if the checkpoint has one, and the progress of the run.
///
/// # Errors
/// Fails if the state file cannot be read.
pub fn progress(dir: &Path) -> Result<(Option<String>, RunState), CheckpointError> {
    let file = read_state(dir)?;
    Ok((file.pairs, file.state))
}

/// Returns a digest that identifies the checkpoint: the hash of its state file, which lists the
/// hashes of its other files.
///
/// # Errors
/// Fails if the state file cannot be read.
pub fn digest(dir: &Path) -> Result<String, CheckpointError> {
    checksum(&dir.join(STATE_FILE))
}

/// Reads a checkpoint's state file and checks all files against their checksums.
fn verify(dir: &Path) -> Result<StateFile, CheckpointError> {
    let file = read_state(dir)?;
    for (name, expected) in &file.files {
        let found = checksum(&dir.join(name))?;
        if found != *expected {
            return Err(damaged(
                dir,
                format!(
                    "{name} does not match its checksum: the file was changed or damaged after it \
                     was written"
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
    if version != FORMAT_VERSION {
        return Err(CheckpointError::Version {
            path: dir.to_owned(),
            found: version,
        });
    }
    serde_json::from_slice(&text).map_err(unreadable)
}

/// Returns the steps that have a folder, in no particular order. Leftovers of interrupted writes
/// are not included.
///
/// # Errors
/// Fails if the folder exists but cannot be read.
pub fn steps(folder: &Path) -> Result<Vec<u64>, CheckpointError> {
    match fs::metadata(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        _ => Ok(file_names(folder)?
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect()),
    }
}

fn damaged(path: &Path, reason: String) -> CheckpointError {
    CheckpointError::Damaged {
        path: path.to_owned(),
        reason,
    }
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
        names.push(
            entry
                .map_err(io_at(dir))?
                .file_name()
                .to_string_lossy()
                .into_owned(),
        );
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
    File::open(dir)
        .and_then(|f| f.sync_all())
        .map_err(io_at(dir))
}

fn remove_if_present(dir: &Path) -> Result<(), CheckpointError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_at(dir)(e)),
        _ => Ok(()),
    }
}
