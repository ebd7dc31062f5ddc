//! LoRA adapters (arXiv:2106.09685): W' = W + scale·B·A on chosen projections of every block.

use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use super::error::ModelError;
use super::parameters::PROJECTIONS;
use super::spec::{BlockSpec, FeedForward};
use crate::domain::training::{LoraConfig, TARGET_MODULES};
use crate::math::rng;

/// One low-rank update.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// A `[r, in]`.
    pub a: Tensor,
    /// B `[out, r]`.
    pub b: Tensor,
}

/// An adapter for every block of a decoder.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Rank, α, targets.
    pub config: LoraConfig,
    /// Per block, per [`PROJECTIONS`] entry.
    pub blocks: Vec<Vec<Option<LowRank>>>,
}

/// `[out, in]` of each projection of a block, C being `width`.
pub fn projection_shapes(width: usize, block: &BlockSpec) -> [(usize, usize); 7] {
    let FeedForward::Gated { width: f, .. } = block.feed_forward;
    let (c, q, k) = (width, block.attention().query_width(), block.attention().kv_width());
    [(q, c), (k, c), (k, c), (c, q), (f, c), (f, c), (c, f)]
}

impl Adapter {
    /// A fresh adapter: A from U(−1/√in, 1/√in) as PEFT draws it, B zero, so that it changes nothing yet. Each tensor's draw depends on `seed` and
    /// its name only.
    pub fn init(model: &ModelConfig, config: &LoraConfig, seed: u64) -> Result<Self, ModelError> {
        let r = config.rank;
        Self::build(model, config, |name, shape| {
            let values = match name.ends_with("lora_A.weight") {
                true => rng::kaiming_uniform(seed, name, shape[0] * shape[1], shape[1]),
                false => vec![0f32; shape[0] * shape[1]],
            };
            debug_assert!(shape.contains(&r));
            Ok(Tensor::from_vec(values, (shape[0], shape[1]), &Device::Cpu)?)
        })
    }

    /// Builds the structure from `get(PEFT name, shape)`.
    pub fn build<E>(model: &ModelConfig, config: &LoraConfig, mut get: impl FnMut(&str, &[usize]) -> Result<Tensor, E>) -> Result<Self, E> {
        let mut blocks = Vec::with_capacity(model.spec.blocks.len());
        for (i, spec) in model.spec.blocks.iter().enumerate() {
            let mut block = Vec::with_capacity(PROJECTIONS.len());
            for (p, (out, input)) in projection_shapes(model.spec.hidden_size, spec).into_iter().enumerate() {
                let wanted = config.target_modules.iter().any(|m| m == TARGET_MODULES[p]);
                block.push(match wanted {
                    true => Some(LowRank {
                        a: get(&peft_name(i, p, "lora_A"), &[config.rank, input])?,
                        b: get(&peft_name(i, p, "lora_B"), &[out, config.rank])?,
                    }),
                    false => None,
                });
            }
            blocks.push(block);
        }
        Ok(Adapter { config: config.clone(), blocks })
    }

    /// The same structure with every tensor replaced by `f(PEFT name, tensor)`, in a fixed order.
    pub fn map<E>(&self, mut f: impl FnMut(&str, &Tensor) -> Result<Tensor, E>) -> Result<Self, E> {
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            let mut mapped = Vec::with_capacity(block.len());
            for (p, low_rank) in block.iter().enumerate() {
                mapped.push(match low_rank {
                    Some(l) => Some(LowRank { a: f(&peft_name(i, p, "lora_A"), &l.a)?, b: f(&peft_name(i, p, "lora_B"), &l.b)? }),
                    None => None,
                });
            }
            blocks.push(mapped);
        }
        Ok(Adapter { config: self.config.clone(), blocks })
    }

    /// Every tensor with its PEFT name.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        let mut all = Vec::new();
        for (i, block) in self.blocks.iter().enumerate() {
            for (p, low_rank) in block.iter().enumerate() {
                if let Some(l) = low_rank {
                    all.push((peft_name(i, p, "lora_A"), l.a.clone()));
                    all.push((peft_name(i, p, "lora_B"), l.b.clone()));
                }
            }
        }
        all
    }

    /// The same storage, untracked.
    pub fn detached(&self) -> Self {
        let detached: Result<Adapter, std::convert::Infallible> = self.map(|_, t| Ok(t.detach()));
        match detached {
            Ok(a) => a,
            Err(never) => match never {},
        }
    }
}

/// The name PEFT gives an adapter tensor, `which` being `lora_A` or `lora_B`.
pub fn peft_name(block: usize, projection: usize, which: &str) -> String {
    format!("base_model.model.model.layers.{block}.{}.{which}.weight", PROJECTIONS[projection])
}
