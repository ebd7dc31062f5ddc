//! Cost estimate of a job before it is created. The rows are tokenised as the job would do it,
//! memory is the engine's own estimate, and time is extrapolated from scoring some of the pairs
//! now.

use std::time::Instant;

use super::create::draft;
use super::inputs::InputLoader;
use super::validate::RequestValidator;
use crate::domain::access::Caller;
use crate::domain::job::JobRequest;
use crate::domain::training::Method;
use crate::engine::Engine;
use crate::engine::api::{ScoreItem, WeightsRef};
use crate::infer::pair::{EncodedPair, SequenceGroup};
use crate::service::error::{Result, ServiceError};
use crate::service::limiter::Limiter;
use crate::service::shutdown::Shutdown;

/// Maximum number of tokens scored to measure the speed of the device. A longer first pair that
/// fits into a scored row is scored alone.
const SPEED_SAMPLE_TOKENS: usize = 1024;

/// Estimated cost of a job.
#[derive(Clone, Debug, PartialEq)]
pub struct JobEstimate {
    /// Pairs to train on.
    pub train_pairs: u64,
    /// Pairs to evaluate on.
    pub eval_pairs: u64,
    /// Rows that would be skipped.
    pub skipped_rows: u64,
    /// Optimizer steps.
    pub total_steps: u64,
    /// Packed tokens over all steps. In a packed pair both answers share one copy of the prompt.
    pub tokens: u64,
    /// Length of the longest pair, in packed tokens.
    pub longest_pair_tokens: u64,
    /// Peak memory in bytes, including the resident base models.
    pub memory_bytes: u64,
    /// Memory limit for jobs on this server, in bytes.
    pub memory_limit_bytes: u64,
    /// Duration in seconds on a device without other work.
    pub seconds: f64,
}

/// Estimates jobs.
#[derive(Clone)]
pub(in crate::service) struct JobEstimator {
    pub engine: Engine,
    pub validator: RequestValidator,
    pub inputs: InputLoader,
    /// Shared limit on slow tasks; an estimate counts as one.
    pub slow_tasks: Limiter,
    pub shutdown: Shutdown,
}

impl JobEstimator {
    /// Estimates the cost of a job without creating it.
    ///
    /// # Errors
    /// The errors of `create_job`, except those that are found only when a job is stored; and those
    /// of [`InputLoader::load`].
    pub async fn estimate_job(&self, caller: &Caller, request: JobRequest) -> Result<JobEstimate> {
        self.shutdown.refuse_new_work()?;
        let mut request = self.validator.check_request(caller, request, None).await?;
        if let Method::Lora(lora) = &mut request.spec.method {
            // The rows do not depend on the adapter, and only a stored job has a copy of it.
            lora.init_adapter = None;
        }
        let job = draft(caller, request);
        // Runs in a separate task that owns the permit: a caller who disconnects must not free the
        // permit while the work still runs.
        let (loader, permit) = (self.inputs.clone(), self.slow_tasks.acquire().await?);
        let draft_job = job.clone();
        let loaded = tokio::spawn(async move {
            let _permit = permit;
            loader.load(&draft_job).await
        });
        let inputs = loaded.await.map_err(ServiceError::internal)??;
        let (train, eval) = (&inputs.train, &inputs.eval);
        let packed = |pairs: &[EncodedPair]| self.engine.packed_tokens(&inputs.model, pairs);
        let (train_tokens, eval_tokens) = (packed(train)?, packed(eval)?);
        let spec = &job.request.spec;
        let size = spec.batch.batch_size;
        let lengths = self.engine.lengths(&inputs.model, train, eval, size)?;
        let (memory_bytes, memory_limit_bytes) =
            self.engine
                .memory(&inputs.model, inputs.reference.as_ref(), spec, lengths)?;

        let total_steps = spec.batch.total_steps(train.len());
        let epochs = total_steps as f64 / spec.batch.steps_per_epoch(train.len()).max(1) as f64;
        let mean = train_tokens as f64 / train.len() as f64;
        let tokens = epochs * train.len() as f64 * mean;
        let evaluations = match (eval.is_empty(), spec.run.eval_steps) {
            (true, _) => 0,
            (false, 0) => 1,
            (false, every) => total_steps.div_ceil(every),
        };
        let forward = self.seconds_per_token(&inputs.model, train).await?;
        // Cost per token in units of a forward pass: 1 for the forward pass and 1 for the gradients
        // of the activations; full training adds 1 for the gradients of the weights. The reference
        // is computed once per training pair and then cached. Its passes over evaluation pairs, and
        // those after each sync of a moving reference (TR-DPO), are not counted.
        let passes = if matches!(spec.method, Method::Full) {
            3.0
        } else {
            2.0
        };
        let reference = match &inputs.reference {
            Some(weights) => {
                let model = weights.model().filter(|model| *model != inputs.model);
                let rate = match model {
                    Some(other) => self.seconds_per_token(other, train).await?,
                    None => forward,
                };
                rate * (train_tokens as f64).min(tokens)
            }
            None => 0.0,
        };
        let evaluated = evaluations as f64 * eval_tokens as f64;
        Ok(JobEstimate {
            train_pairs: train.len() as u64,
            eval_pairs: eval.len() as u64,
            skipped_rows: inputs.skipped.rows(),
            total_steps,
            tokens: tokens.round() as u64,
            longest_pair_tokens: lengths.longest as u64,
            memory_bytes,
            memory_limit_bytes,
            seconds: forward * (passes * tokens + evaluated) + reference,
        })
    }

