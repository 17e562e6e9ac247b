//! The benchmarks as a program of their own, for work on them. Users have `exitless bench`.

use clap::Parser;

#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    args: bench::Args,
}

fn main() -> anyhow::Result<()> {
    bench::run(Cli::parse().args)
}
