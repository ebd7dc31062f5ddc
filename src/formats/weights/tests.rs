//! Tests that weights are read again only from unchanged files.

use std::fs::OpenOptions;
use std::io::{BufWriter, Seek as _, SeekFrom, Write as _};

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};

use super::*;
use crate::formats::gguf::reader::Gguf;
use crate::formats::loader::load_model;
use crate::formats::source::HubOptions;
use crate::model::params::params;

const NORM: &str = "model.norm.weight";
const QUERIES: &str = "model.layers.0.self_attn.q_proj.weight";

/// A model in temporary files.
struct Case {
    folder: tempfile::TempDir,
    config: ModelConfig,
    weights: Weights,
    /// The file that the tests change. The tensor `name` begins at byte `offset` in it, and `names`
    /// has the names of the tensors to load.
    file: PathBuf,
    name: &'static str,
    offset: u64,
    names: Vec<String>,
}

fn param(config: &ModelConfig, name: &str) -> ParamSpec {
    params(&config.spec)
        .into_iter()
        .find(|param| param.name() == name)
        .unwrap()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens/models")
        .join(name)
}

/// Returns a Llama in four files. The tests change its tensor [`NORM`].
fn safetensors() -> Case {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden("llama-sharded")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let model = load_model(
        None,
        folder.path().to_str().unwrap(),
        &HubOptions::default(),
    )
    .unwrap();
    let FileFormat::Safetensors(stored) = &model.weights.kind else {
        panic!("not safetensors")
    };
    let (file, offset) = stored.place(NORM);
    let names = params(&model.config.spec)
        .iter()
        .map(|param| param.name().to_owned())
        .collect();
    Case {
        folder,
        config: model.config,
        weights: model.weights,
        file,
        name: NORM,
        offset,
        names,
    }
}

/// Returns two tensors of the same Llama as a GGUF file, one of them in llama.cpp's order of rows.
fn gguf() -> Case {
    let folder = tempfile::tempdir().unwrap();
    let model = load_model(
        None,
        golden("llama").to_str().unwrap(),
        &HubOptions::default(),
    )
    .unwrap();
    let stored = |name: &str| {
        let tensor = model
            .weights
            .load(&param(&model.config, name), Precision::F32)
            .unwrap();
        QTensor::quantize(&tensor, GgmlDType::F32).unwrap()
    };
    let (norm, queries) = (stored(NORM), stored(QUERIES));
    let file = folder.path().join("model.gguf");
    let mut writer = BufWriter::new(std::fs::File::create(&file).unwrap());
    gguf_file::write(
        &mut writer,
        &[],
        &[
            ("output_norm.weight", &norm),
            ("blk.0.attn_q.weight", &queries),
        ],
    )
    .unwrap();
    writer.flush().unwrap();
    let opened = Gguf::open(&file).unwrap();
    let offset = opened.tensor("output_norm.weight").unwrap().offset;
    let weights = Weights::from_gguf(GgufWeights::new(opened, &model.config), &file);
    let names = vec![NORM.to_owned(), QUERIES.to_owned()];
    Case {
        folder,
        config: model.config,
        weights,
        file,
        name: NORM,
        offset,
        names,
    }
}

impl Case {
    fn load(&self, weights: &Weights, name: &str) -> Result<Vec<f32>, ModelError> {
        Ok(weights
            .load(&param(&self.config, name), Precision::F32)?
            .flatten_all()?
            .to_vec1()?)
    }

    fn load_all(&self, weights: &Weights) -> Vec<Vec<f32>> {
        self.names
            .iter()
            .map(|name| self.load(weights, name).unwrap())
            .collect()
    }

    /// Loads everything as a server does that computes in bf16, and closes the files.
    fn close(&mut self) -> (WeightFiles, Vec<Vec<f32>>) {
        let mut weights = std::mem::replace(
            &mut self.weights,
            Weights::open_folder(&golden("llama")).unwrap(),
        );
        let wanted = self.load_all(&weights);
        weights.record_digests();
        for name in &self.names {
            weights
                .load(&param(&self.config, name), Precision::Bf16)
                .unwrap();
        }
        (weights.files(), wanted)
    }
}

