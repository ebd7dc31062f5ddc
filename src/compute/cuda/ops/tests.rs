use std::sync::Arc;

use super::*;

const HEADS: Heads = Heads {
    query: 4,
    key: 2,
    dim: 64,
    window: None,
    scale: 0.125,
    softcap: None,
};

/// Opens the GPU that BRADLEY_TEST_DEVICE names (`cuda:N`, which may be the emulator).
fn gpu() -> Arc<Gpu> {
    let ordinal = std::env::var("BRADLEY_TEST_DEVICE")
        .ok()
        .and_then(|name| name.strip_prefix("cuda:")?.parse().ok())
        .expect(
            "this test needs a GPU or the emulator: set the environment variable \
             BRADLEY_TEST_DEVICE to cuda:N",
        );
    Gpu::open(ordinal).unwrap()
}

/// Asserts that the launch failed with an error that contains all of these parts.
#[track_caller]
fn assert_refused(launched: Result<()>, parts: &[&str]) {
    let error = launched
        .expect_err("the launch must be refused")
        .to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} should say {part:?}");
    }
}

#[test]
fn an_operand_is_compared_by_kind_and_size() {
    assert!(compare("swiglu", "gate_up", (F32, 8), (F32, 8)).is_ok());
    assert_refused(
        compare("swiglu", "gate_up", (F32, 7), (F32, 8)),
        &["swiglu", "gate_up", "7 elements", "8"],
    );
    assert_refused(
        compare("swiglu", "gate_up", (F32, 8), (Bf16, 8)),
        &["swiglu", "gate_up", "F32", "Bf16"],
    );
    assert_eq!(count_rows("embed", "table", 12, 4).unwrap(), 3);
    assert_eq!(count_rows("embed", "table", 0, 4).unwrap(), 0);
    for width in [0, 5, 24] {
        assert_refused(
            count_rows("embed", "table", 12, width).map(drop),
            &["embed", "table", "12 elements", "rows"],
        );
    }
    assert!(check_columns("add_bias", "y", 8, 8).is_ok());
    assert_refused(
        check_columns("add_bias", "y", 9, 8),
        &["add_bias", "column 9", "8 elements"],
    );
    let heads = HeadLayout {
        rows: 3,
        stride: 512,
        first: 256,
        heads: 2,
        dim: 128,
    };
    assert_eq!(
        (heads.elements("head_norm", "x").unwrap(), heads.items()),
        (3 * 512, 6)
    );
    assert_refused(
        HeadLayout {
            first: 257,
            ..heads
        }
        .elements("head_norm", "x")
        .map(drop),
        &["head_norm", "column 513"],
    );
}

#[test]
fn parts_of_key_gradients_exist_on_tensor_cores_where_heads_share_keys() {
    assert!(has_key_gradient_parts(Bf16, HEADS));
    assert!(!has_key_gradient_parts(F32, HEADS));
    assert!(!has_key_gradient_parts(Bf16, Heads { dim: 32, ..HEADS }));
    assert!(!has_key_gradient_parts(Bf16, Heads { key: 4, ..HEADS }));
    let softcap = Some(50.0);
    assert!(has_key_gradient_parts(Bf16, Heads { softcap, ..HEADS }));
}

