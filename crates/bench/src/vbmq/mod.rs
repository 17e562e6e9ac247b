//! `exitless bench vbmq`: what each step of VBMq brings (Zhang et al., "VBMq: pursuit baremetal performance by embracing
//! block I/O parallelism in virtualization", Frontiers of Computer Science 12(5), 2018), measured in virtual machines.
//!
//! The embedded guest puts a load on a disk, in this program's monitor with one thing after another changed and in QEMU;
//! the same load without a virtual machine is what all are compared with. Every virtual machine is a process of its own.
//! Repetitions of all rows are interleaved. `docs/vbmq.md` says how it is done and where it is biased.

mod condition;
mod figures;
mod model;
mod place;
mod predict;
mod report;
mod rows;
mod runner;

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use reactor::{Machine, interrupts};

use crate::args::VbmqArgs;
use crate::backend::{BackendKind, Storage};
use crate::hop::{self, Distance};
use crate::pattern;
use crate::progress::Progress;
use crate::report::kept::Kept;
use crate::report::text::{microseconds, rate};
use crate::report::{machine, today};
use crate::signals;
use condition::{Condition, Matrix};
use place::Place;
use report::{About, Missing, Report, Sample};
use rows::{Placement, RowKind, Rows};
use runner::{Ran, Runner};

/// Repetitions and their duration.
struct Pace {
    repetitions: u32,
    measure_ms: u64,
}

const FULL: Pace = Pace { repetitions: 3, measure_ms: 1000 };
const QUICK: Pace = Pace { repetitions: 1, measure_ms: 300 };

pub(crate) fn run(args: &VbmqArgs) -> Result<()> {
    let mut rows = Rows::embedded()?;
    // Names of rows are single letters: a pattern without `*` is a name.
    let named =
        |only: &String, name: &str| only == name || (only.contains('*') && pattern::matches(only, name));
    let fits = |name: &str| args.only.is_empty() || args.only.iter().any(|only| named(only, name));
    rows.all.retain(|row| fits(&row.name));
    ensure!(!rows.all.is_empty(), "no row fits --only");
    if let Some(path) = &args.from {
        return report_kept(args, &rows, path);
    }
    let storage = Storage::new(args.dir.as_deref(), args.quick);
    let places = place::places(&Machine::read(), &interrupts::cpus_of_disks([storage.folder()].into_iter()));
    let conditions = matrix(args, &places)?.conditions();
    let pace = if args.quick { QUICK } else { FULL };
    let repetitions = args.repetitions.unwrap_or(pace.repetitions);
    let measure_ms = args.measure_ms.unwrap_or(pace.measure_ms);

    let stop = signals::stop_flag()?;
    let mut runner = Runner::new(&rows, places, storage, measure_ms, &stop);
    let mut report = describe(&runner, &conditions, repetitions);
    let mut kept = Kept::create(args.csv.as_deref(), report::csv::HEADER)?;
    let mut samples = Vec::new();
    let mut keep = |sample: Sample| {
        kept.add(|| report::csv::line(&sample))?;
        samples.push(sample);
        anyhow::Ok(())
    };
    let outcome = measure_all(&mut runner, &conditions, repetitions, &mut report, &mut keep, &stop);
    conclude(&mut report, &samples, runner.places.len());
    write(args, &report)?;
    outcome?;
    ensure!(!stop.load(Ordering::Relaxed), "interrupted after {} measurements", samples.len());
    match report.failed.len() {
        0 => Ok(()),
        count => bail!("{count} of the measurements failed"),
    }
}

/// What the samples come to, measured on so many CPUs.
fn conclude(report: &mut Report, samples: &[Sample], cpus: usize) {
    report.rows = Report::lines(samples);
    remark_distance(report, samples);
    report.predictions = predict::predict(&report.rows, cpus);
}

/// Reports what an earlier run measured. The rows do not say when and on what; the model takes this machine's CPUs.
fn report_kept(args: &VbmqArgs, rows: &Rows, path: &Path) -> Result<()> {
    let what = || format!("cannot report {}", path.display());
    let samples =
        std::fs::read_to_string(path).map_err(anyhow::Error::new).and_then(|text| report::csv::parse(&text));
    let samples = samples.with_context(what)?;
    let measured = |row: &&rows::Row| samples.iter().any(|sample| sample.row == row.name);
    let mut report = Report {
        machine: format!("rows of {}, as reported on {}", path.display(), machine()),
        date: today(),
        method: format!("{} repetitions, medians; 4 KiB requests", samples.len()),
        about: rows.all.iter().filter(measured).map(About::of).collect(),
        ..Report::default()
    };
    conclude(&mut report, &samples, Machine::read().allowed.len());
    write(args, &report)
}

fn matrix(args: &VbmqArgs, places: &[Place]) -> Result<Matrix> {
    let cpus_half = u16::try_from(places.len() / 2).unwrap_or(u16::MAX);
    let mut matrix = if args.quick { Matrix::quick() } else { Matrix::full(cpus_half.min(64)) };
    let backend = |name: &String| match name.as_str() {
        "null" => Ok(BackendKind::Null),
        "mem" => Ok(BackendKind::Memory),
        "file" => Ok(BackendKind::Disk),
        other => bail!("backend `{other}` is none of null, mem, file"),
    };
    if !args.backend.is_empty() {
        matrix.backends = args.backend.iter().map(backend).collect::<Result<_>>()?;
    }
    if !args.qd.is_empty() {
        matrix.depths.clone_from(&args.qd);
    }
    if !args.jobs.is_empty() {
        matrix.jobs.clone_from(&args.jobs);
    }
    Ok(matrix)
}

