//! The `bradley` binary: everything is in the library.

fn main() {}
