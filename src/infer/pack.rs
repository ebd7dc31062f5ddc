//! Packs items (pairs, or answers to one prompt) into rows without padding. Items of the same owner
//! share prompts: a row stores a prompt once for all of them. If a model has other rotary
//! frequencies for long sequences, a row stores the prompt once for each set of frequencies.
//!
//! Tokens attend only to their own prompt and completion, so an item's results do not depend on its
//! position or on the other items. On the CPU this holds bit for bit, because the kernels compute
//! every token in the same order of operations. On a GPU the last bits may differ, because cuBLAS
//! chooses its kernels by the shape of the whole row.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use super::pair::SequenceGroup;
use crate::compute::layout::RowLayout;
use crate::model::row::Row;

/// An item with the index of its owner, e.g. a policy. Only items of the same owner share prompts,
/// and the items of an owner are adjacent in a row.
pub type Owned<'a> = (usize, &'a [SequenceGroup]);

/// Maps the length of a sequence to a number that is the same for lengths with the same rotary
/// frequencies: [`crate::model::spec::ModelSpec::length_class`].
pub type LengthClass<'a> = &'a dyn Fn(usize) -> usize;

/// A packed row with the ranges of its items' completions.
#[derive(Clone, Debug)]
pub struct PackedRow {
    /// The row that a pass takes.
    pub row: Arc<Row>,
    /// Indices of the items in the row.
    pub items: Vec<usize>,
    /// Token ranges of the row, each with its owner.
    pub owners: Vec<(Range<usize>, usize)>,
    /// For each item and each completion, in the order of its groups: the range in `row.targets`.
    pub completions: Vec<Vec<Range<usize>>>,
}

/// Packs all items into one row, for a model whose frequencies do not depend on the length.
pub fn pack(items: &[&[SequenceGroup]]) -> PackedRow {
    pack_by_length(items, &|_| 0)
}

/// Packs all items into one row.
pub fn pack_by_length(items: &[&[SequenceGroup]], class: LengthClass) -> PackedRow {
    pack_items(&with_one_owner(items), (0..items.len()).collect(), class)
}

/// Returns the number of tokens of a row with one item.
pub fn row_tokens(groups: &[SequenceGroup], class: LengthClass) -> usize {
    added_tokens(&[(0, groups)], &[], 0, class)
}

fn with_one_owner<'a>(items: &[&'a [SequenceGroup]]) -> Vec<Owned<'a>> {
    items.iter().map(|groups| (0, *groups)).collect()
}

/// Packs items into rows of at most `row_tokens` tokens and of about equal size. An item that is
/// longer gets a row of its own. Items with the same prompt are placed next to each other.
pub fn pack_rows(
    items: &[&[SequenceGroup]],
    row_tokens: usize,
    class: LengthClass,
) -> Vec<PackedRow> {
    pack_owned_rows(&with_one_owner(items), row_tokens, class)
}

/// Packs items like [`pack_rows`], for `devices` devices that each take every `devices`-th row. The
/// aim is a number of rows that is a multiple of `devices`, so that no device is idle. It is missed
/// if there are too few items, or if their sizes do not fill the rows well.
pub fn pack_rows_for_devices(
    items: &[&[SequenceGroup]],
    row_tokens: usize,
    devices: usize,
    class: LengthClass,
) -> Vec<PackedRow> {
    pack_into_multiple(&with_one_owner(items), row_tokens, devices, class)
}

/// Packs items of several owners like [`pack_rows`].
pub fn pack_owned_rows(items: &[Owned], row_tokens: usize, class: LengthClass) -> Vec<PackedRow> {
    pack_into_multiple(items, row_tokens, 1, class)
}

