//! Configuration files: what they say, and what is said about them when they are wrong.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::path::Path;

use exitless::config::Config;
use exitless::options::{DeviceOptions, LogLevel};
use exitless::report::Reporter;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(Path::new("vm.toml"), text).map_err(|error| error.to_string())
}

fn names(config: &Config) -> Vec<String> {
    config.devices.iter().map(|device| device.socket().name()).collect()
}

#[test]
fn a_file_has_the_options_of_the_command_line_as_keys() {
    let config = parse(
        r#"
            cpus = "2-3"
            control = "/run/c.sock"
            log = "debug"
            json = false

            [[blk]]
            socket = "/run/one.sock"
            backend = "file:/srv/one.raw"
            queues = 4
            read-only = true
            block-size = 4096
            bandwidth = "200M"
            iops = 5_000
            socket-mode = 0o660
            without = ["packed", "event-idx"]

            [[rng]]
            socket = "/run/two.sock"
            bandwidth = 65536

            [[blk]]
            socket = "/run/three.sock"
            backend = "null:1G"
            without = []
            poll = "notify"
        "#,
    )
    .unwrap();
    assert_eq!(names(&config), ["one", "two", "three"]);
    assert_eq!(config.service.cpus.unwrap().as_slice(), [2, 3]);
    assert_eq!(config.service.log, Some(LogLevel::Debug));
    assert!(!config.service.json);
    let DeviceOptions::Blk(one) = &config.devices[0] else { panic!("not a disk") };
    assert_eq!((one.queues.unwrap().get(), one.block_size, one.read_only), (4, Some(4096), true));
    assert_eq!((one.bandwidth.unwrap().0.get(), one.iops.unwrap().get()), (200 << 20, 5000));
    assert_eq!(one.socket.socket_mode, Some(0o660));
    assert_eq!(one.without.iter().map(|feature| feature.name).collect::<Vec<_>>(), ["packed", "event-idx"]);
    let DeviceOptions::Rng(two) = &config.devices[1] else { panic!("not an entropy source") };
    assert_eq!(two.bandwidth.unwrap().0.get(), 65536);
}

#[test]
fn one_device_needs_no_list() {
    assert_eq!(names(&parse("[rng]\nsocket = '/run/a'").unwrap()), ["a"]);
}

#[test]
fn the_command_line_wins_over_the_file() {
    let config = parse("log = 'warn'\njson = true\ncpus = 1\n[rng]\nsocket = 'a'").unwrap();
    let given = exitless::options::ServiceOptions { log: Some(LogLevel::Trace), ..Default::default() };
    let service = given.or(config.service);
    assert_eq!((service.log, service.json), (Some(LogLevel::Trace), true));
    assert_eq!(service.cpus.unwrap().as_slice(), [1]);
    assert!(Reporter { json: service.json }.json);
}

const DISK: &str = "[[blk]]\nsocket = '/run/a'\nbackend = 'null:1G'\n";

#[test]
fn what_is_wrong_is_said_with_its_place_and_what_is_allowed() {
    for (text, says) in [
        ("", "vm.toml:1:1: there is no device; add a table `[[blk]]` or `[[rng]]`"),
        ("cpus = ", "vm.toml:1:8: string values must be quoted, expected literal string"),
        (
            "cpus = '2-'\n[rng]\nsocket = 'a'",
            "vm.toml:1:8: `cpus` = \"2-\": CPU list `2-`: `2-` is not a CPU number below 1024 or a range like `2-5`",
        ),
        ("cpu = 2\n[rng]\nsocket = 'a'", "vm.toml:1:1: unknown key `cpu`; did you mean `cpus`?"),
        (
            "speed = 2\n[rng]\nsocket = 'a'",
            "vm.toml:1:1: unknown key `speed`; allowed are `cpus`, `control`, `metrics`, `log`, `json`, `blk`, `rng`",
        ),
        ("blk = 5", "vm.toml:1:7: `blk` must be a table; begin one with `[[blk]]` on a line of its own"),
        ("[[blk]]\nsocket = '/run/a'", "vm.toml:1:1: `[[blk]]`: it needs `backend`"),
        ("[[blk]]", "vm.toml:1:1: `[[blk]]`: it needs `socket`, `backend`"),
        (&format!("{DISK}queuse = 4"), "vm.toml:4:1: unknown key `blk.queuse`; did you mean `queues`?"),
        (
            &format!("{DISK}queues = 0"),
            "vm.toml:4:10: `blk.queues` = 0: it must be a whole number, at least 1 and not too large",
        ),
        (
            &format!("{DISK}queues = true"),
            "vm.toml:4:10: `blk.queues` = true: it must be a string or a whole number",
        ),
        (
            &format!("{DISK}queues = [1, 2]"),
            "vm.toml:4:10: `blk.queues` = [1, 2]: it must be a string or a whole number",
        ),
        (&format!("{DISK}read-only = 1"), "vm.toml:4:13: `blk.read-only` = 1: it must be true or false"),
        (
            &format!("{DISK}without = 1.5"),
            "vm.toml:4:11: `blk.without` = 1.5: it must be a string or a list of strings",
        ),
        (
            &format!("{DISK}without = ['packed', 'msi']"),
            "vm.toml:4:11: `blk.without` = [\"packed\", \"msi\"]: allowed are `packed`, `event-idx`, `indirect`, `in-order`, `mq`, `flush`, `config-wce`, `discard`, `write-zeroes`, `secure-erase`, `topology`",
        ),
        (
            &format!("{DISK}poll = 'hibrid'"),
            "vm.toml:4:8: `blk.poll` = \"hibrid\": allowed are `notify`, `hybrid`, `poll`",
        ),
        (
            &format!("{DISK}block-size = 1024"),
            "vm.toml:4:14: `blk.block-size` = 1024: allowed are `512`, `4096`",
        ),
        (
            &format!("{DISK}bandwidth = '5X'"),
            "vm.toml:4:13: `blk.bandwidth` = \"5X\": it must be a number of bytes, at least 1, alone or with a unit K, M, G or T (powers of 1024), like 8G",
        ),
        (
            &format!("{DISK}name = 'ä/b'"),
            "vm.toml:4:8: `blk.name` = \"ä/b\": it must be 1 to 64 letters, digits, dots, dashes and underscores",
        ),
        (&format!("{DISK}queues = 1\nqueues = 2"), "vm.toml:5:1: duplicate key"),
        (&format!("{DISK}{DISK}"), "vm.toml:4:1: two devices have the socket `/run/a`"),
        (
            &format!("{DISK}[[rng]]\nsocket = '/tmp/a.sock'"),
            "vm.toml:4:1: two devices have the name `a`; give one of them a `name` of its own",
        ),
        (
            "[[rng]]\nsocket = '/run/a'\nbackend = 'null:1G'",
            "vm.toml:3:1: unknown key `rng.backend`; allowed are `socket`, `socket-mode`, `socket-group`, `name`, `poll`, `bandwidth`, `without`",
        ),
        ("# ä\n[[rng]]\nsocket = '/ü'; x", "vm.toml:3:14: unexpected key or value, expected newline, `#`"),
    ] {
        assert_eq!(parse(text).expect_err(text), says, "{text}");
    }
}

#[test]
fn a_dash_at_the_start_of_a_value_makes_no_option_of_it() {
    let config = parse("[[rng]]\nsocket = '--json'").unwrap();
    assert_eq!(config.devices[0].socket().socket, Path::new("--json"));
}
