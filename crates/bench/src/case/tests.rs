use super::*;

fn read(text: &str) -> Result<Vec<Case>> {
    parse(&[("test.toml".into(), text.into())])
}

const MATRIX: &str = r#"
[[case]]
name = "null/{op}/{ring}/qd{depth}"
group = "4 KiB"
backend = "null"
op = ["randread", "randwrite"]
ring = ["split", "packed"]
depth = [1, 128]
quick = ["*/split/qd1"]
"#;

#[test]
fn lists_stand_for_every_combination() {
    let cases = read(MATRIX).unwrap();
    let names: Vec<_> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), 8);
    assert_eq!(
        names[..3],
        ["null/randread/split/qd1", "null/randread/split/qd128", "null/randread/packed/qd1"]
    );
    let quick: Vec<_> = cases.iter().filter(|case| case.quick).map(|case| case.name.as_str()).collect();
    assert_eq!(quick, ["null/randread/split/qd1", "null/randwrite/split/qd1"]);
}

#[test]
fn what_is_not_said_has_a_default() {
    let cases = read("[[case]]\nname = \"a\"\ngroup = \"g\"\nbackend = \"disk\"\nop = \"read\"").unwrap();
    let case = &cases[0];
    assert_eq!((case.block_bytes, case.depth, case.queues, case.ring), (4096, 32, 1, Ring::Split));
    assert!(case.client == Client::Polled && !case.inflight && !case.quick && !case.indirect);
}

#[test]
fn the_ring_holds_what_is_in_flight() {
    let mut case = read(MATRIX).unwrap().remove(1);
    assert_eq!((case.depth, case.ring_size()), (128, 512), "three descriptors each");
    case.indirect = true;
    assert_eq!(case.ring_size(), 256);
}

#[test]
fn mistakes_are_named() {
    let error = |change: fn(String) -> String| format!("{:#}", read(&change(MATRIX.into())).unwrap_err());
    assert!(error(|t| t.replace("{ring}", "r")).contains("two cases are called `null/randread/r/qd1`"));
    assert!(error(|t| t.replace("128", "1000")).contains("`depth` 1000 is not in 1..=256"));
    assert!(error(|t| t.replace("backend", "backed")).contains("test.toml"));
    assert!(error(|t| t + "block = \"5KiB\"").contains("power of two"));
    assert!(error(|t| t + "block = \"4KB\"").contains("`4KB` is not a size"));
}

#[test]
fn sizes_have_binary_units() {
    assert_eq!(parse_bytes("512").unwrap(), 512);
    assert_eq!(parse_bytes("128KiB").unwrap(), 128 << 10);
    assert_eq!(parse_bytes("8 GiB").unwrap(), 8 << 30);
    assert!(parse_bytes("99999999999GiB").is_err());
}

#[test]
fn the_cases_that_come_with_the_program_are_sound() {
    let cases = parse(&crate::data::cases(None).unwrap()).unwrap();
    assert!(cases.len() >= 20);
    let quick = cases.iter().filter(|case| case.quick).count();
    assert!((6..=16).contains(&quick), "{quick} cases are quick");
}
