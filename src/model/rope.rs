//! Rotary position embedding: the frequencies, with the context extensions that published models
//! use.

use std::f64::consts::PI;

/// θ and how positions beyond the pretrained context are handled.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the geometric progression of wavelengths.
    pub theta: f64,
    /// The context extension.
    pub scaling: RopeScaling,
}

/// Context extension, by the names transformers gives them (`rope_type`).
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// `default`.
    None,
    /// `linear`: positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    Linear {
        /// Context multiplier.
        factor: f64,
    },
    /// `llama3`: long wavelengths divided by `factor`, short ones kept, a smooth ramp between.
    Llama3 {
        /// Context multiplier.
        factor: f64,
        /// Wavelengths above original/low are scaled fully.
        low_freq_factor: f64,
        /// Wavelengths below original/high are kept.
        high_freq_factor: f64,
        /// Context of the pretrained model.
        original_max_position_embeddings: usize,
    },
    /// `yarn` (Peng et al. 2023, arXiv:2309.00071).
    Yarn {
        /// Context multiplier.
        factor: f64,
        /// Context of the pretrained model.
        original_max_position_embeddings: usize,
        /// Rotations above which a dimension is extrapolated; 32 in the paper.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated; 1 in the paper.
        beta_slow: f64,
        /// Multiplies cos and sin; by default 0.1·ln(factor) + 1.
        attention_factor: Option<f64>,
        /// With `mscale_all_dim`, another way to give the attention factor.
        mscale: Option<f64>,
        /// See `mscale`.
        mscale_all_dim: Option<f64>,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
}

impl RopeConfig {
    /// Returns the bits of what [`RopeConfig::inv_freq`] returns.
    pub fn bits(&self, head_dim: usize) -> (Vec<u32>, u32) {
        let (frequencies, factor) = self.inv_freq(head_dim);
        (frequencies.into_iter().map(f32::to_bits).collect(), factor.to_bits())
    }

    /// Inverse frequencies `[head_dim / 2]` and the factor that multiplies cos and sin; the numbers
    /// that transformers' `ROPE_INIT_FUNCTIONS` give, rounded to f32 where they round.
    pub fn inv_freq(&self, head_dim: usize) -> (Vec<f32>, f32) {
        let plain: Vec<f32> = (0..head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / head_dim as f32;
                1.0 / self.theta.powf(f64::from(exponent)) as f32
            })
            .collect();
        match self.scaling {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => {
                (plain.into_iter().map(|f| f / factor as f32).collect(), 1.0)
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let context = original_max_position_embeddings as f64;
                let (long, short) = (context / low_freq_factor, context / high_freq_factor);
                let scale = |f: f32| {
                    let f = f64::from(f);
                    let wavelength = 2.0 * PI / f;
                    if wavelength > long {
                        return (f / factor) as f32;
                    }
                    if wavelength < short {
                        return f as f32;
                    }
                    let smooth = (context / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    ((1.0 - smooth) * f / factor + smooth * f) as f32
                };
                (plain.into_iter().map(scale).collect(), 1.0)
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate,
            } => {
                let ramp = Ramp::new(
                    head_dim,
                    self.theta,
                    original_max_position_embeddings as f64,
                    beta_fast,
                    beta_slow,
                    truncate,
                );
                let blend = |(i, f): (usize, f32)| {
                    let f = f64::from(f);
                    let extrapolated = 1.0 - ramp.at(i);
                    (f / factor * (1.0 - extrapolated) + f * extrapolated) as f32
                };
                let attention =
                    attention_factor.unwrap_or_else(|| match (mscale, mscale_all_dim) {
                        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                            yarn_mscale(factor, m) / yarn_mscale(factor, all)
                        }
                        _ => yarn_mscale(factor, 1.0),
                    });
                (plain.into_iter().enumerate().map(blend).collect(), attention as f32)
            }
        }
    }
}

/// √(1/t) of YaRN, equation 22.
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// YaRN's γ: 0 where a dimension turns more than `beta_fast` times over the pretrained context, 1
/// below `beta_slow` times.
struct Ramp {
    low: f64,
    high: f64,
}

impl Ramp {
    fn new(
        dim: usize,
        theta: f64,
        context: f64,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
    ) -> Self {
        let dim = dim as f64;
        let dimension_of =
            |rotations: f64| dim * (context / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (dimension_of(beta_fast), dimension_of(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001; // transformers' guard against 0/0
        }
        Ramp { low, high }
    }

    fn at(&self, i: usize) -> f64 {
        ((i as f64 - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}
