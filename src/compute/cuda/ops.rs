//! Typed launches of the kernels in `kernels/*.cu`, one function per operation. If several kernels
//! compute an operation (SwiGLU or GEGLU, generic or on tensor cores), the function picks one.
//!
//! Each function takes the operands by name, derives the numbers of rows and blocks from their
//! sizes, checks that the operands fit each other and starts the kernel. Only this file knows the
//! argument order of a kernel and chooses its grid and threads ([`Launch`]).
//!
//! An operand of the wrong size is an error that names the kernel, the operand and both sizes.
//! Without the check the kernel would read or write another buffer's memory. Sizes are in elements.
//! Integers on the device have 32 bits, and their memory is [`Kind::F32`].

#[cfg(test)]
mod tests;

use candle_core::{Result, bail};

use super::gpu::{Gpu, Memory};
use super::kernels::Kind::{Bf16, F32};
use super::kernels::{Arg, AttentionPass, Kind, Launch, tensor_core_kernel};
use crate::compute::cpu::attention::Heads;
use crate::compute::cpu::rope::{Direction, RotaryPairs};
use crate::compute::cpu::swiglu::ActivationFunction;

/// Number of floats in a row's softmax state (`State` in head.cu).
pub(crate) const SOFTMAX_STATE: usize = 8;

/// Number of integers in an entry of a tile list for attention. `Queries` and `Keys` in
/// attention.cuh say what they are.
pub(crate) const TILE_ENTRY: usize = 5;

/// Number of rows (for head norms: heads) that one block of threads sums for the gradient of a
/// norm's weight.
const ROWS_PER_PARTIAL: usize = 64;

/// Threads per block in kernels that give each warp a head.
const HEAD_THREADS: usize = 128;

/// Heads per block in kernels that give each warp a head.
const HEADS_PER_BLOCK: usize = 4;

/// Widest head that a warp holds in registers (`MAX_DIM` in norm.cu). All threads of a block work
/// together on a wider one.
const MAX_WARP_HEAD: usize = 256;

/// Threads per block of the attention kernels.
const ATTENTION_THREADS: usize = 128;

/// Checks the element type and the number of elements of an operand against what its kernel
/// expects.
fn compare(kernel: &str, operand: &str, is: (Kind, usize), expected: (Kind, usize)) -> Result<()> {
    if is == expected {
        return Ok(());
    }
    bail!(
        "CUDA: {kernel}: {operand} has {} elements ({:?}), but {} ({:?}) fit the other operands",
        is.1,
        is.0,
        expected.1,
        expected.0
    )
}

/// Checks operands against what `kernel` expects; each entry is (name, memory, element type, number
/// of elements).
fn check(kernel: &str, operands: &[(&str, &Memory, Kind, usize)]) -> Result<()> {
    operands.iter().try_for_each(|&(name, memory, kind, len)| {
        compare(kernel, name, (memory.kind(), memory.len()), (kind, len))
    })
}

/// Returns the number of rows of `width` elements in an operand of `len` elements.
fn count_rows(kernel: &str, operand: &str, len: usize, width: usize) -> Result<usize> {
    match len.checked_rem(width) {
        Some(0) => Ok(len / width),
        _ => bail!(
            "CUDA: {kernel}: {operand} has {len} elements, which cannot be divided into \
             rows of {width}"
        ),
    }
}

/// Returns the argument for an optional operand: a null pointer if it is absent.
fn optional(memory: Option<&Memory>) -> Arg {
    memory.map_or(Arg::Pointer(0), Arg::from)
}

/// Returns the name of a kernel's variant: the first one without a soft-cap, else the second one.
/// Its last argument is the cap, which is added to `args`.
fn capped(softcap: Option<f32>, names: [&'static str; 2], args: &mut Vec<Arg>) -> &'static str {
    let [plain, with_cap] = names;
    let Some(cap) = softcap else { return plain };
    args.push(cap.into());
    with_cap
}

/// Returns the number of partial sums for the gradient of a norm's weight over `rows` rows.
pub(crate) fn weight_partials(rows: usize) -> usize {
    rows.div_ceil(ROWS_PER_PARTIAL)
}

/// Consecutive columns of a row-major matrix.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    pub matrix: &'a Memory,
    /// Width of the matrix in elements.
    pub stride: usize,
    pub first: usize,
    pub count: usize,
}

impl<'a> Columns<'a> {
    /// Returns all columns of a matrix with rows of `width` elements.
    pub fn all(matrix: &'a Memory, width: usize) -> Self {
        Columns {
            matrix,
            stride: width,
            first: 0,
            count: width,
        }
    }

    /// Checks that the columns lie inside the matrix and returns the number of rows.
    fn rows(&self, kernel: &str, operand: &str) -> Result<usize> {
        check_columns(kernel, operand, self.first + self.count, self.stride)?;
        count_rows(kernel, operand, self.matrix.len(), self.stride)
    }
}

/// Checks that columns up to `end` lie inside rows of `stride` elements.
fn check_columns(kernel: &str, operand: &str, end: usize, stride: usize) -> Result<()> {
    if end > stride {
        bail!("CUDA: {kernel}: column {end} of {operand} is outside its rows of {stride} elements");
    }
    Ok(())
}

/// Position of heads of equal width in the rows of a matrix: head h of row r starts at element
/// r·stride + first + h·dim.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadLayout {
    pub rows: usize,
    pub stride: usize,
    pub first: usize,
    pub heads: usize,
    pub dim: usize,
}

