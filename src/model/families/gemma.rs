//! The properties that Gemma 2 and Gemma 3 share: norms before and after each part, all norms with
//! the factors 1 + w, GELU in the feed-forward part, embeddings times √C, a scale of the scores
//! that the configuration states, and optional soft-caps.

use super::common::Common;
use crate::model::config::json::Fields;
use crate::model::error::ModelError;
use crate::model::spec::{AttentionSpec, BlockSpec, ModelSpec, Norms};

/// The fields of both families.
pub(super) struct Gemma {
    common: Common,
    /// Attention without a window.
    pub attention: AttentionSpec,
    logit_softcap: Option<f32>,
}

impl Gemma {
    /// Reads the fields and refuses variants that are not implemented.
    ///
    /// # Errors
    /// Returns [`ModelError::InvalidConfig`] for a field that is missing or invalid.
    pub fn read(fields: &Fields<'_>) -> Result<Self, ModelError> {
        if fields.is_null("hidden_activation") {
            return Err(fields.invalid("hidden_activation", "is null; must be gelu_pytorch_tanh"));
        }
        if fields.flag("use_bidirectional_attention")? == Some(true) {
            return Err(fields.invalid(
                "use_bidirectional_attention",
                "is true; only causal language models are implemented",
            ));
        }
        let common = Common::read(fields)?;
        let scalar = fields.number("query_pre_attn_scalar")?.unwrap_or(256.0);
        let scale = scalar.powf(-0.5) as f32;
        if !(scale > 0.0 && scale.is_finite()) {
            return Err(fields.invalid(
                "query_pre_attn_scalar",
                format!("is {scalar}; must be a number above 0"),
            ));
        }
        let attention = AttentionSpec {
            scale,
            softcap: softcap(fields, "attn_logit_softcapping")?,
            qkv_bias: common.attention_bias,
            output_bias: common.attention_bias,
            ..common.attention()
        };
        Ok(Gemma {
            attention,
            logit_softcap: softcap(fields, "final_logit_softcapping")?,
            common,
        })
    }

    /// Returns the number of decoder blocks.
    pub fn num_layers(&self) -> usize {
        self.common.num_layers
    }

    /// Returns `sliding_window`.
    pub fn window(&self) -> Option<usize> {
        self.common.window
    }

    /// Returns a block with this attention.
    pub fn block(&self, attention: AttentionSpec) -> BlockSpec {
        BlockSpec {
            mixer_norms: Norms::PreAndPost,
            feed_forward_norms: Norms::PreAndPost,
            ..self.common.block(attention)
        }
    }

    /// Returns the model with these blocks.
    pub fn model(self, blocks: Vec<BlockSpec>) -> ModelSpec {
        let model = self.common.model(blocks);
        ModelSpec {
            embedding_scale: (model.hidden_size as f64).sqrt() as f32,
            rounds_embedding_scale: true,
            norms_add_one: true,
            logit_softcap: self.logit_softcap,
            ..model
        }
    }
}

/// Reads a soft-cap. Null means that there is none.
fn softcap(fields: &Fields<'_>, field: &str) -> Result<Option<f32>, ModelError> {
    let Some(stored) = fields.number(field)? else {
        return Ok(None);
    };
    let cap = stored as f32;
    if !(cap.is_normal() && cap > 0.0) {
        return Err(fields.invalid(
            field,
            format!("is {stored}; must be a number above 0, or null"),
        ));
    }
    Ok(Some(cap))
}