/// The report before anything was measured.
fn describe(runner: &Runner<'_>, conditions: &[Condition], repetitions: u32) -> Report {
    Report {
        machine: machine(),
        date: today(),
        method: format!(
            "{} ms each in a guest of its own, {repetitions} interleaved repetitions, medians; 4 KiB requests",
            runner.measure_ms
        ),
        about: runner.rows.all.iter().map(About::of).collect(),
        remarks: remarks(runner, conditions),
        ..Report::default()
    }
}

/// Which threads share CPUs, and which rows cannot differ here.
fn remarks(runner: &Runner<'_>, conditions: &[Condition]) -> Vec<String> {
    let mut jobs: Vec<u16> = conditions.iter().map(|condition| condition.jobs).collect();
    jobs.sort_unstable();
    jobs.dedup();
    let (mut remarks, rows) = (Vec::new(), &runner.rows.all);
    let cpus = runner.places.len();
    for &jobs in &jobs {
        let name = if jobs == 1 { "1 job".to_owned() } else { format!("{jobs} jobs") };
        for row in rows.iter().filter(|row| row.kind == RowKind::Monitor) {
            let threads = runner.io_threads(row, jobs);
            let vcpus = if row.one_queue { 1 } else { jobs };
            if let Some(crowding) = place::crowding(cpus, &runner.seats(row, jobs), vcpus, threads) {
                remarks.push(format!("({}), {name}: {crowding}", row.name));
            }
        }
        if rows.iter().any(|row| row.placement == Placement::Near)
            && !place::nearness_matters(&runner.places, jobs)
        {
            remarks.push(format!(
                "(g), {name}: the CPUs of this machine allow no other placement than that of (f), so it cannot differ"
            ));
        }
    }
    if jobs.contains(&1) {
        remarks.push("1 job: there is one queue, so (b) and (c) cannot differ from (a)".into());
    }
    if cpus < 2 {
        remarks.push("one CPU for guests and I/O threads: they take turns, and rates mean little".into());
    }
    remarks
}

/// Every row under every condition, and then again: what drifts on the machine meets every row alike.
fn measure_all(
    runner: &mut Runner<'_>,
    conditions: &[Condition],
    repetitions: u32,
    report: &mut Report,
    keep: &mut dyn FnMut(Sample) -> Result<()>,
    stop: &AtomicBool,
) -> Result<()> {
    let mut here = Vec::new();
    for row in &runner.rows.all {
        match runner.obstacle(row) {
            None => here.push(row),
            Some(reason) => {
                report.skipped.push(Missing { row: row.name.clone(), condition: None, reason });
            }
        }
    }
    if here.is_empty() {
        let mut reasons: Vec<_> = report.skipped.iter().map(|missing| missing.reason.as_str()).collect();
        reasons.dedup();
        bail!("none of the rows can be measured here: {}", reasons.join("; "));
    }
    let mut progress = Progress::new(repetitions as usize * conditions.len() * here.len());
    let mut given_up = HashSet::new();
    let load_ms = progress.total() as u64 * runner.measure_ms;
    let mut distance = Distance::new(runner.cpus(), load_ms);
    for repetition in 1..=repetitions {
        for condition in conditions {
            for row in &here {
                let what = format!("{} {} ({repetition}/{repetitions})", row.name, condition.title());
                progress.begin(&what);
                let key = (row.name.clone(), condition.title());
                if given_up.contains(&key) {
                    continue;
                }
                let ran = distance.near(|| runner.run(row, condition), Ran::hop_ns);
                if stop.load(Ordering::Relaxed) {
                    progress.clear();
                    return Ok(());
                }
                let missing =
                    |reason: String| Missing { row: key.0.clone(), condition: Some(key.1.clone()), reason };
                match ran {
                    Ok(Ran::Measured(figures)) => {
                        let (iops, p50) = (rate(figures.iops), microseconds(figures.p50_us));
                        progress.end(&what, &format!("{iops} IOPS, p50 {p50} µs"));
                        keep(Sample { row: row.name.clone(), condition: *condition, figures })?;
                    }
                    Ok(Ran::Skipped(reason)) => {
                        progress.end(&what, &format!("skipped: {reason}"));
                        report.skipped.push(missing(reason));
                        given_up.insert(key);
                    }
                    Err(error) => {
                        progress.note(&format!("failed: {what}: {error:#}"));
                        report.failed.push(missing(format!("{error:#}")));
                        given_up.insert(key);
                    }
                }
            }
        }
    }
    progress.clear();
    Ok(())
}

/// Says at which distance of the CPUs the figures were measured, where it is known.
fn remark_distance(report: &mut Report, samples: &[Sample]) {
    let Some(nearest) = report::nearest_ns(samples) else { return };
    report.method += &format!("; a cache line took {nearest:.0} ns from CPU to CPU");
    let is_far = |ns: Option<f64>| ns.is_some_and(|ns| !hop::is_near(ns, nearest));
    let far = samples.iter().filter(|sample| is_far(sample.figures.hop_ns)).count();
    let only = report.rows.iter().filter(|line| is_far(line.hop_ns)).count();
    if far > 0 {
        report.remarks.push(format!(
            "it took another time in {far} of {} repetitions, because the host moves virtual CPUs between cores: these do not \
             count, but for {only} lines where there is no other",
            samples.len()
        ));
    }
}

fn write(args: &VbmqArgs, report: &Report) -> Result<()> {
    if let Some(path) = &args.svg {
        let text = report::svg::draw(report);
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(report).context("the report as JSON")?);
    } else {
        print!("{}", report::text::text(report));
    }
    Ok(())
}