impl HeadLayout {
    /// Checks that the heads lie inside the rows and returns the number of elements of the matrix.
    fn elements(&self, kernel: &str, operand: &str) -> Result<usize> {
        check_columns(
            kernel,
            operand,
            self.first + self.heads * self.dim,
            self.stride,
        )?;
        Ok(self.rows * self.stride)
    }

    /// Returns the number of heads in all rows.
    pub fn items(&self) -> usize {
        self.rows * self.heads
    }
}

// ----------------------------------------------------------------------------------- moving rows

/// Gathers embeddings: x\[t, :\] = table\[ids\[t\], :\], with x `[T, width]` in f32, table `[V,
/// width]`, ids `[T]`.
pub(crate) fn embed(
    gpu: &Gpu,
    x: &Memory,
    table: &Memory,
    ids: &Memory,
    width: usize,
) -> Result<()> {
    let tokens = ids.len();
    count_rows("embed", "table", table.len(), width)?;
    check(
        "embed",
        &[("x", x, F32, tokens * width), ("ids", ids, F32, tokens)],
    )?;
    let args = [
        x.into(),
        table.into(),
        ids.into(),
        tokens.into(),
        width.into(),
    ];
    gpu.launch("embed", Some(table.kind()), Launch::blocks(tokens), &args)
}

/// Gathers rows: to\[i, :\] = from\[index\[i\], :\], with to `[n, width]`, from `[T, width]`, index
/// `[n]`.
pub(crate) fn gather_rows(
    gpu: &Gpu,
    to: &Memory,
    from: &Memory,
    index: &Memory,
    width: usize,
) -> Result<()> {
    let rows = index.len();
    let source_rows = count_rows("gather_rows", "from", from.len(), width)?;
    check(
        "gather_rows",
        &[
            ("to", to, F32, rows * width),
            ("from", from, F32, source_rows * width),
            ("index", index, F32, rows),
        ],
    )?;
    let args = [
        to.into(),
        from.into(),
        index.into(),
        rows.into(),
        width.into(),
    ];
    gpu.launch("gather_rows", None, Launch::blocks(rows), &args)
}

/// Operands of [`scatter_rows`].
pub(crate) struct ScatterRows<'a> {
    /// `[P, width]`
    pub to: &'a Memory,
    /// `[n, width]`
    pub from: &'a Memory,
    /// Distinct rows of `to` that receive sums `[U]`.
    pub rows: &'a Memory,
    /// For each of these rows, the start of its terms in `order`; the last entry is the end `[U +
    /// 1]`.
    pub offsets: &'a Memory,
    /// Rows of `from`, grouped by their target row `[n]`.
    pub order: &'a Memory,
    pub width: usize,
}

/// Adds rows: to\[rows\[i\], :\] += Σ from\[order\[k\], :\] over k in offsets\[i\]..offsets\[i +
/// 1\], in this order.
pub(crate) fn scatter_rows(gpu: &Gpu, s: ScatterRows<'_>) -> Result<()> {
    let (unique, width) = (s.rows.len(), s.width);
    let target_rows = count_rows("scatter_rows", "to", s.to.len(), width)?;
    check(
        "scatter_rows",
        &[
            ("to", s.to, F32, target_rows * width),
            ("from", s.from, F32, s.order.len() * width),
            ("rows", s.rows, F32, unique),
            ("offsets", s.offsets, F32, unique + 1),
            ("order", s.order, F32, s.order.len()),
        ],
    )?;
    let args = [
        s.to.into(),
        s.from.into(),
        s.rows.into(),
        s.offsets.into(),
        s.order.into(),
        unique.into(),
        width.into(),
    ];
    gpu.launch("scatter_rows", None, Launch::blocks(unique), &args)
}

/// Scales rows: to\[i, :\] = g\[i\] · from\[i, :\], with from `[n, width]` and g `[n]` in f32.
pub(crate) fn scale_rows(
    gpu: &Gpu,
    to: &Memory,
    from: &Memory,
    g: &Memory,
    width: usize,
) -> Result<()> {
    let (kind, rows) = (to.kind(), g.len());
    check(
        "scale_rows",
        &[
            ("to", to, kind, rows * width),
            ("from", from, F32, rows * width),
            ("g", g, F32, rows),
        ],
    )?;
    let args = [to.into(), from.into(), g.into(), rows.into(), width.into()];
    gpu.launch("scale_rows", Some(kind), Launch::blocks(rows), &args)
}

