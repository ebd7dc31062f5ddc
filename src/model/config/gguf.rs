//! The same configuration from GGUF metadata.
