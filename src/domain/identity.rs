//! Content hashes that identify a base model. A job is pinned to the hashes of the model it was
//! created with.

use serde::{Deserialize, Serialize};

/// Identity of a base model: a BLAKE3 hash in hex for each part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelIdentity {
    /// Hash of the weight files.
    pub weights: String,
    /// Hash of the parsed configuration, independent of the file's formatting.
    pub config: String,
    /// Hash of the tokenizer.
    pub tokenizer: String,
    /// Hash of the chat template; empty if there is none.
    pub chat_template: String,
}

/// A part in which two models differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference<'a> {
    /// Name of the part, e.g. `weights`.
    pub part: &'static str,
    /// Hash of the part in the first and in the second model.
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

    /// Returns one hash of all parts.
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

    /// Returns the first part that differs from `other`.
    pub fn difference<'a>(&'a self, other: &'a ModelIdentity) -> Option<Difference<'a>> {
        let both = self.parts().into_iter().zip(other.parts());
        let mut differing = both.filter(|((_, mine), (_, theirs))| mine != theirs);
        differing
            .next()
            .map(|((part, mine), (_, theirs))| Difference {
                part,
                hashes: (mine, theirs),
            })
    }
}

/// Content hashes that a job depends on, recorded when the job is created.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pins {
    /// Identity of the base model.
    pub base: ModelIdentity,
    /// BLAKE3 hash of the adapter that the policy starts from. The job's artifacts hold a copy of
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_adapter: Option<String>,
    /// Identity of the reference's base model, if it is another model than the policy's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference_base: Option<ModelIdentity>,
    /// Hashes of the job's other inputs. `None` in jobs of older versions that have not started
    /// since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contents: Option<ContentPins>,
}

/// Content hashes of a job's inputs besides its base model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContentPins {
    /// Digest of the checkpoint that the policy starts from; `None` for a base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Digest of the checkpoint that the job names as its reference; `None` for a base model or if
    /// none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// BLAKE3 hash of the training dataset's file.
    pub dataset: String,
    /// BLAKE3 hash of the evaluation dataset's file, if there is one.
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
        let with = Pins {
            reference_base: Some(pins.base.clone()),
            ..pins
        };
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
            (
                "weights",
                ModelIdentity {
                    weights: "9".into(),
                    ..a.clone()
                },
            ),
            (
                "config",
                ModelIdentity {
                    config: "9".into(),
                    ..a.clone()
                },
            ),
            (
                "tokenizer",
                ModelIdentity {
                    tokenizer: "9".into(),
                    ..a.clone()
                },
            ),
            (
                "chat template",
                ModelIdentity {
                    chat_template: "9".into(),
                    ..a.clone()
                },
            ),
        ];
        for (part, b) in &changed {
            let difference = a.difference(b).unwrap();
            assert_eq!((difference.part, difference.hashes.1), (*part, "9"));
            assert_ne!(a.hash(), b.hash());
        }
        // Moving a character from one part to the next must change the hash, too.
        let shifted = ModelIdentity {
            weights: "12".into(),
            config: String::new(),
            ..a.clone()
        };
        assert_ne!(a.hash(), shifted.hash());
    }
}
