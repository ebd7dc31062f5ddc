//! DPO objective: the mix of losses, β, the divergence and the weightings. Names and defaults
//! follow TRL where TRL has them.

use serde::{Deserialize, Serialize};

use super::violation::Violations;

/// Loss of a pair. The formulas are in `math::loss`, with the notation used here:
/// lr = log π − log π_ref of an answer, s the divergence's score, δ = s_w − s_l, n the
/// completion tokens, w chosen, l rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// −log σ(βδ), optionally with label smoothing (cDPO).
    Sigmoid,
    /// relu(1 − βδ).
    Hinge,
    /// (s_w/n_w − s_l/n_l − 1/(2β))².
    Ipo,
    /// Efficient exact optimisation, pairwise; needs label smoothing > 0.
    ExoPair,
    /// Noise-contrastive alignment, pairwise.
    NcaPair,
    /// Robust DPO: unbiased under label noise ε < 0.5.
    Robust,
    /// Binary classifier optimisation, pairwise.
    BcoPair,
    /// Self-play preference optimisation with hard labels.
    SppoHard,
    /// Alignment via optimal transport: sorted within the batch.
    Aot,
    /// The unpaired form of [`LossType::Aot`].
    AotUnpaired,
    /// Anchored preference optimisation, "zero".
    ApoZero,
    /// Anchored preference optimisation, "down".
    ApoDown,
    /// The loss discovered in DiscoPOP.
    Discopop,
    /// Token-mean negative log-likelihood of the chosen completion.
    Sft,
    /// Length-normalised sigmoid.
    SigmoidNorm,
    /// SimPO: −log σ(β(logπ_w/n_w − logπ_l/n_l) − γ); needs no reference.
    Simpo,
    /// ORPO: NLL(chosen) − λ·log σ(log-odds ratio); needs no reference.
    Orpo,
}

impl LossType {
    /// All losses.
    pub const ALL: [LossType; 17] = [
        LossType::Sigmoid,
        LossType::Hinge,
        LossType::Ipo,
        LossType::ExoPair,
        LossType::NcaPair,
        LossType::Robust,
        LossType::BcoPair,
        LossType::SppoHard,
        LossType::Aot,
        LossType::AotUnpaired,
        LossType::ApoZero,
        LossType::ApoDown,
        LossType::Discopop,
        LossType::Sft,
        LossType::SigmoidNorm,
        LossType::Simpo,
        LossType::Orpo,
    ];

    /// Returns the name in the API and in stored records, as TRL spells it.
    pub fn name(self) -> &'static str {
        match self {
            LossType::Sigmoid => "sigmoid",
            LossType::Hinge => "hinge",
            LossType::Ipo => "ipo",
            LossType::ExoPair => "exo_pair",
            LossType::NcaPair => "nca_pair",
            LossType::Robust => "robust",
            LossType::BcoPair => "bco_pair",
            LossType::SppoHard => "sppo_hard",
            LossType::Aot => "aot",
            LossType::AotUnpaired => "aot_unpaired",
            LossType::ApoZero => "apo_zero",
            LossType::ApoDown => "apo_down",
            LossType::Discopop => "discopop",
            LossType::Sft => "sft",
            LossType::SigmoidNorm => "sigmoid_norm",
            LossType::Simpo => "simpo",
            LossType::Orpo => "orpo",
        }
    }

    /// Returns the loss with this name.
    pub fn parse(name: &str) -> Option<LossType> {
        LossType::ALL.into_iter().find(|l| l.name() == name)
    }

    /// Returns true if the value depends on reference log-probs.
    pub fn needs_reference(self) -> bool {
        !matches!(self, LossType::Sft | LossType::Simpo | LossType::Orpo)
    }

    /// Returns true if the value depends on ε.
    pub fn smooths_labels(self) -> bool {
        matches!(
            self,
            LossType::Sigmoid
                | LossType::ExoPair
                | LossType::Robust
                | LossType::Aot
                | LossType::AotUnpaired
                | LossType::Simpo
        )
    }

    /// Returns how the reward that the loss trains adds up an answer's log-probs; `None` for
    /// [`LossType::Sft`], which compares no answers.
    pub fn normalization(self) -> Option<Normalization> {
        match self {
            LossType::Sft => None,
            LossType::Ipo | LossType::SigmoidNorm | LossType::Simpo | LossType::Orpo => {
                Some(Normalization::Mean)
            }
            _ => Some(Normalization::Sum),
        }
    }

    /// Returns true if an f-divergence other than reverse KL is defined for this loss. TRL rejects
    /// such a divergence with the losses for which this returns false.
    pub fn accepts_divergence(self) -> bool {
        !matches!(
            self,
            LossType::NcaPair
                | LossType::BcoPair
                | LossType::SppoHard
                | LossType::Aot
                | LossType::AotUnpaired
                | LossType::ApoZero
                | LossType::ApoDown
        )
    }
}

