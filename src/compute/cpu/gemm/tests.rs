use half::bf16;
use proptest::prelude::*;

use super::product::is_small;
use super::*;
use crate::math::rng;

fn values(name: &str, n: usize) -> Vec<f32> {
    rng::kaiming_uniform(7, name, n, 1)
}

fn rounded(v: &[f32]) -> Vec<f32> {
    v.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
}

/// Compares the kernel with sums over k in f64 of the rounded operands, with a bound on the error
/// of f32 sums.
fn check(kernel: Kernel, m: usize, n: usize, k: usize, a_t: bool, b_t: bool, accumulate: bool) {
    let (a, b) = (values("a", m * k), values("b", k * n));
    let start: Vec<f32> = values("c", m * (n + 3));
    let view = |v, rows: usize, cols: usize, t: bool| {
        if t {
            View::f32(v, rows).t()
        } else {
            View::f32(v, cols)
        }
    };
    let operand = Operand::new(kernel, view(&a, m, k, a_t), m, k, 1.0);
    let mut c = start.clone();
    let term = Term::new(&operand, view(&b, k, n, b_t));
    matmul(m, n, &[term], &mut c, n + 3, accumulate, Threads::All);
    let (a, b) = if kernel.is_bf16() {
        (rounded(&a), rounded(&b))
    } else {
        (a, b)
    };
    for i in 0..m {
        for j in 0..n + 3 {
            let at = i * (n + 3) + j;
            if j >= n {
                assert_eq!(c[at], start[at], "{kernel:?} writes between the rows");
                continue;
            }
            let (mut sum, mut size) = (if accumulate { start[at] as f64 } else { 0.0 }, 1.0);
            for p in 0..k {
                let x = a[if a_t { p * m + i } else { i * k + p }] as f64
                    * b[if b_t { j * k + p } else { p * n + j }] as f64;
                sum += x;
                size += x.abs();
            }
            let error = (c[at] as f64 - sum).abs();
            assert!(
                error <= 3e-6 * size,
                "{kernel:?} {m}x{k}x{n} a_t={a_t} b_t={b_t} accumulate={accumulate} at \
                 ({i}, {j}): {} vs {sum}",
                c[at]
            );
        }
    }
}

#[test]
fn every_kernel_agrees_with_a_sum_in_f64() {
    for kernel in Kernel::available() {
        for (m, n, k) in [
            (1, 1, 1),
            (6, 64, 32),
            (7, 65, 33),
            (50, 100, 129),
            (33, 16, 2100),
            (97, 192, 64),
            (300, 70, 700),
        ] {
            for (a_t, b_t, accumulate) in [
                (false, true, false),
                (false, false, true),
                (true, false, true),
                (true, true, false),
            ] {
                check(kernel, m, n, k, a_t, b_t, accumulate);
            }
        }
    }
}

/// A LoRA adapter of rank 1 has matrices with one row or one column.
#[test]
fn matrices_of_one_row_and_of_one_column_are_multiplied() {
    for kernel in Kernel::available() {
        for (m, n, k) in [(97, 70, 1), (97, 1, 70), (97, 1, 1), (1, 70, 1)] {
            for (a_t, b_t) in [(false, true), (false, false), (true, false), (true, true)] {
                check(kernel, m, n, k, a_t, b_t, false);
            }
        }
    }
}

#[test]
fn weights_in_bf16_are_what_they_would_be_in_f32() {
    for (m, n, k) in [(20, 70, 50), (97, 70, 1), (97, 1, 70)] {
        weights_in_bf16_are_exact(m, n, k);
    }
}

fn weights_in_bf16_are_exact(m: usize, n: usize, k: usize) {
    let (a, b) = (values("a", m * k), rounded(&values("b", n * k)));
    let stored: Vec<bf16> = b.iter().map(|x| bf16::from_f32(*x)).collect();
    for kernel in Kernel::available() {
        let a = Operand::new(kernel, View::f32(&a, k), m, k, 1.0);
        for t in [false, true] {
            let view = |e| {
                if t {
                    View::of(e, k).t()
                } else {
                    View::of(e, n)
                }
            };
            let (mut x, mut y) = (vec![0f32; m * n], vec![0f32; m * n]);
            matmul(
                m,
                n,
                &[Term::new(&a, view(Elements::F32(&b)))],
                &mut x,
                n,
                false,
                Threads::One,
            );
            matmul(
                m,
                n,
                &[Term::new(&a, view(Elements::Bf16(&stored)))],
                &mut y,
                n,
                false,
                Threads::One,
            );
            assert_eq!(x, y, "{kernel:?}");
        }
    }
}