    /// Returns the seconds per token of a forward pass, measured by scoring some pairs with the
    /// base model. If the device is busy, waiting for it is included.
    async fn seconds_per_token(&self, model: &str, pairs: &[EncodedPair]) -> Result<f64> {
        let longest = self.engine.max_row_tokens();
        let limit = SPEED_SAMPLE_TOKENS.min(longest);
        let (mut tokens, mut groups) = (0, Vec::new());
        for pair in pairs {
            let more = self
                .engine
                .packed_tokens(model, std::slice::from_ref(pair))?;
            // Training has no such limit.
            if more > longest {
                continue;
            }
            if tokens > 0 && tokens + more > limit {
                break;
            }
            tokens += more;
            groups.extend(pair.groups());
        }
        if let (true, Some(pair)) = (groups.is_empty(), pairs.first()) {
            // No pair fits into a scored row. The speed does not depend on the text.
            let group = beginning(pair, limit);
            tokens = group.tokens();
            groups.push(group);
        }
        let weights = WeightsRef::Base {
            model: model.to_owned(),
        };
        let start = Instant::now();
        self.engine
            .score(&weights, None, ScoreItem { groups })
            .await?;
        Ok(start.elapsed().as_secs_f64() / tokens.max(1) as f64)
    }
}

/// Returns the first `limit` tokens of a pair as one text, or all if there are fewer. A pair may
/// have fewer than its packed row, which may hold two prompts. `limit` is at least 2.
fn beginning(pair: &EncodedPair, limit: usize) -> SequenceGroup {
    let mut prompt = [&pair.prompt[..], &pair.chosen, &pair.rejected].concat();
    prompt.truncate(limit);
    let completion = prompt.split_off(1);
    SequenceGroup {
        prompt,
        completions: vec![completion],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_with_two_prompts_may_have_fewer_tokens_than_the_limit() {
        let pair = EncodedPair {
            row: 1,
            id: None,
            weight: 1.0,
            prompt: vec![1; 30],
            chosen: vec![2; 10],
            rejected_prompt: Some(vec![1; 35]),
            rejected: vec![3; 5],
            chosen_truncated: true,
            rejected_truncated: true,
            logged: None,
        };
        assert_eq!(pair.packed_tokens(), 80);
        let whole = beginning(&pair, 64);
        assert_eq!((whole.prompt.len(), whole.tokens()), (1, 45));
        assert_eq!(beginning(&pair, 2).tokens(), 2);
    }
}