/// Packs items into rows, the number of which should be a multiple of `multiple`.
fn pack_into_multiple(
    items: &[Owned],
    row_tokens: usize,
    multiple: usize,
    class: LengthClass,
) -> Vec<PackedRow> {
    let order = order_by_prompt(items);
    let mut tokens_left = sizes(items, &order, class).iter().sum::<usize>();
    let needed = tokens_left.div_ceil(row_tokens).max(1);
    let mut rows_left = needed
        .next_multiple_of(multiple)
        .min(items.len().max(needed));
    let mut rows = Vec::new();
    let (mut members, mut tokens): (Vec<usize>, usize) = (Vec::new(), 0);
    for &i in &order {
        let n = added_tokens(items, &members, i, class);
        // End the row where its size is closest to an equal share of the remaining tokens.
        let share = tokens_left.div_ceil(rows_left);
        let over = tokens + n > row_tokens
            || (rows_left > 1
                && tokens + n > share
                && tokens + n - share > share.saturating_sub(tokens));
        if !members.is_empty() && over {
            rows.push(pack_items(items, std::mem::take(&mut members), class));
            tokens_left = tokens_left.saturating_sub(tokens);
            rows_left = rows_left
                .saturating_sub(1)
                .max(tokens_left.div_ceil(row_tokens))
                .max(1);
            tokens = 0;
        }
        tokens += added_tokens(items, &members, i, class);
        members.push(i);
    }
    if !members.is_empty() {
        rows.push(pack_items(items, members, class));
    }
    rows
}

/// Returns the items' indices, sorted by owner. Items with the same first prompt are adjacent, in
/// the order in which the prompts first appear.
fn order_by_prompt(items: &[Owned]) -> Vec<usize> {
    let mut first: HashMap<(usize, &[u32]), usize> = HashMap::new();
    let mut keyed: Vec<(usize, usize, usize)> = Vec::with_capacity(items.len());
    for (i, (owner, groups)) in items.iter().enumerate() {
        let prompt = groups.first().map_or(&[][..], |g| g.prompt.as_slice());
        keyed.push((*owner, *first.entry((*owner, prompt)).or_insert(i), i));
    }
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, _, i)| i).collect()
}

/// Returns the number of tokens that each item adds after its predecessor in `order`.
fn sizes(items: &[Owned], order: &[usize], class: LengthClass) -> Vec<usize> {
    order
        .iter()
        .enumerate()
        .map(|(k, &i)| added_tokens(items, &order[k.saturating_sub(1)..k], i, class))
        .collect()
}

/// Returns the distinct classes of the lengths of a group's sequences. A group without completions
/// has the class of its prompt.
fn classes(group: &SequenceGroup, class: LengthClass) -> BTreeSet<usize> {
    let prompt = group.prompt.len();
    let mut found: BTreeSet<usize> = group
        .completions
        .iter()
        .map(|completion| class(prompt + completion.len()))
        .collect();
    if found.is_empty() {
        found.insert(class(prompt));
    }
    found
}

/// Returns the number of tokens that item `i` adds to a row of `members`. Prompts that the last
/// member also has are not counted, because they are stored once.
fn added_tokens(items: &[Owned], members: &[usize], i: usize, class: LengthClass) -> usize {
    let (owner, groups) = items[i];
    let last = members
        .last()
        .map(|m| items[*m])
        .filter(|(other, _)| *other == owner)
        .map_or(&[][..], |(_, groups)| groups);
    groups
        .iter()
        .map(|g| {
            let mut needed = classes(g, class);
            for l in last.iter().filter(|l| l.prompt == g.prompt) {
                classes(l, class).iter().for_each(|known| {
                    needed.remove(known);
                });
            }
            g.tokens() - g.prompt.len() + needed.len() * g.prompt.len()
        })
        .sum()
}

/// A completion: index of its item in `members`, its index within the item, its tokens.
type Answer<'a> = (usize, usize, &'a [u32]);

