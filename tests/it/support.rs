//! Helpers of several test modules: golden files, models, and comparisons.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bradley::domain::dataset::{DatasetFormat, PreferenceRow};
use bradley::domain::training::Precision;
use bradley::domain::training::Truncation;
use bradley::formats::loader::{LoadedModel, load_model};
use bradley::formats::source::HubOptions;
use bradley::formats::tokenizer::ChatTokenizer;
use bradley::infer::encode::PairEncoder;
use bradley::infer::pair::EncodedPair;
use bradley::model::decoder::Policy;
use bradley::model::device::{ComputeDevice, DeviceChoice};
use bradley::model::parameters::Parameters;
use bradley::train::rows::read_rows;
use candle_core::{Device, Tensor};
use serde_json::Value;

/// Names of the tiny models of the first four families, which most tests of models use. The other
/// families are in [`FAMILY_MODELS`].
pub const MODELS: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// Names of tiny models of the further families, of each the one with more features. `FAMILIES` in
/// tests/it/families.rs has all models of these families.
pub const FAMILY_MODELS: [&str; 13] = [
    "gemma3",
    "gemma2-64",
    "phi3-long",
    "glm4-64",
    "smollm3-64",
    "granite-64",
    "olmo2-64",
    "olmo3-64",
    "ministral-64",
    "ministral3-64",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl-64",
];

/// Returns a path below tests/goldens.
pub fn golden(path: &str) -> PathBuf {
    // Tests start in the package's folder, wherever they were built.
    std::env::current_dir()
        .unwrap()
        .join("tests/goldens")
        .join(path)
}

/// Returns a golden JSON file.
pub fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(path)).unwrap()).unwrap()
}

/// Returns a golden safetensors file.
pub fn tensors(path: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(golden(path), &Device::Cpu).unwrap()
}

/// Loads the files of a tiny model.
pub fn open(name: &str) -> LoadedModel {
    load_model(
        None,
        golden(&format!("models/{name}")).to_str().unwrap(),
        &HubOptions::default(),
    )
    .unwrap()
}

/// Returns a model as a policy in f32 without an adapter, and its tokenizer.
pub fn policy(model: LoadedModel) -> (Policy, ChatTokenizer) {
    let parameters = Parameters::load(&model.config, &model.weights, Precision::F32).unwrap();
    let config = Arc::new(model.config);
    (
        Policy {
            config,
            parameters: Arc::new(parameters),
            adapter: None,
            precision: Precision::F32,
            device: device(),
            helpers: Arc::default(),
        },
        model.tokenizer,
    )
}

/// Returns the device of the golden tests: BRADLEY_TEST_DEVICE, or the CPU.
pub fn device() -> ComputeDevice {
    static DEVICE: OnceLock<ComputeDevice> = OnceLock::new();
    let open = || {
        let name = std::env::var("BRADLEY_TEST_DEVICE").unwrap_or("cpu".into());
        ComputeDevice::open(DeviceChoice::parse(&name).unwrap()).unwrap()
    };
    DEVICE.get_or_init(open).clone()
}

/// Returns the names of the models that the tests of all families use: those that
/// BRADLEY_TEST_FAMILIES names, separated by commas; without it `few` on a GPU or in the emulator,
/// which is slow, and `all` on the CPU. BRADLEY_TEST_FAMILIES=all means `all` on every device.
pub fn chosen_families(
    all: &'static [&'static str],
    few: &'static [&'static str],
) -> Vec<&'static str> {
    match std::env::var("BRADLEY_TEST_FAMILIES") {
        Ok(wanted) if wanted != "all" => {
            let wanted: Vec<_> = wanted.split(',').collect();
            let chosen: Vec<_> = all.iter().copied().filter(|n| wanted.contains(n)).collect();
            assert!(
                !chosen.is_empty(),
                "BRADLEY_TEST_FAMILIES names none of {all:?}"
            );
            chosen
        }
        Err(_) if !matches!(device(), ComputeDevice::Cpu) => few.to_vec(),
        _ => all.to_vec(),
    }
}