/// Rounds `from` to bf16.
pub(crate) fn cast_bf16(gpu: &Gpu, to: &Memory, from: &Memory) -> Result<()> {
    let len = from.len();
    check(
        "cast_bf16",
        &[("to", to, Bf16, len), ("from", from, F32, len)],
    )?;
    gpu.launch(
        "cast_bf16",
        None,
        Launch::strided(len),
        &[to.into(), from.into(), Arg::Long(len as i64)],
    )
}

/// Converts `from`, in bf16, to f32.
pub(crate) fn cast_f32(gpu: &Gpu, to: &Memory, from: &Memory) -> Result<()> {
    let len = from.len();
    check(
        "cast_f32",
        &[("to", to, F32, len), ("from", from, Bf16, len)],
    )?;
    gpu.launch(
        "cast_f32",
        None,
        Launch::strided(len),
        &[to.into(), from.into(), Arg::Long(len as i64)],
    )
}

// ---------------------------------------------------------------------------------- element-wise

/// Rotary tables of a row.
#[derive(Clone, Copy)]
pub(crate) struct RotaryTables<'a> {
    /// `[T, half]`.
    pub cos: &'a Memory,
    /// `[T, half]`.
    pub sin: &'a Memory,
    /// Number of pairs that are rotated in each head.
    pub half: usize,
    /// Dimensions that are rotated together.
    pub pairs: RotaryPairs,
}

/// Applies the rotary embedding to heads of every row of `x` in place.
pub(crate) fn rope(
    gpu: &Gpu,
    x: &Memory,
    tables: RotaryTables<'_>,
    heads: HeadLayout,
    direction: Direction,
) -> Result<()> {
    let RotaryTables {
        cos,
        sin,
        half,
        pairs,
    } = tables;
    let HeadLayout {
        rows,
        stride,
        first,
        heads: count,
        dim,
    } = heads;
    if 2 * half > dim {
        bail!("CUDA: rope: {half} pairs do not fit into a head of {dim}");
    }
    let (kind, table) = (x.kind(), rows * half);
    let name = match pairs {
        RotaryPairs::Halves => "rope",
        RotaryPairs::Interleaved => "rope_interleaved",
    };
    check(
        name,
        &[
            ("x", x, kind, heads.elements(name, "x")?),
            ("cos", cos, F32, table),
            ("sin", sin, F32, table),
        ],
    )?;
    let sign: f32 = match direction {
        Direction::Forward => 1.0,
        Direction::Backward => -1.0,
    };
    let args = [
        x.at(first).into(),
        cos.into(),
        sin.into(),
        rows.into(),
        stride.into(),
        count.into(),
        dim.into(),
        half.into(),
        sign.into(),
    ];
    gpu.launch(name, Some(kind), Launch::blocks(rows), &args)
}

/// Computes y = activation(gate) · up, with y `[T, width]` and gate_up = \[gate | up\] `[T,
/// 2·width]`.
pub(crate) fn gated(
    gpu: &Gpu,
    activation: ActivationFunction,
    y: &Memory,
    gate_up: &Memory,
    width: usize,
) -> Result<()> {
    let kernel = match activation {
        ActivationFunction::Silu => "swiglu",
        ActivationFunction::GeluTanh => "geglu",
    };
    let tokens = count_rows(kernel, "y", y.len(), width)?;
    check(kernel, &[("gate_up", gate_up, y.kind(), 2 * y.len())])?;
    let args = [y.into(), gate_up.into(), tokens.into(), width.into()];
    gpu.launch(
        kernel,
        Some(y.kind()),
        Launch::strided(tokens * width),
        &args,
    )
}

/// Replaces gate_up by its gradient, given the gradient of y, `gy` `[T, width]`.
pub(crate) fn gated_backward(
    gpu: &Gpu,
    activation: ActivationFunction,
    gate_up: &Memory,
    gy: &Memory,
    width: usize,
) -> Result<()> {
    let kernel = match activation {
        ActivationFunction::Silu => "swiglu_backward",
        ActivationFunction::GeluTanh => "geglu_backward",
    };
    let tokens = count_rows(kernel, "gy", gy.len(), width)?;
    check(kernel, &[("gate_up", gate_up, gy.kind(), 2 * gy.len())])?;
    let args = [gate_up.into(), gy.into(), tokens.into(), width.into()];
    gpu.launch(
        kernel,
        Some(gy.kind()),
        Launch::strided(tokens * width),
        &args,
    )
}

