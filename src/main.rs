//! The `bradley` binary: everything is in the library.

fn main() -> std::process::ExitCode {
    bradley::cli::main()
}