/// Returns true if a pair's results have the same bits whatever else shares its row. This does not
/// hold on a GPU: cuBLAS chooses its kernels by the shape of the multiplication.
pub fn is_batch_invariant() -> bool {
    matches!(device(), ComputeDevice::Cpu)
}

/// Loads a tiny model as a policy, with its tokenizer.
pub fn tiny(name: &str) -> (Policy, ChatTokenizer) {
    policy(open(name))
}

/// Returns the rows of a golden JSONL file.
pub fn rows(file: &str) -> Vec<PreferenceRow> {
    read_rows(&golden(file), DatasetFormat::Jsonl)
        .unwrap()
        .map(|r| r.unwrap())
        .collect()
}

/// Tokenises rows, each to at most `max_length` tokens.
pub fn encode(
    rows: &[PreferenceRow],
    tokenizer: &ChatTokenizer,
    max_length: usize,
) -> Vec<EncodedPair> {
    let encoder = PairEncoder::new(tokenizer, max_length, Truncation::KeepStart);
    rows.iter()
        .map(|r| encoder.encode_row(r).unwrap())
        .collect()
}

/// Returns a JSON list of numbers.
pub fn numbers(v: &Value) -> Vec<f64> {
    v.as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect()
}

/// Returns a JSON list of token ids.
pub fn ids(v: &Value) -> Vec<u32> {
    v.as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_u64().unwrap() as u32)
        .collect()
}

/// Checks that |got − want| ≤ tolerance · max(|want|, floor).
pub fn assert_close(what: &str, got: f64, want: f64, tolerance: f64, floor: f64) {
    assert!(
        (got - want).abs() <= tolerance * want.abs().max(floor),
        "{what}: {got} is not {want} within {tolerance} relative"
    );
}

/// Returns ‖a − b‖ / ‖b‖.
pub fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (mut difference, mut norm) = (0f64, 0f64);
    for (x, y) in values(a).iter().zip(values(b)) {
        difference += (*x as f64 - y as f64).powi(2);
        norm += (y as f64).powi(2);
    }
    (difference / norm.max(1e-30)).sqrt()
}

/// Returns a variable of the environment that names a tool or a file. Tests that call this are
/// `#[ignore]`d, with the tool as the reason; `.ci/run setup` prints all these variables.
#[track_caller]
pub fn needed(variable: &str) -> String {
    match std::env::var(variable) {
        Ok(value) if !value.is_empty() => value,
        _ => panic!(
            "this test needs the environment variable {variable}, which is not set: \
             `.ci/run setup` installs the tools and prints it"
        ),
    }
}

/// Returns the program under test; BRADLEY_TEST_BINARY names another build of it.
pub fn binary() -> PathBuf {
    std::env::var_os("BRADLEY_TEST_BINARY")
        .map_or_else(|| env!("CARGO_BIN_EXE_bradley").into(), PathBuf::from)
}

/// Replaces every occurrence of `old` in a text file, which must have one.
pub fn replace(file: PathBuf, old: &str, new: &str) {
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(old), "{} has no {old:?}", file.display());
    std::fs::write(file, text.replace(old, new)).unwrap();
}

/// Changes 2,000 weights in the middle of a safetensors file a little, so that it stays valid and
/// its numbers stay finite.
pub fn perturb_weights(file: PathBuf) {
    let mut bytes = std::fs::read(&file).unwrap();
    let header_size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let data = &mut bytes[8 + header_size..];
    let middle = data.len() / 8 * 4;
    for number in data[middle..].chunks_exact_mut(4).take(2000) {
        // An upper bit of the mantissa of a little-endian f32.
        number[2] ^= 0x20;
    }
    std::fs::write(file, bytes).unwrap();
}

/// Copies the files of a folder to another one that exists.
pub fn copy_files(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// Returns the words in a message that may be hashes: at least 12 hexadecimal digits. A job's ID
/// is none, because it has dashes.
pub fn hashes(message: &str) -> BTreeSet<&str> {
    let words = message.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    words
        .filter(|w| w.len() >= 12 && w.bytes().all(|b| b.is_ascii_hexdigit()))
        .collect()
}
