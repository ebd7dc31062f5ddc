//! Calibration of margins: Pr(chosen ≻ rejected) = σ(m/T + c·d) with a temperature T and a
//! coefficient c of the length difference d = tokens of the chosen answer − tokens of the
//! rejected one.
//!
//! The fit is a logistic regression of the label on m and d by maximum likelihood, without a
//! penalty. There is no intercept: if the answers change places, m and d change their signs, and
//! the probability must become its complement. Both orders of a pair have the same likelihood, so
//! that each pair is used once.
//!
//! The likelihood has exactly one maximum unless there is a line through the origin with no point
//! (m, d) on one of its sides. With such a line the likelihood grows with the parameters without
//! end; or, if all points are on the line, many parameters are equally good. Then the length is
//! left out. If all margins, too, have one sign or are 0, there is no calibration.

use std::f64::consts::{PI, TAU};

use serde::{Deserialize, Serialize};

use super::{log_sigmoid, sigmoid};

/// Maximum number of Newton steps. The likelihood is concave, and 20 usually suffice.
const MAX_STEPS: usize = 200;
/// Length of the gradient, for scaled features, at which the fit has converged.
const GRADIENT_TOLERANCE: f64 = 1e-14;
/// Angle in radians by which points must lie outside of a half-plane, because angles are rounded.
const ANGLE_TOLERANCE: f64 = 1e-12;

/// Margin and length difference of a pair whose first answer is the chosen one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CalibrationPoint {
    /// m = r_chosen − r_rejected.
    pub margin: f64,
    /// d = tokens of the chosen answer − tokens of the rejected answer.
    pub length_difference: f64,
}

/// Parameters of calibrated probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// T > 0. Above 1 it makes probabilities less extreme.
    pub temperature: f64,
    /// c, per token. Below 0 it takes away a preference for long answers.
    pub length_coefficient: f64,
}

impl Calibration {
    /// Returns the calibrated margin m/T + c·d; σ of it is the calibrated probability.
    pub fn margin(&self, point: CalibrationPoint) -> f64 {
        point.margin / self.temperature + self.length_coefficient * point.length_difference
    }
}

/// The reason why there is no calibration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CalibrationProblem {
    /// All margins are at least 0, or all are at most 0.
    #[error(
        "all margins have the same sign, so that no finite temperature is the best: use more pairs"
    )]
    Separable,
    /// The margins predict the opposite of the labels, or nothing.
    #[error(
        "a larger margin does not make it more likely that the chosen answer is preferred, so that \
         no finite temperature above 0 is the best: check which answer is the chosen one"
    )]
    Reversed,
}

/// Fits temperature and length coefficient. If the two have no single best values, or if a larger
/// margin would not make a win more likely at the same length difference, the temperature alone is
/// fitted, and the coefficient is 0.
///
/// # Errors
/// Returns the problem if there is no best temperature.
pub fn fit(points: &[CalibrationPoint]) -> Result<Calibration, CalibrationProblem> {
    if !surrounds_origin(points) {
        return fit_temperature(points);
    }
    let rows: Vec<[f64; 2]> = points
        .iter()
        .map(|p| [p.margin, p.length_difference])
        .collect();
    let [slope, length_coefficient] = newton(&rows);
    match slope > 0.0 {
        true => calibration(slope, length_coefficient),
        false => fit_temperature(points),
    }
}

/// Fits the temperature alone.
///
/// # Errors
/// Returns the problem if there is no best temperature.
pub fn fit_temperature(points: &[CalibrationPoint]) -> Result<Calibration, CalibrationProblem> {
    let has = |sign: f64| points.iter().any(|p| p.margin * sign > 0.0);
    if !(has(1.0) && has(-1.0)) {
        return Err(CalibrationProblem::Separable);
    }
    let rows: Vec<[f64; 1]> = points.iter().map(|p| [p.margin]).collect();
    let [slope] = newton(&rows);
    calibration(slope, 0.0)
}

