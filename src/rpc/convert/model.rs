//! Converts base models.

use super::identity;
use crate::engine::api::{ModelInfo, ModelUse};
use crate::rpc::pb;
use crate::service::server::ServedModel;

/// Converts a base model.
pub(in crate::rpc) fn model(served: ServedModel) -> pb::Model {
    let ModelInfo {
        id,
        source,
        base: _,
        architecture,
        parameters,
        vocab_size,
        num_layers,
        hidden_size,
        max_position_embeddings,
        stored_format,
        text_only,
        chat_template,
        identity: hashes,
        device,
    } = served.info;
    pb::Model {
        name: format!("models/{id}"),
        source,
        architecture,
        parameters,
        vocab_size: vocab_size as u32,
        num_layers: num_layers as u32,
        hidden_size: hidden_size as u32,
        max_position_embeddings: max_position_embeddings as u32,
        chat_template,
        fingerprint: hashes.weights.clone(),
        device,
        identity: Some(identity(hashes)),
        dtype: stored_format.to_owned(),
        text_only,
        uses: served
            .uses
            .into_iter()
            .map(|u| model_use(u).into())
            .collect(),
    }
}

fn model_use(of_model: ModelUse) -> pb::ModelUse {
    match of_model {
        ModelUse::TrainLora => pb::ModelUse::TrainLora,
        ModelUse::TrainFull => pb::ModelUse::TrainFull,
        ModelUse::Score => pb::ModelUse::Score,
        ModelUse::Export => pb::ModelUse::Export,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::identity::ModelIdentity;
    use crate::domain::names::BaseName;

    #[test]
    fn a_model_has_its_values_and_its_uses_on_the_wire() {
        let info = ModelInfo {
            id: "small".into(),
            source: "example/gemma-3-4b-it".into(),
            base: BaseName::from("small"),
            architecture: "gemma3_text".into(),
            parameters: 5_000_000_000,
            vocab_size: 262_208,
            num_layers: 34,
            hidden_size: 2560,
            max_position_embeddings: 131_072,
            stored_format: "q4_k",
            text_only: true,
            chat_template: true,
            identity: ModelIdentity {
                weights: "w".repeat(64),
                ..ModelIdentity::default()
            },
            device: "cpu".into(),
        };
        let uses = vec![ModelUse::TrainLora, ModelUse::Score, ModelUse::Export];
        let sent = model(ServedModel { info, uses });
        assert_eq!(
            (sent.name.as_str(), sent.parameters, sent.dtype.as_str()),
            ("models/small", 5_000_000_000, "q4_k")
        );
        assert_eq!((sent.vocab_size, sent.num_layers), (262_208, 34));
        assert_eq!(
            (sent.hidden_size, sent.max_position_embeddings),
            (2560, 131_072)
        );
        assert!(sent.text_only && sent.chat_template);
        assert_eq!(sent.fingerprint, sent.identity.clone().unwrap().weights);
        let uses: Vec<&str> = sent.uses().map(|u| u.as_str_name()).collect();
        assert_eq!(
            uses,
            [
                "MODEL_USE_TRAIN_LORA",
                "MODEL_USE_SCORE",
                "MODEL_USE_EXPORT"
            ]
        );
        let full = model_use(ModelUse::TrainFull);
        assert_eq!(full.as_str_name(), "MODEL_USE_TRAIN_FULL");
    }
}
