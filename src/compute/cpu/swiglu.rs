//! Gated linear units: y = activation(gate) ⊙ up, SwiGLU and GEGLU (arXiv:2002.05202).

use std::ops::Range;

use half::bf16;

use super::buffer::Buffer;
use super::gemm::{Kernel, NR, Operand, Shared, TiledOperand};
use super::simd::{dispatch, sigmoid};
use super::thread_pool;

/// Activation function of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationFunction {
    /// x·σ(x).
    Silu,
    /// GELU with its tanh approximation, x·σ(2·√(2/π)·(x + 0.044715·x³)).
    GeluTanh,
}

/// Activation of the form x·σ(u(x)).
trait Gate {
    /// Returns σ(u(x)).
    fn sigma(x: f32) -> f32;

    /// Returns x·u'(x)·(1 − s), given s = σ(u(x)). The derivative of x·σ(u(x)) is
    /// s·(1 + this value).
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

/// Computes the operand y `[T, F]` from `[gate | up]` `[T, 2F]`, with F = `width`.
pub fn gated(
    kernel: Kernel,
    activation: ActivationFunction,
    gate_up: &[f32],
    width: usize,
) -> Operand<'static> {
    match activation {
        ActivationFunction::Silu => gated_by::<Silu>(kernel, gate_up, width),
        ActivationFunction::GeluTanh => gated_by::<GeluTanh>(kernel, gate_up, width),
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

/// Replaces `[gate | up]` `[T, 2F]` by its gradient for the upstream gradient `g` `[T, F]`. With s
/// = σ(u(gate)): d_up = g·gate·s, d_gate = g·up·s·(1 + gate·u'(gate)·(1 − s)).
pub fn gated_backward(
    activation: ActivationFunction,
    gate_up: &mut [f32],
    width: usize,
    g: &[f32],
) {
    match activation {
        ActivationFunction::Silu => gated_by_backward::<Silu>(gate_up, width, g),
        ActivationFunction::GeluTanh => gated_by_backward::<GeluTanh>(gate_up, width, g),
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

/// Saved `[gate | up]` `[T, 2F]` for the backward pass.
pub enum GateUpTape {
    /// As computed.
    F32(Buffer),
    /// Rounded to bf16, which takes half the memory. Used with bf16 kernels when only an adapter is
    /// trained and gate and up have a matrix each; the gradient is rounded as well.
    Bf16(Operand<'static>),
}

/// Format in which `[gate | up]` is saved for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavedGateUp {
    /// Not saved.
    Nothing,
    /// [`GateUpTape::F32`].
    F32,
    /// [`GateUpTape::Bf16`]; for bf16 kernels only.
    Bf16,
}

impl SavedGateUp {
    /// Returns the format for a tape. With a bf16 kernel and only an adapter to train, rounded
    /// values are enough. If one matrix computes gate and up (Phi-3, GLM-4), callers pass false for
    /// `is_adapted`, because the gradients of rounded values are separate operands.
    pub fn for_tape(kernel: Kernel, is_adapted: bool) -> Self {
        if kernel.is_bf16() && is_adapted {
            SavedGateUp::Bf16
        } else {
            SavedGateUp::F32
        }
    }

    /// Returns the memory saved per token, in f32 values, for F = `width`.
    pub fn floats(self, width: usize) -> usize {
        match self {
            SavedGateUp::Nothing => 0,
            SavedGateUp::F32 => 2 * width,
            SavedGateUp::Bf16 => width,
        }
    }
}

/// Returns the f32 values per token that the forward pass needs for F = `width`: gate, up, y and
/// its operand.
pub fn forward_floats(width: usize) -> usize {
    4 * width
}

/// Returns the f32 values per token that the backward pass needs in addition to the tape: y and its
/// gradient. With [`SavedGateUp::Bf16`] these are y and the gradients of gate and of up instead,
/// all rounded and written tile by tile.
pub fn backward_floats(width: usize, tape: SavedGateUp) -> usize {
    match tape {
        SavedGateUp::Bf16 => 3 * width / 2,
        SavedGateUp::F32 | SavedGateUp::Nothing => 2 * width,
    }
}

/// Computes y = activation(gate) ⊙ up tile by tile. The full gate and up matrices exist only if
/// they are saved for the backward pass.
pub struct GatedTiles {
    activation: ActivationFunction,
    tokens: usize,
    width: usize,
    y: TiledOperand,
    rounded: Option<TiledOperand>,
    saved: Option<(Buffer, Shared)>,
}

impl GatedTiles {
    /// Allocates the outputs for `tokens` tokens and F = `width`, a multiple of [`NR`].
    pub fn new(
        kernel: Kernel,
        activation: ActivationFunction,
        (tokens, width): (usize, usize),
        format: SavedGateUp,
    ) -> Self {
        assert!(
            width.is_multiple_of(NR),
            "gated: the width {width} is not a multiple of {NR}"
        );
        let mut saved = (format == SavedGateUp::F32).then(|| {
            (
                Buffer::uninit(tokens * 2 * width),
                Shared(std::ptr::null_mut()),
            )
        });
        saved
            .iter_mut()
            .for_each(|(buffer, at)| *at = Shared(buffer.as_mut_ptr()));
        let rounded =
            (format == SavedGateUp::Bf16).then(|| TiledOperand::new(kernel, tokens, 2 * width));
        GatedTiles {
            activation,
            tokens,
            width,
            y: TiledOperand::new(kernel, tokens, width),
            rounded,
            saved,
        }
    }

    /// Processes a tile of gate and of up (row stride [`NR`]): saves them as requested and writes
    /// y. `up` is overwritten.
    ///
    /// # Safety
    /// No other task writes this part at the same time.
    pub unsafe fn take(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        gate: &[f32],
        up: &mut [f32],
    ) {
        let width = columns.len();
        if let Some(rounded) = &self.rounded {
            // SAFETY: guaranteed by the caller.
            unsafe {
                rounded.write(rows.clone(), columns.start, width, gate);
                rounded.write(rows.clone(), self.width + columns.start, width, up);
            }
        }
        if let Some((_, at)) = &self.saved {
            assert!(rows.end <= self.tokens && columns.end <= self.width);
            for (i, row) in rows.clone().enumerate() {
                for (tile, column) in [(gate, columns.start), (&*up, self.width + columns.start)] {
                    // SAFETY: the assertion keeps it inside the buffer; by the caller, no other
                    // task writes this part.
                    let to = unsafe {
                        std::slice::from_raw_parts_mut(at.at(row * 2 * self.width + column), width)
                    };
                    to.copy_from_slice(&tile[i * NR..][..width]);
                }
            }
        }
        match self.activation {
            ActivationFunction::Silu => multiply::<Silu>(up, gate),
            ActivationFunction::GeluTanh => multiply::<GeluTanh>(up, gate),
        }
        // SAFETY: guaranteed by the caller.
        unsafe { self.y.write(rows, columns.start, width, up) };
    }

    /// Returns y and the saved `[gate | up]`, if requested.
    pub fn finish(self) -> (Operand<'static>, Option<GateUpTape>) {
        let rounded = self.rounded.map(|r| GateUpTape::Bf16(r.operand()));
        (
            self.y.operand(),
            rounded.or(self.saved.map(|(buffer, _)| GateUpTape::F32(buffer))),
        )
    }
}

/// Computes y = up ⊙ activation(gate) in place of `up`.
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

/// Computes the gradients of gate and up, as [`gated_backward`] does, and y again. Works tile by
/// tile from the saved rounded `[gate | up]` and the upstream gradient.
pub struct GradientTiles<'a> {
    activation: ActivationFunction,
    saved: &'a Operand<'static>,
    width: usize,
    y: TiledOperand,
    gate: TiledOperand,
    up: TiledOperand,
}

impl<'a> GradientTiles<'a> {
    /// Allocates the outputs for the `[gate | up]` that [`GatedTiles`] saved, with F = `width`.
    pub fn new(saved: &'a Operand<'static>, activation: ActivationFunction, width: usize) -> Self {
        let tiled = || TiledOperand::new(saved.kernel(), saved.rows(), width);
        GradientTiles {
            activation,
            saved,
            width,
            y: tiled(),
            gate: tiled(),
            up: tiled(),
        }
    }

    /// Processes a tile of the upstream gradient (row stride [`NR`]).
    ///
    /// # Safety
    /// No other task writes this part at the same time.
    pub unsafe fn take(&self, rows: Range<usize>, columns: Range<usize>, g: &[f32]) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            match self.activation {
                ActivationFunction::Silu => self.take_by::<Silu>(rows, columns, g),
                ActivationFunction::GeluTanh => self.take_by::<GeluTanh>(rows, columns, g),
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
                        let saved = self.saved.bf16_row(row);
                        widen(&saved[columns.clone()], &mut gate[i * NR..][..width]);
                        widen(
                            &saved[self.width + columns.start..][..width],
                            &mut up[i * NR..][..width],
                        );
                    }
                    let n = part.len() * NR;
                    for (((y, a), b), g) in y[..n]
                        .iter_mut()
                        .zip(&mut gate[..n])
                        .zip(&mut up[..n])
                        .zip(g)
                    {
                        let s = G::sigma(*a);
                        *y = *a * s * *b;
                        (*a, *b) = (g * *b * s * (1.0 + G::slope(*a, s)), g * *a * s);
                    }
                },
            );
            // SAFETY: guaranteed by the caller.
            unsafe {
                self.y.write(part.clone(), columns.start, width, &y);
                self.gate.write(part.clone(), columns.start, width, &gate);
                self.up.write(part, columns.start, width, &up);
            }
        }
    }

    /// Returns the operands of y and of the gradients `[∂gate, ∂up]`.
    pub fn finish(self) -> (Operand<'static>, [Operand<'static>; 2]) {
        (self.y.operand(), [self.gate.operand(), self.up.operand()])
    }
}

/// Rows of a tile that are converted to f32 at a time.
const PART: usize = 16;

#[inline(always)]
fn widened(x: bf16) -> f32 {
    f32::from_bits((x.to_bits() as u32) << 16)
}

/// Converts bf16 to f32. It has a loop of its own because the compiler reliably vectorises a loop
/// over few slices.
#[inline(always)]
fn widen(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = widened(*from);
    }
}
