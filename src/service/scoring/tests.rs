//! Tests that answers and their errors are returned in the order of the request.

use super::*;

fn scored(reward: f64) -> ScoredCompletion {
    ScoredCompletion {
        policy_logprob: reward,
        reference_logprob: 0.0,
        reward,
        tokens: 1,
        token_ids: vec![1],
        prompt_tokens: 1,
        truncated: false,
        policy_token_logprobs: vec![reward as f32],
        reference_token_logprobs: Vec::new(),
    }
}

#[test]
fn answers_with_errors_keep_their_places_and_are_not_ranked() {
    let bad = |i: usize| {
        Some(ServiceError::invalid(
            format!("completions[{i}]"),
            "is empty",
        ))
    };
    let ranked = ranked(
        vec![bad(0), None, bad(2), None, None],
        vec![scored(-1.0), scored(2.0), scored(0.5)],
    );
    assert_eq!(ranked.ranking, [3, 4, 1]);
    let rewards: Vec<Option<f64>> = ranked
        .answers
        .iter()
        .map(|a| a.score.as_ref().ok().map(|s| s.reward))
        .collect();
    assert_eq!(rewards, [None, Some(-1.0), None, Some(2.0), Some(0.5)]);
    let chances: Vec<f64> = ranked.answers.iter().map(|a| a.probability).collect();
    assert_eq!((chances[0], chances[2]), (0.0, 0.0));
    assert!(
        (chances.iter().sum::<f64>() - 1.0).abs() < 1e-12
            && chances[3] > chances[4]
            && chances[4] > chances[1],
        "{chances:?}"
    );
}

#[test]
fn answers_without_any_score_have_their_errors() {
    let ranked = ranked(
        vec![Some(ServiceError::invalid("completions[0]", "is empty"))],
        Vec::new(),
    );
    assert!(ranked.ranking.is_empty());
    assert!(
        matches!(
            &ranked.answers[0].score,
            Err(ServiceError::InvalidArgument(_))
        ) && ranked.answers[0].probability == 0.0
    );
}
