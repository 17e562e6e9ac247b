//! The command line: what is understood, what is refused and how, and whether the help tells everything.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use clap::{CommandFactory, Parser, ValueEnum};
use clap_complete::Shell;
use exitless::cli::{Cli, Command, CtlCommand};
use exitless::feature;
use exitless::options::{BlkOptions, LogLevel, ServiceOptions};
use reactor::Mode;

fn parse(line: &str) -> Result<Command, String> {
    let words = std::iter::once("exitless").chain(line.split_whitespace());
    Cli::try_parse_from(words).map(|cli| cli.command).map_err(|error| error.to_string())
}

fn blk(options: &str) -> (BlkOptions, ServiceOptions) {
    match parse(&format!("blk --socket /run/a.b.sock --backend null:1G {options}")) {
        Ok(Command::Blk { device, service }) => (*device, service),
        other => panic!("{options}: {other:?}"),
    }
}

fn refusal(line: &str) -> String {
    parse(line).expect_err(line)
}

#[test]
fn definitions_do_not_contradict_each_other() {
    Cli::command().debug_assert();
}

#[test]
fn what_is_not_said_has_a_sensible_default() {
    let (device, service) = blk("");
    assert_eq!(device.socket.name(), "a.b", "the socket's name without its extension");
    assert_eq!(device.socket.poll, Mode::Hybrid);
    assert_eq!((device.socket.socket_mode, device.queues, device.block_size), (None, None, None));
    assert!(!device.read_only && device.without.is_empty() && device.iops.is_none());
    assert!(service.cpus.is_none() && service.control.is_none() && service.log.is_none() && !service.json);
}

#[test]
fn a_disk_is_described_in_full() {
    let (device, service) = blk(
        "--queues 4 --cpus 2-5 --read-only --serial X1 --block-size 4096 --poll poll --iops 5000 --bandwidth 200M \
         --without packed,event-idx --socket-mode 660 --socket-group kvm --name vm1 --log DEBUG --json --control /c",
    );
    assert_eq!(device.queues.unwrap().get(), 4);
    assert_eq!(service.cpus.unwrap().as_slice(), [2, 3, 4, 5]);
    assert!(device.read_only && service.json);
    assert_eq!((device.serial.as_deref(), device.block_size), (Some("X1"), Some(4096)));
    assert_eq!((device.iops.unwrap().get(), device.bandwidth.unwrap().0.get()), (5000, 200 << 20));
    assert_eq!(feature::bits(&device.without), virtio::features::RING_PACKED | virtio::features::EVENT_IDX);
    assert_eq!((device.socket.poll, device.socket.socket_mode), (Mode::Poll, Some(0o660)));
    assert_eq!(
        (device.socket.socket_group.as_deref(), device.socket.name()),
        (Some("kvm"), "vm1".to_owned())
    );
    assert_eq!(service.log, Some(LogLevel::Debug));
}

#[test]
fn commands_to_a_service_are_understood() {
    let command = |line: &str| match parse(&format!("ctl --control /c {line}")) {
        Ok(Command::Ctl { command, json, .. }) => (command, json),
        other => panic!("{line}: {other:?}"),
    };
    assert!(matches!(command("list"), (CtlCommand::List, false)));
    assert!(matches!(command("stats --json"), (CtlCommand::Stats, true)));
    assert!(matches!(command("--json stats"), (CtlCommand::Stats, true)));
    assert!(matches!(
        command("resize --device a 16G").0,
        CtlCommand::Resize { device, size: Some(size), shrink: false, force: false }
            if device == "a" && size.0.get() == 16 << 30
    ));
    assert!(matches!(
        command("resize --device a 8G --shrink --force").0,
        CtlCommand::Resize { size: Some(_), shrink: true, force: true, .. }
    ));
    assert!(matches!(command("resize --device a").0, CtlCommand::Resize { size: None, .. }));
    assert!(matches!(
        command("limit --device a --iops 5").0,
        CtlCommand::Limit { iops: Some(_), bandwidth: None, .. }
    ));
}

