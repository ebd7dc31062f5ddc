//! Tokenised sequences, the input of the packer, the scorer and the trainer.

use crate::math::rng::split;

/// A prompt and its completions. A pass computes the prompt once for all completions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SequenceGroup {
    /// Prompt token ids; at least one.
    pub prompt: Vec<u32>,
    /// Completion token ids, each with at least one token.
    pub completions: Vec<Vec<u32>>,
}

impl SequenceGroup {
    /// Returns the number of tokens in the packed row: the prompt once, then every completion.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.completions.iter().map(Vec::len).sum::<usize>()
    }
}

/// A tokenised preference pair.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedPair {
    /// Number of the row in the dataset, counted from 1.
    pub row: u64,
    /// The row's own id, if it has one.
    pub id: Option<String>,
    /// Factor on the pair's loss.
    pub weight: f64,
    /// Prompt x, as token ids.
    pub prompt: Vec<u32>,
    /// Chosen answer y_w, as token ids.
    pub chosen: Vec<u32>,
    /// The prompt of `rejected`, if truncation at the start made it differ from `prompt`.
    pub rejected_prompt: Option<Vec<u32>>,
    /// Rejected answer y_l, as token ids.
    pub rejected: Vec<u32>,
    /// True if prompt + chosen was truncated to `max_length`.
    pub chosen_truncated: bool,
    /// True if prompt + rejected was truncated to `max_length`.
    pub rejected_truncated: bool,
    /// Σ log π_ref of chosen and rejected as the row has them; only in runs that use them.
    pub logged: Option<[f64; 2]>,
}

impl EncodedPair {
    /// Returns the pair as groups: one if the prompt is shared, otherwise two. Chosen always comes
    /// before rejected.
    pub fn groups(&self) -> Vec<SequenceGroup> {
        match &self.rejected_prompt {
            None => vec![SequenceGroup {
                prompt: self.prompt.clone(),
                completions: vec![self.chosen.clone(), self.rejected.clone()],
            }],
            Some(p) => vec![
                SequenceGroup {
                    prompt: self.prompt.clone(),
                    completions: vec![self.chosen.clone()],
                },
                SequenceGroup {
                    prompt: p.clone(),
                    completions: vec![self.rejected.clone()],
                },
            ],
        }
    }

    /// Returns the number of tokens in the pair's packed row.
    pub fn packed_tokens(&self) -> usize {
        self.prompt.len()
            + self.chosen.len()
            + self.rejected_prompt.as_ref().map_or(0, Vec::len)
            + self.rejected.len()
    }

    /// Returns the number of tokens in the pair's packed row, for a model whose frequencies depend
    /// on the length of a sequence. The row stores a shared prompt twice if its two sequences have
    /// different frequencies.
    pub fn packed_tokens_by_length(&self, class: &dyn Fn(usize) -> usize) -> usize {
        let of = |answer: &[u32]| class(self.prompt.len() + answer.len());
        let is_split = self.rejected_prompt.is_none() && of(&self.chosen) != of(&self.rejected);
        self.packed_tokens() + if is_split { self.prompt.len() } else { 0 }
    }

    /// Returns the number of tokens of prompt + chosen and prompt + rejected as two sequences, as
    /// in TRL's `num_tokens`.
    pub fn sequence_tokens(&self) -> usize {
        self.prompt.len()
            + self.chosen.len()
            + self.rejected_prompt.as_ref().unwrap_or(&self.prompt).len()
            + self.rejected.len()
    }
}

/// Returns the BLAKE3 hash, in hex, of everything that a run reads from its pairs: token ids, the
/// boundaries between prompts and answers, weights, and logged log-probs, in order.
pub fn digest(train: &[EncodedPair], eval: &[EncodedPair]) -> String {
    let mut hash = blake3::Hasher::new();
    let mut bytes = Vec::new();
    for pairs in [train, eval] {
        hash.update(&(pairs.len() as u64).to_le_bytes());
        for pair in pairs {
            bytes.clear();
            bytes.extend(pair.weight.to_bits().to_le_bytes());
            // A length precedes each part, so that different pairs never give the same bytes. A
            // prompt has at least one token, so an empty one can stand for the shared prompt.
            let rejected_prompt = pair.rejected_prompt.as_deref().unwrap_or_default();
            for ids in [
                &pair.prompt[..],
                &pair.chosen[..],
                rejected_prompt,
                &pair.rejected[..],
            ] {
                bytes.extend((ids.len() as u64).to_le_bytes());
                bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
            }
            if let Some(sums) = pair.logged {
                bytes.extend(b"logged");
                bytes.extend(sums.iter().flat_map(|sum| sum.to_bits().to_le_bytes()));
            }
            hash.update(&bytes);
        }
    }
    hash.finalize().to_hex().to_string()
}