/// Adds y to x, both in f32.
pub(crate) fn add(gpu: &Gpu, x: &Memory, y: &Memory) -> Result<()> {
    check("add_bias", &[("y", x, F32, y.len())])?;
    // x is a single row, and y is its bias.
    add_bias(gpu, Columns::all(x, x.len()), y)
}

/// Adds an f32 bias to every row of the given columns.
pub(crate) fn add_bias(gpu: &Gpu, y: Columns<'_>, bias: &Memory) -> Result<()> {
    let rows = y.rows("add_bias", "y")?;
    check("add_bias", &[("bias", bias, F32, y.count)])?;
    let add_to_y = true;
    let args = [
        y.matrix.at(y.first).into(),
        bias.into(),
        rows.into(),
        y.count.into(),
        y.stride.into(),
        add_to_y.into(),
    ];
    gpu.launch(
        "add_bias",
        Some(y.matrix.kind()),
        Launch::strided(rows * y.count),
        &args,
    )
}

/// Adds column sums: out\[c\] += Σ_r g\[r, c\], with out in f32.
pub(crate) fn column_sum(gpu: &Gpu, out: &Memory, g: Columns<'_>) -> Result<()> {
    let rows = g.rows("column_sum", "g")?;
    check("column_sum", &[("out", out, F32, g.count)])?;
    let args = [
        out.into(),
        g.matrix.at(g.first).into(),
        rows.into(),
        g.count.into(),
        g.stride.into(),
    ];
    gpu.launch(
        "column_sum",
        Some(g.matrix.kind()),
        Launch::columns(g.count),
        &args,
    )
}

// ----------------------------------------------------------------------------------------- norms

/// Computes y = x / √(mean x² + ε) ⊙ w of every row, for x `[n, width]` and w `[width]`
/// in f32.
pub(crate) fn rms_norm(gpu: &Gpu, y: &Memory, x: &Memory, w: &Memory, eps: f32) -> Result<()> {
    let (kind, width) = (y.kind(), w.len());
    let rows = count_rows("rms_norm", "y", y.len(), width)?;
    check("rms_norm", &[("x", x, F32, y.len()), ("w", w, F32, width)])?;
    let args = [
        y.into(),
        x.into(),
        w.into(),
        rows.into(),
        width.into(),
        eps.into(),
    ];
    gpu.launch("rms_norm", Some(kind), Launch::blocks(rows), &args)
}

/// Operands of [`rms_norm_backward`].
pub(crate) struct RmsNormBackward<'a> {
    /// The gradient of x is added to this `[n, width]`, in f32.
    pub gx: &'a Memory,
    /// Receives 1 / √(mean x² + ε) of every row `[n]`, in f32.
    pub inverse: &'a Memory,
    /// `[n, width]`, in f32.
    pub x: &'a Memory,
    /// `[width]`, in f32.
    pub w: &'a Memory,
    /// Gradient of y `[n, width]`.
    pub g: &'a Memory,
    pub eps: f32,
}

/// Adds the gradient of the norm's input to `gx`.
pub(crate) fn rms_norm_backward(gpu: &Gpu, n: RmsNormBackward<'_>) -> Result<()> {
    let (kind, width) = (n.g.kind(), n.w.len());
    let rows = count_rows("rms_norm_backward", "g", n.g.len(), width)?;
    check(
        "rms_norm_backward",
        &[
            ("gx", n.gx, F32, n.g.len()),
            ("inverse", n.inverse, F32, rows),
            ("x", n.x, F32, n.g.len()),
            ("w", n.w, F32, width),
        ],
    )?;
    let args = [
        n.gx.into(),
        n.inverse.into(),
        n.x.into(),
        n.w.into(),
        n.g.into(),
        rows.into(),
        width.into(),
        n.eps.into(),
    ];
    gpu.launch("rms_norm_backward", Some(kind), Launch::blocks(rows), &args)
}

/// Computes partial sums of the gradient of w: partial\[b, :\] = Σ g ⊙ x · inverse over the
/// b-th group of rows. `partial` is `[weight_partials(n), width]`; the sum of its rows is the
/// gradient.
pub(crate) fn rms_norm_weight(
    gpu: &Gpu,
    partial: &Memory,
    x: &Memory,
    inverse: &Memory,
    g: &Memory,
    width: usize,
) -> Result<()> {
    let (kind, rows, parts) = (g.kind(), inverse.len(), weight_partials(inverse.len()));
    check(
        "rms_norm_weight",
        &[
            ("partial", partial, F32, parts * width),
            ("x", x, F32, rows * width),
            ("inverse", inverse, F32, rows),
            ("g", g, kind, rows * width),
        ],
    )?;
    let args = [
        partial.into(),
        x.into(),
        inverse.into(),
        g.into(),
        rows.into(),
        width.into(),
        ROWS_PER_PARTIAL.into(),
    ];
    gpu.launch(
        "rms_norm_weight",
        Some(kind),
        Launch::grid([width.div_ceil(256), parts], 256),
        &args,
    )
}

