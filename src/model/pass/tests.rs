//! Tests the passes on a mock device that computes nothing and counts the allocated bytes.

use std::cell::Cell;
use std::rc::Rc;

use super::*;
use crate::compute::cpu::rope::Direction;
use crate::model::backend::{Attended, BlockOps, Gated, OutputGradient, StreamNorm};
use crate::model::block_shape::BlockShape;
use crate::model::params::LinearGroup;
use crate::model::spec::{
    ActivationFunction, AttentionSpec, BlockSpec, FeedForward, Mixer, NormNames, Norms,
    Projections, QkNorm,
};

const TOKENS: usize = 5;
const BLOCKS: usize = 3;
/// Width of the residual stream.
const HIDDEN: usize = 32;
/// Rank of an adapter on every linear layer.
const RANK: usize = 2;
/// Bytes of an element of an activation.
const ELEMENT: usize = 2;
/// Bytes of an element of the residual stream.
const F32: usize = 4;

/// Counters of the mock device.
#[derive(Default)]
struct Ledger {
    /// Bytes allocated now.
    live: Cell<usize>,
    /// Maximum of `live` since this field was last set, in bytes.
    peak: Cell<usize>,
    /// Number of times that a block was run forward.
    runs: Cell<usize>,
}

/// Memory on the device.
struct CountedPiece {
    bytes: usize,
    ledger: Rc<Ledger>,
}

impl CountedPiece {
    fn new(ledger: &Rc<Ledger>, bytes: usize) -> Self {
        ledger.live.set(ledger.live.get() + bytes);
        ledger.peak.set(ledger.peak.get().max(ledger.live.get()));
        CountedPiece {
            bytes,
            ledger: ledger.clone(),
        }
    }
}

impl Drop for CountedPiece {
    fn drop(&mut self) {
        self.ledger.live.set(self.ledger.live.get() - self.bytes);
    }
}

struct Counting;

impl Backend for Counting {
    type Activation = CountedPiece;
    /// `None` where an activation is borrowed.
    type LeftOperand<'a> = Option<CountedPiece>;
    type LowRankProjection = CountedPiece;
    type GateUpSpace = CountedPiece;
    type GateUp = CountedPiece;
    type GateUpGradient = CountedPiece;
    type HeadTape = ();
    type Gradients = ();
    type Retired<T> = ();

    fn copy(x: &CountedPiece) -> Result<CountedPiece> {
        Ok(CountedPiece::new(&x.ledger, x.bytes))
    }

    fn retire<T>(_value: T) {}
}

struct CountingRow {
    blocks: Vec<BlockSpec>,
    ledger: Rc<Ledger>,
}

impl CountingRow {
    fn new((qk_norm, norms, output_factor): (QkNorm, Norms, f32)) -> Self {
        let attention = AttentionSpec {
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            scale: 0.35,
            softcap: None,
            rope: Some(0),
            window: None,
            qk_norm,
            qkv_bias: false,
            output_bias: false,
            projections: Projections::Separate,
        };
        let block = BlockSpec {
            mixer: Mixer::Attention(attention),
            mixer_norms: norms,
            feed_forward: FeedForward::Gated {
                width: 48,
                activation: ActivationFunction::Silu,
                bias: false,
                projections: Projections::Separate,
            },
            feed_forward_norms: norms,
            norm_names: NormNames::Gemma,
            output_factor,
        };
        CountingRow {
            blocks: vec![block; BLOCKS],
            ledger: Rc::default(),
        }
    }

    fn shape(&self) -> BlockShape {
        BlockShape::of(HIDDEN, &self.blocks[0])
    }

    /// Allocates `bytes` bytes per token.
    fn piece(&self, bytes: usize) -> CountedPiece {
        CountedPiece::new(&self.ledger, TOKENS * bytes)
    }
}

impl RowOps<Counting> for CountingRow {
    type Block<'a> = CountingBlock<'a>;

    fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, index: usize) -> Result<CountingBlock<'_>> {
        Ok(CountingBlock {
            row: self,
            spec: &self.blocks[index],
            shape: self.shape(),
        })
    }

    fn embed(&self) -> Result<CountedPiece> {
        Ok(self.piece(F32 * HIDDEN))
    }

    fn embed_backward(&self, _gx: &CountedPiece, (): &mut ()) -> Result<()> {
        Ok(())
    }

    fn log_probs(&self, _x: &CountedPiece) -> Result<Vec<f32>> {
        Ok(vec![-1.0])
    }

    fn head(&self, _x: &CountedPiece, _save: SavePolicy) -> Result<(HeadOutput, ())> {
        Ok((
            HeadOutput {
                log_probs: vec![-1.0],
                ..HeadOutput::default()
            },
            (),
        ))
    }

    fn head_backward(
        &self,
        (): (),
        _output: HeadOutput,
        _upstream: &[f32],
        (): &mut (),
    ) -> Result<CountedPiece> {
        Ok(self.piece(F32 * HIDDEN))
    }
}

