//! The generated protobuf types and services.
#![allow(missing_docs, clippy::all, clippy::pedantic)]

tonic::include_proto!("bradley.v1");

/// The encoded descriptors of the protos, for reflection and canonical JSON.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bradley.bin"));
