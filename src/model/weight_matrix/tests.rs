use candle_core::{DType, Device, Tensor, Var};
use half::bf16;
use proptest::prelude::*;

use super::WeightMatrix;
use crate::compute::cpu::gemm::{
    Elements, Kernel, NR, Operand, Orientation, Term, Threads, View, WeightView, matmul,
};
use crate::math::rng;

fn values(name: &str, n: usize) -> Vec<f32> {
    rng::kaiming_uniform(23, name, n, 1)
}

fn matrix(values: &[f32], rows: usize, columns: usize, dtype: DType) -> WeightMatrix {
    let tensor = Tensor::from_slice(values, (rows, columns), &Device::Cpu).unwrap();
    WeightMatrix::new(tensor.to_dtype(dtype).unwrap()).unwrap()
}

/// Returns the value that a matrix of a type stores for `x`.
fn stored(x: f32, dtype: DType) -> f32 {
    if dtype == DType::BF16 {
        bf16::from_f32(x).to_f32()
    } else {
        x
    }
}

/// Packs a panel by its definition: for each lane of the depth, `NR` columns of B side by side.
fn panel(kernel: Kernel, k: usize, n: usize, at: impl Fn(usize, usize) -> f32) -> Vec<u32> {
    let bits = |i: usize, j: usize| if i < k && j < n { at(i, j) } else { 0.0 };
    let pair = |i: usize, j: usize| u32::from(bf16::from_f32(bits(i, j)).to_bits());
    let unit = |p: usize, j: usize| match kernel {
        Kernel::Avx512Bf16 | Kernel::Amx => pair(2 * p, j) | pair(2 * p + 1, j) << 16,
        Kernel::Portable | Kernel::Avx512 => bits(p, j).to_bits(),
    };
    (0..kernel.depth(k) * NR)
        .map(|i| unit(i / NR, i % NR))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// The forward and the backward GEMM of a linear layer read the panels of the definition, for
    /// every storage type and every place of the panel. Bf16 kernels read pairs, so k starts even.
    #[test]
    fn a_matrix_packs_the_panels_of_both_products(
        rows in 1usize..90,
        columns in 1usize..90,
        k_from in 0usize..40,
        k_len in 1usize..90,
        n_from in 0usize..90,
        n_len in 1usize..=NR,
    ) {
        let w = values("w", rows * columns);
        for dtype in [DType::F32, DType::BF16] {
            let w_matrix = matrix(&w, rows, columns, dtype);
            let read = w_matrix.read().unwrap();
            for orientation in [Orientation::Transposed, Orientation::Plain] {
                let (depth, width) = match orientation {
                    Orientation::Transposed => (columns, rows),
                    Orientation::Plain => (rows, columns),
                };
                let (k_from, n_from) = (2 * k_from % depth / 2 * 2, n_from % width);
                let (k, n) = (k_from..depth.min(k_from + k_len), n_from..width.min(n_from + n_len));
                let at = |i: usize, j: usize| {
                    let (i, j) = (k_from + i, n_from + j);
                    let (row, column) =
                        if orientation == Orientation::Transposed { (j, i) } else { (i, j) };
                    stored(w[row * columns + column], dtype)
                };
                for kernel in Kernel::available() {
                    let mut units = vec![u32::MAX; kernel.depth(k.len()) * NR];
                    read.view().pack(kernel, orientation, k.clone(), n.clone(), &mut units);
                    let expected = panel(kernel, k.len(), n.len(), at);
                    prop_assert!(
                        units == expected,
                        "{:?} {:?} {:?}: {:?} x {:?}", kernel, dtype, orientation, k, n
                    );
                }
            }
        }
    }

    /// A GEMM with a matrix equals the GEMM with a view of its values, bit for bit.
    #[test]
    fn a_product_with_a_matrix_is_that_with_its_values(
        m in 1usize..150,
        rows in 1usize..150,
        columns in 1usize..300,
    ) {
        let w = values("w", rows * columns);
        let (x, g) = (values("x", m * columns), values("g", m * rows));
        let rounded: Vec<bf16> = w.iter().map(|x| bf16::from_f32(*x)).collect();
        for (dtype, elements) in [
            (DType::F32, Elements::F32(&w)),
            (DType::BF16, Elements::Bf16(&rounded)),
        ] {
            let w = matrix(&w, rows, columns, dtype);
            let read = w.read().unwrap();
            for kernel in Kernel::available() {
                let x = Operand::new(kernel, View::f32(&x, columns), m, columns, 1.0);
                let g = Operand::new(kernel, View::f32(&g, rows), m, rows, 1.0);
                let multiply = |n: usize, term: Term| {
                    let mut c = vec![f32::NAN; m * n];
                    matmul(m, n, &[term], &mut c, n, false, Threads::All);
                    c.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
                };
                let view = View::of(elements, columns);
                let forward = multiply(rows, Term::new(&x, read.view().transposed()));
                prop_assert!(
                    forward == multiply(rows, Term::new(&x, view.t())),
                    "{:?} {:?}", kernel, dtype
                );
                let backward = multiply(columns, Term::new(&g, read.view().plain()));
                prop_assert!(
                    backward == multiply(columns, Term::new(&g, view)),
                    "{:?} {:?}", kernel, dtype
                );
            }
        }
    }
}

#[test]
fn a_matrix_says_its_shape_and_reads_its_rows() {
    let w = values("w", 6 * 5);
    for (dtype, bytes) in [(DType::F32, 120), (DType::BF16, 60)] {
        let matrix = matrix(&w, 6, 5, dtype);
        assert_eq!(
            (matrix.rows(), matrix.columns(), matrix.bytes()),
            (6, 5, bytes)
        );
        let read = matrix.read().unwrap();
        assert_eq!((read.view().rows(), read.view().columns()), (6, 5));
        let mut row = [f32::NAN; 5];
        read.view().read_row(4, &mut row);
        let expected: Vec<f32> = w[20..25].iter().map(|x| stored(*x, dtype)).collect();
        assert_eq!(row.as_slice(), expected);
        assert_eq!(
            (matrix.tensor().dtype(), matrix.tensor().dims()),
            (dtype, [6, 5].as_slice())
        );
    }
    let view = WeightView::new(Elements::F32(&w), 5);
    assert_eq!((view.rows(), view.elements().len()), (6, 30));
}

#[test]
fn a_matrix_shares_the_storage_of_its_tensor() {
    let var = Var::from_tensor(&Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap()).unwrap();
    let matrix = WeightMatrix::new(var.as_detached_tensor()).unwrap();
    var.set(&Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap())
        .unwrap();
    let mut row = [f32::NAN; 3];
    matrix.read().unwrap().view().read_row(1, &mut row);
    assert_eq!(row, [1.0; 3]);
    assert_eq!(matrix.tensor().to_vec2::<f32>().unwrap(), [[1.0; 3]; 2]);
}

#[test]
fn what_is_no_matrix_of_floats_is_refused() {
    let vector = Tensor::zeros(5, DType::F32, &Device::Cpu).unwrap();
    assert!(WeightMatrix::new(vector).is_err());
    let integers = Tensor::zeros((2, 2), DType::U32, &Device::Cpu).unwrap();
    assert!(
        WeightMatrix::new(integers)
            .unwrap_err()
            .to_string()
            .contains("f32 or bf16")
    );
    // The transpose of a tensor is a non-contiguous view of its storage.
    let tensor = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(
        WeightMatrix::new(tensor.t().unwrap())
            .unwrap()
            .read()
            .is_err()
    );
}
