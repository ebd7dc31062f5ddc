//! Gated linear units: y = activation(gate) ⊙ up, SwiGLU and GEGLU (arXiv:2002.05202).

use std::ops::Range;

use half::bf16;

use super::buffer::Buffer;
use super::gemm::{Kernel, NR, Operand, Shared, TiledOperand};
use super::simd::{dispatch, sigmoid};
use super::thread_pool;

/// What the gate goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·σ(x).
    Silu,
    /// GELU with its tanh approximation, x·σ(2·√(2/π)·(x + 0.044715·x³)).
    GeluTanh,
}

/// An activation x·σ(u(x)).
trait Gate {
    /// σ(u(x)).
    fn sigma(x: f32) -> f32;

    /// x·u'(x)·(1 − s), given s = σ(u(x)); the derivative of x·σ(u(x)) is s times 1 + this.
    fn slope(x: f32, s: f32) -> f32;
}

struct Silu;

impl Gate for Silu {
    #[inline(always)]
    fn sigma(x: f32) -> f32 {
        sigmoid(x)
    }

    #[inline(always)]
    fn slope(x: f32, s: f32) -> f32 {
        x * (1.0 - s)
    }
}

struct GeluTanh;

impl GeluTanh {
    /// 2·√(2/π).
    const SCALE: f32 = 1.595_769_2;
    const CUBE: f32 = 0.044_715;
}

impl Gate for GeluTanh {
    #[inline(always)]
    fn sigma(x: f32) -> f32 {
        sigmoid(Self::SCALE * (x + Self::CUBE * x * x * x))
    }

    #[inline(always)]
    fn slope(x: f32, s: f32) -> f32 {
        x * (1.0 - s) * (Self::SCALE * (1.0 + 3.0 * Self::CUBE * x * x))
    }
}

/// y `[T, F]` from `[gate | up]` `[T, 2F]`, to be multiplied.
pub fn gated(
    kernel: Kernel,
    activation: Activation,
    gate_up: &[f32],
    width: usize,
) -> Operand<'static> {
    match activation {
        Activation::Silu => gated_by::<Silu>(kernel, gate_up, width),
        Activation::GeluTanh => gated_by::<GeluTanh>(kernel, gate_up, width),
    }
}

fn gated_by<G: Gate>(kernel: Kernel, gate_up: &[f32], width: usize) -> Operand<'static> {
    Operand::computed(kernel, gate_up.len() / (2 * width), width, |i, y| {
        let (gate, up) = gate_up[2 * i * width..][..2 * width].split_at(width);
        dispatch(
            #[inline(always)]
            || {
                for ((y, a), b) in y.iter_mut().zip(gate).zip(up) {
                    *y = a * G::sigma(*a) * b;
                }
            },
        )
    })
}

/// Replaces `[gate | up]` by its gradient for the upstream gradient `g` `[T, F]`. With s =
/// σ(u(gate)): d_up = g·gate·s, d_gate = g·up·s·(1 + gate·u'(gate)·(1 − s)).
pub fn gated_backward(activation: Activation, gate_up: &mut [f32], width: usize, g: &[f32]) {
    match activation {
        Activation::Silu => gated_by_backward::<Silu>(gate_up, width, g),
        Activation::GeluTanh => gated_by_backward::<GeluTanh>(gate_up, width, g),
    }
}

fn gated_by_backward<G: Gate>(gate_up: &mut [f32], width: usize, g: &[f32]) {
    let rows = thread_pool::rows_per_task(g.len() / width);
    thread_pool::chunks(gate_up, rows * 2 * width, |i, gate_up| {
        let g = &g[i * rows * width..];
        dispatch(
            #[inline(always)]
            || {
                for (row, g) in gate_up.chunks_mut(2 * width).zip(g.chunks(width)) {
                    let (gate, up) = row.split_at_mut(width);
                    for ((a, b), g) in gate.iter_mut().zip(up).zip(g) {
                        let s = G::sigma(*a);
                        (*a, *b) = (g * *b * s * (1.0 + G::slope(*a, s)), g * *a * s);
                    }
                }
            },
        )
    });
}

