//! The binary: see the library's first lines.

fn main() -> std::process::ExitCode {
    stockade::main()
}
