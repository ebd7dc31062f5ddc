//! Content hashes that identify a base model. A job is pinned to the hashes of the model it was
//! created with.

use serde::{Deserialize, Serialize};

/// A base model by the content of its parts, each a BLAKE3 hash in hex.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelIdentity {
    /// The weight files.
    pub weights: String,
    /// The configuration as it is computed with, however its file is written.
    pub config: String,
    /// The tokenizer.
    pub tokenizer: String,
    /// The chat template; empty where there is none.
    pub chat_template: String,
}

/// A part in which two models differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference<'a> {
    /// The name of the part, e.g. `weights`.
    pub part: &'static str,
    /// The part's hash in the first model, and in the second.
    pub hashes: (&'a str, &'a str),
}

impl ModelIdentity {
    fn parts(&self) -> [(&'static str, &str); 4] {
        [
            ("weights", &self.weights),
            ("config", &self.config),
            ("tokenizer", &self.tokenizer),
            ("chat template", &self.chat_template),
        ]
    }

    /// One hash of all parts.
    pub fn hash(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for (part, content) in self.parts() {
            for text in [part, content] {
                hash.update(&(text.len() as u64).to_le_bytes());
                hash.update(text.as_bytes());
            }
        }
        hash.finalize().to_hex().to_string()
    }

    /// The first part that is not the same in `other`.
    pub fn difference<'a>(&'a self, other: &'a ModelIdentity) -> Option<Difference<'a>> {
        let both = self.parts().into_iter().zip(other.parts());
        let mut differing = both.filter(|((_, mine), (_, theirs))| mine != theirs);
        differing
            .next()
            .map(|((part, mine), (_, theirs))| Difference { part, hashes: (mine, theirs) })
    }
}

/// The content that a job depends on. It is pinned when the job is created.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pins {
    /// The base model.
    pub base: ModelIdentity,
    /// BLAKE3 of the adapter that the policy starts from; the job's artifacts hold a copy of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_adapter: Option<String>,
    /// The base model under the reference, where that is another model than the policy's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference_base: Option<ModelIdentity>,
    /// Hashes of the job's other inputs; `None` in jobs of versions that did not pin it and that
    /// have not started since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contents: Option<ContentPins>,
}

/// Content hashes of a job's inputs besides its base model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContentPins {
    /// The checkpoint that the policy starts from, by its digest; `None` for a base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// The checkpoint that the job names as its reference, by its digest; `None` for a base model
    /// and where none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// BLAKE3 of the training dataset's file.
    pub dataset: String,
    /// BLAKE3 of the evaluation dataset's file, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_dataset: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_without_another_models_reference_are_written_as_before() {
        let old = r#"{"base":{"weights":"1","config":"2","tokenizer":"3","chat_template":""}}"#;
        let pins: Pins = serde_json::from_str(old).unwrap();
        assert_eq!(pins.reference_base, None);
        assert_eq!(serde_json::to_string(&pins).unwrap(), old);
        let with = Pins { reference_base: Some(pins.base.clone()), ..pins };
        let written = serde_json::to_string(&with).unwrap();
        assert_eq!(serde_json::from_str::<Pins>(&written).unwrap(), with);
    }

    #[test]
    fn every_part_counts_and_the_one_that_differs_is_named() {
        let a = ModelIdentity {
            weights: "1".into(),
            config: "2".into(),
            tokenizer: "3".into(),
            chat_template: "4".into(),
        };
        assert_eq!(a.difference(&a.clone()), None);
        let changed = [
            ("weights", ModelIdentity { weights: "9".into(), ..a.clone() }),
            ("config", ModelIdentity { config: "9".into(), ..a.clone() }),
            ("tokenizer", ModelIdentity { tokenizer: "9".into(), ..a.clone() }),
            ("chat template", ModelIdentity { chat_template: "9".into(), ..a.clone() }),
        ];
        for (part, b) in &changed {
            let difference = a.difference(b).unwrap();
            assert_eq!((difference.part, difference.hashes.1), (*part, "9"));
            assert_ne!(a.hash(), b.hash());
        }
        // Moving a character from one part to the next is another model, too.
        let shifted = ModelIdentity { weights: "12".into(), config: String::new(), ..a.clone() };
        assert_ne!(a.hash(), shifted.hash());
    }
}