/// Aggregation of an answer's log-ratios in the reward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Normalization {
    /// r = β·Σ_t lr_t.
    Sum,
    /// r = β·(Σ_t lr_t)/n over the answer's n tokens.
    Mean,
}

/// One term of the mix: `weight · mean(loss)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightedLoss {
    /// Loss of this term.
    pub loss: LossType,
    /// Weight in the sum.
    pub weight: f64,
    /// Label smoothing ε of this term, in [0, 0.5), for losses that smooth labels; `None` means
    /// the objective's value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label_smoothing: Option<f64>,
}

impl WeightedLoss {
    /// Returns a term that uses the objective's label smoothing.
    pub fn new(loss: LossType, weight: f64) -> Self {
        WeightedLoss {
            loss,
            weight,
            label_smoothing: None,
        }
    }
}

/// f-divergence: the function s(lr) applied to a log-ratio before it enters the loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Divergence {
    /// s = lr.
    ReverseKl,
    /// s = 1 − e^(−lr).
    ForwardKl,
    /// s = log 2 + log σ(lr).
    JensenShannon,
    /// s = (e^((α−1)·lr) − 1)/(α−1).
    Alpha {
        /// α ≠ 1.
        alpha: f64,
    },
}

/// TR-DPO: every `every_steps` optimizer steps, ref ← α·π + (1−α)·ref.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceSync {
    /// The mixing weight α in (0, 1].
    pub alpha: f64,
    /// The period in optimizer steps.
    pub every_steps: u32,
}

/// The whole DPO objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DpoConfig {
    /// Terms of the mix, at least one.
    pub losses: Vec<WeightedLoss>,
    /// Strength β > 0 of the implicit reward, r = β·lr.
    pub beta: f64,
    /// Label smoothing ε in [0, 0.5), for terms without a value of their own.
    pub label_smoothing: f64,
    /// Function applied to the log-ratios.
    pub divergence: Divergence,
    /// Temperature τ of the discopop loss.
    pub discopop_tau: f64,
    /// RPO: adds α·NLL(chosen), averaged over tokens.
    pub rpo_alpha: Option<f64>,
    /// DPOP (smaug): factor λ of the penalty λ·max(0, −lr_w) inside the sigmoid; 0 turns
    /// it off.
    pub dpop_lambda: f64,
    /// Target margin γ of SimPO.
    pub simpo_gamma: f64,
    /// Factor λ of ORPO.
    pub orpo_lambda: f64,
    /// WPO: weights each pair by its probability under the policy.
    pub wpo: bool,
    /// LD-DPO: weight in [0, 1] of the tokens beyond the length of the shorter answer.
    pub ld_alpha: Option<f64>,
    /// True to use lr = log π, without a reference.
    pub reference_free: bool,
    /// TR-DPO: schedule that moves the reference towards the policy.
    pub reference_sync: Option<ReferenceSync>,
}

impl Default for DpoConfig {
    fn default() -> Self {
        DpoConfig {
            losses: vec![WeightedLoss::new(LossType::Sigmoid, 1.0)],
            beta: 0.1,
            label_smoothing: 0.0,
            divergence: Divergence::ReverseKl,
            discopop_tau: 0.05,
            rpo_alpha: None,
            dpop_lambda: 0.0,
            simpo_gamma: 0.5,
            orpo_lambda: 0.1,
            wpo: false,
            ld_alpha: None,
            reference_free: false,
            reference_sync: None,
        }
    }
}