/// Applies RMSNorm to each head in place; w `[D]` is in f32.
pub(crate) fn head_norm(
    gpu: &Gpu,
    x: &Memory,
    w: &Memory,
    heads: HeadLayout,
    eps: f32,
) -> Result<()> {
    let HeadLayout {
        rows,
        stride,
        first,
        heads: count,
        dim,
    } = heads;
    check(
        "head_norm",
        &[
            ("x", x, x.kind(), heads.elements("head_norm", "x")?),
            ("w", w, F32, dim),
        ],
    )?;
    let args = [
        x.into(),
        w.into(),
        rows.into(),
        stride.into(),
        first.into(),
        count.into(),
        dim.into(),
        eps.into(),
    ];
    let (kernel, grid) = match dim > MAX_WARP_HEAD {
        false => {
            let blocks = heads.items().div_ceil(HEADS_PER_BLOCK);
            ("head_norm", Launch::grid([blocks, 1], HEAD_THREADS))
        }
        true => ("wide_head_norm", Launch::blocks(heads.items())),
    };
    gpu.launch(kernel, Some(x.kind()), grid, &args)
}

/// Operands of [`head_norm_backward`].
pub(crate) struct HeadNormBackward<'a> {
    /// On entry the gradient of the norm's output, on return that of its input.
    pub g: &'a Memory,
    /// If given, receives partial sums of the gradient of w, Σ g ⊙ x · inverse over each group
    /// of heads `[weight_partials(heads), D]`, in f32. The sum of its rows is the gradient.
    pub partial: Option<&'a Memory>,
    /// Input of the norm, in the same layout as `g`.
    pub before: &'a Memory,
    /// `[D]`, in f32.
    pub w: &'a Memory,
    pub eps: f32,
}

/// Replaces the gradient of the norm's output by that of its input.
pub(crate) fn head_norm_backward(
    gpu: &Gpu,
    n: HeadNormBackward<'_>,
    heads: HeadLayout,
) -> Result<()> {
    let HeadLayout {
        rows,
        stride,
        first,
        heads: count,
        dim,
    } = heads;
    let (kind, len, parts) = (
        n.g.kind(),
        heads.elements("head_norm_backward", "g")?,
        weight_partials(heads.items()),
    );
    check(
        "head_norm_backward",
        &[
            ("g", n.g, kind, len),
            ("before", n.before, kind, len),
            ("w", n.w, F32, dim),
        ],
    )?;
    if let Some(partial) = n.partial {
        check(
            "head_norm_backward",
            &[("partial", partial, F32, parts * dim)],
        )?;
    }
    let args = [
        n.g.into(),
        optional(n.partial),
        n.before.into(),
        n.w.into(),
        rows.into(),
        stride.into(),
        first.into(),
        count.into(),
        dim.into(),
        n.eps.into(),
        ROWS_PER_PARTIAL.into(),
    ];
    let (kernel, grid) = match dim > MAX_WARP_HEAD {
        false => ("head_norm_backward", Launch::grid([parts, 1], HEAD_THREADS)),
        true => ("wide_head_norm_backward", Launch::blocks(parts)),
    };
    gpu.launch(kernel, Some(kind), grid, &args)
}

// ------------------------------------------------------------------------------------------ head

/// Initialises the softmax state of every row, state `[n, SOFTMAX_STATE]`, to that of an empty row
/// of logits.
pub(crate) fn head_start(gpu: &Gpu, state: &Memory) -> Result<()> {
    let rows = count_rows("head_start", "state", state.len(), SOFTMAX_STATE)?;
    check("head_start", &[("state", state, F32, state.len())])?;
    gpu.launch(
        "head_start",
        None,
        Launch::blocks(rows.div_ceil(256)),
        &[state.into(), rows.into()],
    )
}

/// Tile of logits for tokens `first` to `first + width`, in rows of `stride` elements.
#[derive(Clone, Copy)]
pub(crate) struct LogitTile<'a> {
    /// `[n, stride]`, in f32.
    pub logits: &'a Memory,
    pub stride: usize,
    pub first: usize,
    pub width: usize,
}

impl LogitTile<'_> {
    /// Checks the tile for `rows` rows and returns the number of elements.
    fn elements(&self, kernel: &str, rows: usize) -> Result<usize> {
        check_columns(kernel, "logits", self.width, self.stride)?;
        check(kernel, &[("logits", self.logits, F32, rows * self.stride)])?;
        Ok(rows * self.stride)
    }
}

