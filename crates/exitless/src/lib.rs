//! The `exitless` program: the only room in which devices and transports meet.
//!
//! A command line ([`cli`]) or a configuration file ([`config`]) becomes [`options`]; `service` makes devices of them,
//! puts each behind its socket, and serves until it is told to end. Meanwhile [`control`] answers questions,
//! and [`metrics`] whoever collects figures.

#![warn(missing_docs)]

mod check;
pub mod cli;
pub mod config;
pub mod control;
mod descriptors;
mod device;
mod drain;
pub mod failure;
pub mod feature;
mod group;
pub mod guest;
pub mod metrics;
pub mod options;
mod outlet;
pub mod report;
mod run;
mod service;
pub mod size;
mod stop;

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser};

use crate::cli::{Cli, Command};
use crate::config::{CONFIG_BYTES_MAX, Config};
use crate::failure::{EXIT_OK, Failure};
use crate::options::{DeviceOptions, LogLevel, ServiceOptions};
use crate::outlet::{Lines, Stream};

/// The program, from its command line to its exit code.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(failure::EXIT_USAGE));
        }
    };
    let code = run(cli.command).unwrap_or_else(|failure| {
        Stream::Stderr.line(format!("error: {failure}\n").into_bytes());
        failure.exit_code()
    });
    outlet::end();
    ExitCode::from(code)
}

/// Carries out a command; returns the code to exit with.
fn run(command: Command) -> Result<u8, Failure> {
    let done = match command {
        Command::Blk { device, service } => serve(service, vec![DeviceOptions::Blk(*device)]),
        Command::Rng { device, service } => serve(service, vec![DeviceOptions::Rng(device)]),
        Command::Serve { config, service } => {
            let text = read_config(&config).map_err(Failure::Usage)?;
            let config = Config::parse(&config, &text).map_err(Failure::usage)?;
            serve(service.or(config.service), config.devices)
        }
        Command::Ctl { control, json, command } => print(control::run(&control, command, json)?.as_bytes()),
        Command::Run(options) => {
            log_to_stderr(options.log.unwrap_or(LogLevel::Warn));
            run::run(&options)
        }
        Command::Bench(arguments) => Ok(bench::run(arguments)?),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "exitless", &mut script);
            print(&script)
        }
        Command::Check { file, json, force_share } => {
            log_to_stderr(LogLevel::Warn);
            let (text, code) = check::run(&file, json, force_share)?;
            return print(text.as_bytes()).map(|()| code);
        }
    };
    done.map(|()| EXIT_OK)
}

fn serve(service: ServiceOptions, devices: Vec<DeviceOptions>) -> Result<(), Failure> {
    log_to_stderr(service.log.unwrap_or_default());
    service::serve(service, devices)
}

fn read_config(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text));
    let len = read.with_context(|| format!("cannot read the configuration file {}", path.display()))?;
    anyhow::ensure!(
        len as u64 <= CONFIG_BYTES_MAX,
        "the configuration file {} is larger than {CONFIG_BYTES_MAX} bytes",
        path.display()
    );
    Ok(text)
}

fn log_to_stderr(level: LogLevel) {
    let level = match level {
        LogLevel::Error => tracing::Level::ERROR,
        LogLevel::Warn => tracing::Level::WARN,
        LogLevel::Info => tracing::Level::INFO,
        LogLevel::Debug => tracing::Level::DEBUG,
        LogLevel::Trace => tracing::Level::TRACE,
    };
    Stream::Stderr.start();
    // Complaints about a log that nobody reads any more would go the same way, by a print that panics.
    let subscriber = tracing_subscriber::fmt().log_internal_errors(false);
    let subscriber = subscriber.with_max_level(level).with_writer(|| Lines(Stream::Stderr));
    subscriber.with_ansi(io::stderr().is_terminal()).init();
}

/// Prints what was asked for. A reader that has seen enough is fine.
fn print(text: &[u8]) -> Result<(), Failure> {
    match io::stdout().write_all(text) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::Runtime(anyhow::Error::new(error).context("cannot write to stdout")))
        }
        _ => Ok(()),
    }
}