/// `[gate | up]` `[T, 2F]` until the backward pass.
pub enum GateUp {
    /// As it was computed.
    F32(Buffer),
    /// Rounded, as its gradient will be: half the memory. Where products are computed in bf16 and
    /// only an adapter is trained.
    Bf16(Operand<'static>),
}

/// What is kept of `[gate | up]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepGateUp {
    /// Nothing.
    No,
    /// [`GateUp::F32`].
    F32,
    /// [`GateUp::Bf16`]; for kernels that round.
    Bf16,
}

impl KeepGateUp {
    /// Returns what a tape holds: where the kernel rounds and only an adapter is trained, rounded
    /// values are enough.
    pub fn for_tape(kernel: Kernel, is_adapted: bool) -> Self {
        if kernel.is_bf16() && is_adapted { KeepGateUp::Bf16 } else { KeepGateUp::F32 }
    }

    /// Returns the memory of what is kept for a token, in f32 values, for F = `width`.
    pub fn floats(self, width: usize) -> usize {
        match self {
            KeepGateUp::No => 0,
            KeepGateUp::F32 => 2 * width,
            KeepGateUp::Bf16 => width,
        }
    }
}

/// Values per token of the forward pass for F = `width`: gate, up, their product and its operand.
pub fn forward_floats(width: usize) -> usize {
    4 * width
}

/// Values per token of the backward pass, besides what the tape holds: the product, its gradient
/// and the operands. By tiles there are only operands, which are rounded.
pub fn backward_floats(width: usize, tape: KeepGateUp) -> usize {
    match tape {
        KeepGateUp::Bf16 => 3 * width / 2,
        KeepGateUp::F32 | KeepGateUp::No => 2 * width,
    }
}

/// y from tiles of gate and of up: neither is written as a whole, but for what is kept.
pub struct GatedTiles {
    activation: Activation,
    tokens: usize,
    width: usize,
    y: TiledOperand,
    rounded: Option<TiledOperand>,
    kept: Option<(Buffer, Shared)>,
}

impl GatedTiles {
    /// For T tokens of F = `width`, a multiple of [`NR`].
    pub fn new(
        kernel: Kernel,
        activation: Activation,
        (tokens, width): (usize, usize),
        keep: KeepGateUp,
    ) -> Self {
        assert!(width.is_multiple_of(NR), "gated: tiles of a width of {width}");
        let mut kept = (keep == KeepGateUp::F32)
            .then(|| (Buffer::dirty(tokens * 2 * width), Shared(std::ptr::null_mut())));
        kept.iter_mut().for_each(|(buffer, at)| *at = Shared(buffer.as_mut_ptr()));
        let rounded =
            (keep == KeepGateUp::Bf16).then(|| TiledOperand::new(kernel, tokens, 2 * width));
        GatedTiles {
            activation,
            tokens,
            width,
            y: TiledOperand::new(kernel, tokens, width),
            rounded,
            kept,
        }
    }

    /// Takes a tile of each; `up` is overwritten.
    ///
    /// # Safety
    /// No other task has this part.
    pub unsafe fn take(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        gate: &[f32],
        up: &mut [f32],
    ) {
        let width = columns.len();
        if let Some(rounded) = &self.rounded {
            // SAFETY: by the caller.
            unsafe {
                rounded.write(rows.clone(), columns.start, width, gate);
                rounded.write(rows.clone(), self.width + columns.start, width, up);
            }
        }
        if let Some((_, at)) = &self.kept {
            assert!(rows.end <= self.tokens && columns.end <= self.width);
            for (i, row) in rows.clone().enumerate() {
                for (tile, column) in [(gate, columns.start), (&*up, self.width + columns.start)] {
                    // SAFETY: inside the buffer by the assertion; this part is the caller's.
                    let to = unsafe {
                        std::slice::from_raw_parts_mut(at.at(row * 2 * self.width + column), width)
                    };
                    to.copy_from_slice(&tile[i * NR..][..width]);
                }
            }
        }
        match self.activation {
            Activation::Silu => multiply::<Silu>(up, gate),
            Activation::GeluTanh => multiply::<GeluTanh>(up, gate),
        }
        // SAFETY: by the caller.
        unsafe { self.y.write(rows, columns.start, width, up) };
    }

