//! What a job would cost, before it is made: its rows are tokenised as the job would, memory is the
//! engine's own estimate, and time comes from scoring some of its pairs now.

use std::time::Instant;

use super::create::draft;
use super::inputs::InputLoader;
use super::validate::RequestValidator;
use crate::domain::access::Caller;
use crate::domain::job::JobRequest;
use crate::domain::training::Method;
use crate::engine::Engine;
use crate::engine::api::{ScoreItem, WeightsRef};
use crate::infer::pair::EncodedPair;
use crate::service::error::{Result, ServiceError};
use crate::service::limiter::Limiter;
use crate::service::shutdown::Shutdown;
use crate::train::estimate::Lengths;

/// Tokens that are scored to see how fast the device is.
const CALIBRATION: usize = 1024;

/// What a job would cost.
#[derive(Clone, Debug, PartialEq)]
pub struct JobEstimate {
    /// Pairs to train on.
    pub train_pairs: u64,
    /// Pairs to evaluate on.
    pub eval_pairs: u64,
    /// Rows that would be left out.
    pub skipped_rows: u64,
    /// Optimizer steps.
    pub total_steps: u64,
    /// Packed tokens of all steps: each prompt once for both answers.
    pub tokens: u64,
    /// The longest pair, in packed tokens.
    pub longest_pair_tokens: u64,
    /// Bytes at the peak, the resident base models included.
    pub memory_bytes: u64,
    /// Bytes that jobs may need on this server.
    pub memory_limit_bytes: u64,
    /// Seconds on a device that does nothing else.
    pub seconds: f64,
}

/// Estimates jobs.
#[derive(Clone)]
pub(in crate::service) struct JobEstimator {
    pub engine: Engine,
    pub validator: RequestValidator,
    pub inputs: InputLoader,
    /// Estimates share it with other work that takes long.
    pub heavy: Limiter,
    pub shutdown: Shutdown,
}

impl JobEstimator {
    /// Estimates a job without making it.
    ///
    /// # Errors
    /// Those of `create_job`, as far as they can be found now.
    pub async fn estimate_job(&self, caller: &Caller, request: JobRequest) -> Result<JobEstimate> {
        self.shutdown.refuse_new_work()?;
        let mut request = self.validator.check_request(caller, request, None).await?;
        if let Method::Lora(lora) = &mut request.spec.method {
            // The rows do not depend on it, and a draft has no copy of it.
            lora.init_adapter = None;
        }
        let job = draft(caller, request);
        // A task of its own: a caller who leaves does not make room for more of this work.
        let (loader, permit) = (self.inputs.clone(), self.heavy.acquire().await?);
        let whole = job.clone();
        let loaded = tokio::spawn(async move {
            let _permit = permit;
            loader.load(&whole).await
        });
        let inputs = loaded.await.map_err(ServiceError::internal)??;
        let (train, eval) = (&inputs.train, &inputs.eval);
        let packed =
            |pairs: &[EncodedPair]| pairs.iter().map(EncodedPair::packed_tokens).sum::<usize>();
        let spec = &job.request.spec;
        let size = spec.batch.batch_size;
        let lengths = Lengths::of(train, size).max(Lengths::of(eval, size));
        let (memory_bytes, memory_limit_bytes) =
            self.engine.memory(&inputs.model, inputs.reference.as_ref(), spec, lengths)?;

        let total_steps = spec.batch.total_steps(train.len());
        let epochs = total_steps as f64 / spec.batch.steps_per_epoch(train.len()).max(1) as f64;
        let mean = packed(train) as f64 / train.len() as f64;
        let tokens = epochs * train.len() as f64 * mean;
        let evaluations = match (eval.is_empty(), spec.run.eval_steps) {
            (true, _) => 0,
            (false, 0) => 1,
            (false, every) => total_steps.div_ceil(every),
        };
        let forward = self.seconds_per_token(&inputs.model, train).await?;
        // In passes over a token: forward, and backward to the activations; full training goes back
        // to the weights, too. The reference is computed once for each pair and then remembered.
        let passes = if matches!(spec.method, Method::Full) { 3.0 } else { 2.0 };
        let reference = match &inputs.reference {
            Some(weights) => {
                let model = weights.model().filter(|model| *model != inputs.model);
                let rate = match model {
                    Some(other) => self.seconds_per_token(other, train).await?,
                    None => forward,
                };
                rate * (packed(train) as f64).min(tokens)
            }
            None => 0.0,
        };
        let evaluated = evaluations as f64 * packed(eval) as f64;
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

    /// Scores some pairs with the base model; while something else uses the device, its time is
    /// counted too.
    async fn seconds_per_token(&self, model: &str, pairs: &[EncodedPair]) -> Result<f64> {
        let (mut tokens, mut groups) = (0, Vec::new());
        for pair in pairs {
            if tokens > 0 && tokens + pair.packed_tokens() > CALIBRATION {
                break;
            }
            tokens += pair.packed_tokens();
            groups.extend(pair.groups());
        }
        let weights = WeightsRef::Base { model: model.to_owned() };
        let start = Instant::now();
        self.engine.score(&weights, None, ScoreItem { groups }).await?;
        Ok(start.elapsed().as_secs_f64() / tokens.max(1) as f64)
    }
}
