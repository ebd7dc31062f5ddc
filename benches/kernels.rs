//! Benchmarks of the CPU kernels at SmolLM2's and at larger shapes: `cargo bench --bench kernels`.
//! Items are floating-point operations, so items/s means FLOP/s. Element-wise kernels count the
//! bytes that they read and write instead. `peak` approximates the machine's maximum: a GEMM with
//! operands that stay in a core's own cache.

#![allow(clippy::print_stdout)]

use bradley::compute::cpu::attention::{Heads, attention, attention_backward};
use bradley::compute::cpu::gemm::{
    Elements, Kernel, Operand, Term, Threads, View, WeightView, matmul,
};
use bradley::compute::cpu::head::{HeadInput, HeadOptions, head};
use bradley::compute::cpu::rms_norm::{rms_norm, rms_norm_backward};
use bradley::compute::cpu::swiglu::{ActivationFunction, gated, gated_backward};
use bradley::compute::cpu::thread_pool;
use bradley::compute::layout::RowLayout;
use bradley::domain::training::Precision;
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};

fn main() {
    bradley::cli::tune_allocator();
    println!(
        "kernels: f32 {:?}, bf16 {:?}, {} threads",
        Kernel::best(Precision::F32),
        Kernel::best(Precision::Bf16),
        thread_pool::threads()
    );
    divan::main();
}

const PRECISIONS: [&str; 2] = ["f32", "bf16"];

fn kernel(name: &str) -> Kernel {
    Kernel::best(Precision::parse(name).unwrap_or_default())
}

fn values(n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5)
        .collect()
}

/// Repeats a small GEMM on every thread at the same time.
#[divan::bench(args = PRECISIONS)]
fn peak(bencher: Bencher, precision: &str) {
    let kernel = kernel(precision);
    let (m, k, n, times) = (560, 576, 96, 40);
    let (a, b) = (values(m * k), values(k * n));
    let flops = 2 * m * k * n * times * thread_pool::threads();
    bencher.counter(ItemsCount::new(flops)).bench(|| {
        thread_pool::for_each(thread_pool::threads(), |_| {
            let a = Operand::new(kernel, View::f32(&a, k), m, k, 1.0);
            let mut c = vec![0f32; m * n];
            for _ in 0..times {
                matmul(
                    m,
                    n,
                    &[Term::new(&a, View::f32(&b, n))],
                    &mut c,
                    n,
                    false,
                    Threads::One,
                );
            }
            divan::black_box(c);
        });
    });
}

/// Multiplies an m × k matrix by weights: a linear layer forward, or backward to its input.
fn gemm(bencher: Bencher, precision: &str, m: usize, k: usize, n: usize, backward: bool) {
    let kernel = kernel(precision);
    let (a, b) = (values(m * k), values(k * n));
    let rounded: Vec<half::bf16> = b.iter().map(|x| half::bf16::from_f32(*x)).collect();
    let b = if precision == "bf16" {
        Elements::Bf16(&rounded)
    } else {
        Elements::F32(&b)
    };
    let view = if backward {
        WeightView::new(b, n).plain()
    } else {
        WeightView::new(b, k).transposed()
    };
    let mut c = vec![0f32; m * n];
    bencher
        .counter(ItemsCount::new(2 * m * k * n))
        .bench_local(|| {
            let a = Operand::new(kernel, View::f32(&a, k), m, k, 1.0);
            matmul(m, n, &[Term::new(&a, view)], &mut c, n, false, Threads::All);
        });
}

#[divan::bench(args = PRECISIONS)]
fn gate_forward_550x576x1536(bencher: Bencher, precision: &str) {
    gemm(bencher, precision, 550, 576, 1536, false);
}

#[divan::bench(args = PRECISIONS)]
fn gate_backward_550x1536x576(bencher: Bencher, precision: &str) {
    gemm(bencher, precision, 550, 1536, 576, true);
}

#[divan::bench(args = PRECISIONS)]
fn gate_forward_64x576x1536(bencher: Bencher, precision: &str) {
    gemm(bencher, precision, 64, 576, 1536, false);
}

/// Gradient of an adapter's A or B: a GEMM with few rows (the rank) that sums over tokens.
#[divan::bench(args = PRECISIONS)]
fn adapter_gradient_16x550x1536(bencher: Bencher, precision: &str) {
    gemm(bencher, precision, 16, 550, 1536, true);
}

/// GEMM at the size of a 1.7B model's block (SmolLM2-1.7B: C 2048, F 8192).
#[divan::bench(args = PRECISIONS)]
fn gate_forward_550x2048x8192(bencher: Bencher, precision: &str) {
    gemm(bencher, precision, 550, 2048, 8192, false);
}

