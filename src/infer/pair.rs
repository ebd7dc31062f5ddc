//! Tokenised sequences: what the packer, the scorer and the trainer work on.

use crate::math::rng::split;

/// A prompt and the completions that follow it. The prompt is computed once for all of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SequenceGroup {
    /// Prompt token ids; at least one.
    pub prompt: Vec<u32>,
    /// Completion token ids, each with at least one token.
    pub completions: Vec<Vec<u32>>,
}

impl SequenceGroup {
    /// Tokens in the packed row: the prompt once, then every completion.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.completions.iter().map(Vec::len).sum::<usize>()
    }
}

/// A tokenised preference pair.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedPair {
    /// The row it came from, from 1.
    pub row: u64,
    /// The row's own id.
    pub id: Option<String>,
    /// Multiplies the pair's loss.
    pub weight: f64,
    /// x.
    pub prompt: Vec<u32>,
    /// y_w.
    pub chosen: Vec<u32>,
    /// The prompt of `rejected` where truncation at the head made it differ from `prompt`.
    pub rejected_prompt: Option<Vec<u32>>,
    /// y_l.
    pub rejected: Vec<u32>,
    /// Whether max_length cut the chosen side.
    pub chosen_truncated: bool,
    /// Whether max_length cut the rejected side.
    pub rejected_truncated: bool,
}

impl EncodedPair {
    /// The pair as groups: one when the prompt is shared, else two. Chosen comes before rejected
    /// either way.
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
                SequenceGroup { prompt: p.clone(), completions: vec![self.rejected.clone()] },
            ],
        }
    }

    /// Tokens in its packed row.
    pub fn packed_tokens(&self) -> usize {
        self.prompt.len()
            + self.chosen.len()
            + self.rejected_prompt.as_ref().map_or(0, Vec::len)
            + self.rejected.len()
    }

    /// Tokens of prompt + chosen and prompt + rejected counted as two sequences, as TRL's
    /// num_tokens counts them.
    pub fn sequence_tokens(&self) -> usize {
        self.prompt.len()
            + self.chosen.len()
            + self.rejected_prompt.as_ref().unwrap_or(&self.prompt).len()
            + self.rejected.len()
    }
}

/// Returns the BLAKE3 hash, in hex, of everything that a run reads from its pairs: token ids, where
/// prompts and answers begin, and weights, in order.
pub fn digest(train: &[EncodedPair], eval: &[EncodedPair]) -> String {
    let mut hash = blake3::Hasher::new();
    let mut bytes = Vec::new();
    for pairs in [train, eval] {
        hash.update(&(pairs.len() as u64).to_le_bytes());
        for pair in pairs {
            bytes.clear();
            bytes.extend(pair.weight.to_bits().to_le_bytes());
            // A length before each part, so that no two different pairs give the same bytes. A
            // prompt has a token at least: an empty one stands for the prompt that both share.
            let rejected_prompt = pair.rejected_prompt.as_deref().unwrap_or_default();
            for ids in [&pair.prompt[..], &pair.chosen[..], rejected_prompt, &pair.rejected[..]] {
                bytes.extend((ids.len() as u64).to_le_bytes());
                bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
            }
            hash.update(&bytes);
        }
    }
    hash.finalize().to_hex().to_string()
}

/// Splits pairs for training and evaluation, `⌈fraction·rows⌉` rows for the latter, both in order.
/// The pairs of one row follow each other and stay together, so that no prompt is trained on and
/// evaluated because it had several rejected answers.
pub fn split_rows(
    pairs: &[EncodedPair],
    fraction: f64,
    seed: u64,
) -> (Vec<EncodedPair>, Vec<EncodedPair>) {
    let rows: Vec<&[EncodedPair]> = pairs.chunk_by(|a, b| a.row == b.row).collect();
    let (train, eval) = split(rows.len(), fraction, seed);
    let of_rows =
        |chosen: Vec<usize>| chosen.into_iter().flat_map(|row| rows[row]).cloned().collect();
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
            changed(&|pair| pair.prompt = vec![9]),
            changed(&|pair| pair.chosen = vec![9]),
            changed(&|pair| pair.rejected = vec![9]),
            changed(&|pair| pair.rejected_prompt = Some(vec![1])),
            // The same tokens, of which another number is the prompt.
            changed(&|pair| (pair.prompt, pair.chosen) = (vec![1, 2], vec![2])),
            changed(&|pair| (pair.prompt, pair.chosen) = (vec![1], vec![2, 2])),
        ];
        for (i, a) in differing.iter().enumerate() {
            assert!(differing[i + 1..].iter().all(|b| a != b), "{i}");
        }
        // What only names a pair does not count.
        assert_eq!(changed(&|pair| (pair.row, pair.id) = (7, Some("x".into()))), differing[0]);
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
            assert_eq!((numbers(&train), numbers(&eval)), (expected(kept), expected(held_out)));
        }
    }

    #[test]
    fn the_pairs_of_a_row_fall_on_one_side() {
        let rows: Vec<u64> = (1..=20).flat_map(|row| vec![row; 1 + row as usize % 4]).collect();
        for seed in 0..20 {
            let (train, eval) = split_rows(&pairs(&rows), 0.25, seed);
            let (train, eval) = (numbers(&train), numbers(&eval));
            assert!(eval.iter().all(|row| !train.contains(row)), "{train:?} {eval:?}");
            let mut held_out = eval.clone();
            held_out.dedup();
            assert_eq!(held_out.len(), 5);
            let mut all = [train, eval].concat();
            all.sort_unstable();
            assert_eq!(all, rows);
        }
    }
}
