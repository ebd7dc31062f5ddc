//! Families of models, one small file each. A family translates its config.json to a
//! [`crate::model::spec::ModelSpec`].

mod common;
mod gemma;
mod gemma2;
mod gemma3;
mod glm4;
mod granite;
mod llama;
mod ministral;
mod ministral3;
mod mistral;
mod olmo2;
mod olmo3;
mod phi3;
mod qwen2;
mod qwen3;
mod refused;
mod smollm3;

pub(super) use self::common::Family;

/// Model families: the decoders that [`crate::model::spec::ModelSpec`] can describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 2 and 3.x, SmolLM2.
    Llama,
    /// Mistral: a sliding window on every layer.
    Mistral,
    /// Qwen2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMSNorm on each head's q and k.
    Qwen3,
    /// Gemma 2: soft-caps on scores and logits, a sliding window on every second layer.
    Gemma2,
    /// Gemma 3, text only: norms before and after each part, a sliding window on 5 of 6 layers.
    Gemma3,
    /// Phi-3 and Phi-4: fused projections, longrope.
    Phi3,
    /// GLM-4: norms before and after each part, half of each head rotated in interleaved pairs.
    Glm4,
    /// SmolLM3: no rotation on every fourth layer.
    SmolLm3,
    /// Granite 3.x, dense: multipliers on embeddings, scores, outputs of parts and logits.
    Granite,
    /// OLMo 2: norms on outputs only, and on all queries and all keys at once.
    Olmo2,
    /// OLMo 3: as OLMo 2, with a sliding window on 3 of 4 layers.
    Olmo3,
    /// Ministral: a sliding window on some layers.
    Ministral,
    /// Ministral 3: a factor on queries that grows with their position.
    Ministral3,
}

impl Architecture {
    /// All families.
    pub const ALL: [Architecture; 14] = [
        Architecture::Llama,
        Architecture::Mistral,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Gemma2,
        Architecture::Gemma3,
        Architecture::Phi3,
        Architecture::Glm4,
        Architecture::SmolLm3,
        Architecture::Granite,
        Architecture::Olmo2,
        Architecture::Olmo3,
        Architecture::Ministral,
        Architecture::Ministral3,
    ];

    /// Returns the family's `model_type` in config.json.
    pub fn as_str(self) -> &'static str {
        self.family().model_type
    }

    /// Returns the family with the `model_type` `name`.
    pub fn from_model_type(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.as_str() == name)
    }

    /// Returns the class of transformers that loads a model of the family.
    pub(crate) fn causal_lm_class(self) -> &'static str {
        self.family().causal_lm_class
    }

    /// Returns true if llama.cpp interleaves the halves of each head in the rows of Q and K.
    pub(crate) fn is_interleaved_in_gguf(self) -> bool {
        self.family().is_interleaved_in_gguf
    }

    /// Returns the description of the family.
    pub(super) fn family(self) -> &'static Family {
        match self {
            Architecture::Llama => &llama::FAMILY,
            Architecture::Mistral => &mistral::FAMILY,
            Architecture::Qwen2 => &qwen2::FAMILY,
            Architecture::Qwen3 => &qwen3::FAMILY,
            Architecture::Gemma2 => &gemma2::FAMILY,
            Architecture::Gemma3 => &gemma3::FAMILY,
            Architecture::Phi3 => &phi3::FAMILY,
            Architecture::Glm4 => &glm4::FAMILY,
            Architecture::SmolLm3 => &smollm3::FAMILY,
            Architecture::Granite => &granite::FAMILY,
            Architecture::Olmo2 => &olmo2::FAMILY,
            Architecture::Olmo3 => &olmo3::FAMILY,
            Architecture::Ministral => &ministral::FAMILY,
            Architecture::Ministral3 => &ministral3::FAMILY,
        }
    }
}

/// Returns the end of a message about a model that is not implemented: the reason, if there is one,
/// and what is supported.
pub(crate) fn refusal(name: &str, supported: &str) -> String {
    match refused::reason(name) {
        Some(reason) => format!(": {reason} (supported: {supported})"),
        None => format!(" (supported: {supported})"),
    }
}