struct CountingBlock<'a> {
    row: &'a CountingRow,
    spec: &'a BlockSpec,
    shape: BlockShape,
}

impl CountingBlock<'_> {
    fn low_rank(&self, group: LinearGroup) -> CountedPiece {
        let layers = match group {
            LinearGroup::Qkv => 3,
            LinearGroup::GateUp => 2,
            LinearGroup::Output | LinearGroup::Down => 1,
        };
        self.row.piece(ELEMENT * RANK * layers)
    }
}

impl BlockOps<Counting> for CountingBlock<'_> {
    fn spec(&self) -> &BlockSpec {
        self.spec
    }

    fn new_qkv(&self) -> Result<CountedPiece> {
        self.row.ledger.runs.set(self.row.ledger.runs.get() + 1);
        Ok(self.row.piece(ELEMENT * self.shape.qkv()))
    }

    fn new_stream(&self) -> Result<CountedPiece> {
        Ok(self.row.piece(F32 * HIDDEN))
    }

    fn new_gate_up(&self) -> Result<CountedPiece> {
        Ok(self.row.piece(ELEMENT * self.shape.gate_up()))
    }

    fn norm(&self, _norm: StreamNorm, _x: &CountedPiece) -> Result<Option<CountedPiece>> {
        Ok(Some(self.row.piece(ELEMENT * HIDDEN)))
    }

    fn attention_operand(&self, _output: &CountedPiece) -> Option<CountedPiece> {
        None
    }

    fn project(
        &self,
        group: LinearGroup,
        _input: &Option<CountedPiece>,
        _out: &mut CountedPiece,
    ) -> Result<CountedPiece> {
        Ok(self.low_rank(group))
    }

    fn add_to_stream(
        &self,
        group: LinearGroup,
        _input: &Option<CountedPiece>,
        _x: &mut CountedPiece,
    ) -> Result<CountedPiece> {
        Ok(self.low_rank(group))
    }

    fn stream_operand(&self, _x: &CountedPiece) -> Result<Option<CountedPiece>> {
        Ok(Some(self.row.piece(ELEMENT * HIDDEN)))
    }

    fn add_gradient(&self, _g: &CountedPiece, _gx: &mut CountedPiece) -> Result<()> {
        drop(self.row.piece(F32 * HIDDEN));
        Ok(())
    }

    fn add_scaled(&self, factor: f32, y: &CountedPiece, _x: &mut CountedPiece) -> Result<()> {
        drop(self.scaled(factor, y)?);
        Ok(())
    }

    fn scaled(&self, _factor: f32, _x: &CountedPiece) -> Result<CountedPiece> {
        Ok(self.row.piece(F32 * HIDDEN))
    }

    fn add_norm(&self, _norm: StreamNorm, _y: &CountedPiece, _x: &mut CountedPiece) -> Result<()> {
        drop(self.row.piece(F32 * HIDDEN));
        Ok(())
    }

    fn head_norms(&self, _qkv: &mut CountedPiece) -> Result<()> {
        Ok(())
    }

    fn rotate(&self, _rope: usize, _qkv: &mut CountedPiece, _direction: Direction) -> Result<()> {
        Ok(())
    }

    fn attention(&self, _qkv: &CountedPiece) -> Result<Attended<Counting>> {
        let output = self.row.piece(ELEMENT * self.shape.attended());
        Ok(Attended {
            output,
            log_sum_exp: self.row.piece(F32 * self.shape.log_sum_exps()),
        })
    }

    fn feed_forward(
        &self,
        space: CountedPiece,
        input: Option<CountedPiece>,
        _save_tape: bool,
    ) -> Result<Gated<Counting>> {
        let low_rank = self.low_rank(LinearGroup::GateUp);
        drop(input);
        let y = Some(self.row.piece(ELEMENT * self.shape.feed_forward));
        Ok(Gated {
            y,
            gate_up: Some(space),
            low_rank,
        })
    }

    fn feed_forward_backward(
        &self,
        gate_up: CountedPiece,
        _low_rank: &CountedPiece,
        _g: &CountedPiece,
        (): &mut (),
    ) -> Result<CountedPiece> {
        let (y, gy) = (
            self.row.piece(ELEMENT * self.shape.feed_forward),
            self.row.piece(ELEMENT * self.shape.feed_forward),
        );
        drop((y, gy));
        Ok(gate_up)
    }

    fn linear_backward(
        &self,
        group: LinearGroup,
        _input: &Option<CountedPiece>,
        _low_rank: &CountedPiece,
        _g: OutputGradient<'_, Counting>,
        (): &mut (),
    ) -> Result<CountedPiece> {
        let width = if group == LinearGroup::Output {
            self.shape.attended()
        } else {
            HIDDEN
        };
        Ok(self.row.piece(ELEMENT * width))
    }

    fn attention_backward(
        &self,
        _qkv: &CountedPiece,
        _attended: &Attended<Counting>,
        _g: &CountedPiece,
    ) -> Result<CountedPiece> {
        Ok(self.row.piece(ELEMENT * self.shape.qkv()))
    }

    fn head_norms_backward(
        &self,
        _before: &CountedPiece,
        _dqkv: &mut CountedPiece,
        (): &mut (),
    ) -> Result<()> {
        Ok(())
    }

    fn norm_backward(
        &self,
        _norm: StreamNorm,
        _x: &CountedPiece,
        _g: &CountedPiece,
        _gx: &mut CountedPiece,
        (): &mut (),
    ) -> Result<()> {
        Ok(())
    }
}