/// Operands of [`head_tile`].
pub(crate) struct HeadTile<'a> {
    /// `[n, SOFTMAX_STATE]`, in f32.
    pub state: &'a Memory,
    /// With `gradient`, receives e^(l − max) of the tile, in the same layout as the logits.
    pub p: &'a Memory,
    /// With `gradient`, receives the factor by which sums over earlier tiles must be scaled `[n]`,
    /// in f32.
    pub scales: &'a Memory,
    pub tile: LogitTile<'a>,
    /// Target token of every row `[n]`.
    pub targets: &'a Memory,
    /// True to accumulate the statistics for a `TokenDistribution` too.
    pub distribution: bool,
    pub gradient: bool,
    /// Soft-cap of the logits. With it, `p` is multiplied by the slope of the cap.
    pub softcap: Option<f32>,
}

/// Adds a tile of logits to every row's softmax state.
pub(crate) fn head_tile(gpu: &Gpu, h: HeadTile<'_>) -> Result<()> {
    let (kind, rows) = (h.p.kind(), h.targets.len());
    let elements = h.tile.elements("head_tile", rows)?;
    check(
        "head_tile",
        &[
            ("state", h.state, F32, rows * SOFTMAX_STATE),
            (
                "p",
                h.p,
                kind,
                if h.gradient { elements } else { h.p.len() },
            ),
            ("scales", h.scales, F32, rows),
            ("targets", h.targets, F32, rows),
        ],
    )?;
    let mut args = vec![
        h.state.into(),
        h.p.into(),
        h.scales.into(),
        h.tile.logits.into(),
        h.targets.into(),
        rows.into(),
        h.tile.width.into(),
        h.tile.stride.into(),
        h.tile.first.into(),
        h.distribution.into(),
        h.gradient.into(),
    ];
    let name = capped(h.softcap, ["head_tile", "head_tile_capped"], &mut args);
    gpu.launch(name, Some(kind), Launch::blocks(rows), &args)
}

/// Scales rows in place: d\[i, :\] *= scales\[i\], in f32.
pub(crate) fn head_rescale(gpu: &Gpu, d: &Memory, scales: &Memory, width: usize) -> Result<()> {
    let rows = scales.len();
    check(
        "head_rescale",
        &[("d", d, F32, rows * width), ("scales", scales, F32, rows)],
    )?;
    gpu.launch(
        "head_rescale",
        None,
        Launch::blocks(rows),
        &[d.into(), scales.into(), rows.into(), width.into()],
    )
}

/// Operands of [`head_finish`].
pub(crate) struct HeadFinish<'a> {
    /// On entry Σ_v e^(l_v − max)·W_v, on return ∂log p/∂h `[n, width]`, in f32.
    pub d: &'a Memory,
    /// `[n, SOFTMAX_STATE]`, in f32.
    pub state: &'a Memory,
    /// Weight of the head `[V, width]`.
    pub w: &'a Memory,
    /// Target token of every row `[n]`.
    pub targets: &'a Memory,
    pub width: usize,
    /// Soft-cap of the logits. With it, the target's row of W is multiplied by the cap's slope.
    pub softcap: Option<f32>,
}

/// Computes d\[i, :\] = W\[targets\[i\], :\] − d\[i, :\] / Σ e^(l − max).
pub(crate) fn head_finish(gpu: &Gpu, h: HeadFinish<'_>) -> Result<()> {
    let (kind, rows) = (h.w.kind(), h.targets.len());
    count_rows("head_finish", "w", h.w.len(), h.width)?;
    check(
        "head_finish",
        &[
            ("d", h.d, F32, rows * h.width),
            ("state", h.state, F32, rows * SOFTMAX_STATE),
            ("targets", h.targets, F32, rows),
        ],
    )?;
    let mut args = vec![
        h.d.into(),
        h.state.into(),
        h.w.into(),
        h.targets.into(),
        rows.into(),
        h.width.into(),
    ];
    let name = capped(h.softcap, ["head_finish", "head_finish_capped"], &mut args);
    gpu.launch(name, Some(kind), Launch::blocks(rows), &args)
}

/// Operands of [`head_errors`].
pub(crate) struct HeadErrors<'a> {
    /// Receives ∂loss/∂logits, in the same layout as the logits.
    pub errors: &'a Memory,
    pub tile: LogitTile<'a>,
    /// Log-sum-exp of every row `[n]`, in f32.
    pub lse: &'a Memory,
    /// ∂loss/∂log p of every row `[n]`, in f32.
    pub g: &'a Memory,
    /// Target token of every row `[n]`.
    pub targets: &'a Memory,
    /// Soft-cap of the logits. With it, the errors are multiplied by the slope of the cap.
    pub softcap: Option<f32>,
}

