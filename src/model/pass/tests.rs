//! The passes on a device that computes nothing: it counts the bytes that are allocated.

use std::cell::Cell;
use std::rc::Rc;

use super::*;
use crate::compute::cpu::rope::Direction;
use crate::model::backend::{Attended, BlockOps, Gated, OutputGradient, StreamNorm};
use crate::model::block_shape::BlockShape;
use crate::model::params::LinearGroup;
use crate::model::spec::{Activation, AttentionSpec, BlockSpec, FeedForward, Mixer, Norms, QkNorm};

const TOKENS: usize = 5;
const BLOCKS: usize = 3;
/// Width of the residual stream.
const HIDDEN: usize = 32;
/// Rank of an adapter on every linear layer.
const RANK: usize = 2;
/// Bytes of an element of an activation, and of the residual stream.
const ELEMENT: usize = 2;
const F32: usize = 4;

/// What happened on the device.
#[derive(Default)]
struct Ledger {
    /// Bytes.
    live: Cell<usize>,
    /// The most bytes that were live since this was last set.
    peak: Cell<usize>,
    /// Runs of a block forward.
    runs: Cell<usize>,
}

/// Memory on the device.
struct Piece {
    bytes: usize,
    ledger: Rc<Ledger>,
}

impl Piece {
    fn new(ledger: &Rc<Ledger>, bytes: usize) -> Self {
        ledger.live.set(ledger.live.get() + bytes);
        ledger.peak.set(ledger.peak.get().max(ledger.live.get()));
        Piece { bytes, ledger: ledger.clone() }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.ledger.live.set(self.ledger.live.get() - self.bytes);
    }
}

struct Counting;

impl Backend for Counting {
    type Activation = Piece;
    /// `None` where an activation is borrowed.
    type Operand<'a> = Option<Piece>;
    type LowRank = Piece;
    type GateUpSpace = Piece;
    type GateUp = Piece;
    type GateUpGradient = Piece;
    type HeadTape = ();
    type Gradients = ();
    type Retired<T> = ();

    fn copy(x: &Piece) -> Result<Piece> {
        Ok(Piece::new(&x.ledger, x.bytes))
    }

    fn retire<T>(_value: T) {}
}

struct CountingRow {
    blocks: Vec<BlockSpec>,
    ledger: Rc<Ledger>,
}

impl CountingRow {
    fn new(qk_norm: QkNorm) -> Self {
        let attention = AttentionSpec {
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            scale: 0.35,
            rope: 0,
            window: None,
            qk_norm,
            qkv_bias: false,
            output_bias: false,
        };
        let block = BlockSpec {
            mixer: Mixer::Attention(attention),
            mixer_norms: Norms::Pre,
            feed_forward: FeedForward::Gated {
                width: 48,
                activation: Activation::Silu,
                bias: false,
            },
            feed_forward_norms: Norms::Pre,
        };
        CountingRow { blocks: vec![block; BLOCKS], ledger: Rc::default() }
    }

    fn shape(&self) -> BlockShape {
        BlockShape::of(HIDDEN, &self.blocks[0])
    }

    /// Allocates so many bytes for each token.
    fn piece(&self, bytes: usize) -> Piece {
        Piece::new(&self.ledger, TOKENS * bytes)
    }
}

impl RowOps<Counting> for CountingRow {
    type Block<'a> = CountingBlock<'a>;

    fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, index: usize) -> Result<CountingBlock<'_>> {
        Ok(CountingBlock { row: self, spec: &self.blocks[index], shape: self.shape() })
    }

    fn embed(&self) -> Result<Piece> {
        Ok(self.piece(F32 * HIDDEN))
    }

    fn embed_backward(&self, _gx: &Piece, (): &mut ()) -> Result<()> {
        Ok(())
    }

    fn log_probs(&self, _x: &Piece) -> Result<Vec<f32>> {
        Ok(vec![-1.0])
    }

    fn head(&self, _x: &Piece, _keep: Keep) -> Result<(HeadOutput, ())> {
        Ok((HeadOutput { log_probs: vec![-1.0], ..HeadOutput::default() }, ()))
    }

    fn head_backward(
        &self,
        (): (),
        _output: HeadOutput,
        _upstream: &[f32],
        (): &mut (),
    ) -> Result<Piece> {
        Ok(self.piece(F32 * HIDDEN))
    }
}

struct CountingBlock<'a> {
    row: &'a CountingRow,
    spec: &'a BlockSpec,
    shape: BlockShape,
}

impl CountingBlock<'_> {
    fn low_rank(&self, group: LinearGroup) -> Piece {
        self.row.piece(ELEMENT * RANK * group.members().len())
    }
}

