//! Packs sequence groups into rows without padding: `[prompt | completion | completion | …]`, several groups to a row.

use std::ops::Range;
use std::sync::Arc;

use super::pair::{EncodedPair, SequenceGroup};
use crate::model::decoder::Row;
use crate::model::layout::RowLayout;

/// A row and where each completion's log-probs are among its targets.
#[derive(Clone, Debug)]
pub struct PackedRow {
    /// The row.
    pub row: Arc<Row>,
    /// Per completion, in the order of the groups: its range in `row.targets`.
    pub completions: Vec<Range<usize>>,
}

/// Packs groups into one row. The last prompt token predicts the first token of every completion.
pub fn pack<'a>(groups: impl IntoIterator<Item = &'a SequenceGroup>) -> PackedRow {
    let mut layout = RowLayout::default();
    let (mut ids, mut predictors, mut targets, mut completions) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for group in groups {
        let (prompt, ranges) = layout.push_group(group.prompt.len(), group.completions.iter().map(Vec::len));
        ids.extend_from_slice(&group.prompt);
        for (completion, range) in group.completions.iter().zip(ranges) {
            ids.extend_from_slice(completion);
            predictors.push(prompt.end as u32 - 1);
            predictors.extend(range.start as u32..range.end as u32 - 1);
            completions.push(targets.len()..targets.len() + completion.len());
            targets.extend_from_slice(completion);
        }
    }
    PackedRow { row: Arc::new(Row { ids, layout: Arc::new(layout), predictors, targets: Arc::new(targets) }), completions }
}

/// Pairs of a micro-batch that share a row: completions `2i` and `2i + 1` are the chosen and rejected side of pair `pairs.start + i`.
#[derive(Clone, Debug)]
pub struct PairRow {
    /// Which pairs of the micro-batch.
    pub pairs: Range<usize>,
    /// The row.
    pub packed: PackedRow,
}

/// Cuts a micro-batch into rows of at most `row_tokens` tokens (a longer pair gets a row of its own), keeping the order.
pub fn pack_pairs(pairs: &[&EncodedPair], row_tokens: usize) -> Vec<PairRow> {
    let mut rows = Vec::new();
    let (mut start, mut tokens) = (0, 0);
    let mut close = |range: Range<usize>| {
        if !range.is_empty() {
            let groups: Vec<SequenceGroup> = pairs[range.clone()].iter().flat_map(|p| p.groups()).collect();
            rows.push(PairRow { pairs: range, packed: pack(&groups) });
        }
    };
    for (i, pair) in pairs.iter().enumerate() {
        let n = pair.packed_tokens();
        if tokens > 0 && tokens + n > row_tokens {
            close(start..i);
            (start, tokens) = (i, 0);
        }
        tokens += n;
    }
    close(start..pairs.len());
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(prompt: usize, chosen: usize, rejected: usize) -> EncodedPair {
        EncodedPair {
            row: 1,
            id: None,
            weight: 1.0,
            prompt: vec![1; prompt],
            chosen: vec![2; chosen],
            rejected_prompt: None,
            rejected: vec![3; rejected],
            chosen_truncated: false,
            rejected_truncated: false,
        }
    }

    #[test]
    fn the_last_prompt_token_predicts_both_first_tokens() {
        let packed = pack(&pair(3, 2, 1).groups());
        assert_eq!(packed.row.ids, [1, 1, 1, 2, 2, 3]);
        assert_eq!(packed.row.predictors, [2, 3, 2]);
        assert_eq!(*packed.row.targets, [2, 2, 3]);
        assert_eq!(packed.completions, [0..2, 2..3]);
    }

    #[test]
    fn rows_keep_the_order_and_the_limit_and_lose_no_pair() {
        let pairs = [pair(3, 2, 1), pair(1, 1, 1), pair(20, 5, 5), pair(1, 1, 1), pair(2, 2, 2)];
        let rows = pack_pairs(&pairs.iter().collect::<Vec<_>>(), 10);
        assert_eq!(rows.iter().map(|r| r.pairs.clone()).collect::<Vec<_>>(), [0..2, 2..3, 3..5]);
        assert!(rows.iter().all(|r| r.packed.completions.len() == 2 * r.pairs.len()));
    }
}
