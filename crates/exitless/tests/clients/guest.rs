//! A guest as its test sees it: a console that reports results, and a line to talk back.
//!
//! The guest's side of this protocol is `guest/init`.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{ChildStdin, Command};
use std::time::Duration;

use crate::process::Process;

/// The limit from power-on to power-off, on a loaded machine with an emulated CPU.
const LIFE: Duration = Duration::from_secs(900);
/// The limit for the next sign of progress.
const STEP: Duration = Duration::from_secs(300);

pub(crate) struct Guest {
    process: Process,
    keyboard: ChildStdin,
}

/// What the guest reported under each name.
pub(crate) struct Results {
    by_name: BTreeMap<String, (bool, String)>,
    console: Vec<String>,
}

impl Guest {
    pub(crate) fn boot(name: &str, command: &mut Command) -> Self {
        let mut process = Process::spawn(name, command);
        let keyboard = process.take_stdin();
        Self { process, keyboard }
    }

    /// Types a line on the guest's console.
    pub(crate) fn type_line(&mut self, line: &str) {
        writeln!(self.keyboard, "{line}").expect("type on the guest's console");
        self.keyboard.flush().expect("type on the guest's console");
    }

    /// How often the guest has reported to be making progress.
    pub(crate) fn beats(&self) -> usize {
        count_beats(&self.process.lines())
    }

    /// Waits until the guest has reported progress `more` times from now on.
    pub(crate) fn wait_beats(&mut self, more: usize) {
        let wanted = self.beats() + more;
        self.process.wait_for("progress", STEP, |lines| (count_beats(lines) >= wanted).then_some(()));
    }

    /// Takes the guest away at once, as pulling its plug would.
    pub(crate) fn kill(mut self) {
        self.process.kill();
    }

    /// Waits until the guest powers itself off.
    pub(crate) fn finish(self) -> Results {
        Results::of(self.process.finish(LIFE).1)
    }
}

impl Results {
    /// The results on a guest's console.
    pub(crate) fn of(console: Vec<String>) -> Self {
        Self { by_name: console.iter().filter_map(|line| parse(line)).collect(), console }
    }

    /// The detail of a result that must be there and good.
    #[track_caller]
    pub(crate) fn ok(&self, name: &str) -> &str {
        self.get(name).unwrap_or_else(|fault| panic!("{fault}\n{}", self.console.join("\n")))
    }

    fn get(&self, name: &str) -> Result<&str, String> {
        match self.by_name.get(name) {
            Some((true, detail)) => Ok(detail),
            Some((false, detail)) => Err(format!("the guest failed at `{name}`: {detail}")),
            None => Err(format!("the guest never reported `{name}`")),
        }
    }

    /// The rest of every console line that starts with `mark`.
    pub(crate) fn lines_after(&self, mark: &str) -> Vec<String> {
        self.console.iter().filter_map(|line| line.strip_prefix(mark)).map(str::to_owned).collect()
    }

    /// Panics unless every result is good and the job came to its end.
    #[track_caller]
    pub(crate) fn all_ok(&self) {
        if let Some(fault) = self.fault() {
            panic!("{fault}\n{}", self.console.join("\n"));
        }
    }

    /// The first result that is not good, or is missing at the end.
    pub(crate) fn fault(&self) -> Option<String> {
        self.by_name.keys().map(String::as_str).chain(["end"]).find_map(|name| self.get(name).err())
    }
}

fn count_beats(lines: &[String]) -> usize {
    lines.iter().filter(|line| line.contains("BEAT ")).count()
}

/// Takes a result out of a console line; kernel messages may stand in front of it.
fn parse(line: &str) -> Option<(String, (bool, String))> {
    let mut words = line[line.find("RESULT ")?..].splitn(4, ' ').skip(1);
    let name = words.next()?.to_owned();
    let good = words.next()? == "ok";
    Some((name, (good, words.next().unwrap_or_default().to_owned())))
}
