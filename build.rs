//! Compiles `proto/` into OUT_DIR with protox, so that no protoc is needed, and writes the
//! descriptor set for reflection, canonical JSON and the routes of REST.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Folder of the CUDA kernels. Its `all.cu` includes them all.
const KERNELS: &str = "src/compute/cuda/kernels";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = [
        "training",
        "dataset",
        "checkpoint",
        "scoring",
        "evaluation",
        "generation",
        "model",
        "usage",
    ]
    .map(|f| format!("bradley/v1/{f}.proto"));
    // Includes the types of error details, so that clients that use reflection can decode them.
    let files = files
        .into_iter()
        .chain(["google/rpc/error_details.proto".to_owned()]);
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler
        .include_source_info(true)
        .include_imports(true)
        .open_files(files)?;
    let descriptors = compiler.file_descriptor_set();
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // The compiler's own encoding, because prost's types lose the options `google.api.http`.
    fs::write(
        out.join("bradley.bin"),
        compiler.encode_file_descriptor_set(),
    )?;
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels(&out.join("kernels.ptx"))?;
    }
    // The names connect a message with its descriptor, for its canonical JSON.
    let mut config = prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure()
        .extern_path(".google.rpc.Status", "::tonic_types::Status")
        .btree_map(".")
        .compile_fds_with_config(descriptors, config)?;
    Ok(())
}

/// Compiles the CUDA kernels to PTX for compute capability 8.0 and newer. The driver compiles PTX
/// for its GPU.
fn compile_kernels(ptx: &Path) -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={KERNELS}");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let of_home = |variable| env::var_os(variable).map(|home| PathBuf::from(home).join("bin/nvcc"));
    let nvcc = env::var_os("NVCC")
        .map(PathBuf::from)
        .or_else(|| of_home("CUDA_HOME"))
        .or_else(|| of_home("CUDA_PATH"));
    let nvcc = nvcc.unwrap_or_else(|| "nvcc".into());
    let status = Command::new(&nvcc)
        .args(["-ptx", "-arch=compute_80", "-O3", "-std=c++17", "-o"])
        .args([ptx, &Path::new(KERNELS).join("all.cu")])
        .status()
        .map_err(|e| {
            format!(
                "the feature cuda needs NVIDIA's compiler, and {} did not start: {e}; \
                 set NVCC or CUDA_HOME",
                nvcc.display()
            )
        })?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{} failed with {status}", nvcc.display()).into())
    }
}
