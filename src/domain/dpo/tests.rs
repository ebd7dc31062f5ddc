use super::*;

fn mix(losses: &[LossType]) -> DpoConfig {
    DpoConfig {
        losses: losses
            .iter()
            .map(|loss| WeightedLoss::new(*loss, 1.0))
            .collect(),
        ..DpoConfig::default()
    }
}

#[test]
fn an_objective_of_means_has_a_mean_reward_and_any_other_a_sum() {
    use LossType::*;
    use Normalization::{Mean, Sum};
    for (losses, trained, logged) in [
        (&[Ipo][..], Mean, Sum),
        (&[SigmoidNorm], Mean, Sum),
        (&[Simpo], Mean, Mean),
        (&[Orpo], Mean, Mean),
        (&[Ipo, Simpo], Mean, Sum),
        // SFT compares no answers, so the other loss of the mix decides.
        (&[Simpo, Sft], Mean, Mean),
        (&[Ipo, Sft], Mean, Sum),
        (&[Sft], Sum, Sum),
        (&[Sigmoid, Ipo], Sum, Sum),
        (&[Simpo, Hinge], Sum, Sum),
    ] {
        assert_eq!(mix(losses).reward_normalization(), trained, "{losses:?}");
        assert_eq!(mix(losses).logged_normalization(), logged, "{losses:?}");
    }
}

#[test]
fn a_reference_is_there_for_the_loss_for_metrics_or_because_it_is_named() {
    use LossType::*;
    for (losses, unnamed) in [
        (&[Sigmoid][..], true),
        (&[Sft], true),
        (&[Simpo], false),
        (&[Orpo], false),
        (&[Simpo, Sft], false),
        (&[Simpo, Ipo], true),
    ] {
        assert_eq!(mix(losses).has_reference(false), unnamed, "{losses:?}");
        assert!(mix(losses).has_reference(true), "{losses:?}");
        let free = DpoConfig {
            reference_free: true,
            ..mix(losses)
        };
        assert!(
            !free.has_reference(true) && !free.has_reference(false),
            "{losses:?}"
        );
    }
}

#[test]
fn a_loss_is_stored_under_its_name_in_the_api() {
    for loss in LossType::ALL {
        assert_eq!(serde_json::to_value(loss).unwrap(), loss.name());
    }
}

#[test]
fn a_term_without_smoothing_of_its_own_is_stored_as_before() {
    let term = WeightedLoss::new(LossType::Sigmoid, 0.5);
    assert_eq!(
        serde_json::to_string(&term).unwrap(),
        r#"{"loss":"sigmoid","weight":0.5}"#
    );
    assert_eq!(
        serde_json::from_str::<WeightedLoss>(r#"{"loss":"sigmoid","weight":0.5}"#).unwrap(),
        term
    );
}