fn calibration(slope: f64, length_coefficient: f64) -> Result<Calibration, CalibrationProblem> {
    let temperature = 1.0 / slope;
    if !(temperature > 0.0 && temperature.is_finite() && length_coefficient.is_finite()) {
        return Err(CalibrationProblem::Reversed);
    }
    Ok(Calibration {
        temperature,
        length_coefficient,
    })
}

/// Returns true if no closed half-plane with the origin on its border holds all points: sorted by
/// angle, two neighbours are always less than π apart. Then the likelihood has exactly one
/// maximum.
fn surrounds_origin(points: &[CalibrationPoint]) -> bool {
    let mut angles: Vec<f64> = points
        .iter()
        .filter(|p| p.margin != 0.0 || p.length_difference != 0.0)
        .map(|p| p.length_difference.atan2(p.margin))
        .collect();
    angles.sort_by(f64::total_cmp);
    let (Some(first), Some(last)) = (angles.first(), angles.last()) else {
        return false;
    };
    let around = first + TAU - last;
    let between = angles.windows(2).map(|pair| pair[1] - pair[0]);
    between.fold(around, f64::max) < PI - ANGLE_TOLERANCE
}

/// Returns the w that minimises the mean of −log σ(w·x), by Newton's method with step halving.
/// The features are scaled to a root mean square of 1 meanwhile.
#[allow(clippy::needless_range_loop)]
fn newton<const K: usize>(rows: &[[f64; K]]) -> [f64; K] {
    let n = rows.len() as f64;
    let scale: [f64; K] = std::array::from_fn(|k| {
        let square = rows.iter().map(|x| x[k] * x[k]).sum::<f64>() / n;
        if square > 0.0 { square.sqrt() } else { 1.0 }
    });
    let scaled: Vec<[f64; K]> = rows
        .iter()
        .map(|x| std::array::from_fn(|k| x[k] / scale[k]))
        .collect();
    let dot = |w: &[f64; K], x: &[f64; K]| (0..K).map(|k| w[k] * x[k]).sum::<f64>();
    let loss = |w: &[f64; K]| scaled.iter().map(|x| -log_sigmoid(dot(w, x))).sum::<f64>() / n;
    let mut w = [0.0; K];
    let mut current = loss(&w);
    for _ in 0..MAX_STEPS {
        let mut gradient = [0.0; K];
        let mut hessian = [[0.0; K]; K];
        for x in &scaled {
            let z = dot(&w, x);
            let wrong = sigmoid(-z);
            let curvature = wrong * sigmoid(z);
            for i in 0..K {
                gradient[i] -= wrong * x[i] / n;
                for j in 0..K {
                    hessian[i][j] += curvature * x[i] * x[j] / n;
                }
            }
        }
        let length = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        if length < GRADIENT_TOLERANCE {
            break;
        }
        let direction = solve(hessian, gradient);
        let decrease = (0..K).map(|k| gradient[k] * direction[k]).sum::<f64>();
        let mut size = 1.0;
        // Near the minimum the loss does not change any more in double precision, and the whole
        // step is taken.
        let is_close = decrease < 1e-10 * current.max(f64::MIN_POSITIVE);
        let next = loop {
            let next: [f64; K] = std::array::from_fn(|k| w[k] - size * direction[k]);
            if is_close || size < 1e-12 || loss(&next) <= current - 1e-4 * size * decrease {
                break next;
            }
            size /= 2.0;
        };
        if next == w {
            break;
        }
        w = next;
        current = loss(&w);
    }
    std::array::from_fn(|k| w[k] / scale[k])
}

