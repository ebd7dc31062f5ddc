//! PEFT adapters on the server from which LoRA jobs may start.

use std::path::PathBuf;

use crate::domain::job::{Job, JobRequest};
use crate::domain::training::Method;
use crate::domain::violation::{Violations, quoted};
use crate::formats::peft;
use crate::model::error::ModelError;
use crate::service::blocking::blocking;
use crate::service::error::{Result, ServiceError};

/// Request field that names the adapter to start from.
pub(super) const INIT_ADAPTER: &str = "training_job.lora.init_adapter";

/// Folder that contains the adapters (`adapter_dir`), if one is configured.
#[derive(Clone, Debug)]
pub(in crate::service) struct InitAdapters(pub Option<PathBuf>);

impl InitAdapters {
    /// Returns the PEFT adapter folder `name` below `adapter_dir`. Symbolic links that lead out of
    /// `adapter_dir` are rejected.
    ///
    /// # Errors
    /// `InvalidArgument` if no `adapter_dir` is configured or it has no such adapter.
    pub async fn find(&self, name: &str) -> Result<PathBuf> {
        let Some(root) = self.0.clone() else {
            let message = "needs a folder of adapters, which this server does not have: set \
                           adapter_dir, or leave the field empty";
            return Err(ServiceError::invalid(INIT_ADAPTER, message));
        };
        let wanted = root.join(name);
        let found = blocking(move || {
            let (root, dir) = (root.canonicalize().ok()?, wanted.canonicalize().ok()?);
            (dir.starts_with(&root) && dir.join(peft::CONFIG_FILE).is_file()).then_some(dir)
        })
        .await?;
        match found {
            Some(dir) => Ok(dir),
            None => Err(ServiceError::invalid(
                INIT_ADAPTER,
                format!(
                    "{} is not a PEFT adapter folder below the server's adapter_dir",
                    quoted(name)
                ),
            )),
        }
    }
}

/// Copies the rank, α, target modules and `use_rslora` of the adapter in `folder`, from which a
/// LoRA job starts, into the job's request.
///
/// # Errors
/// `InvalidArgument` if the client gave another value for one of them, or if the adapter cannot be
/// read.
pub(super) async fn adopt_adapter(request: &mut JobRequest, folder: PathBuf) -> Result<()> {
    let JobRequest {
        spec,
        given_lora,
        policy,
        ..
    } = request;
    let Method::Lora(lora) = &mut spec.method else {
        return Ok(());
    };
    let (field, adapter_name) = match &lora.init_adapter {
        Some(name) => (INIT_ADAPTER, format!("the init_adapter {}", quoted(name))),
        None => ("training_job.policy", format!("the adapter of {policy}")),
    };
    let adapter = match blocking(move || peft::config(&folder)).await? {
        Ok(adapter) => adapter,
        Err(e) => {
            tracing::warn!(error = %e, "an adapter cannot be read");
            // Clients do not get the whole error, because it contains a path of this machine.
            let reason = match e {
                ModelError::Adapter { reason, .. } | ModelError::CorruptWeights { reason, .. } => {
                    reason
                }
                _ => format!(
                    "{} or {} is missing or unreadable",
                    peft::CONFIG_FILE,
                    peft::WEIGHTS_FILE
                ),
            };
            return Err(ServiceError::invalid(
                field,
                format!("is given, but {adapter_name} cannot be read: {reason}"),
            ));
        }
    };
    let mut bad = Violations::default();
    lora.adopt(
        &adapter,
        given_lora,
        &adapter_name,
        "training_job.lora",
        &mut bad,
    );
    Ok(bad.into_result()?)
}

/// Returns true if a job starts from one of the server's adapters.
pub(super) fn names_adapter(job: &Job) -> bool {
    matches!(&job.request.spec.method, Method::Lora(lora) if lora.init_adapter.is_some())
}