impl DpoConfig {
    /// Returns true if a run compares its policy with a reference: because the loss needs one,
    /// because the request names one, or for the metrics alone. TRL's DPOTrainer reports rewards
    /// against the reference whatever its loss (sft too); its trainers of simpo and orpo have none.
    pub fn has_reference(&self, named: bool) -> bool {
        let without = |loss| matches!(loss, LossType::Simpo | LossType::Orpo);
        !self.reference_free
            && (self.needs_reference()
                || named
                || !self.losses.iter().any(|term| without(term.loss)))
    }

    /// Returns true if the loss needs reference log-probs.
    pub fn needs_reference(&self) -> bool {
        !self.reference_free
            && (self.losses.iter().any(|l| l.loss.needs_reference()) || self.dpop_lambda > 0.0)
    }

    /// Returns the normalization of the reward that the objective trains: the mean over tokens if
    /// every loss that compares answers does so by means, else the sum. A mix of both kinds has the
    /// sum, which is what TRL logs for it.
    pub fn reward_normalization(&self) -> Normalization {
        let mut trained = self
            .losses
            .iter()
            .filter_map(|term| term.loss.normalization())
            .peekable();
        match trained.peek().is_some() && trained.all(|n| n == Normalization::Mean) {
            true => Normalization::Mean,
            false => Normalization::Sum,
        }
    }

    /// Returns the normalization of the metrics `rewards/*`. TRL's CPOTrainer (simpo) and
    /// ORPOTrainer log means over tokens; its DPOTrainer logs sums, also for ipo and sigmoid_norm.
    pub fn logged_normalization(&self) -> Normalization {
        let by_dpo_trainer = |loss| matches!(loss, LossType::Ipo | LossType::SigmoidNorm);
        match self.losses.iter().any(|term| by_dpo_trainer(term.loss)) {
            true => Normalization::Sum,
            false => self.reward_normalization(),
        }
    }

    /// Returns true if a pair's loss depends on the other pairs of its micro-batch (losses that
    /// sort log-ratios).
    pub fn compares_pairs(&self) -> bool {
        self.losses
            .iter()
            .any(|term| matches!(term.loss, LossType::Aot | LossType::AotUnpaired))
    }

    /// Returns true if one of the terms is this loss.
    pub fn has_loss(&self, loss: LossType) -> bool {
        self.losses.iter().any(|term| term.loss == loss)
    }

    /// Records a violation if label smoothing is set and no loss of the mix depends on it.
    fn refuse_unused_label_smoothing(&self, field: &str, out: &mut Violations) {
        let is_used = self
            .losses
            .iter()
            .any(|term| term.loss.smooths_labels() && term.label_smoothing.is_none());
        if self.label_smoothing <= 0.0 || is_used || self.losses.is_empty() {
            return;
        }
        let names: Vec<&str> = self.losses.iter().map(|term| term.loss.name()).collect();
        let smoothed = LossType::ALL
            .into_iter()
            .filter(|loss| loss.smooths_labels())
            .map(LossType::name);
        let message = format!(
            "has no effect on {}: leave it out or set it to 0, or use a loss with label smoothing \
             ({})",
            names.join(", "),
            smoothed.collect::<Vec<_>>().join(", ")
        );
        out.push(format!("{field}.label_smoothing"), message);
    }

    /// Returns the label smoothing ε of a term.
    pub fn smoothing(&self, term: &WeightedLoss) -> f64 {
        term.label_smoothing.unwrap_or(self.label_smoothing)
    }

    /// Records the violations in the label smoothing of term `i`.
    fn validate_smoothing(&self, field: &str, i: usize, out: &mut Violations) {
        let term = &self.losses[i];
        let own = format!("{field}.losses[{i}].label_smoothing");
        if let Some(eps) = term.label_smoothing {
            if !(0.0..0.5).contains(&eps) {
                out.push(
                    &own,
                    format!("is {eps}: label smoothing must lie in [0, 0.5)"),
                );
            } else if eps > 0.0 && !term.loss.smooths_labels() {
                out.push(
                    &own,
                    format!(
                        "is {eps}: {} has no label smoothing, remove this number",
                        term.loss.name()
                    ),
                );
            }
        }
        if term.loss == LossType::ExoPair && self.smoothing(term) <= 0.0 {
            let at = if term.label_smoothing.is_some() {
                own
            } else {
                format!("{field}.label_smoothing")
            };
            let message = format!(
                "is {}: exo_pair needs a label smoothing above 0, for example 0.001",
                self.smoothing(term)
            );
            out.push(at, message);
        }
    }

