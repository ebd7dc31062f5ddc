//! docs/how-it-works.md. A model of 16 tokens is small enough to enumerate all of its answers. So
//! for any explicit reward the best policy π* ∝ π_ref·exp(r/β) can be computed by brute force and
//! written into the weights of a model, and the probabilities that a server computes from these
//! weights are compared with Bradley–Terry on the reward.

use std::collections::HashMap;
use std::path::Path;

use bradley::domain::dpo::Normalization;
use bradley::math::score::{AnswerLogps, preference_probability, reward};
use bradley::rpc::client::Client;
use bradley::rpc::pb;
use candle_core::{Device, Tensor};
use serde_json::json;

use crate::pages::{read, table};
use crate::server::{Server, scored};

/// Largest difference between a served number and one computed from the explicit reward.
const TOLERANCE: f64 = 1e-6;

/// Size of the vocabulary, and of the model's hidden state.
const TOKENS: usize = 16;
const EOS: usize = 0;
/// Token of the prompt, `x`. It is also the root of the tree of answers.
const PROMPT: usize = 1;
/// Number of answers. Each is a node of a binary tree of depth 3: the answer is the path to it,
/// then EOS. The tokens of the nodes are 2 to 15, so that the last token of a text is its node.
const ANSWERS: usize = 14;
/// Logit of a token that cannot follow: its probability is about 1e-22.
const IMPOSSIBLE: f64 = -50.0;

/// Returns the token of an answer's node.
fn node(answer: usize) -> usize {
    answer + 2
}

/// Returns the two children of a node, or none below depth 3.
fn children(node: usize) -> Option<[usize; 2]> {
    let first = 2 * node;
    (first + 1 < TOKENS).then_some([first, first + 1])
}

fn letter(node: usize) -> char {
    match node {
        PROMPT => 'x',
        node => (b'a' + (node - 2) as u8) as char,
    }
}

/// Returns the text of an answer: the letters of the path to its node.
fn text(answer: usize) -> String {
    let mut path = Vec::new();
    let mut at = node(answer);
    while at != PROMPT {
        path.push(letter(at));
        at /= 2;
    }
    path.iter().rev().collect()
}

