//! Random numbers as pure functions of a seed and a purpose. A run can be resumed without saving
//! the state of a generator.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Returns a generator whose seed is a hash of `seed` and `purpose`.
fn generator(seed: u64, purpose: &str) -> ChaCha8Rng {
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes());
    hash.update(purpose.as_bytes());
    ChaCha8Rng::from_seed(*hash.finalize().as_bytes())
}

/// Returns the seed of a generator for one purpose of a request or run with the seed `seed`.
pub fn derived_seed(seed: u64, purpose: &str) -> u64 {
    generator(seed, purpose).next_u64()
}

/// Draws a number from `0..n` without bias, by rejection sampling.
fn below(rng: &mut ChaCha8Rng, n: u64) -> u64 {
    let limit = u64::MAX - u64::MAX % n;
    loop {
        let x = rng.next_u64();
        if x < limit {
            return x % n;
        }
    }
}

/// Returns the order in which an epoch visits `0..n`: a Fisher–Yates shuffle that starts at the
/// last place.
pub fn epoch_order(n: usize, seed: u64, epoch: u64) -> Vec<u32> {
    permutation(n, seed, &format!("epoch {epoch}"))
}

/// Splits `0..n` into training and evaluation rows, both in ascending order. The evaluation set has
/// `⌈fraction·n⌉` rows, but at least one and at most n − 1. Fewer than two rows are not
/// split: all of them are training rows.
pub fn split(n: usize, fraction: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    if n < 2 {
        return ((0..n).collect(), Vec::new());
    }
    let held_out = ((fraction * n as f64).ceil() as usize).clamp(1, n - 1);
    let order = permutation(n, seed, "evaluation split");
    let mut eval: Vec<usize> = order[..held_out].iter().map(|i| *i as usize).collect();
    let mut train: Vec<usize> = order[held_out..].iter().map(|i| *i as usize).collect();
    eval.sort_unstable();
    train.sort_unstable();
    (train, eval)
}

fn permutation(n: usize, seed: u64, purpose: &str) -> Vec<u32> {
    let mut rng = generator(seed, purpose);
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        order.swap(i, below(&mut rng, i as u64 + 1) as usize);
    }
    order
}

/// Returns `n` samples of U(−1/√fan_in, 1/√fan_in). This is `kaiming_uniform_(a=√5)`,
/// PEFT's initialisation of LoRA's A.
pub fn kaiming_uniform(seed: u64, purpose: &str, n: usize, fan_in: usize) -> Vec<f32> {
    let mut rng = generator(seed, purpose);
    let bound = 1.0 / (fan_in.max(1) as f32).sqrt();
    (0..n)
        .map(|_| ((rng.next_u32() >> 8) as f32 / 8_388_608.0 - 1.0) * bound)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_visits_every_row_once_and_each_epoch_differs() {
        let mut a = epoch_order(50, 42, 0);
        assert_eq!(a, epoch_order(50, 42, 0));
        assert_ne!(a, epoch_order(50, 42, 1));
        assert_ne!(a, epoch_order(50, 43, 0));
        a.sort_unstable();
        assert_eq!(a, (0..50).collect::<Vec<_>>());
    }

    /// The values come from another implementation: ChaCha with 8 rounds after RFC 7539's layout
    /// with a 64-bit counter, and BLAKE3's Python package. They must never change, because that
    /// would change the results of every existing run.
    #[test]
    fn orders_splits_and_draws_never_change() {
        assert_eq!(
            epoch_order(12, 42, 0),
            [4, 1, 3, 10, 0, 5, 2, 7, 11, 6, 9, 8]
        );
        assert_eq!(
            epoch_order(12, 42, 1),
            [4, 5, 8, 2, 10, 1, 3, 7, 0, 9, 6, 11]
        );
        let (train, eval) = split(12, 0.25, 7);
        assert_eq!(eval, [1, 10, 11]);
        assert_eq!(train, [0, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(
            kaiming_uniform(1, "x", 6, 16),
            [
                0.153_822_18,
                0.213_824_9,
                -0.022_806_704,
                0.179_479_81,
                0.130_275_96,
                0.139_582_51
            ]
        );
        let draws = kaiming_uniform(1, "x", 1000, 16);
        assert!(draws.iter().all(|d| d.abs() <= 0.25));
        assert!((draws.iter().sum::<f32>() / 1000.0).abs() < 0.02);
    }

    #[test]
    fn a_split_is_disjoint_complete_and_never_empty_on_either_side() {
        for (n, fraction) in [(2, 0.01), (2, 0.99), (10, 0.25), (7, 0.5)] {
            let (train, eval) = split(n, fraction, 7);
            assert!(!train.is_empty() && !eval.is_empty());
            let mut all = [train, eval].concat();
            all.sort_unstable();
            assert_eq!(all, (0..n).collect::<Vec<_>>());
        }
    }
}