/// Solves H·x = g for a symmetric positive definite H by Cholesky's method. A pivot that is 0
/// after rounding becomes a small number, so that the step is long and is then halved.
#[allow(clippy::needless_range_loop)]
fn solve<const K: usize>(hessian: [[f64; K]; K], gradient: [f64; K]) -> [f64; K] {
    let mut lower = [[0.0; K]; K];
    for i in 0..K {
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| lower[i][k] * lower[j][k]).sum();
            let rest = hessian[i][j] - sum;
            lower[i][j] = match i == j {
                true => rest.max(1e-30).sqrt(),
                false => rest / lower[j][j],
            };
        }
    }
    let mut x = gradient;
    for i in 0..K {
        let sum: f64 = (0..i).map(|k| lower[i][k] * x[k]).sum();
        x[i] = (x[i] - sum) / lower[i][i];
    }
    for i in (0..K).rev() {
        let sum: f64 = (i + 1..K).map(|k| lower[k][i] * x[k]).sum();
        x[i] = (x[i] - sum) / lower[i][i];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(all: &[(f64, f64)]) -> Vec<CalibrationPoint> {
        let point = |(margin, length_difference): &(f64, f64)| CalibrationPoint {
            margin: *margin,
            length_difference: *length_difference,
        };
        all.iter().map(point).collect()
    }

    #[test]
    fn equal_margins_have_the_temperature_of_their_share() {
        // 3 of 4 margins are +2: σ(2/T) = 3/4, so T = 2 / log 3.
        let fitted = fit_temperature(&points(&[(2.0, 0.0), (2.0, 0.0), (2.0, 0.0), (-2.0, 0.0)]));
        let fitted = fitted.unwrap();
        assert!(
            (fitted.temperature - 2.0 / 3f64.ln()).abs() < 1e-12,
            "{fitted:?}"
        );
        assert_eq!(fitted.length_coefficient, 0.0);
    }

    #[test]
    fn separable_margins_have_no_temperature() {
        for all in [
            &[(1.0, 3.0), (0.0, -2.0), (0.4, 1.0)][..],
            &[(-1.0, 3.0), (-2.0, -1.0)],
            &[(0.0, 1.0), (0.0, -1.0)],
            &[],
        ] {
            assert_eq!(
                fit(&points(all)),
                Err(CalibrationProblem::Separable),
                "{all:?}"
            );
        }
    }

    #[test]
    fn a_length_that_separates_is_left_out() {
        // The length difference is positive in every pair: c would grow without end.
        let separable = points(&[(1.0, 5.0), (2.0, 3.0), (-0.5, 4.0), (0.1, 1.0)]);
        let fitted = fit(&separable).unwrap();
        assert_eq!(fitted, fit_temperature(&separable).unwrap());
        // All points are on one line, so that every c fits as well.
        let line = points(&[(1.0, 2.0), (2.0, 4.0), (-1.0, -2.0)]);
        assert_eq!(fit(&line).unwrap().length_coefficient, 0.0);
    }

    #[test]
    fn reversed_margins_have_no_temperature() {
        let reversed = points(&[(-1.0, 1.0), (-2.0, -1.0), (-3.0, 2.0), (0.5, -2.0)]);
        assert_eq!(fit(&reversed), Err(CalibrationProblem::Reversed));
    }

    #[test]
    fn the_gradient_at_the_fit_is_zero() {
        let all = points(&[
            (40.0, 300.0),
            (-25.0, 150.0),
            (3.0, -80.0),
            (-1.0, -200.0),
            (8.0, 20.0),
            (0.5, -10.0),
        ]);
        let fitted = fit(&all).unwrap();
        let (mut by_margin, mut by_length) = (0.0, 0.0);
        for p in &all {
            let wrong = sigmoid(-fitted.margin(*p));
            by_margin += wrong * p.margin;
            by_length += wrong * p.length_difference;
        }
        assert!(
            by_margin.abs() < 1e-9 && by_length.abs() < 1e-9,
            "{fitted:?}"
        );
        assert!(fitted.temperature > 0.0 && fitted.length_coefficient != 0.0);
    }
}