/// Computes
/// errors\[i, j\] = g\[i\]·(1{first + j = targets\[i\]} − e^(logits\[i, j\] − lse\[i\])).
pub(crate) fn head_errors(gpu: &Gpu, h: HeadErrors<'_>) -> Result<()> {
    let (kind, rows) = (h.errors.kind(), h.targets.len());
    let elements = h.tile.elements("head_errors", rows)?;
    check(
        "head_errors",
        &[
            ("errors", h.errors, kind, elements),
            ("lse", h.lse, F32, rows),
            ("g", h.g, F32, rows),
            ("targets", h.targets, F32, rows),
        ],
    )?;
    let mut args = vec![
        h.errors.into(),
        h.tile.logits.into(),
        h.lse.into(),
        h.g.into(),
        h.targets.into(),
        rows.into(),
        h.tile.width.into(),
        h.tile.stride.into(),
        h.tile.first.into(),
    ];
    let name = capped(h.softcap, ["head_errors", "head_errors_capped"], &mut args);
    gpu.launch(name, Some(kind), Launch::blocks(rows), &args)
}

// ------------------------------------------------------------------------------------- attention

/// Returns true if [`attention_dkv`] writes one part for every query head, which [`attention_sum`]
/// then adds up. The tensor-core kernel does: one block for all query heads that share a key head
/// would give fewer blocks than a GPU runs at a time.
pub(crate) fn has_key_gradient_parts(kind: Kind, heads: Heads) -> bool {
    tensor_core_kernel(kind, &heads, AttentionPass::Keys).is_some() && heads.query != heads.key
}

/// Tiles of tokens that blocks of threads work on. They define which tokens attend to which.
#[derive(Clone, Copy)]
pub(crate) struct AttentionTiles<'a> {
    pub heads: Heads,
    /// `[n, TILE_ENTRY]`: tiles of queries, or of keys for [`attention_dkv`].
    pub tiles: &'a Memory,
    /// Position of every token `[T]`.
    pub positions: &'a Memory,
}

impl AttentionTiles<'_> {
    fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Returns the arguments that all attention kernels have in common, without the soft-cap.
    fn arguments(&self) -> [Arg; 7] {
        let Heads {
            query,
            key,
            dim,
            window,
            scale,
            softcap: _,
        } = self.heads;
        let (tiles, positions) = (self.tiles.into(), self.positions.into());
        [
            tiles,
            positions,
            query.into(),
            key.into(),
            dim.into(),
            window.unwrap_or(0).into(),
            scale.into(),
        ]
    }

    /// Starts the kernel of a pass: the tensor-core kernel if there is one for these heads,
    /// otherwise the generic one, with blocks for `generic_heads` heads.
    fn launch(
        &self,
        gpu: &Gpu,
        pass: AttentionPass,
        kind: Kind,
        generic_heads: usize,
        mut args: Vec<Arg>,
    ) -> Result<()> {
        let names = match pass {
            AttentionPass::Forward => ["attention", "attention_capped"],
            AttentionPass::Queries => ["attention_dq", "attention_dq_capped"],
            AttentionPass::Keys => ["attention_dkv", "attention_dkv_capped"],
        };
        let generic = capped(self.heads.softcap, names, &mut args);
        let count = count_rows(generic, "tiles", self.tiles.len(), TILE_ENTRY)?;
        check(
            generic,
            &[
                ("tiles", self.tiles, F32, count * TILE_ENTRY),
                ("positions", self.positions, F32, self.tokens()),
            ],
        )?;
        match tensor_core_kernel(kind, &self.heads, pass) {
            // All heads of a tile run before the next tile.
            Some((name, shared)) => {
                let grid =
                    Launch::grid([self.heads.query, count], ATTENTION_THREADS).shared(shared);
                gpu.launch(name, None, grid, &args)
            }
            None => gpu.launch(
                generic,
                Some(kind),
                Launch::grid([count, generic_heads], ATTENTION_THREADS),
                &args,
            ),
        }
    }
}

/// Computes attention's output `[T, H·D]` and log-sum-exps `[T, H]` in f32 from
/// qkv = \[q | k | v\] `[T, (H + 2K)·D]`.
pub(crate) fn attention(
    gpu: &Gpu,
    out: &Memory,
    lse: &Memory,
    qkv: &Memory,
    over: AttentionTiles<'_>,
) -> Result<()> {
    let (kind, tokens, heads) = (qkv.kind(), over.tokens(), over.heads);
    check(
        "attention",
        &[
            ("out", out, kind, tokens * heads.width()),
            ("lse", lse, F32, tokens * heads.query),
            ("qkv", qkv, kind, tokens * heads.row()),
        ],
    )?;
    let args = [
        [out.into(), lse.into(), qkv.into()].as_slice(),
        &over.arguments(),
    ]
    .concat();
    over.launch(gpu, AttentionPass::Forward, kind, heads.query, args)
}