/// Splits pairs by their rows into a training and an evaluation set, with [`split`]. Both sets are
/// in the order of `pairs`. The pairs of one row, which are adjacent, always go to the same set.
/// Otherwise a prompt with several rejected answers could be in both sets.
pub fn split_rows(
    pairs: &[EncodedPair],
    fraction: f64,
    seed: u64,
) -> (Vec<EncodedPair>, Vec<EncodedPair>) {
    let rows: Vec<&[EncodedPair]> = pairs.chunk_by(|a, b| a.row == b.row).collect();
    let (train, eval) = split(rows.len(), fraction, seed);
    let of_rows = |indices: Vec<usize>| {
        indices
            .into_iter()
            .flat_map(|row| rows[row])
            .cloned()
            .collect()
    };
    (of_rows(train), of_rows(eval))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(rows: &[u64]) -> Vec<EncodedPair> {
        let pair = |row: &u64| EncodedPair {
            row: *row,
            id: None,
            weight: 1.0,
            prompt: vec![1],
            chosen: vec![2],
            rejected_prompt: None,
            rejected: vec![3],
            chosen_truncated: false,
            rejected_truncated: false,
            logged: None,
        };
        rows.iter().map(pair).collect()
    }

    fn numbers(pairs: &[EncodedPair]) -> Vec<u64> {
        pairs.iter().map(|pair| pair.row).collect()
    }

    #[test]
    fn a_digest_tells_pairs_with_other_tokens_places_or_weights_apart() {
        let all = pairs(&[1, 2]);
        let changed = |change: &dyn Fn(&mut EncodedPair)| {
            let mut all = all.clone();
            change(&mut all[1]);
            digest(&all, &[])
        };
        let differing = [
            digest(&all, &[]),
            digest(&all[..1], &[]),
            digest(&all[..1], &all[1..]),
            digest(&[], &all),
            changed(&|pair| pair.weight = 0.5),
            changed(&|pair| pair.logged = Some([-1.0, -2.0])),
            changed(&|pair| pair.logged = Some([-2.0, -1.0])),
            changed(&|pair| pair.prompt = vec![9]),
            changed(&|pair| pair.chosen = vec![9]),
            changed(&|pair| pair.rejected = vec![9]),
            changed(&|pair| pair.rejected_prompt = Some(vec![1])),
            // The same tokens, split differently into prompt and answer.
            changed(&|pair| (pair.prompt, pair.chosen) = (vec![1, 2], vec![2])),
            changed(&|pair| (pair.prompt, pair.chosen) = (vec![1], vec![2, 2])),
        ];
        for (i, a) in differing.iter().enumerate() {
            assert!(differing[i + 1..].iter().all(|b| a != b), "{i}");
        }
        // Row number and id only name a pair and do not affect the digest.
        assert_eq!(
            changed(&|pair| (pair.row, pair.id) = (7, Some("x".into()))),
            differing[0]
        );
        let mut swapped = all.clone();
        swapped[0].weight = 2.0;
        let in_order = digest(&swapped, &[]);
        swapped.reverse();
        assert_ne!(digest(&swapped, &[]), in_order);
    }

    #[test]
    fn rows_of_one_pair_are_split_as_pairs_always_were() {
        let rows: Vec<u64> = (10..60).collect();
        for seed in 0..20 {
            let (train, eval) = split_rows(&pairs(&rows), 0.3, seed);
            let (kept, held_out) = split(rows.len(), 0.3, seed);
            let expected =
                |indices: Vec<usize>| indices.into_iter().map(|i| rows[i]).collect::<Vec<_>>();
            assert_eq!(
                (numbers(&train), numbers(&eval)),
                (expected(kept), expected(held_out))
            );
        }
    }

    #[test]
    fn the_pairs_of_a_row_fall_on_one_side() {
        let rows: Vec<u64> = (1..=20)
            .flat_map(|row| vec![row; 1 + row as usize % 4])
            .collect();
        for seed in 0..20 {
            let (train, eval) = split_rows(&pairs(&rows), 0.25, seed);
            let (train, eval) = (numbers(&train), numbers(&eval));
            assert!(
                eval.iter().all(|row| !train.contains(row)),
                "{train:?} {eval:?}"
            );
            let mut held_out = eval.clone();
            held_out.dedup();
            assert_eq!(held_out.len(), 5);
            let mut all = [train, eval].concat();
            all.sort_unstable();
            assert_eq!(all, rows);
        }
    }
}
