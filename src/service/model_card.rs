//! The model card of an exported adapter, in the form of PEFT's `save_pretrained`.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::domain::dpo::LossType;
use crate::domain::job::{Checkpoint, Evaluation, Job, Metrics};
use crate::domain::names::BaseName;
use crate::domain::training::Method;

/// File with the card.
pub(super) const CARD_FILE: &str = "README.md";
/// Title of a card whose job has none.
const NO_TITLE: &str = "An adapter trained by Bradley";

/// Content of a card, apart from the base model.
pub(super) struct ModelCard {
    title: String,
    /// Rows of the table "training".
    settings: Vec<(&'static str, String)>,
    losses: Vec<LossType>,
    metrics: Metrics,
}

impl ModelCard {
    /// Describes a checkpoint of a job.
    pub fn of(job: &Job, checkpoint: &Checkpoint) -> Self {
        let (request, spec) = (&job.request, &job.request.spec);
        let dpo = &spec.dpo;
        let losses: Vec<String> = dpo
            .losses
            .iter()
            .map(|term| match dpo.losses.len() {
                1 => term.loss.name().to_owned(),
                _ => format!("{} × {}", term.weight, term.loss.name()),
            })
            .collect();
        let mut settings = vec![
            ("job", format!("trainingJobs/{}", job.id)),
            ("optimizer step", checkpoint.step.to_string()),
            ("started from", request.policy.to_string()),
            ("loss", losses.join(" + ")),
            ("β", dpo.beta.to_string()),
            ("learning rate", spec.optimizer.learning_rate.to_string()),
            ("batch size", spec.batch.batch_size.to_string()),
            ("maximum length", spec.batch.max_length.to_string()),
            ("seed", spec.seed.0.to_string()),
        ];
        if let Some(reference) = &request.reference {
            settings.push(("reference", reference.to_string()));
        }
        if let Method::Lora(lora) = &spec.method {
            settings.push(("LoRA rank", lora.rank.to_string()));
            settings.push(("LoRA α", lora.alpha.to_string()));
            settings.push(("target modules", lora.target_modules.join(", ")));
        }
        settings.push(("dataset", format!("datasets/{}", request.dataset)));
        let contents = request
            .pins
            .as_ref()
            .and_then(|pins| pins.contents.as_ref());
        if let Some(contents) = contents {
            settings.push(("dataset (BLAKE3)", contents.dataset.clone()));
        }
        if let Evaluation::Dataset(id) = &request.evaluation {
            settings.push(("evaluated on", format!("datasets/{id}")));
        }
        if let Some(hash) = contents.and_then(|contents| contents.eval_dataset.clone()) {
            settings.push(("evaluated on (BLAKE3)", hash));
        }
        ModelCard {
            title: match request.display_name.trim() {
                "" => NO_TITLE.to_owned(),
                title => title.to_owned(),
            },
            settings,
            losses: dpo.losses.iter().map(|term| term.loss).collect(),
            metrics: checkpoint.metrics.clone(),
        }
    }

    /// Returns the text of the card. Like PEFT's, it begins with metadata that the Hugging Face hub
    /// reads.
    pub fn text(&self, base: &BaseName) -> String {
        let is_dpo = self.losses.iter().any(|loss| *loss != LossType::Sft);
        let mut tags = vec![
            format!("base_model:adapter:{}", base.name),
            "lora".to_owned(),
        ];
        if is_dpo {
            tags.push("dpo".to_owned());
        }
        tags.sort();
        let metadata = json!({
            "base_model": base.name,
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "tags": tags,
        });
        // JSON is YAML, too.
        let metadata = yaml_serde::to_string(&metadata).unwrap_or_else(|_| format!("{metadata}\n"));
        let revision = match &base.revision {
            Some(revision) => format!(" (revision {})", cell(revision)),
            None => String::new(),
        };
        let mut text = format!(
            "---\n{metadata}---\n\n# {}\n\nA LoRA adapter for {}{revision}, trained on preference \
             pairs by Bradley {}.\n\n## Training\n\n| setting | value |\n|---|---|\n",
            cell(&self.title),
            cell(&base.name),
            env!("CARGO_PKG_VERSION"),
        );
        for (name, value) in &self.settings {
            // Writing to a String does not fail.
            let _ = writeln!(text, "| {name} | {} |", cell(value));
        }
        if !self.metrics.is_empty() {
            text.push_str("\n## Metrics at this step\n\n| metric | value |\n|---|---|\n");
            for (name, value) in &self.metrics {
                let _ = writeln!(text, "| {} | {} |", cell(name), Value::from(*value));
            }
        }
        text
    }
}

/// Returns a text as a cell of a Markdown table, on one line.
fn cell(text: &str) -> String {
    text.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .replace('|', "\\|")
        .replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_has_the_metadata_of_the_hub_and_one_line_for_each_setting() {
        let card = ModelCard {
            title: "a | b\n# c <img>".to_owned(),
            settings: vec![("loss", "sigmoid".to_owned())],
            losses: vec![LossType::Sigmoid],
            metrics: [("eval_loss".to_owned(), 0.5)].into_iter().collect(),
        };
        let base = BaseName::from_hub("owner/name@v1");
        let text = card.text(&base);
        let (metadata, body) = text[4..].split_once("---\n").unwrap();
        let metadata: Value = yaml_serde::from_str(metadata).unwrap();
        assert_eq!(
            metadata,
            json!({
                "base_model": "owner/name",
                "library_name": "peft",
                "pipeline_tag": "text-generation",
                "tags": ["base_model:adapter:owner/name", "dpo", "lora"],
            })
        );
        for line in [
            "# a \\| b # c &lt;img>",
            "| loss | sigmoid |",
            "| eval_loss | 0.5 |",
        ] {
            assert!(body.lines().any(|l| l == line), "{line} is not in {body}");
        }
        assert!(body.contains("owner/name (revision v1)"), "{body}");
    }
}
