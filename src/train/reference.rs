//! The reference π_ref: frozen weights, weights that are moved towards the policy at intervals
//! (TR-DPO), log-probs that the rows carry, or none.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use crate::infer::scorer::Logps;
use crate::math::loss::ReferenceLogps;
use crate::model::decoder::Policy;

/// Reference for the log-ratios.
#[derive(Debug)]
pub enum Reference {
    /// No reference: lr = log π.
    None,
    /// Log-probs that the pairs carry (`EncodedPair::logged`), without weights.
    Logged,
    /// Frozen weights.
    Frozen {
        /// The frozen weights.
        policy: Policy,
        /// Permanent identity of the weights, for the cache of log-probs.
        identity: String,
    },
    /// TR-DPO: ref ← α·π + (1−α)·ref at intervals (arXiv:2404.09656).
    Moving {
        /// The current weights.
        policy: Policy,
        /// Identity of the weights since the last sync.
        identity: String,
        /// Prefix of the identities, which names the run.
        run: String,
    },
}

/// Reference log-probs of a micro-batch, with one entry for each pair.
#[derive(Debug)]
pub(super) enum BatchReferences {
    /// No reference.
    None,
    /// log π_ref of each token.
    Tokens(Vec<Arc<Logps>>),
    /// Σ log π_ref of the chosen and of the rejected answer.
    Sums(Vec<[f64; 2]>),
}

impl BatchReferences {
    /// Returns the log-probs of the pair with the index `pair`.
    pub fn of(&self, pair: usize) -> Option<ReferenceLogps<'_>> {
        match self {
            BatchReferences::None => None,
            BatchReferences::Tokens(all) => {
                Some(ReferenceLogps::Tokens(&all[pair][0], &all[pair][1]))
            }
            BatchReferences::Sums(all) => Some(ReferenceLogps::Sums(all[pair])),
        }
    }
}

impl Reference {
    /// Returns a moving reference that starts as `policy`.
    pub fn moving_from(policy: Policy, run: &str) -> Self {
        Reference::Moving {
            policy,
            identity: format!("{run}#0"),
            run: run.to_owned(),
        }
    }

    /// Returns the current weights and their identity.
    pub fn weights(&self) -> Option<(&Policy, &str)> {
        match self {
            Reference::None | Reference::Logged => None,
            Reference::Frozen { policy, identity }
            | Reference::Moving {
                policy, identity, ..
            } => Some((policy, identity)),
        }
    }

    /// Returns the weights of a moving reference, which a checkpoint must hold.
    pub fn moving(&self) -> Option<&Policy> {
        match self {
            Reference::Moving { policy, .. } => Some(policy),
            _ => None,
        }
    }

    /// Computes ref ← α·π + (1−α)·ref in f32. `count` is the number of syncs including
    /// this one.
    ///
    /// # Errors
    /// Fails if the reference does not move or a tensor operation fails.
    pub fn sync(&mut self, policy: &Policy, alpha: f64, count: u64) -> Result<()> {
        let Reference::Moving {
            policy: reference,
            identity,
            run,
        } = self
        else {
            bail!("reference_sync needs a moving reference");
        };
        let mixed =
            reference
                .parameters
                .map(|param, old| match policy.parameters.get(param.id) {
                    Some(new) => (new * alpha)? + (old * (1.0 - alpha))?,
                    None => {
                        bail!(
                            "the policy has no tensor {}, but its reference has one",
                            param.name()
                        )
                    }
                })?;
        reference.parameters = Arc::new(mixed);
        *identity = format!("{run}#{count}");
        Ok(())
    }

    /// Restores stored weights after `count` syncs. Does nothing if the reference does not move.
    ///
    /// # Errors
    /// Fails if a tensor is missing or has another shape.
    pub fn restore(&mut self, tensors: Vec<(String, Tensor)>, count: u64) -> Result<()> {
        let Reference::Moving {
            policy,
            identity,
            run,
        } = self
        else {
            return Ok(());
        };
        let stored: std::collections::HashMap<String, Tensor> = tensors.into_iter().collect();
        let restored = policy
            .parameters
            .map(|param, t| match stored.get(param.name()) {
                Some(s) if s.shape() == t.shape() => Ok(s.clone()),
                _ => bail!(
                    "the stored reference has no tensor {} of the expected shape",
                    param.name()
                ),
            })?;
        policy.parameters = Arc::new(restored);
        *identity = format!("{run}#{count}");
        Ok(())
    }
}