/// Returns a distribution over the answers without any symmetry.
fn reference() -> Vec<f64> {
    let weights: Vec<f64> = (0..ANSWERS).map(|i| 1.0 + (i * 7 % 5) as f64).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

/// Returns an explicit reward of each answer, between −0.4 and 0.4.
fn rewards() -> Vec<f64> {
    (0..ANSWERS)
        .map(|i| 0.4 * (1.7 * i as f64 + 0.3).sin())
        .collect()
}

/// Returns Z(x) = Σ_y π_ref(y|x)·exp(r(x, y)/β), by brute force.
fn partition(beta: f64) -> f64 {
    let terms = reference().into_iter().zip(rewards());
    terms.map(|(p, r)| p * (r / beta).exp()).sum()
}

/// Returns π*(y|x) = π_ref(y|x)·exp(r(x, y)/β)/Z(x).
fn optimum(beta: f64) -> Vec<f64> {
    let z = partition(beta);
    let terms = reference().into_iter().zip(rewards());
    terms.map(|(p, r)| p * (r / beta).exp() / z).collect()
}

/// Returns E_π[r] − β·KL(π ‖ π_ref), the objective of RLHF.
fn objective(policy: &[f64], beta: f64) -> f64 {
    let terms = policy.iter().zip(reference()).zip(rewards());
    terms.map(|((p, q), r)| p * (r - beta * (p / q).ln())).sum()
}

/// Returns log P(next token | last token) of the language model with these probabilities of whole
/// answers, as `[last][next]`.
fn transitions(answers: &[f64]) -> Vec<Vec<f64>> {
    // The probability that an answer's path leads through a node.
    let mut through = [0.0; TOKENS];
    for at in (PROMPT..TOKENS).rev() {
        let below: f64 = children(at)
            .into_iter()
            .flatten()
            .map(|child| through[child])
            .sum();
        let ends_here = if at == PROMPT { 0.0 } else { answers[at - 2] };
        through[at] = below + ends_here;
    }
    let mut table = vec![vec![IMPOSSIBLE; TOKENS]; TOKENS];
    for at in PROMPT..TOKENS {
        for child in children(at).into_iter().flatten() {
            table[at][child] = (through[child] / through[at]).ln();
        }
        if at != PROMPT {
            table[at][EOS] = (answers[at - 2] / through[at]).ln();
        }
    }
    table
}

/// Writes a Llama whose next token depends on the last one only. Attention and MLP add nothing, and
/// the embedding of a token is 1024 times a unit vector, which the last norm turns into 4 times
/// that vector. So the column of the token in the head, times 4, has the logits.
fn write_model(folder: &Path, answers: &[f64]) {
    std::fs::create_dir(folder).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": TOKENS,
        "intermediate_size": TOKENS,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": false,
        "vocab_size": TOKENS,
        "bos_token_id": null,
        "eos_token_id": EOS,
        "dtype": "float32",
    });
    let mut vocabulary = serde_json::Map::new();
    vocabulary.insert("</s>".into(), EOS.into());
    for token in PROMPT..TOKENS {
        vocabulary.insert(letter(token).into(), token.into());
    }
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": EOS, "content": "</s>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": vocabulary, "merges": [],
        },
    });
    let tokenizer_config = json!({"eos_token": "</s>", "tokenizer_class": "TokenizersBackend"});
    for (name, content) in [
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
    ] {
        std::fs::write(folder.join(name), content.to_string()).unwrap();
    }

    let mut embedding = vec![0f32; TOKENS * TOKENS];
    let mut head = vec![0f32; TOKENS * TOKENS];
    for (last, logits) in transitions(answers).iter().enumerate() {
        embedding[last * TOKENS + last] = 1024.0;
        for (next, logit) in logits.iter().enumerate() {
            head[next * TOKENS + last] = (logit / 4.0) as f32;
        }
    }
    let square =
        |values: Vec<f32>| Tensor::from_vec(values, (TOKENS, TOKENS), &Device::Cpu).unwrap();
    let ones = || Tensor::from_vec(vec![1f32; TOKENS], TOKENS, &Device::Cpu).unwrap();
    let block = "model.layers.0";
    let mut tensors = HashMap::from([
        ("model.embed_tokens.weight".to_owned(), square(embedding)),
        ("lm_head.weight".to_owned(), square(head)),
        ("model.norm.weight".to_owned(), ones()),
        (format!("{block}.input_layernorm.weight"), ones()),
        (format!("{block}.post_attention_layernorm.weight"), ones()),
    ]);
    for matrix in [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ] {
        let zeros = square(vec![0.0; TOKENS * TOKENS]);
        tensors.insert(format!("{block}.{matrix}.weight"), zeros);
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

fn plain(text: impl Into<String>) -> Option<pb::Text> {
    Some(pb::Text {
        form: Some(pb::text::Form::Plain(text.into())),
    })
}

fn options(policy: &str, reference: &str, beta: f64) -> Option<pb::ScoringOptions> {
    Some(pb::ScoringOptions {
        policy: policy.into(),
        reference: reference.into(),
        beta: Some(beta),
        ..Default::default()
    })
}

/// Scores every answer against every answer in one call. The results are ordered by the first
/// answer, then by the second.
async fn score_all(client: &Client, policy: &str, beta: f64) -> pb::ScorePairsResponse {
    let pair = |a: usize, b: usize| pb::Pair {
        id: format!("{a}-{b}"),
        prompt: plain(letter(PROMPT)),
        a: plain(text(a)),
        b: plain(text(b)),
        ..Default::default()
    };
    let request = pb::ScorePairsRequest {
        options: options(policy, "models/reference", beta),
        pairs: (0..ANSWERS)
            .flat_map(|a| (0..ANSWERS).map(move |b| pair(a, b)))
            .collect(),
    };
    let answer = client.scoring().score_pairs(request).await.unwrap();
    answer.into_inner()
}

/// Checks that two numbers differ by at most [`TOLERANCE`].
fn assert_equal(what: &str, got: f64, want: f64) {
    assert!((got - want).abs() <= TOLERANCE, "{what}: {got}, not {want}");
}

#[tokio::test(flavor = "multi_thread")]
async fn served_probabilities_of_the_best_policy_are_bradley_terry_on_its_reward() {
    const BETAS: [(f64, &str); 2] = [(0.1, "tenth"), (0.5, "half")];
    let dir = tempfile::tempdir().unwrap();
    write_model(&dir.path().join("reference"), &reference());
    let mut models = format!("reference={}", dir.path().join("reference").display());
    for (beta, name) in BETAS {
        let folder = dir.path().join(name);
        write_model(&folder, &optimum(beta));
        models += &format!(",{name}={}", folder.display());
    }
    let server = Server::start_with(&dir.path().join("data"), &models, &[]);
    let client = server.client().await;

    for (beta, name) in BETAS {
        let served = score_all(&client, &format!("models/{name}"), beta).await;
        let side = |answer: usize| scored(&served.results[answer * ANSWERS]).a.clone().unwrap();
        let probabilities = |logp: &dyn Fn(pb::CompletionScore) -> f64| -> Vec<f64> {
            (0..ANSWERS).map(|i| logp(side(i)).exp()).collect()
        };
        let policy = probabilities(&|s| s.policy_logprob);
        // No further answer exists: these have the probability 1.
        assert_equal("Σ π_θ", policy.iter().sum(), 1.0);
        let of_reference = probabilities(&|s| s.reference_logprob);
        assert_equal("Σ π_ref", of_reference.iter().sum(), 1.0);
        for (i, want) in optimum(beta).into_iter().enumerate() {
            assert_equal(&format!("β {beta}, π of {i}"), policy[i], want);
            assert_equal(
                &format!("β {beta}, π_ref of {i}"),
                of_reference[i],
                reference()[i],
            );
        }

        // Pr(y_a ≻ y_b | x), of every pair.
        let explicit = rewards();
        for (i, result) in served.results.iter().enumerate() {
            let (a, b) = (i / ANSWERS, i % ANSWERS);
            let bradley_terry = 1.0 / (1.0 + (explicit[b] - explicit[a]).exp());
            let what = format!("β {beta}, {} and {}", text(a), text(b));
            assert_equal(&what, scored(result).probability, bradley_terry);
        }
        // One answer's reward is known up to β·log Z(x) only.
        let constant = beta * partition(beta).ln();
        assert!(constant.abs() > 0.01, "Z is 1: it cannot be seen to cancel");
        for (i, r) in explicit.iter().enumerate() {
            let what = format!("β {beta}, r of {i}");
            assert_equal(&what, side(i).reward, r - constant);
        }
        // The served policy is the best one, and its objective is β·log Z(x).
        assert_equal("the objective", objective(&policy, beta), constant);
        let uniform = vec![1.0 / ANSWERS as f64; ANSWERS];
        for other in [reference(), uniform, optimum(0.2), optimum(1.0)] {
            assert!(objective(&other, beta) < constant - 0.001);
        }

        let request = pb::ScoreCompletionsRequest {
            options: options(&format!("models/{name}"), "models/reference", beta),
            prompt: plain(letter(PROMPT)),
            completions: (0..ANSWERS).map(|i| plain(text(i)).unwrap()).collect(),
        };
        let answer = client.scoring().score_completions(request).await.unwrap();
        let sum: f64 = explicit.iter().map(|r| r.exp()).sum();
        for (result, r) in answer.into_inner().results.iter().zip(&explicit) {
            assert_equal("best of all", result.probability, r.exp() / sum);
        }
    }

    let same = score_all(&client, "models/reference", 0.1).await;
    for result in &same.results {
        assert_eq!(scored(result).probability, 0.5);
    }
    assert!(!same.warnings.is_empty());
}

#[test]
fn the_example_on_the_page_is_computed_correctly() {
    let page = read("docs/how-it-works.md");
    let rows = table(&page, "| y | π_ref |");
    assert_eq!(rows.len(), 3, "{rows:?}");
    let number = |i: usize, column: usize| rows[i][column].parse::<f64>().unwrap();
    let weight = |i: usize| number(i, 1) * number(i, 2).exp();
    let z: f64 = (0..3).map(weight).sum();
    assert!(page.contains(&format!("Z = {z:.4}")), "Z is {z:.4}");
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(row[3], format!("{:.4}", weight(i)));
        assert_eq!(row[4], format!("{:.4}", weight(i) / z));
    }
    // The functions that the server calls, on the log-probs of π* and π_ref; β is 1.
    let implicit = |i: usize| {
        let answer = AnswerLogps {
            policy: (weight(i) / z).ln(),
            reference: Some(number(i, 1).ln()),
            tokens: 1,
        };
        reward(1.0, Normalization::Sum, answer)
    };
    for (pair, a, b) in [("no ≻ yes", 1, 0), ("yes ≻ maybe", 0, 2)] {
        let served = preference_probability(implicit(a) - implicit(b));
        let explicit = 1.0 / (1.0 + (number(b, 2) - number(a, 2)).exp());
        assert!((served - explicit).abs() < 1e-12);
        let said = format!("Pr({pair}) = {served:.4}");
        assert!(page.contains(&said), "the page lacks {said}");
    }
}
