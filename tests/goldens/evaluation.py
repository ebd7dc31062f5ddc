#!/usr/bin/env python3
"""Writes evaluation.json: what scikit-learn, scipy and numpy say about margins and
length differences.

Needs scikit-learn==1.9.1, scipy==1.17.1 and numpy==2.4.6.
"""

import json
import pathlib
import warnings

import numpy as np
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

BINS = [10, 15]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def samples(margins):
    """Both orders of each pair: label and predicted probability."""
    labels = np.concatenate([np.ones(len(margins)), np.zeros(len(margins))])
    return labels, sigmoid(np.concatenate([margins, -margins]))


def reliability(labels, probabilities, bins):
    observed, predicted = calibration_curve(labels, probabilities, n_bins=bins, strategy="uniform")
    # The same bins as of calibration_curve, which does not return their sizes.
    edges = np.linspace(0, 1, bins + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], probabilities), minlength=bins)
    filled = counts[counts > 0]
    return {
        "bins": bins,
        "counts": counts.tolist(),
        "observed": observed.tolist(),
        "predicted": predicted.tolist(),
        "ece": float(np.sum(filled * np.abs(observed - predicted)) / len(labels)),
    }


def fitted(features, labels):
    """Maximum likelihood without a penalty, polished by Newton steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scale = np.sqrt(np.mean(features**2, axis=0))
        x = features / scale
        model = LogisticRegression(
            C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=1000
        ).fit(x, labels)
    return (model.coef_[0] / scale).tolist()


def case(name, margins, lengths):
    labels, probabilities = samples(margins)
    wins = int(np.sum(margins > 0))
    interval = binomtest(wins, len(margins)).proportion_ci(0.95, method="wilson")
    counts, edges = np.histogram(margins, bins=20)
    features = np.stack([margins, lengths], axis=1)
    both = np.concatenate([features, -features])
    return {
        "name": name,
        "margins": margins.tolist(),
        "length_differences": lengths.tolist(),
        "auc": float(roc_auc_score(labels, np.concatenate([margins, -margins]))),
        "brier": float(brier_score_loss(labels, probabilities)),
        "log_loss": float(log_loss(labels, probabilities)),
        "reliability": [reliability(labels, probabilities, bins) for bins in BINS],
        "wins": wins,
        "interval": [float(interval.low), float(interval.high)],
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "slope": fitted(both[:, :1], labels)[0],
        "slope_and_coefficient": fitted(both, labels),
    }


def main():
    random = np.random.default_rng(20)
    noisy = random.normal(0.4, 1.0, 400)
    long = random.normal(0, 60, 400).round()
    biased = 3 * random.normal(0.3, 1.0, 250) + 0.02 * long[:250]
    # Few different values, so that there are ties within and between the orders.
    coarse = random.integers(-3, 6, 120) / 2
    coarse = coarse[coarse != 0]
    cases = [
        case("normal", noisy, long),
        case("biased", biased, long[:250]),
        case("ties", coarse, random.normal(5, 30, len(coarse)).round()),
        case("extreme", random.normal(2.0, 12.0, 60).clip(-30, 30), random.normal(0, 400, 60).round()),
        case("small", np.array([0.25, -0.5, 1.0, 0.125, -0.25]), np.array([3.0, 2.0, -4.0, -1.0, -2.0])),
    ]
    path = pathlib.Path(__file__).parent / "evaluation.json"
    path.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