/// Computes delta\[t, h\] = Σ_d out · dout of the head, with delta `[T, H]` in f32.
pub(crate) fn attention_delta(
    gpu: &Gpu,
    delta: &Memory,
    out: &Memory,
    dout: &Memory,
    heads: Heads,
) -> Result<()> {
    let kind = out.kind();
    let tokens = count_rows("attention_delta", "out", out.len(), heads.width())?;
    check(
        "attention_delta",
        &[
            ("delta", delta, F32, tokens * heads.query),
            ("dout", dout, kind, out.len()),
        ],
    )?;
    let args = [
        delta.into(),
        out.into(),
        dout.into(),
        tokens.into(),
        heads.query.into(),
        heads.dim.into(),
    ];
    let grid = Launch::grid(
        [(tokens * heads.query).div_ceil(HEADS_PER_BLOCK), 1],
        HEAD_THREADS,
    );
    gpu.launch("attention_delta", Some(kind), grid, &args)
}

/// Operands of [`attention_dq`] and [`attention_dkv`].
#[derive(Clone, Copy)]
pub(crate) struct AttentionBackward<'a> {
    /// Receives the gradient of `qkv`. [`attention_dq`] writes the query columns, [`attention_dkv`]
    /// the others.
    pub dqkv: &'a Memory,
    /// `[T, (H + 2K)·D]`
    pub qkv: &'a Memory,
    /// Gradient of the output `[T, H·D]`.
    pub dout: &'a Memory,
    /// `[T, H]`, in f32.
    pub lse: &'a Memory,
    /// Output of [`attention_delta`] `[T, H]`, in f32.
    pub delta: &'a Memory,
}

impl AttentionBackward<'_> {
    /// Checks the operands and returns the first arguments of both kernels.
    fn arguments(&self, kernel: &str, over: AttentionTiles<'_>) -> Result<[Arg; 5]> {
        let (kind, tokens, heads) = (self.qkv.kind(), over.tokens(), over.heads);
        check(
            kernel,
            &[
                ("dqkv", self.dqkv, kind, tokens * heads.row()),
                ("qkv", self.qkv, kind, tokens * heads.row()),
                ("dout", self.dout, kind, tokens * heads.width()),
                ("lse", self.lse, F32, tokens * heads.query),
                ("delta", self.delta, F32, tokens * heads.query),
            ],
        )?;
        Ok([
            self.dqkv.into(),
            self.qkv.into(),
            self.dout.into(),
            self.lse.into(),
            self.delta.into(),
        ])
    }
}

/// Computes the gradients of the queries, over tiles of queries.
pub(crate) fn attention_dq(
    gpu: &Gpu,
    a: AttentionBackward<'_>,
    over: AttentionTiles<'_>,
) -> Result<()> {
    let args = [
        a.arguments("attention_dq", over)?.as_slice(),
        &over.arguments(),
    ]
    .concat();
    over.launch(
        gpu,
        AttentionPass::Queries,
        a.qkv.kind(),
        over.heads.query,
        args,
    )
}

/// Computes the gradients of keys and values, over tiles of keys. If [`has_key_gradient_parts`] is
/// true, they go to `parts` `[T, 2·H·D]` in f32 instead of `dqkv`.
pub(crate) fn attention_dkv(
    gpu: &Gpu,
    a: AttentionBackward<'_>,
    over: AttentionTiles<'_>,
    parts: Option<&Memory>,
) -> Result<()> {
    let (kind, heads) = (a.qkv.kind(), over.heads);
    let mut args = [
        a.arguments("attention_dkv", over)?.as_slice(),
        &over.arguments(),
    ]
    .concat();
    if parts.is_some() != has_key_gradient_parts(kind, heads) {
        bail!(
            "CUDA: attention_dkv: parts given: {}, but {heads:?} in {kind:?} need the opposite",
            parts.is_some()
        );
    }
    if let Some(parts) = parts {
        check(
            "attention_dkv",
            &[("parts", parts, F32, 2 * over.tokens() * heads.width())],
        )?;
    }
    if tensor_core_kernel(kind, &heads, AttentionPass::Keys).is_some() {
        args.push(optional(parts));
    }
    over.launch(gpu, AttentionPass::Keys, kind, heads.key, args)
}

/// Sums `parts` over the query heads that share a key head, into the key and value columns of
/// `dqkv`.
pub(crate) fn attention_sum(gpu: &Gpu, dqkv: &Memory, parts: &Memory, heads: Heads) -> Result<()> {
    let tokens = count_rows("attention_sum", "dqkv", dqkv.len(), heads.row())?;
    check(
        "attention_sum",
        &[
            ("dqkv", dqkv, Bf16, dqkv.len()),
            ("parts", parts, F32, 2 * tokens * heads.width()),
        ],
    )?;
    let args = [
        dqkv.into(),
        parts.into(),
        heads.query.into(),
        heads.key.into(),
        heads.dim.into(),
    ];
    gpu.launch("attention_sum", None, Launch::blocks(tokens), &args)
}
