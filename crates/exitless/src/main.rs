//! The `exitless` program. See `exitless --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    exitless::main()
}