impl BlockOps<Counting> for CountingBlock<'_> {
    fn spec(&self) -> &BlockSpec {
        self.spec
    }

    fn new_qkv(&self) -> Result<Piece> {
        self.row.ledger.runs.set(self.row.ledger.runs.get() + 1);
        Ok(self.row.piece(ELEMENT * self.shape.qkv()))
    }

    fn new_gate_up(&self) -> Result<Piece> {
        Ok(self.row.piece(ELEMENT * self.shape.gate_up()))
    }

    fn norm(&self, _norm: StreamNorm, _x: &Piece) -> Result<Option<Piece>> {
        Ok(Some(self.row.piece(ELEMENT * HIDDEN)))
    }

    fn attention_operand(&self, _output: &Piece) -> Option<Piece> {
        None
    }

    fn project(
        &self,
        group: LinearGroup,
        _input: &Option<Piece>,
        _out: &mut Piece,
    ) -> Result<Piece> {
        Ok(self.low_rank(group))
    }

    fn add_to_stream(
        &self,
        group: LinearGroup,
        _input: &Option<Piece>,
        _x: &mut Piece,
    ) -> Result<Piece> {
        Ok(self.low_rank(group))
    }

    fn head_norms(&self, _qkv: &mut Piece) -> Result<()> {
        Ok(())
    }

    fn rotate(&self, _qkv: &mut Piece, _direction: Direction) -> Result<()> {
        Ok(())
    }

    fn attention(&self, _qkv: &Piece) -> Result<Attended<Counting>> {
        let output = self.row.piece(ELEMENT * self.shape.attended());
        Ok(Attended { output, log_sum_exp: self.row.piece(F32 * self.shape.log_sum_exps()) })
    }

    fn feed_forward(
        &self,
        space: Piece,
        input: Option<Piece>,
        _save_tape: bool,
    ) -> Result<Gated<Counting>> {
        let low_rank = self.low_rank(LinearGroup::GateUp);
        drop(input);
        let y = Some(self.row.piece(ELEMENT * self.shape.feed_forward));
        Ok(Gated { y, gate_up: Some(space), low_rank })
    }

    fn feed_forward_backward(
        &self,
        gate_up: Piece,
        _low_rank: &Piece,
        _gx: &Piece,
        (): &mut (),
    ) -> Result<Piece> {
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
        _input: &Option<Piece>,
        _low_rank: &Piece,
        _g: OutputGradient<'_, Counting>,
        (): &mut (),
    ) -> Result<Piece> {
        let width = if group == LinearGroup::Output { self.shape.attended() } else { HIDDEN };
        Ok(self.row.piece(ELEMENT * width))
    }

    fn attention_backward(
        &self,
        _qkv: &Piece,
        _attended: &Attended<Counting>,
        _g: &Piece,
    ) -> Result<Piece> {
        Ok(self.row.piece(ELEMENT * self.shape.qkv()))
    }

    fn head_norms_backward(&self, _before: &Piece, _dqkv: &mut Piece, (): &mut ()) -> Result<()> {
        Ok(())
    }

    fn norm_backward(
        &self,
        _norm: StreamNorm,
        _x: &Piece,
        _g: &Piece,
        _gx: &mut Piece,
        (): &mut (),
    ) -> Result<()> {
        Ok(())
    }
}

#[test]
fn a_forward_pass_saves_what_the_formulas_for_its_memory_say() {
    for qk_norm in [QkNorm::Absent, QkNorm::PerHead] {
        let row = CountingRow::new(qk_norm);
        let tape_bytes = row.shape().tape_bytes(ELEMENT, 7 * RANK);
        for (keep, of_block) in [
            (Keep::Tapes, tape_bytes),
            (Keep::Inputs, row.shape().input_bytes()),
            (Keep::Nothing, 0),
        ] {
            let mut yields = 0;
            let tape = forward(&row, keep, &mut || yields += 1).unwrap();
            assert_eq!(row.ledger.live.get(), BLOCKS * TOKENS * of_block, "{qk_norm:?} {keep:?}");
            assert_eq!(
                (yields, tape.output().log_probs.len()),
                (BLOCKS, 1),
                "{qk_norm:?} {keep:?}"
            );
            drop(tape);
            assert_eq!(row.ledger.live.get(), 0, "{qk_norm:?} {keep:?}");
        }
    }
}

#[test]
fn a_backward_pass_takes_no_more_than_its_formula_and_frees_everything() {
    for qk_norm in [QkNorm::Absent, QkNorm::PerHead] {
        for (keep, runs_again) in [(Keep::Tapes, 0), (Keep::Inputs, BLOCKS)] {
            let row = CountingRow::new(qk_norm);
            let tape = forward(&row, keep, &mut || {}).unwrap();
            let saved = row.ledger.live.get();
            row.ledger.peak.set(saved);
            row.ledger.runs.set(0);
            let mut yields = 0;
            backward(&row, tape, &[1.0], &mut (), &mut || yields += 1).unwrap();
            assert_eq!(
                (yields, row.ledger.runs.get()),
                (BLOCKS, runs_again),
                "{qk_norm:?} {keep:?}"
            );
            assert_eq!(row.ledger.live.get(), 0, "{qk_norm:?} {keep:?}");
            if keep == Keep::Tapes {
                let besides = row.ledger.peak.get() - saved;
                let formula = TOKENS * row.shape().backward_bytes(ELEMENT);
                assert!(
                    besides > 0 && besides <= formula,
                    "{qk_norm:?}: {besides} bytes besides the tapes, {formula} planned"
                );
            }
        }
    }
}

#[test]
fn a_row_that_saved_nothing_cannot_go_back() {
    let row = CountingRow::new(QkNorm::Absent);
    let tape = forward(&row, Keep::Nothing, &mut || {}).unwrap();
    let error = backward(&row, tape, &[1.0], &mut (), &mut || {}).unwrap_err();
    assert!(error.to_string().contains("without a tape"), "{error}");
}

#[test]
fn log_probs_yield_before_every_block_and_hold_nothing() {
    let row = CountingRow::new(QkNorm::PerHead);
    let mut yields = 0;
    assert_eq!(log_probs(&row, &mut || yields += 1).unwrap(), [-1.0]);
    assert_eq!((yields, row.ledger.runs.get(), row.ledger.live.get()), (BLOCKS, BLOCKS, 0));
}
