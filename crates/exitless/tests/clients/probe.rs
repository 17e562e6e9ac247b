//! Probes of clients: one that is installed need not work. Each is probed once in a run of the tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::guest::Results;
use crate::needs;
use crate::process::{self, Process};
use crate::scratch::Scratch;

/// The limit for a probe. A guest boots within seconds, on a loaded machine within a minute.
const LIMIT: Duration = Duration::from_secs(180);

/// Names this run: nextest starts a process for each test, and gives all of them one name.
static RUN: LazyLock<String> = LazyLock::new(|| {
    std::env::var("NEXTEST_RUN_ID").unwrap_or_else(|_| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
        format!("{}-{}", std::process::id(), now.as_nanos())
    })
});

/// The outcome of `probe`, from a file if this run has probed `name` before.
pub(crate) fn once(name: &str, probe: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let file = kept(name);
    let known = fs::read_to_string(&file).unwrap_or_default();
    if let Some((run, reason)) = known.split_once('\n')
        && run == *RUN
    {
        return if reason.is_empty() { Ok(()) } else { Err(reason.to_owned()) };
    }
    let outcome = probe();
    let reason = outcome.as_ref().err().map_or("", String::as_str);
    fs::write(&file, format!("{}\n{reason}", *RUN)).expect("keep the outcome of a probe");
    outcome
}

fn kept(name: &str) -> PathBuf {
    needs::cache_dir().join(format!("{name}.probe"))
}

/// Whether a program does the least that it is used for.
pub(crate) fn program(name: &str, path: &Path) -> Result<(), String> {
    once(name, || {
        let scratch = Scratch::new();
        let arguments: &[&str] = match name {
            "busybox" => &["true"],
            "debugfs" | "e2fsck" => &["-V"],
            "fio" => &["--name=probe", "--ioengine=libaio", "--rw=write", "--size=64k"],
            "mkfs.ext4" => &["-q", "-F", "image", "8M"],
            "qemu-img" => &["create", "-q", "-f", "qcow2", "image", "8M"],
            _ => &["--version"],
        };
        succeeds(process::command(path).args(arguments).current_dir(scratch.path("")))
            .map_err(|reason| format!("{name} does not work: {reason}"))
    })
}

/// Whether a command ends well, or the reason why not.
pub(crate) fn succeeds(command: &mut Command) -> Result<(), String> {
    let (status, lines) = output(command)?;
    if status.success() { Ok(()) } else { Err(format!("{status}: {}", telling(&lines))) }
}

/// Whether a guest with the job "probe" boots, runs programs and powers off, or the reason why not.
pub(crate) fn boots(command: &mut Command) -> Result<(), String> {
    let (status, lines) = output(command)?;
    let told = telling(&lines).to_owned();
    Results::of(lines).fault().map_or(Ok(()), |fault| Err(format!("{status}: {told} ({fault})")))
}

/// How a command ended, and what it printed.
pub(crate) fn output(command: &mut Command) -> Result<(ExitStatus, Vec<String>), String> {
    let mut process =
        Process::try_spawn("probe", command).map_err(|error| format!("it does not start: {error}"))?;
    if process.ends_within(LIMIT).is_none() {
        return Err(format!("it does not end: {}", telling(&process.lines())));
    }
    Ok(process.finish(LIMIT))
}

/// The line of an output that most likely gives the reason of a failure.
pub(crate) fn telling(lines: &[String]) -> &str {
    let tells = |line: &&String| ["fail", "error", "cannot", "panic"].iter().any(|word| line.contains(word));
    let last = lines.iter().rfind(|line| !line.is_empty());
    lines.iter().find(tells).or(last).map_or("no output", |line| line.trim())
}

#[test]
fn a_program_that_does_not_work_is_told_with_its_reason() {
    let shell = |script: &str| succeeds(Command::new("sh").args(["-c", script]));
    assert_eq!(shell("exit 0"), Ok(()));
    assert_eq!(
        shell("echo first; echo it failed; echo last; exit 3"),
        Err("exit status: 3: it failed".into())
    );
    assert_eq!(shell("echo first; echo last; exit 3"), Err("exit status: 3: last".into()));
    assert_eq!(shell("exit 3"), Err("exit status: 3: no output".into()));
    assert!(
        succeeds(&mut Command::new("/nonexistent")).is_err_and(|reason| reason.contains("does not start"))
    );
    assert!(boots(&mut Command::new("true")).is_err_and(|reason| reason.contains("never reported")));
}

#[test]
fn a_probe_is_made_once_in_a_run() {
    for outcome in [Ok(()), Err("a reason\nof two lines".to_owned())] {
        let name = format!("once-{}-{}", std::process::id(), outcome.is_ok());
        assert_eq!(once(&name, || outcome.clone()), outcome);
        assert_eq!(once(&name, || panic!("it was probed before")), outcome);
        fs::remove_file(kept(&name)).expect("remove what was kept");
    }
}
