//! Frequencies of the rotary position embedding (arXiv:2104.09864), with the context extensions
//! that published models use. Some extensions depend on the length of the sequence.

use std::f64::consts::PI;

pub use crate::compute::cpu::rope::RotaryPairs;

/// θ, the rotated dimensions, and the treatment of positions beyond the pretrained context.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric progression of wavelengths.
    pub theta: f64,
    /// Context extension.
    pub scaling: RopeScaling,
    /// R, the number of dimensions at the start of each head that are rotated. `None` means all.
    pub dims: Option<usize>,
    /// Dimensions that are rotated together.
    pub pairs: RotaryPairs,
    /// Factor on the queries that grows with their position. It needs a rotation of all
    /// dimensions, because it is multiplied into cos and sin.
    pub query_scaling: Option<QueryScaling>,
}

/// Factor 1 + β·ln(1 + ⌊position / `period`⌋) on rotated queries (`llama_4_scaling_beta` in
/// transformers). It is 1 below position `period`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScaling {
    /// β.
    pub beta: f32,
    /// Number of positions after which the factor changes: the context of the pretrained model.
    pub period: usize,
}

impl QueryScaling {
    /// Returns the factor at a position.
    pub fn factor(&self, position: u32) -> f32 {
        let periods = (position as usize / self.period) as f32;
        1.0 + self.beta * (1.0 + periods).ln()
    }
}

/// Context extension. The names are those of `rope_type` in transformers.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// `default`: no extension.
    None,
    /// `linear`: positions are divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    Linear {
        /// Context multiplier.
        factor: f64,
    },
    /// `llama3`: the frequencies of long wavelengths are divided by `factor`, those of short
    /// wavelengths are unchanged, with a smooth transition in between.
    Llama3 {
        /// Context multiplier.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings` / `low_freq_factor` are scaled
        /// fully.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings` / `high_freq_factor` are
        /// unchanged.
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
        /// Number of rotations over the pretrained context above which a dimension is extrapolated;
        /// 32 in the paper.
        beta_fast: f64,
        /// Number of rotations below which a dimension is interpolated; 1 in the paper.
        beta_slow: f64,
        /// Factor on cos and sin; by default 0.1·ln(factor) + 1.
        attention_factor: Option<f64>,
        /// Together with `mscale_all_dim`, an alternative to `attention_factor`.
        mscale: Option<f64>,
        /// Together with `mscale`, an alternative to `attention_factor`.
        mscale_all_dim: Option<f64>,
        /// True if the ends of the ramp are rounded to whole dimensions.
        truncate: bool,
    },
    /// `dynamic`: θ grows with the length of a sequence that is longer than the context ("dynamic
    /// NTK" scaling).
    Dynamic {
        /// Context multiplier.
        factor: f64,
        /// Context of the pretrained model.
        context: usize,
    },
    /// `longrope` (Ding et al. 2024, arXiv:2402.13753): each frequency is divided by a factor of
    /// its own. Sequences that are longer than the pretrained context have other factors.
    LongRope {
        /// Divisors for sequences within the pretrained context, one for each frequency.
        short_factor: Vec<f64>,
        /// Divisors for longer sequences.
        long_factor: Vec<f64>,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Context of the pretrained model.
        original_max_position_embeddings: usize,
    },
}

impl RopeConfig {
    /// Returns the rotation of all dimensions, in halves, without a context extension.
    pub fn new(theta: f64) -> Self {
        RopeConfig {
            theta,
            scaling: RopeScaling::None,
            dims: None,
            pairs: RotaryPairs::Halves,
            query_scaling: None,
        }
    }

    /// Returns a number that identifies the frequencies of a sequence of this length: two lengths
    /// have the same number exactly if their frequencies are equal. It does not decrease with the
    /// length.
    pub fn length_class(&self, length: usize) -> usize {
        match self.scaling {
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::Llama3 { .. }
            | RopeScaling::Yarn { .. } => 0,
            RopeScaling::Dynamic { context, .. } if length > context => length,
            RopeScaling::Dynamic { .. } => 0,
            RopeScaling::LongRope {
                original_max_position_embeddings,
                ..
            } => usize::from(length > original_max_position_embeddings),
        }
    }

    /// Returns the result of [`RopeConfig::inv_freq_at`] for a sequence of `length` tokens as bits,
    /// so that it can be compared and hashed exactly.
    pub fn bits_at(&self, head_dim: usize, length: usize) -> (Vec<u32>, u32) {
        let (frequencies, factor) = self.inv_freq_at(head_dim, length);
        (
            frequencies.into_iter().map(f32::to_bits).collect(),
            factor.to_bits(),
        )
    }

    /// Returns the result of [`RopeConfig::bits_at`] for sequences within the pretrained context.
    pub fn bits(&self, head_dim: usize) -> (Vec<u32>, u32) {
        self.bits_at(head_dim, 0)
    }

    /// Returns the result of [`RopeConfig::inv_freq_at`] for sequences within the pretrained
    /// context.
    pub fn inv_freq(&self, head_dim: usize) -> (Vec<f32>, f32) {
        self.inv_freq_at(head_dim, 0)
    }

    /// Returns the inverse frequencies `[R / 2]` for heads of width `head_dim` in a sequence of
    /// `length` tokens, and the factor on cos and sin. The values are those of
    /// `ROPE_INIT_FUNCTIONS` in transformers, rounded to f32 in the same places.
    pub fn inv_freq_at(&self, head_dim: usize, length: usize) -> (Vec<f32>, f32) {
        let dims = self.dims.unwrap_or(head_dim);
        // θ^(2i/R) for each i.
        let powers = |theta: f64| {
            (0..dims / 2).map(move |i| {
                let exponent = (2 * i) as f32 / dims as f32;
                theta.powf(f64::from(exponent)) as f32
            })
        };
        let plain: Vec<f32> = powers(self.theta).map(|power| 1.0 / power).collect();
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
                    dims,
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
                (
                    plain.into_iter().enumerate().map(blend).collect(),
                    attention as f32,
                )
            }
            RopeScaling::Dynamic { factor, context } => {
                let ratio = length.max(context) as f64 / context as f64;
                let exponent = dims as f64 / (dims as f64 - 2.0);
                let theta = self.theta * (factor * ratio - (factor - 1.0)).powf(exponent);
                (powers(theta).map(|power| 1.0 / power).collect(), 1.0)
            }
            RopeScaling::LongRope {
                ref short_factor,
                ref long_factor,
                attention_factor,
                original_max_position_embeddings,
            } => {
                let factors = match length > original_max_position_embeddings {
                    true => long_factor,
                    false => short_factor,
                };
                let divided = powers(self.theta)
                    .zip(factors)
                    .map(|(power, factor)| 1.0 / (*factor as f32 * power));
                (divided.collect(), attention_factor as f32)
            }
        }
    }
}

/// √(1/t) of YaRN (arXiv:2309.00071, eq. 22), with the factor `mscale` that transformers adds.
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

/// Linear ramp between the extrapolated and the interpolated dimensions (1 − γ of YaRN): 0 for
/// dimensions that rotate more than `beta_fast` times over the pretrained context, 1 for those that
/// rotate less than `beta_slow` times.
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
            high += 0.001; // avoids 0/0, as transformers does
        }
        Ramp { low, high }
    }

    fn at(&self, i: usize) -> f64 {
        ((i as f64 - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}
