//! Compiles `proto/` into OUT_DIR with protox, so that no protoc is needed, and writes the descriptor set that reflection serves.

use std::path::PathBuf;
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["training", "dataset", "checkpoint", "scoring", "model"].map(|f| format!("bradley/v1/{f}.proto"));
    // Error details, so that clients by reflection can read them.
    let files = files.into_iter().chain(["google/rpc/error_details.proto".to_owned()]);
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("bradley.bin"), prost_bytes(&descriptors))?;
    tonic_prost_build::configure().extern_path(".google.rpc.Status", "::tonic_types::Status").btree_map(".").compile_fds(descriptors)?;
    Ok(())
}

fn prost_bytes(set: &prost_types::FileDescriptorSet) -> Vec<u8> {
    use prost::Message;
    set.encode_to_vec()
}