const VARIANTS: [(QkNorm, Norms, f32); 6] = [
    (QkNorm::Absent, Norms::Pre, 1.0),
    (QkNorm::PerHead, Norms::Pre, 1.0),
    (QkNorm::PerHead, Norms::PreAndPost, 1.0),
    (QkNorm::AllHeads, Norms::Post, 1.0),
    (QkNorm::Absent, Norms::Pre, 0.5),
    (QkNorm::Absent, Norms::PreAndPost, 0.5),
];

#[test]
fn a_forward_pass_saves_what_the_formulas_for_its_memory_say() {
    for variant in VARIANTS {
        let row = CountingRow::new(variant);
        let tape_bytes = row.shape().tape_bytes(ELEMENT, 7 * RANK);
        for (save, of_block) in [
            (SavePolicy::Tapes, tape_bytes),
            (SavePolicy::BlockInputs, row.shape().input_bytes()),
            (SavePolicy::Nothing, 0),
        ] {
            let mut yields = 0;
            let tape = forward(&row, save, &mut || yields += 1).unwrap();
            assert_eq!(
                row.ledger.live.get(),
                BLOCKS * TOKENS * of_block,
                "{variant:?} {save:?}"
            );
            assert_eq!(
                (yields, tape.output().log_probs.len()),
                (BLOCKS, 1),
                "{variant:?} {save:?}"
            );
            drop(tape);
            assert_eq!(row.ledger.live.get(), 0, "{variant:?} {save:?}");
        }
    }
}

#[test]
fn a_backward_pass_takes_no_more_than_its_formula_and_frees_everything() {
    for variant in VARIANTS {
        for (save, runs_again) in [(SavePolicy::Tapes, 0), (SavePolicy::BlockInputs, BLOCKS)] {
            let row = CountingRow::new(variant);
            let tape = forward(&row, save, &mut || {}).unwrap();
            let saved = row.ledger.live.get();
            row.ledger.peak.set(saved);
            row.ledger.runs.set(0);
            let mut yields = 0;
            backward(&row, tape, &[1.0], &mut (), &mut || yields += 1).unwrap();
            assert_eq!(
                (yields, row.ledger.runs.get()),
                (BLOCKS, runs_again),
                "{variant:?} {save:?}"
            );
            assert_eq!(row.ledger.live.get(), 0, "{variant:?} {save:?}");
            if save == SavePolicy::Tapes {
                let besides = row.ledger.peak.get() - saved;
                let formula = TOKENS * row.shape().backward_bytes(ELEMENT);
                assert!(
                    besides > 0 && besides <= formula,
                    "{variant:?}: {besides} bytes besides the tapes, {formula} planned"
                );
            }
        }
    }
}

#[test]
fn a_row_that_saved_nothing_cannot_go_back() {
    let row = CountingRow::new(VARIANTS[0]);
    let tape = forward(&row, SavePolicy::Nothing, &mut || {}).unwrap();
    let error = backward(&row, tape, &[1.0], &mut (), &mut || {}).unwrap_err();
    assert!(error.to_string().contains("without a tape"), "{error}");
}

#[test]
fn log_probs_yield_before_every_block_and_hold_nothing() {
    let row = CountingRow::new(VARIANTS[2]);
    let mut yields = 0;
    assert_eq!(log_probs(&row, &mut || yields += 1).unwrap(), [-1.0]);
    assert_eq!(
        (yields, row.ledger.runs.get(), row.ledger.live.get()),
        (BLOCKS, BLOCKS, 0)
    );
}
