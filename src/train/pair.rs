//! Tokenised sequences: what the packer, the scorer and the trainer work on.

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
    /// The pair as groups: one when the prompt is shared, else two. Chosen comes before rejected either way.
    pub fn groups(&self) -> Vec<SequenceGroup> {
        match &self.rejected_prompt {
            None => vec![SequenceGroup { prompt: self.prompt.clone(), completions: vec![self.chosen.clone(), self.rejected.clone()] }],
            Some(p) => vec![
                SequenceGroup { prompt: self.prompt.clone(), completions: vec![self.chosen.clone()] },
                SequenceGroup { prompt: p.clone(), completions: vec![self.rejected.clone()] },
            ],
        }
    }

    /// Tokens in its packed row.
    pub fn packed_tokens(&self) -> usize {
        self.prompt.len() + self.chosen.len() + self.rejected_prompt.as_ref().map_or(0, Vec::len) + self.rejected.len()
    }

    /// Tokens of prompt + chosen and prompt + rejected counted as two sequences, as TRL's num_tokens counts them.
    pub fn sequence_tokens(&self) -> usize {
        self.prompt.len() + self.chosen.len() + self.rejected_prompt.as_ref().unwrap_or(&self.prompt).len() + self.rejected.len()
    }
}
