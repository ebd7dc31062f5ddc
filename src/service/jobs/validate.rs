//! Validation of a job before it is created.

use std::ops::RangeInclusive;

use super::init_adapter::{INIT_ADAPTER, InitAdapters, adopt_adapter};
use crate::domain::access::Caller;
use crate::domain::dataset::{Dataset, LoggedRows};
use crate::domain::identity::{ModelIdentity, Pins};
use crate::domain::job::{Evaluation, JobRequest, RowPolicy};
use crate::domain::logged::LOGGED_REFERENCE;
use crate::domain::reason::Reason;
use crate::domain::training::{LoraConfig, Method};
use crate::domain::violation::Violations;
use crate::engine::Engine;
use crate::engine::api::WeightsRef;
use crate::service::auth::access::{check_weights, own_dataset};
use crate::service::error::{Result, ServiceError};
use crate::service::policies::PolicyResolver;
use crate::service::store::Store;
use crate::train::estimate::Lengths;

const PRIORITIES: RangeInclusive<i32> = -1000..=1000;

/// Checks the fields that can be changed after creation.
pub(super) fn check_changeable(request: &JobRequest, bad: &mut Violations) {
    if request.display_name.chars().count() > 256 {
        bad.push("training_job.display_name", "has more than 256 characters");
    }
    if request.labels.len() > 64
        || request
            .labels
            .iter()
            .any(|(k, v)| k.is_empty() || k.len() > 128 || v.len() > 128)
    {
        bad.push(
            "training_job.labels",
            "must be at most 64 labels with keys of 1 to 128 and values of at most 128 bytes",
        );
    }
    if !PRIORITIES.contains(&request.priority) {
        bad.push(
            "training_job.priority",
            format!("is {}: it must lie in -1000..=1000", request.priority),
        );
    }
}

/// Checks a priority against the highest that clients may use. Without this limit, clients could
/// outbid each other without end.
pub(super) fn check_priority(caller: &Caller, priority: i32, highest: i32, bad: &mut Violations) {
    if !caller.is_admin() && priority > highest {
        let message = format!(
            "is {priority}: clients of this server may use at most {highest} (max_client_priority)"
        );
        bad.push("training_job.priority", message);
    }
}

/// Validates requests for jobs and pins the models and data that they name.
#[derive(Clone)]
pub(in crate::service) struct RequestValidator {
    pub store: Store,
    pub engine: Engine,
    pub policies: PolicyResolver,
    pub adapters: InitAdapters,
    /// Highest priority that a client may give its jobs. Administrators may give any.
    pub max_client_priority: i32,
}

/// Returns true if `id` can be the `request_id` of a call.
pub(super) fn is_request_id(id: &str) -> bool {
    id.len() <= 128 && !id.contains('\0')
}