    /// y, and what was kept.
    pub fn finish(self) -> (Operand<'static>, Option<GateUp>) {
        let rounded = self.rounded.map(|r| GateUp::Bf16(r.operand()));
        (self.y.operand(), rounded.or(self.kept.map(|(buffer, _)| GateUp::F32(buffer))))
    }
}

/// y = up ⊙ activation(gate) in up's place.
fn multiply<G: Gate>(up: &mut [f32], gate: &[f32]) {
    dispatch(
        #[inline(always)]
        || {
            for (y, a) in up.iter_mut().zip(gate) {
                *y *= a * G::sigma(*a);
            }
        },
    );
}

/// The gradients of gate and of up, as [`gated_backward`] gives them, and y again, from what was
/// kept rounded and tiles of the upstream gradient.
pub struct GradientTiles<'a> {
    activation: Activation,
    kept: &'a Operand<'static>,
    width: usize,
    y: TiledOperand,
    gate: TiledOperand,
    up: TiledOperand,
}

impl<'a> GradientTiles<'a> {
    /// For what [`GatedTiles`] kept; F = `width`.
    pub fn new(kept: &'a Operand<'static>, activation: Activation, width: usize) -> Self {
        let tiled = || TiledOperand::new(kept.kernel(), kept.rows(), width);
        GradientTiles { activation, kept, width, y: tiled(), gate: tiled(), up: tiled() }
    }

    /// Takes a tile of the upstream gradient.
    ///
    /// # Safety
    /// No other task has this part.
    pub unsafe fn take(&self, rows: Range<usize>, columns: Range<usize>, g: &[f32]) {
        // SAFETY: by the caller.
        unsafe {
            match self.activation {
                Activation::Silu => self.take_by::<Silu>(rows, columns, g),
                Activation::GeluTanh => self.take_by::<GeluTanh>(rows, columns, g),
            }
        }
    }

    /// # Safety
    /// As [`GradientTiles::take`].
    unsafe fn take_by<G: Gate>(&self, rows: Range<usize>, columns: Range<usize>, g: &[f32]) {
        let width = columns.len();
        let (mut y, mut gate, mut up) = ([0f32; PART * NR], [0f32; PART * NR], [0f32; PART * NR]);
        for first in rows.clone().step_by(PART) {
            let part = first..(first + PART).min(rows.end);
            let g = &g[(first - rows.start) * NR..];
            dispatch(
                #[inline(always)]
                || {
                    for (i, row) in part.clone().enumerate() {
                        let kept = self.kept.bf16_row(row);
                        widen(&kept[columns.clone()], &mut gate[i * NR..][..width]);
                        widen(
                            &kept[self.width + columns.start..][..width],
                            &mut up[i * NR..][..width],
                        );
                    }
                    let n = part.len() * NR;
                    for (((y, a), b), g) in
                        y[..n].iter_mut().zip(&mut gate[..n]).zip(&mut up[..n]).zip(g)
                    {
                        let s = G::sigma(*a);
                        *y = *a * s * *b;
                        (*a, *b) = (g * *b * s * (1.0 + G::slope(*a, s)), g * *a * s);
                    }
                },
            );
            // SAFETY: by the caller.
            unsafe {
                self.y.write(part.clone(), columns.start, width, &y);
                self.gate.write(part.clone(), columns.start, width, &gate);
                self.up.write(part, columns.start, width, &up);
            }
        }
    }

    /// y, and the gradients of gate and of up, to be multiplied.
    pub fn finish(self) -> (Operand<'static>, [Operand<'static>; 2]) {
        (self.y.operand(), [self.gate.operand(), self.up.operand()])
    }
}

/// Rows of a tile that are widened at a time.
const PART: usize = 16;

#[inline(always)]
fn widened(x: bf16) -> f32 {
    f32::from_bits((x.to_bits() as u32) << 16)
}

/// In a loop of its own: with fewer slices in a loop the compiler is sure to make vectors of it.
#[inline(always)]
fn widen(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = widened(*from);
    }
}