/// Packs the items with the indices `members` into one row, each prompt of an owner once for each
/// class of the lengths of its sequences.
fn pack_items(items: &[Owned], members: Vec<usize>, class: LengthClass) -> PackedRow {
    let mut prompts: Vec<(usize, &[u32], Vec<Answer>)> = Vec::new();
    let mut known: HashMap<(usize, &[u32], usize), usize> = HashMap::new();
    let mut completions: Vec<Vec<Range<usize>>> = Vec::with_capacity(members.len());
    for (m, &i) in members.iter().enumerate() {
        let mut nth = 0;
        let (owner, groups) = items[i];
        for g in groups {
            let mut place = |class| {
                *known.entry((owner, &g.prompt, class)).or_insert_with(|| {
                    prompts.push((owner, &g.prompt, Vec::new()));
                    prompts.len() - 1
                })
            };
            if g.completions.is_empty() {
                place(class(g.prompt.len()));
            }
            let places: Vec<usize> = g
                .completions
                .iter()
                .map(|c| place(class(g.prompt.len() + c.len())))
                .collect();
            for (c, at) in g.completions.iter().zip(places) {
                prompts[at].2.push((m, nth, c));
                nth += 1;
            }
        }
        completions.push(vec![0..0; nth]);
    }
    let mut layout = RowLayout::default();
    let (mut ids, mut predictors, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    let mut owners: Vec<(Range<usize>, usize)> = Vec::new();
    for (owner, prompt, answers) in prompts {
        let start = ids.len();
        let (prefix, ranges) =
            layout.push_group(prompt.len(), answers.iter().map(|(_, _, c)| c.len()));
        ids.extend_from_slice(prompt);
        for ((m, nth, tokens), range) in answers.into_iter().zip(ranges) {
            ids.extend_from_slice(tokens);
            // The last prompt token predicts the first token of every completion.
            predictors.push(prefix.end as u32 - 1);
            predictors.extend(range.start as u32..range.end as u32 - 1);
            completions[m][nth] = targets.len()..targets.len() + tokens.len();
            targets.extend_from_slice(tokens);
        }
        match owners.last_mut().filter(|(_, last)| *last == owner) {
            Some((tokens, _)) => tokens.end = ids.len(),
            None => owners.push((start..ids.len(), owner)),
        }
    }
    PackedRow {
        row: Arc::new(Row {
            ids,
            layout: Arc::new(layout),
            predictors,
            targets: Arc::new(targets),
        }),
        items: members,
        owners,
        completions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(prompt: u32, length: usize, answers: &[usize]) -> Vec<SequenceGroup> {
        vec![SequenceGroup {
            prompt: vec![prompt; length],
            completions: answers.iter().map(|n| vec![90 + *n as u32; *n]).collect(),
        }]
    }

    fn borrowed(items: &[Vec<SequenceGroup>]) -> Vec<&[SequenceGroup]> {
        items.iter().map(Vec::as_slice).collect()
    }

    #[test]
    fn the_last_prompt_token_predicts_every_first_token() {
        let packed = pack(&borrowed(&[item(1, 3, &[2, 1])]));
        assert_eq!(packed.row.ids, [1, 1, 1, 92, 92, 91]);
        assert_eq!(packed.row.predictors, [2, 3, 2]);
        assert_eq!(*packed.row.targets, [92, 92, 91]);
        assert_eq!(packed.completions, [vec![0..2, 2..3]]);
    }

    #[test]
    fn an_item_has_a_prompt_once_for_each_class_of_lengths() {
        let item = item(1, 10, &[5, 50, 60]);
        assert_eq!(row_tokens(&item, &|_| 0), 10 + 115);
        assert_eq!(
            row_tokens(&item, &|length| usize::from(length > 20)),
            2 * 10 + 115
        );
        assert_eq!(row_tokens(&item, &|length| length), 3 * 10 + 115);
    }

    #[test]
    fn items_with_one_prompt_share_it() {
        let items = [
            item(1, 3, &[2, 1]),
            item(2, 2, &[1, 1]),
            item(1, 3, &[1, 4]),
        ];
        let rows = pack_rows(&borrowed(&items), 100, &|_| 0);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].items, [0, 2, 1]);
        assert_eq!(rows[0].row.ids.len(), 3 + 3 + 5 + 2 + 2);
        for (k, &i) in rows[0].items.iter().enumerate() {
            for (range, answer) in rows[0].completions[k].iter().zip(&items[i][0].completions) {
                assert_eq!(&rows[0].row.targets[range.clone()], answer);
            }
        }
    }

    #[test]
    fn every_device_gets_equally_many_rows_if_there_are_enough_items() {
        let sizes = |n: usize, row_tokens: usize, devices: usize| {
            let items: Vec<_> = (0..n).map(|i| item(i as u32, 3, &[2, 1 + i % 3])).collect();
            let rows = pack_rows_for_devices(&borrowed(&items), row_tokens, devices, &|_| 0);
            let mut seen: Vec<usize> = rows.iter().flat_map(|r| r.items.clone()).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..n).collect::<Vec<_>>());
            rows.iter().map(|r| r.row.ids.len()).collect::<Vec<usize>>()
        };
        // A micro-batch that would fit in one row is still distributed over all devices.
        assert_eq!(sizes(8, 1000, 4).len(), 4);
        // Five rows on four devices would leave three devices idle half of the time.
        let eight = sizes(16, 24, 4);
        assert_eq!(eight.len(), 8, "{eight:?}");
        assert!(
            eight.iter().max().unwrap() - eight.iter().min().unwrap() <= 7,
            "{eight:?}"
        );
        // There are never more rows than items.
        assert_eq!(sizes(3, 1000, 4).len(), 3);
        assert_eq!(sizes(8, 1000, 1).len(), 1);
    }

    #[test]
    fn rows_keep_the_limit_are_balanced_and_lose_no_item() {
        let items: Vec<_> = (0..7).map(|i| item(i, 3, &[2, 1])).collect();
        let rows = pack_rows(&borrowed(&items), 20, &|_| 0);
        let mut seen: Vec<usize> = rows.iter().flat_map(|r| r.items.clone()).collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3, 4, 5, 6]);
        let sizes: Vec<usize> = rows.iter().map(|r| r.row.ids.len()).collect();
        assert!(sizes.iter().all(|n| *n <= 20), "{sizes:?}");
        assert_eq!(sizes.len(), 3, "{sizes:?}");
        // The sizes differ by at most one item of 6 tokens. Full rows would have 18, 18 and 6.
        let (longest, shortest) = (sizes.iter().max(), sizes.iter().min());
        assert!(longest.unwrap() - shortest.unwrap() <= 6, "{sizes:?}");
        let long = [item(1, 50, &[5, 5]), item(2, 2, &[1, 1])];
        assert_eq!(pack_rows(&borrowed(&long), 20, &|_| 0).len(), 2);
    }

    #[test]
    fn sequences_with_other_frequencies_have_a_prompt_of_their_own() {
        // Sequences of more than 5 tokens are long.
        let class = |length: usize| usize::from(length > 5);
        let items = [item(1, 3, &[2, 4]), item(1, 3, &[3, 1])];
        let packed = pack_by_length(&borrowed(&items), &class);
        assert_eq!(packed.row.layout.sequence_lengths(), [5, 5, 4, 7, 7, 6]);
        assert_eq!(packed.row.ids[..3], packed.row.ids[6..9]);
        assert_eq!(packed.completions, [vec![0..2, 3..7], vec![7..10, 2..3]]);
        for row_tokens in [15, 16, 19] {
            let rows = pack_rows(&borrowed(&items), row_tokens, &class);
            assert!(rows.iter().all(|row| row.row.ids.len() <= row_tokens));
            assert_eq!(rows.len(), if row_tokens < 16 { 2 } else { 1 });
        }
    }
}