/// Logits, log-softmax and gradient for 390 completion tokens.
#[divan::bench(args = PRECISIONS)]
fn head_390x576x49152(bencher: Bencher, precision: &str) {
    let (n, c, v) = (390, 576, 49152);
    let (h, w) = (values(n * c), values(v * c));
    let rounded: Vec<half::bf16> = w.iter().map(|x| half::bf16::from_f32(*x)).collect();
    let w = if precision == "bf16" {
        Elements::Bf16(&rounded)
    } else {
        Elements::F32(&w)
    };
    let targets: Vec<u32> = (0..n as u32).collect();
    let options = HeadOptions {
        distribution: true,
        gradient: true,
        trained: None,
    };
    bencher
        .counter(ItemsCount::new(4 * n * c * v))
        .bench_local(|| {
            let input = HeadInput {
                kernel: kernel(precision),
                h: &h,
                w: WeightView::new(w, c),
                targets: &targets,
                softcap: None,
            };
            head(input, options)
        });
}

/// Returns the layout of a pair with a prompt of 160 and answers of 195 tokens, SmolLM2's heads,
/// and the number of pairs of a query and a key that it attends to.
fn pair() -> (RowLayout, Heads, usize) {
    let mut layout = RowLayout::default();
    layout.push_group(160, [195, 195]);
    let seen: usize = layout
        .segments
        .iter()
        .map(|s| {
            (0..s.tokens.len())
                .map(|i| s.prefix.len() + i + 1)
                .sum::<usize>()
        })
        .sum();
    (
        layout,
        Heads {
            query: 9,
            key: 3,
            dim: 64,
            window: None,
            scale: 0.125,
            softcap: None,
        },
        seen,
    )
}

#[divan::bench(args = PRECISIONS)]
fn attention_forward_550(bencher: Bencher, precision: &str) {
    let (layout, heads, seen) = pair();
    let qkv = values(layout.tokens() * heads.row());
    let (mut out, mut lse) = (
        vec![0f32; layout.tokens() * heads.width()],
        vec![0f32; layout.tokens() * heads.query],
    );
    bencher
        .counter(ItemsCount::new(4 * seen * heads.width()))
        .bench_local(|| attention(kernel(precision), &qkv, heads, &layout, &mut out, &mut lse));
}

#[divan::bench(args = PRECISIONS)]
fn attention_backward_550(bencher: Bencher, precision: &str) {
    let (layout, heads, seen) = pair();
    let qkv = values(layout.tokens() * heads.row());
    let (mut out, mut lse) = (
        vec![0f32; layout.tokens() * heads.width()],
        vec![0f32; layout.tokens() * heads.query],
    );
    attention(kernel(precision), &qkv, heads, &layout, &mut out, &mut lse);
    let g = values(out.len());
    let mut dqkv = vec![0f32; qkv.len()];
    bencher
        .counter(ItemsCount::new(10 * seen * heads.width()))
        .bench_local(|| {
            attention_backward(
                kernel(precision),
                &qkv,
                heads,
                &layout,
                (&out, &lse),
                &g,
                &mut dqkv,
            )
        });
}

#[divan::bench]
fn rms_norm_550x576(bencher: Bencher) {
    let (x, w) = (values(550 * 576), values(576));
    let mut y = vec![0f32; x.len()];
    bencher
        .counter(BytesCount::new(8 * x.len()))
        .bench_local(|| rms_norm(&x, &w, 1e-5, &mut y));
}

#[divan::bench]
fn rms_norm_backward_550x576(bencher: Bencher) {
    let (x, w) = (values(550 * 576), values(576));
    let mut dx = vec![0f32; x.len()];
    bencher
        .counter(BytesCount::new(16 * x.len()))
        .bench_local(|| rms_norm_backward(&x, &w, &x, 1e-5, &mut dx, None));
}

#[divan::bench]
fn swiglu_550x1536(bencher: Bencher) {
    let x = values(550 * 3072);
    bencher
        .counter(BytesCount::new(6 * x.len()))
        .bench_local(|| gated(kernel("f32"), ActivationFunction::Silu, &x, 1536));
}

#[divan::bench]
fn swiglu_backward_550x1536(bencher: Bencher) {
    let (mut x, g) = (values(550 * 3072), values(550 * 1536));
    bencher
        .counter(BytesCount::new(10 * x.len()))
        .bench_local(|| gated_backward(ActivationFunction::Silu, &mut x, 1536, &g));
}
