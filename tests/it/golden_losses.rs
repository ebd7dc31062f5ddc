//! Compares every loss, divergence and weighting that TRL's DPOTrainer has with TRL's own results:
//! value, gradient norm and metrics. Losses that TRL lacks are compared with their formulas.

use bradley::domain::dpo::{Divergence, DpoConfig, LossType, WeightedLoss};
use bradley::domain::training::{BatchConfig, Method, OptimizerConfig, ScheduleKind, TrainingSpec};
use bradley::math::loss::{PairLogps, ReferenceLogps, batch_loss};
use serde_json::Value;

use crate::golden_training::{Run, train};
use crate::support::{assert_close, encode, json, rows, tiny};

fn config(settings: &Value) -> DpoConfig {
    let number = |k: &str| settings.get(k).and_then(Value::as_f64);
    let d = DpoConfig::default();
    let names: Vec<&str> = settings["loss_type"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_str().unwrap())
        .collect();
    let weights: Vec<f64> = settings
        .get("loss_weights")
        .map_or(vec![1.0; names.len()], crate::support::numbers);
    DpoConfig {
        losses: names
            .iter()
            .zip(weights)
            .map(|(n, weight)| term(n, weight, number("label_smoothing")))
            .collect(),
        beta: number("beta").unwrap_or(d.beta),
        divergence: match settings.get("f_divergence_type").and_then(Value::as_str) {
            None => Divergence::ReverseKl,
            Some("forward_kl") => Divergence::ForwardKl,
            Some("js_divergence") => Divergence::JensenShannon,
            Some(_) => Divergence::Alpha {
                alpha: number("f_alpha_divergence_coef").unwrap(),
            },
        },
        wpo: settings
            .get("use_weighting")
            .and_then(Value::as_bool)
            .unwrap_or(false),
        ld_alpha: number("ld_alpha"),
        ..d
    }
}

/// Returns a term with smoothing only for losses that TRL smooths, which are fewer than here.
fn term(name: &str, weight: f64, smoothing: Option<f64>) -> WeightedLoss {
    let label_smoothing =
        smoothing.filter(|_| ["exo_pair", "robust", "aot", "aot_unpaired"].contains(&name));
    WeightedLoss {
        loss: LossType::parse(name).unwrap(),
        weight,
        label_smoothing,
    }
}

#[test]
fn every_loss_has_trls_value_gradient_norm_and_metrics() {
    let golden = json("losses.json");
    let ((model, tokenizer), (reference, _)) = (tiny("llama"), tiny("llama-ref"));
    let pairs = encode(&rows("pairs.jsonl")[..4], &tokenizer, 256);
    // TRL's DPOTrainer lacks these; the next test compares them with their formulas.
    let mut compared = vec![LossType::Simpo, LossType::Orpo];
    for case in golden["cases"].as_array().unwrap() {
        let what = case["settings"].to_string();
        let dpo = config(&case["settings"]);
        compared.extend(dpo.losses.iter().map(|term| term.loss));
        let spec = TrainingSpec {
            method: Method::Full,
            optimizer: OptimizerConfig {
                learning_rate: 1e-9,
                schedule: ScheduleKind::Constant,
                ..Default::default()
            },
            batch: BatchConfig {
                batch_size: 4,
                max_steps: Some(1),
                shuffle: false,
                max_length: 256,
                ..Default::default()
            },
            dpo: dpo.clone(),
            ..Default::default()
        };
        let steps = train(Run::full(&model, &reference, pairs.clone(), spec));
        let got = &steps[0];
        assert_close(
            &format!("{what} loss"),
            got["loss"],
            case["loss"].as_f64().unwrap(),
            2e-5,
            1e-2,
        );
        assert_close(
            &format!("{what} grad_norm"),
            got["grad_norm"],
            case["grad_norm"].as_f64().unwrap(),
            2e-4,
            1e-3,
        );
        for (name, want) in case["metrics"].as_object().unwrap() {
            // TRL's rewards and logps are those of the LD-weighted sums. Ours are those of the
            // plain sums, which are also the served scores.
            if dpo.ld_alpha.is_some()
                && (name.starts_with("rewards/") || name.starts_with("logps/"))
            {
                continue;
            }
            assert_close(
                &format!("{what} {name}"),
                got[name.as_str()],
                want.as_f64().unwrap(),
                1e-4,
                1e-2,
            );
        }
    }
    for loss in LossType::ALL {
        assert!(
            compared.contains(&loss),
            "tests/goldens/losses.json has no case of {}",
            loss.name()
        );
    }
}

#[test]
fn losses_that_trl_lacks_follow_their_formulas() {
    let floats = |v: &Value| -> Vec<f32> {
        crate::support::numbers(v)
            .into_iter()
            .map(|x| x as f32)
            .collect()
    };
    for case in json("formulas.json").as_array().unwrap() {
        let (name, number) = (case["name"].as_str().unwrap(), |k: &str| {
            case[k].as_f64().unwrap()
        });
        let loss = match name {
            "simpo" => LossType::Simpo,
            "orpo" => LossType::Orpo,
            _ => LossType::Sigmoid,
        };
        let mut config = DpoConfig {
            losses: vec![WeightedLoss::new(loss, 1.0)],
            beta: number("beta"),
            ..DpoConfig::default()
        };
        match name {
            "cdpo" => config.label_smoothing = number("label_smoothing"),
            "dpop" => config.dpop_lambda = number("dpop_lambda"),
            "rpo" => config.rpo_alpha = Some(number("rpo_alpha")),
            "simpo" => config.simpo_gamma = number("simpo_gamma"),
            "orpo" => config.orpo_lambda = number("orpo_lambda"),
            _ => config.reference_free = true,
        }
        let pairs: Vec<[Vec<f32>; 6]> = case["pairs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| ["w", "l", "rw", "rl", "gw", "gl"].map(|k| floats(&p[k])))
            .collect();
        let inputs: Vec<PairLogps> = pairs
            .iter()
            .map(|[w, l, rw, rl, ..]| PairLogps {
                policy_chosen: w,
                policy_rejected: l,
                reference: Some(ReferenceLogps::Tokens(rw, rl)),
                weight: 1.0,
                wpo: None,
            })
            .collect();
        let got = batch_loss(&config, &inputs, 1.0);
        assert_close(name, got.loss, number("loss"), 1e-12, 1.0);
        for (i, [.., gw, gl]) in pairs.iter().enumerate() {
            for (g, w) in got.grad_chosen[i]
                .iter()
                .chain(&got.grad_rejected[i])
                .zip(gw.iter().chain(gl))
            {
                assert_close(
                    &format!("{name} gradient"),
                    *g as f64,
                    *w as f64,
                    1e-6,
                    1e-3,
                );
            }
        }
    }
}
