//! The watchdog over one run: it tells a wake-up that was lost from a machine that let nobody run.

use std::fs;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// What takes longer has stalled: a run takes milliseconds, or as many turns of a busy CPU's scheduler.
const STALL: Duration = Duration::from_secs(60);
/// Between two looks at what stalled.
const LOOK: Duration = Duration::from_secs(1);
/// A virtual machine's CPU may be away for long, and what is bound to it too: so often it gets another chance.
const CHANCES: u32 = 5;

/// Waits until the run drops its end of the channel.
///
/// # Panics
/// It does not, and no thread of `processes` waits for a CPU. The message says how things stand, twice, so that what
/// moves can be told.
pub(crate) fn watch(ended: &Receiver<()>, processes: &[&str], what: &str, describe: impl Fn() -> String) {
    let has_ended = |limit| ended.recv_timeout(limit) != Err(RecvTimeoutError::Timeout);
    for chance in 1..=CHANCES {
        if has_ended(STALL) {
            return;
        }
        let (before, ready) = (describe(), ready(processes));
        if has_ended(LOOK) {
            return;
        }
        let starved = self::ready(processes).iter().any(|thread| ready.contains(thread));
        assert!(
            starved && chance < CHANCES,
            "{what} stalled; the CPU is kept from it: {starved}; {before}\nand a second later: {}",
            describe()
        );
        println!("{what} waits for a CPU: {before}");
    }
}

/// The threads that could run, with the time for which they did: one that is in two such lists has got no CPU.
fn ready(processes: &[&str]) -> Vec<(String, String)> {
    let tasks = processes.iter().flat_map(|process| fs::read_dir(format!("/proc/{process}/task")));
    let ready = tasks.flatten().flatten().filter_map(|task| {
        let read = |file| fs::read_to_string(task.path().join(file)).ok();
        let state = read("status")?.lines().find(|line| line.starts_with("State:"))?.contains('R');
        let ran = read("schedstat")?.split(' ').next()?.to_owned();
        state.then(|| (task.path().display().to_string(), ran))
    });
    ready.collect()
}