#[test]
fn a_sum_of_products_is_one_product_over_the_joined_depth() {
    let (m, n, k) = (40, 70, 96);
    let (a, b) = (values("a", m * k), values("b", k * n));
    for kernel in Kernel::available() {
        let whole = Operand::new(kernel, View::f32(&a, k), m, k, 1.0);
        let (left, right) = (
            Operand::new(kernel, View::f32(&a, k), m, 64, 1.0),
            Operand::new(kernel, View::f32(&a[64..], k), m, 32, 1.0),
        );
        let (mut x, mut y) = (vec![0f32; m * n], vec![0f32; m * n]);
        matmul(
            m,
            n,
            &[Term::new(&whole, View::f32(&b, n))],
            &mut x,
            n,
            false,
            Threads::All,
        );
        let terms = [
            Term::new(&left, View::f32(&b, n)),
            Term::new(&right, View::f32(&b[64 * n..], n)),
        ];
        matmul(m, n, &terms, &mut y, n, false, Threads::All);
        assert_eq!(x, y, "{kernel:?}");
    }
}

/// The projections of a small model for the new tokens of a few sequences.
#[test]
fn few_rows_and_a_large_weight_use_all_threads_and_have_the_bits_of_one() {
    // Starting threads would take longer.
    assert!(is_small(1, 64 * 64));
    assert!(!is_small(512, 64 * 64));
    for (m, n, k) in [(1, 576, 576), (1, 192, 576), (2, 192, 576), (1, 40, 2100)] {
        assert!(!is_small(m, n * k), "{m}x{k}x{n}");
        let (a, w) = (values("a", m * k), values("w", n * k));
        let w = WeightView::new(Elements::F32(&w), k);
        for kernel in Kernel::available() {
            let a = Operand::new(kernel, View::f32(&a, k), m, k, 1.0);
            let product = |threads| {
                let mut c = vec![0f32; m * n];
                let term = Term::new(&a, w.transposed());
                matmul(m, n, &[term], &mut c, n, false, threads);
                c
            };
            let (all, one) = (product(Threads::All), product(Threads::One));
            assert_eq!(all, one, "{kernel:?} {m}x{k}x{n}");
        }
    }
}

#[test]
fn an_operand_computed_row_by_row_is_the_one_of_the_whole_matrix_and_so_are_its_parts() {
    let (m, n, k) = (45, 40, 71);
    let (a, b) = (values("a", m * k), values("b", k * n));
    for kernel in Kernel::available() {
        let product = |a: &Operand, rows: usize| {
            let mut c = vec![0f32; rows * n];
            matmul(
                rows,
                n,
                &[Term::new(a, View::f32(&b, n))],
                &mut c,
                n,
                false,
                Threads::All,
            );
            c
        };
        let whole = product(&Operand::new(kernel, View::f32(&a, k), m, k, 1.0), m);
        let computed =
            Operand::computed(kernel, m, k, |i, row| row.copy_from_slice(&a[i * k..][..k]));
        assert_eq!(product(&computed, m), whole, "{kernel:?}");
        assert_eq!(
            product(&computed.part(7..31), 24),
            whole[7 * n..31 * n],
            "{kernel:?}"
        );
    }
}