    /// Records every invalid setting. `field` is the prefix of the field paths, e.g. `dpo`.
    pub fn validate(&self, field: &str, out: &mut Violations) {
        if self.losses.is_empty() {
            out.push(
                format!("{field}.losses"),
                "is empty: name at least one loss, for example sigmoid",
            );
        }
        for (i, l) in self.losses.iter().enumerate() {
            if !(l.weight.is_finite() && l.weight > 0.0) {
                out.push(
                    format!("{field}.losses[{i}].weight"),
                    format!("is {}: a weight must be a finite number above 0", l.weight),
                );
            }
            if self.divergence != Divergence::ReverseKl && !l.loss.accepts_divergence() {
                out.push(
                    format!("{field}.losses[{i}].loss_type"),
                    format!(
                        "{} is defined for reverse_kl only: set f_divergence to reverse_kl or \
                        choose another loss",
                        l.loss.name()
                    ),
                );
            }
            self.validate_smoothing(field, i, out);
        }
        out.positive(format!("{field}.beta"), self.beta);
        if !(0.0..0.5).contains(&self.label_smoothing) {
            out.push(
                format!("{field}.label_smoothing"),
                format!("is {}: it must lie in [0, 0.5)", self.label_smoothing),
            );
        }
        self.refuse_unused_label_smoothing(field, out);
        if let Divergence::Alpha { alpha } = self.divergence
            && (!alpha.is_finite() || (alpha - 1.0).abs() < 1e-9)
        {
            out.push(
                format!("{field}.f_alpha"),
                format!(
                    "is {alpha}: it must be a finite number other than 1; for the limit at 1 set \
                     f_divergence to reverse_kl"
                ),
            );
        }
        out.positive(format!("{field}.discopop_tau"), self.discopop_tau);
        if let Some(a) = self.rpo_alpha {
            out.non_negative(format!("{field}.rpo_alpha"), a);
        }
        out.non_negative(format!("{field}.dpop_lambda"), self.dpop_lambda);
        if self.dpop_lambda > 0.0 && !self.losses.iter().any(|l| l.loss == LossType::Sigmoid) {
            out.push(
                format!("{field}.dpop_lambda"),
                "acts inside the sigmoid loss only: add sigmoid to the losses or set it to 0",
            );
        }
        if self.wpo && self.compares_pairs() {
            let message = "weighs pairs, which aot and aot_unpaired cannot: they compare sorted \
                log-ratios across pairs; remove one of the two";
            out.push(format!("{field}.use_weighting"), message);
        }
        out.non_negative(format!("{field}.simpo_gamma"), self.simpo_gamma);
        out.non_negative(format!("{field}.orpo_lambda"), self.orpo_lambda);
        if let Some(a) = self.ld_alpha
            && !(0.0..=1.0).contains(&a)
        {
            out.push(
                format!("{field}.ld_alpha"),
                format!("is {a}: it must lie in [0, 1]"),
            );
        }
        if let Some(s) = self.reference_sync {
            if !(s.alpha > 0.0 && s.alpha <= 1.0) {
                out.push(
                    format!("{field}.reference_sync.alpha"),
                    format!("is {}: it must lie in (0, 1]", s.alpha),
                );
            }
            if s.every_steps == 0 {
                out.push(
                    format!("{field}.reference_sync.every_steps"),
                    "is 0: it must be at least 1",
                );
            }
            if self.reference_free {
                out.push(
                    format!("{field}.reference_sync"),
                    "has no meaning with reference_free: remove one of them",
                );
            } else if !self.needs_reference() {
                let names: Vec<&str> = self.losses.iter().map(|l| l.loss.name()).collect();
                let message = format!(
                    "has no meaning: {} trains without a reference: remove it, or add a loss that \
                     needs one",
                    names.join(", ")
                );
                out.push(format!("{field}.reference_sync"), message);
            }
        }
    }
}

#[cfg(test)]
mod tests;