impl RequestValidator {
    /// Checks everything that can be checked before the data is read, and replaces `latest` and
    /// `best` by steps.
    ///
    /// # Errors
    /// `InvalidArgument` with all bad fields, `PermissionDenied` or `NotFound` for inputs of other
    /// clients or missing ones, `FailedPrecondition` for inputs that cannot be used,
    /// `ResourceExhausted` if the job needs more memory than the server has.
    pub(super) async fn check_request(
        &self,
        caller: &Caller,
        mut request: JobRequest,
        request_id: Option<&str>,
    ) -> Result<JobRequest> {
        let mut bad = Violations::default();
        request.spec.validate("training_job", &mut bad);
        check_changeable(&request, &mut bad);
        if request_id.is_some_and(|id| !is_request_id(id)) {
            bad.push(
                "request_id",
                "must have at most 128 bytes, none of them NUL",
            );
        }
        if let Evaluation::Fraction(f) = request.evaluation
            && !(f > 0.0 && f < 1.0)
        {
            bad.push(
                "training_job.eval_fraction",
                format!("is {f}: it must be above 0 and below 1"),
            );
        }
        let run = &request.spec.run;
        for (field, is_set) in [
            ("eval_steps", run.eval_steps > 0),
            ("eval_on_start", run.eval_on_start),
            ("early_stopping_patience", run.early_stopping_patience > 0),
        ] {
            if is_set && request.evaluation == Evaluation::None {
                bad.push(
                    format!("training_job.run.{field}"),
                    "needs an evaluation: set eval_dataset or eval_fraction",
                );
            }
        }
        if request.reference.is_some() && request.spec.dpo.reference_free {
            bad.push(
                "training_job.reference",
                "has no meaning with dpo.reference_free: remove one of them",
            );
        }
        check_priority(caller, request.priority, self.max_client_priority, &mut bad);
        bad.into_result()?;
        for name in [Some(&request.policy), request.reference.as_ref()]
            .into_iter()
            .flatten()
        {
            check_weights(&self.store, caller, name).await?;
        }

        // Resolved only once, because `latest` may change between two look-ups.
        request.policy = self.policies.pin(&request.policy).await?;
        let start = self.policies.resolve(&request.policy).await?;
        request.model = Some(start.model.clone());
        let mut pins = Pins {
            base: self.engine.identity(&start.model)?,
            ..Pins::default()
        };
        if let (Method::Lora(_), WeightsRef::Full { .. }) = (&request.spec.method, &start.weights) {
            let message = "LoRA starts from a base model or from a LoRA checkpoint: export the \
                           full checkpoint merged and serve it as a model";
            return Err(ServiceError::FailedPrecondition {
                reason: Reason::FullCheckpoint,
                message: message.into(),
            });
        }
        if let Method::Lora(LoraConfig {
            init_adapter: Some(name),
            ..
        }) = &request.spec.method
        {
            let WeightsRef::Base { .. } = &start.weights else {
                let message = "is given, but the policy is a checkpoint with an adapter of its \
                               own: name one of the two";
                return Err(ServiceError::invalid(INIT_ADAPTER, message));
            };
            // A repeated request returns the job of the first one, even if the folder has changed
            // or is gone.
            if !self.store.has_created(&caller.owner, request_id).await? {
                let folder = self.adapters.find(name).await?;
                adopt_adapter(&mut request, folder).await?;
            }
        } else if let WeightsRef::Adapter { dir, .. } = &start.weights {
            adopt_adapter(&mut request, dir.clone()).await?;
        } else if let Method::Lora(lora) = &request.spec.method {
            let unmatched = self.engine.unmatched_targets(&start.model, lora)?;
            if !unmatched.is_empty() {
                let message = format!(
                    "{}: {} has no such layers: name layers that it has, or all parts of a fused \
                     one",
                    unmatched.join(", "),
                    start.model
                );
                let field = "training_job.lora.target_modules";
                return Err(ServiceError::invalid(field, message));
            }
        }
        let mut reference = start.weights.clone();
        if let Some(name) = &request.reference {
            let pinned = self.policies.pin(name).await?;
            let resolved = self.policies.resolve(&pinned).await?;
            self.policies.check_tokenizers(
                "training_job.reference",
                &start.model,
                &resolved.model,
            )?;
            if resolved.model != start.model {
                let reference_base = self.engine.identity(&resolved.model)?;
                check_mixable(&request, &pins.base, &resolved.model, &reference_base)?;
                pins.reference_base = Some(reference_base);
            }
            request.reference = Some(pinned);
            reference = resolved.weights;
        }
        for id in [Some(&request.dataset), eval_dataset(&request.evaluation)]
            .into_iter()
            .flatten()
        {
            let dataset = own_dataset(&self.store, caller, id).await?;
            // With other template arguments, the template may accept other rows.
            let has_arguments = !request.chat_template_kwargs.is_empty();
            let model = (!has_arguments).then_some(start.model.as_str());
            let (bad_rows, first) = dataset.report.bad_rows_with(model);
            if request.row_policy == RowPolicy::Reject && bad_rows > 0 {
                let example = first
                    .map(|i| format!(" (row {}, {}: {})", i.row, i.reason.name(), i.message))
                    .unwrap_or_default();
                let remedy = match dataset.report.rows - bad_rows {
                    0 => "fix them: no other row is left".to_owned(),
                    others => {
                        format!("fix them, or set row_policy to SKIP to use the other {others}")
                    }
                };
                let message = format!("datasets/{id} has {bad_rows} bad rows{example}: {remedy}");
                return Err(ServiceError::FailedPrecondition {
                    reason: Reason::DatasetInvalid,
                    message,
                });
            }
            if request.spec.logged_reference.is_some() {
                let is_training = *id == request.dataset;
                check_logged(&dataset, request.row_policy, is_training)?;
            }
        }
        pins.contents = Some(self.policies.content_pins(&request).await?);
        request.pins = Some(pins);
        // Pinned, so that the job continues with the same precision on a server with other
        // settings.
        request
            .spec
            .precision
            .get_or_insert(self.engine.precision());
        // The size of a micro-batch is known only after the rows are tokenised. The engine checks
        // the actual lengths before the run; here the longest possible pair is assumed.
        let computes_reference = request.spec.logged_reference.is_none()
            && request.spec.dpo.has_reference(request.reference.is_some());
        let reference = computes_reference.then_some(&reference);
        self.engine.check(
            &start.model,
            reference,
            &request.spec,
            Lengths::one(2 * request.spec.batch.max_length),
        )?;
        Ok(request)
    }
}

/// Rejects a moving reference (TR-DPO) on a model with another configuration: the weights of both
/// models are mixed tensor by tensor.
fn check_mixable(
    request: &JobRequest,
    policy: &ModelIdentity,
    model: &str,
    reference: &ModelIdentity,
) -> Result<()> {
    if request.spec.dpo.reference_sync.is_none() || policy.config == reference.config {
        return Ok(());
    }
    let message = format!(
        "mixes the policy's weights into those of models/{model}, whose configuration has the hash \
         {}, the policy's has {}: name a reference of the same architecture and shape, or remove \
         reference_sync",
        reference.config, policy.config
    );
    Err(ServiceError::invalid(
        "training_job.dpo.reference_sync",
        message,
    ))
}

/// Rejects a dataset whose rows lack the log-probs of reference `logged`. With the row policy SKIP,
/// a training dataset needs one pair that has them. A dataset of version 0.3.0 or before has no
/// counts: the job finds such rows when it starts.
fn check_logged(dataset: &Dataset, policy: RowPolicy, is_training: bool) -> Result<()> {
    let Some(LoggedRows {
        pairs,
        rows_without,
        first_without: Some(first),
    }) = &dataset.report.logged
    else {
        return Ok(());
    };
    let remedy = match policy {
        RowPolicy::Reject if *pairs == 0 => "Fix them: no other row is left",
        RowPolicy::Reject => "Fix them, or set row_policy to SKIP",
        RowPolicy::Skip if *pairs == 0 && is_training => "No other row is left to train on",
        RowPolicy::Skip => return Ok(()),
    };
    let message = format!(
        "datasets/{} has {rows_without} rows that cannot be used with reference \
         {LOGGED_REFERENCE}; row {}, {} {}: {}. {remedy}",
        dataset.id,
        first.row,
        first.field,
        first.reason.name(),
        first.message
    );
    Err(ServiceError::FailedPrecondition {
        reason: Reason::DatasetInvalid,
        message,
    })
}

fn eval_dataset(evaluation: &Evaluation) -> Option<&String> {
    match evaluation {
        Evaluation::Dataset(id) => Some(id),
        _ => None,
    }
}