#[test]
fn refusals_say_what_is_allowed() {
    let disk = "blk --socket /s --backend null:1G";
    for (line, says) in [
        ("blk --backend null:1G", vec!["--socket <PATH>"]),
        ("blk --socket /s", vec!["--backend <SPEC>"]),
        ("blk --socket /s --backend tape:1G", vec!["null:SIZE, mem:SIZE, file:PATH or qcow2:PATH"]),
        ("blk --socket /s --backend file:a,cache=none", vec!["expected one of direct, engine"]),
        ("blk --sokcet /s --backend null:1G", vec!["unexpected argument '--sokcet'", "'--socket'"]),
        (&format!("{disk} --poll never"), vec!["possible values: notify, hybrid, poll"]),
        (&format!("{disk} --block-size 1024"), vec!["possible values: 512, 4096"]),
        (&format!("{disk} --without packed,msi"), vec!["'msi'", "packed, event-idx, indirect, in-order, mq"]),
        ("rng --socket /s --without mq", vec!["possible values: packed, event-idx, indirect, in-order]"]),
        ("ctl --control /c resize --device a --shrink", vec!["<SIZE>"]),
        ("ctl --control /c resize --device a 1G --force", vec!["--shrink"]),
        (&format!("{disk} --queues 0"), vec!["'0' for '--queues <COUNT>'", "at least 1"]),
        (&format!("{disk} --cpus 5-2"), vec!["range `5-2` runs backwards"]),
        (&format!("{disk} --bandwidth 5X"), vec!["a unit K, M, G or T"]),
        (&format!("{disk} --iops none"), vec!["'--iops <COUNT>'", "a whole number"]),
        (&format!("{disk} --socket-mode 888"), vec!["octal permissions, 0 to 777"]),
        (&format!("{disk} --socket-mode +60"), vec!["octal permissions, 0 to 777"]),
        (&format!("{disk} --name a/b"), vec!["letters, digits, dots, dashes and underscores"]),
        (&format!("{disk} --log loud"), vec!["possible values: error, warn, info, debug, trace"]),
        ("serve", vec!["--config <FILE>"]),
        ("ctl list", vec!["--control <PATH>"]),
        ("ctl --control /c resize 5G", vec!["--device <NAME>"]),
        ("completions tcsh", vec!["possible values: bash"]),
        ("blok", vec!["unrecognized subcommand 'blok'", "'blk'"]),
    ] {
        let refusal = refusal(line);
        for words in says {
            assert!(refusal.contains(words), "{line}: {words}\n{refusal}");
        }
    }
}

#[test]
fn the_help_lists_every_option_and_says_something_about_it() {
    fn check(command: &mut clap::Command) {
        let help = command.render_long_help().to_string();
        for argument in command.get_arguments() {
            if let Some(long) = argument.get_long() {
                assert!(help.contains(&format!("--{long}")), "{}: no --{long}\n{help}", command.get_name());
            }
            assert!(
                argument.get_help().is_some(),
                "{}: {} is not explained",
                command.get_name(),
                argument.get_id()
            );
        }
        for command in command.get_subcommands_mut() {
            assert!(command.get_about().is_some(), "{} is not explained", command.get_name());
            check(command);
        }
    }
    let mut command = Cli::command();
    command.build();
    check(&mut command);
}

#[test]
fn the_help_of_a_service_has_examples_and_the_main_one_exit_codes() {
    let mut command = Cli::command();
    let help = command.render_help().to_string();
    assert!(
        ["0  it did", "1  it failed", "2  the command line"].iter().all(|code| help.contains(code)),
        "{help}"
    );
    for name in ["blk", "rng", "serve", "ctl", "bench", "completions"] {
        let help = command.find_subcommand_mut(name).unwrap().render_help().to_string();
        assert!(help.contains("xample") || help.contains("    cpus = "), "{name}: {help}");
    }
}

#[test]
fn completions_know_the_options_in_every_shell() {
    for shell in Shell::value_variants() {
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut Cli::command(), "exitless", &mut script);
        let script = String::from_utf8(script).unwrap();
        for word in ["backend", "socket-mode", "hybrid", "event-idx"] {
            // Elvish and PowerShell scripts know no values.
            let known = script.contains(word) || matches!(shell, Shell::Elvish | Shell::PowerShell);
            assert!(known, "{shell}: no {word}");
        }
    }
}
