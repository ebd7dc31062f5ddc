//! The reference π_ref: frozen weights, weights that follow the policy at intervals (TR-DPO), or
//! none.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use crate::model::decoder::Policy;

/// What log-ratios are taken against.
#[derive(Debug)]
pub enum Reference {
    /// lr = log π.
    None,
    /// Frozen; `identity` names the weights for good.
    Frozen {
        /// The weights.
        policy: Policy,
        /// For the cache of log-probs.
        identity: String,
    },
    /// TR-DPO: ref ← α·π + (1−α)·ref at intervals (arXiv:2404.09656).
    Moving {
        /// The weights as they are now.
        policy: Policy,
        /// Names the weights since the last sync.
        identity: String,
        /// Names the run.
        run: String,
    },
}

impl Reference {
    /// A reference that starts as `policy` and moves.
    pub fn moving_from(policy: Policy, run: &str) -> Self {
        Reference::Moving { policy, identity: format!("{run}#0"), run: run.to_owned() }
    }

    /// The weights and their identity.
    pub fn weights(&self) -> Option<(&Policy, &str)> {
        match self {
            Reference::None => None,
            Reference::Frozen { policy, identity } | Reference::Moving { policy, identity, .. } => {
                Some((policy, identity))
            }
        }
    }

    /// The weights that a checkpoint must hold.
    pub fn moving(&self) -> Option<&Policy> {
        match self {
            Reference::Moving { policy, .. } => Some(policy),
            _ => None,
        }
    }

    /// ref ← α·π + (1−α)·ref, in f32.
    pub fn sync(&mut self, policy: &Policy, alpha: f64, count: u64) -> Result<()> {
        let Reference::Moving { policy: reference, identity, run } = self else {
            bail!("reference_sync needs a moving reference");
        };
        let mixed =
            reference.parameters.map(|param, old| match policy.parameters.get(param.id) {
                Some(new) => (new * alpha)? + (old * (1.0 - alpha))?,
                None => bail!("the policy has no tensor {}, its reference has", param.name()),
            })?;
        reference.parameters = Arc::new(mixed);
        *identity = format!("{run}#{count}");
        Ok(())
    }

    /// Puts stored weights back.
    pub fn restore(&mut self, tensors: Vec<(String, Tensor)>, count: u64) -> Result<()> {
        let Reference::Moving { policy, identity, run } = self else { return Ok(()) };
        let stored: std::collections::HashMap<String, Tensor> = tensors.into_iter().collect();
        let restored = policy.parameters.map(|param, t| match stored.get(param.name()) {
            Some(s) if s.shape() == t.shape() => Ok(s.clone()),
            _ => bail!("the stored reference has no fitting tensor {}", param.name()),
        })?;
        policy.parameters = Arc::new(restored);
        *identity = format!("{run}#{count}");
        Ok(())
    }
}