#[test]
fn weights_are_read_again_bit_for_bit() {
    for mut case in [safetensors(), gguf()] {
        let (files, wanted) = case.close();
        let again = files.open().unwrap();
        assert_eq!(case.load_all(&again), wanted);
        // A second time, because the files can be opened again any number of times.
        assert_eq!(case.load_all(&again.files().open().unwrap()), wanted);
    }
}

#[test]
fn what_is_overwritten_while_it_is_read_is_not_used() {
    for mut case in [safetensors(), gguf()] {
        let (files, wanted) = case.close();
        let again = files.open().unwrap();
        let before = |name: &str| &wanted[case.names.iter().position(|n| n == name).unwrap()];
        assert_eq!(&case.load(&again, case.name).unwrap(), before(case.name));
        let mut file = OpenOptions::new().write(true).open(&case.file).unwrap();
        file.seek(SeekFrom::Start(case.offset)).unwrap();
        file.write_all(&1.5f32.to_le_bytes()).unwrap();
        for weights in [again, files.open().unwrap()] {
            let e = case.load(&weights, case.name).unwrap_err();
            assert!(
                matches!(&e, ModelError::Changed { path, .. } if *path == case.file),
                "{e}"
            );
            assert!(e.to_string().contains(case.name), "{e}");
            // Only changes of tensors that are loaded are detected.
            assert_eq!(&case.load(&weights, QUERIES).unwrap(), before(QUERIES));
        }
    }
}

#[test]
fn a_file_that_is_cut_off_or_gone_is_an_error_that_names_no_folder() {
    for mut case in [safetensors(), gguf()] {
        let (files, _) = case.close();
        let again = files.open().unwrap();
        // If the file were mapped, the process would be killed here.
        OpenOptions::new()
            .write(true)
            .open(&case.file)
            .unwrap()
            .set_len(16)
            .unwrap();
        let cut_off = case.load(&again, case.name).unwrap_err();
        std::fs::remove_file(&case.file).unwrap();
        let gone = files.open().map(|_| ()).unwrap_err();
        let name = case.file.file_name().unwrap().to_str().unwrap();
        for e in [cut_off, gone] {
            assert!(matches!(&e, ModelError::Changed { .. }), "{e}");
            let told = e.for_clients();
            assert!(
                told.contains(name) && !told.contains(case.folder.path().to_str().unwrap()),
                "{told}"
            );
        }
    }
}

#[test]
fn what_was_not_loaded_before_cannot_be_read_again() {
    let mut case = gguf();
    case.weights.record_digests();
    let files = case.weights.files();
    let e = case.load(&files.open().unwrap(), NORM).unwrap_err();
    assert!(matches!(&e, ModelError::Changed { .. }), "{e}");
}

#[test]
fn the_stored_format_is_that_of_most_weights() {
    let format_of = |name: &str| Weights::open_folder(&golden(name)).unwrap().stored_format();
    assert_eq!(
        (format_of("llama"), format_of("llama-bf16")),
        ("f32", "bf16")
    );

    let values = |shape: (usize, usize)| {
        let numbers = (0..shape.0 * shape.1).map(|i| i as f32).collect();
        Tensor::from_vec(numbers, shape, &candle_core::Device::Cpu).unwrap()
    };
    let quantised = QTensor::quantize(&values((4, 256)), GgmlDType::Q4K).unwrap();
    let exact = QTensor::quantize(&values((3, 256)), GgmlDType::F32).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    let mut writer = BufWriter::new(std::fs::File::create(&file).unwrap());
    let tensors = [
        ("blk.0.attn_q.weight", &quantised),
        ("blk.0.attn_k.weight", &exact),
        ("blk.0.attn_v.weight", &exact),
    ];
    gguf_file::write(&mut writer, &[], &tensors[..2]).unwrap();
    writer.flush().unwrap();
    let config = gguf().config;
    let open = || GgufWeights::new(Gguf::open(&file).unwrap(), &config);
    assert_eq!(Weights::from_gguf(open(), &file).stored_format(), "q4_k");

    let mut writer = BufWriter::new(std::fs::File::create(&file).unwrap());
    gguf_file::write(&mut writer, &[], &tensors).unwrap();
    writer.flush().unwrap();
    assert_eq!(Weights::from_gguf(open(), &file).stored_format(), "f32");
}
