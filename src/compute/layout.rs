//! Packed rows: several prompts, each with its completions, laid end to end without padding.
//!
//! ```text
//! tokens    [ prompt 0 | completion 0.0 | completion 0.1 | prompt 1 | completion 1.0 | … ]
//! positions   0 … p−1    p …              p …              0 … q−1    q …
//! ```
//! A completion attends to its own prompt and causally to itself, never to a sibling. The mask is
//! this list of segments, not a T×T tensor.

use std::ops::Range;

/// Consecutive tokens that attend causally to each other and to every token of `prefix`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Indices of its tokens in the packed row.
    pub tokens: Range<usize>,
    /// Indices of the tokens of the prompt that this completion continues; empty for a prompt.
    pub prefix: Range<usize>,
}

/// Segments of a packed row. They define the attention mask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowLayout {
    /// In row order, without gaps between them.
    pub segments: Vec<Segment>,
}

impl RowLayout {
    /// Returns the number of tokens in the row.
    pub fn tokens(&self) -> usize {
        self.segments.last().map_or(0, |s| s.tokens.end)
    }

    /// Appends a prompt and its completions, given their lengths in tokens. Returns the token range
    /// of the prompt and of each completion.
    pub fn push_group(
        &mut self,
        prompt: usize,
        completions: impl IntoIterator<Item = usize>,
    ) -> (Range<usize>, Vec<Range<usize>>) {
        let start = self.tokens();
        let prefix = start..start + prompt;
        self.segments.push(Segment {
            tokens: prefix.clone(),
            prefix: start..start,
        });
        let mut at = prefix.end;
        let mut ranges = Vec::new();
        for n in completions {
            self.segments.push(Segment {
                tokens: at..at + n,
                prefix: prefix.clone(),
            });
            ranges.push(at..at + n);
            at += n;
        }
        (prefix, ranges)
    }

    /// Returns the position of every token for the position embedding. Each completion continues
    /// from the end of its prompt.
    pub fn positions(&self) -> Vec<u32> {
        self.segments
            .iter()
            .flat_map(|s| (0..s.tokens.len()).map(|i| (s.prefix.len() + i) as u32))
            .collect()
    }

    /// Returns for each segment the length in tokens of the longest sequence that it is part of. A
    /// prompt is part of the sequences of its completions, a completion only of its own. Some
    /// rotary embeddings (LongRoPE, `dynamic`) choose their frequencies by this length.
    pub fn sequence_lengths(&self) -> Vec<usize> {
        let own = |s: &Segment| s.prefix.len() + s.tokens.len();
        let mut lengths: Vec<usize> = self.segments.iter().map(own).collect();
        let mut prompt = 0;
        for (i, s) in self.segments.iter().enumerate() {
            if s.prefix.is_empty() {
                prompt = i;
            } else {
                lengths[prompt] = lengths[prompt].max(lengths[i]);
            }
        }
        lengths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_restart_after_their_own_prompt() {
        let mut l = RowLayout::default();
        let (p, c) = l.push_group(3, [2, 1]);
        assert_eq!((p, c), (0..3, vec![3..5, 5..6]));
        l.push_group(1, [2]);
        assert_eq!(l.positions(), [0, 1, 2, 3, 4, 3, 0, 1, 2]);
        assert_eq!(l.sequence_lengths(), [5, 5, 4, 3, 3]);
        assert_eq!(l.tokens(), 9);
    }
}
