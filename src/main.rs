//! Entry point of the `bradley` binary. All code is in the library.

fn main() -> std::process::ExitCode {
    bradley::cli::main()
}