#[test]
#[ignore = "needs a GPU or the emulator (BRADLEY_TEST_DEVICE)"]
fn launches_compute_what_they_say_and_refuse_operands_that_do_not_fit() {
    let gpu = gpu();
    let f32s = |values: &[f32]| gpu.upload(F32, values).unwrap();
    // The kind of 32 bits also stands for integers.
    let ints = |values: &[u32]| gpu.upload(F32, values).unwrap();
    let zeros = |kind, len| gpu.zeros(kind, len).unwrap();
    let read = |memory: &Memory| {
        let mut values = vec![0f32; memory.len()];
        gpu.download(memory, &mut values).unwrap();
        values
    };

    // Rows: gathered, and added to where they came from.
    let source = f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let (to, index) = (zeros(F32, 4), ints(&[2, 0]));
    gather_rows(&gpu, &to, &source, &index, 2).unwrap();
    assert_eq!(read(&to), [5.0, 6.0, 1.0, 2.0]);
    assert_refused(
        gather_rows(&gpu, &to, &source, &ints(&[2]), 2),
        &["gather_rows", "to has 4 elements", "2"],
    );
    let (rows, offsets, order) = (ints(&[0, 2]), ints(&[0, 1, 2]), ints(&[1, 0]));
    let scatter = |offsets| ScatterRows {
        to: &source,
        from: &to,
        rows: &rows,
        offsets,
        order: &order,
        width: 2,
    };
    scatter_rows(&gpu, scatter(&offsets)).unwrap();
    assert_eq!(read(&source), [2.0, 4.0, 3.0, 4.0, 10.0, 12.0]);
    assert_refused(
        scatter_rows(&gpu, scatter(&order)),
        &["scatter_rows", "offsets has 2 elements", "3"],
    );
    let (x, table) = (zeros(F32, 4), f32s(&[1.0, 2.0, 3.0, 4.0]));
    embed(&gpu, &x, &table, &ints(&[1, 1]), 2).unwrap();
    assert_eq!(read(&x), [3.0, 4.0, 3.0, 4.0]);
    assert_refused(
        embed(&gpu, &x, &f32s(&[1.0; 3]), &ints(&[1, 1]), 2),
        &["embed", "table has 3 elements"],
    );

    // Columns in the middle of a matrix `[2, 3]`.
    let matrix = f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let middle = Columns {
        matrix: &matrix,
        stride: 3,
        first: 1,
        count: 1,
    };
    let sums = f32s(&[0.5]);
    column_sum(&gpu, &sums, middle).unwrap();
    assert_eq!(read(&sums), [7.5]);
    add_bias(&gpu, middle, &f32s(&[10.0])).unwrap();
    assert_eq!(read(&matrix), [1.0, 12.0, 3.0, 4.0, 15.0, 6.0]);
    assert_refused(
        add_bias(&gpu, middle, &f32s(&[1.0; 2])),
        &["add_bias", "bias has 2 elements", "1"],
    );
    assert_refused(
        add_bias(&gpu, Columns { count: 3, ..middle }, &f32s(&[1.0; 3])),
        &["add_bias", "column 4"],
    );

    // Norms and the feed-forward part.
    let (y, x, w) = (
        zeros(F32, 4),
        f32s(&[3.0, 3.0, -2.0, 2.0]),
        f32s(&[1.0, 2.0]),
    );
    rms_norm(&gpu, &y, &x, &w, 0.0).unwrap();
    assert_eq!(read(&y), [1.0, 2.0, -1.0, 2.0]);
    assert_refused(
        rms_norm(&gpu, &zeros(F32, 2), &x, &w, 0.0),
        &["rms_norm", "x has 4 elements", "2"],
    );
    assert_refused(
        rms_norm(&gpu, &y, &zeros(Bf16, 4), &w, 0.0),
        &["rms_norm", "x", "Bf16", "F32"],
    );
    let partial = zeros(F32, 2);
    rms_norm_weight(&gpu, &partial, &x, &f32s(&[1.0, 2.0]), &y, 2).unwrap();
    assert_eq!(read(&partial), [3.0 + 4.0, 6.0 + 8.0]);
    assert_refused(
        rms_norm_weight(&gpu, &x, &x, &f32s(&[1.0, 2.0]), &y, 2),
        &["rms_norm_weight", "partial has 4"],
    );
    assert_refused(
        gated(&gpu, ActivationFunction::Silu, &y, &x, 2),
        &["swiglu", "gate_up has 4 elements", "8"],
    );
    assert_refused(
        gated_backward(&gpu, ActivationFunction::Silu, &x, &y, 2),
        &["swiglu_backward", "gate_up has 4 elements", "8"],
    );
    assert_refused(
        gated(&gpu, ActivationFunction::GeluTanh, &y, &x, 2),
        &["geglu", "gate_up has 4 elements", "8"],
    );
    let sum = f32s(&[1.0, -2.0, 3.0]);
    add(&gpu, &sum, &f32s(&[0.5, 2.0, 1.0])).unwrap();
    assert_eq!(read(&sum), [1.5, 0.0, 4.0]);
    assert_refused(add(&gpu, &sum, &y), &["y has 3 elements", "4"]);

    // The head: one row, a tile of three of four columns.
    let logits = f32s(&[0.0, 1.0, 2.0, 9.0]);
    let tile = LogitTile {
        logits: &logits,
        stride: 4,
        first: 5,
        width: 3,
    };
    let (state, p, scales, targets) = (
        zeros(F32, SOFTMAX_STATE),
        zeros(F32, 4),
        zeros(F32, 1),
        ints(&[6]),
    );
    let head = |state, p, tile| HeadTile {
        state,
        p,
        scales: &scales,
        tile,
        targets: &targets,
        distribution: true,
        gradient: true,
        softcap: None,
    };
    head_start(&gpu, &state).unwrap();
    head_tile(&gpu, head(&state, &p, tile)).unwrap();
    let softmax = read(&state);
    assert_eq!(
        (softmax[0], softmax[5], softmax[6].to_bits()),
        (2.0, 1.0, 7)
    );
    assert_eq!(read(&p)[2], 1.0);
    assert_refused(
        head_tile(&gpu, head(&state, &scales, tile)),
        &["head_tile", "p has 1 elements", "4"],
    );
    assert_refused(
        head_tile(&gpu, head(&p, &p, tile)),
        &["head_tile", "state has 4 elements", "8"],
    );
    assert_refused(
        head_tile(&gpu, head(&state, &p, LogitTile { width: 5, ..tile })),
        &["head_tile", "column 5"],
    );
    // With a soft-cap: the maximum and the target's logit, and the exponential times the slope.
    let with_cap = HeadTile {
        softcap: Some(2.0),
        ..head(&state, &p, tile)
    };
    head_start(&gpu, &state).unwrap();
    head_tile(&gpu, with_cap).unwrap();
    let (softmax, top) = (read(&state), 2.0 * 1f32.tanh());
    assert!((softmax[0] - top).abs() < 1e-6, "{softmax:?}");
    assert!(
        (softmax[5] - 2.0 * 0.5f32.tanh()).abs() < 1e-6,
        "{softmax:?}"
    );
    let slope = 1.0 - 1f32.tanh().powi(2);
    assert!((read(&p)[2] - slope).abs() < 1e-6, "{:?}", read(&p));
    let (lse, g, errors) = (f32s(&[top]), f32s(&[1.0]), zeros(F32, 4));
    let of_errors = |g, softcap| HeadErrors {
        errors: &errors,
        tile,
        lse: &lse,
        g,
        targets: &targets,
        softcap,
    };
    head_errors(&gpu, of_errors(&g, Some(2.0))).unwrap();
    assert!(
        (read(&errors)[2] + slope).abs() < 1e-6,
        "{:?}",
        read(&errors)
    );
    assert_refused(
        head_errors(&gpu, of_errors(&state, Some(2.0))),
        &["head_errors", "g has 8 elements", "1"],
    );
    let (d, weight) = (f32s(&[0.0, 0.0]), f32s(&[1.0; 16]));
    let finish = HeadFinish {
        d: &d,
        state: &state,
        w: &weight,
        targets: &targets,
        width: 2,
        softcap: Some(2.0),
    };
    head_finish(&gpu, finish).unwrap();
    let slope = 1.0 - 0.5f32.tanh().powi(2);
    assert!((read(&d)[0] - slope).abs() < 1e-6, "{:?}", read(&d));
    assert_refused(
        head_start(&gpu, &p),
        &["head_start", "state has 4 elements"],
    );

    // Attention: one token sees itself alone, so its output is its value.
    let qkv = f32s(&vec![0.25; HEADS.row()]);
    let (out, lse) = (zeros(F32, HEADS.width()), zeros(F32, HEADS.query));
    let (tiles, positions) = (ints(&[0, 1, 0, 0, 0]), ints(&[0]));
    let over = AttentionTiles {
        heads: HEADS,
        tiles: &tiles,
        positions: &positions,
    };
    attention(&gpu, &out, &lse, &qkv, over).unwrap();
    assert!(read(&out).iter().all(|x| *x == 0.25), "{:?}", read(&out));
    // Its score is 64 · 0.25² · 0.125 = 0.5.
    assert!((read(&lse)[0] - 0.5).abs() < 1e-6, "{:?}", read(&lse));
    let capped = AttentionTiles {
        heads: Heads {
            softcap: Some(0.25),
            ..HEADS
        },
        ..over
    };
    attention(&gpu, &out, &lse, &qkv, capped).unwrap();
    assert!(read(&out).iter().all(|x| *x == 0.25), "{:?}", read(&out));
    let score = 0.25 * 2f32.tanh();
    assert!((read(&lse)[0] - score).abs() < 1e-6, "{:?}", read(&lse));
    attention(&gpu, &out, &lse, &qkv, over).unwrap();
    assert_refused(
        attention(&gpu, &out, &scales, &qkv, over),
        &["attention", "lse has 1 elements", "4"],
    );
    assert_refused(
        attention(
            &gpu,
            &out,
            &lse,
            &qkv,
            AttentionTiles {
                tiles: &lse,
                ..over
            },
        ),
        &["attention", "tiles has 4"],
    );
    let (dqkv, delta) = (zeros(F32, HEADS.row()), zeros(F32, HEADS.query));
    let backward = AttentionBackward {
        dqkv: &dqkv,
        qkv: &qkv,
        dout: &out,
        lse: &lse,
        delta: &delta,
    };
    attention_delta(&gpu, &delta, &out, &out, HEADS).unwrap();
    assert_eq!(read(&delta), [64.0 * 0.0625; 4]);
    assert_refused(
        attention_dq(
            &gpu,
            AttentionBackward {
                delta: &scales,
                ..backward
            },
            over,
        ),
        &["attention_dq", "delta has 1"],
    );
    assert_refused(
        attention_dkv(&gpu, backward, over, Some(&qkv)),
        &["attention_dkv", "parts"],
    );
    let key_tiles = ints(&[0, 1, 1, 1, 1]);
    attention_dkv(
        &gpu,
        backward,
        AttentionTiles {
            tiles: &key_tiles,
            ..over
        },
        None,
    )
    .unwrap();
    // The value's gradient is that of the output, summed over the two heads that share it.
    let of_value = read(&dqkv)[HEADS.row() - 1];
    assert!((of_value - 0.5).abs() < 1e-5, "{of_value}");
    let places = HeadLayout {
        rows: 1,
        stride: HEADS.row(),
        first: 0,
        heads: 6,
        dim: 64,
    };
    let tables = |half| RotaryTables {
        cos: &lse,
        sin: &lse,
        half,
        pairs: RotaryPairs::Halves,
    };
    assert_refused(
        rope(&gpu, &dqkv, tables(32), places, Direction::Forward),
        &["rope", "cos has 4 elements", "32"],
    );
    assert_refused(
        rope(&gpu, &dqkv, tables(33), places, Direction::Forward),
        &["rope", "33 pairs", "64"],
    );
    assert_refused(
        head_norm(&gpu, &dqkv, &lse, places, 0.0),
        &["head_norm", "w has 4 elements", "64"],
    );
}