#[test]
fn operands_prepared_in_place_and_their_transposes_are_those_of_the_finished_matrix() {
    let n = 40;
    for (m, k) in [(45, 71), (64, 352), (1, 2), (3, 64)] {
        let (a, b, down) = (
            values("a", m * k),
            values("b", k * n),
            values("down", m * n),
        );
        let done: Vec<f32> = a
            .iter()
            .enumerate()
            .map(|(i, x)| x * (i / k + 1) as f32)
            .collect();
        for kernel in Kernel::available() {
            let product = |a: &Operand, rows: usize, b: &[f32]| {
                let mut c = vec![0f32; rows * n];
                matmul(
                    rows,
                    n,
                    &[Term::new(a, View::f32(b, n))],
                    &mut c,
                    n,
                    false,
                    Threads::All,
                );
                c
            };
            let scale =
                |i: usize, row: &mut [f32]| row.iter_mut().for_each(|x| *x *= (i + 1) as f32);
            let (mut one, mut two, mut three) = (a.clone(), a.clone(), a.clone());
            let prepared = Operand::prepared(kernel, &mut one, k, scale);
            let [first, second] =
                Operand::prepared_pair(kernel, [&mut two, &mut three], k, |i, x, y| {
                    scale(i, x);
                    y.copy_from_slice(x);
                });
            let whole = product(&Operand::new(kernel, View::f32(&done, k), m, k, 1.0), m, &b);
            let transposed = product(
                &Operand::new(kernel, View::f32(&done, k).t(), k, m, 1.0),
                k,
                &down,
            );
            for operand in [prepared, first, second] {
                assert_eq!(product(&operand, m, &b), whole, "{kernel:?} {m}x{k}");
                assert_eq!(
                    product(&operand.transposed(), k, &down),
                    transposed,
                    "{kernel:?} {m}x{k}"
                );
            }
        }
    }
}

#[test]
fn tiles_are_the_parts_of_whole_products() {
    // Few rows; many rows that are processed in several passes; depths of one and of several
    // blocks; a number of columns that is not a multiple of the panel width.
    for (m, n, k) in [
        (3, 70, 40),
        (300, 160, 96),
        (140, 33, 2300),
        (600, 170, 500),
        (1, 512, 7),
    ] {
        let (a, b, c, d) = (
            values("a", m * k),
            values("b", k * n),
            values("c", n * k),
            values("d", m * 6),
        );
        for kernel in Kernel::available() {
            let operand = Operand::new(kernel, View::f32(&a, k), m, k, 1.0);
            let more = Operand::new(kernel, View::f32(&d, 6), m, 6, 0.5);
            let first = [
                Term::new(&operand, View::f32(&b, n)),
                Term::new(&more, View::f32(&b, n)),
            ];
            let second = [Term::new(&operand, View::f32(&c, k).t())];
            let whole = [&first[..], &second[..]].map(|terms| {
                let mut y = vec![0f32; m * n];
                matmul(m, n, terms, &mut y, n, false, Threads::All);
                y
            });
            let parts = [vec![f32::NAN; m * n], vec![f32::NAN; m * n]].map(std::sync::Mutex::new);
            matmul_tiles(m, n, [&first, &second], |rows, columns, tiles| {
                for (y, tile) in parts.iter().zip(tiles) {
                    let mut y = y.lock().unwrap();
                    for (tile, row) in tile.chunks(NR).zip(rows.clone()) {
                        y[row * n..][columns.clone()].copy_from_slice(&tile[..columns.len()]);
                    }
                }
            });
            assert_eq!(
                parts.map(|y| y.into_inner().unwrap()),
                whole,
                "{kernel:?} {m}x{k}x{n}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// A row of C is the same bit for bit alone, among others and with any number of threads.
    #[test]
    fn a_row_depends_on_no_other_row(
        m in 1usize..150,
        n in 1usize..150,
        k in 1usize..1500,
        row in 0usize..150,
    ) {
        let row = row % m;
        let (a, b) = (values("a", m * k), values("b", n * k));
        for kernel in Kernel::available() {
            let all = Operand::new(kernel, View::f32(&a, k), m, k, 1.0);
            let one = Operand::new(kernel, View::f32(&a[row * k..], k), 1, k, 1.0);
            for b in [View::f32(&b, k).t(), View::f32(&b, n)] {
                let (mut x, mut y) = (vec![0f32; m * n], vec![0f32; n]);
                matmul(m, n, &[Term::new(&all, b)], &mut x, n, false, Threads::All);
                matmul(1, n, &[Term::new(&one, b)], &mut y, n, false, Threads::One);
                prop_assert_eq!(&x[row * n..(row + 1) * n], &y[..], "{:?}", kernel);
            }
        }
    }
}
