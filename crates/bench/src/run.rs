//! A run: which peers are here, every case against each of them, repetition after repetition, then the report.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use reactor::{Clock, Machine};

use crate::args::{Args, BlkArgs, What};
use crate::backend::Storage;
use crate::case::{self, Case};
use crate::cpus::Cpus;
use crate::data;
use crate::hop::{self, Distance};
use crate::measure::{Outcome, Settings, measure};
use crate::pattern;
use crate::peer::{self, Installed, PeerKind};
use crate::progress::Progress;
use crate::report::kept::Kept;
use crate::report::{self, Report, text};
use crate::row::{Measurement, Row, median, nearest_ns, summarize};
use crate::signals;

/// A run whose server or client waits for a CPU longer than this share of the time gets a remark.
const WAITED_MAX: f64 = 0.02;

/// Durations of one kind of run.
struct Pace {
    repetitions: u32,
    warmup_ms: u64,
    measure_ms: u64,
    idle_ms: u64,
    verify_bytes: u64,
}

const FULL: Pace =
    Pace { repetitions: 5, warmup_ms: 200, measure_ms: 1000, idle_ms: 2000, verify_bytes: 32 << 20 };
const QUICK: Pace =
    Pace { repetitions: 3, warmup_ms: 100, measure_ms: 400, idle_ms: 1000, verify_bytes: 8 << 20 };

/// Runs what the command line asks for.
///
/// # Errors
/// The options, cases or peers are wrong; the machine refuses something; a server failed or stored wrong data; or the
/// run was interrupted. What was measured until then is reported all the same.
pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Blk(args) => blk(&args),
        What::Vbmq(args) => crate::vbmq::run(&args),
    }
}

fn blk(args: &BlkArgs) -> Result<()> {
    let (case_filter, peer_filter): (Vec<_>, Vec<_>) =
        args.only.iter().partition(|pattern| !pattern.starts_with("peer:"));
    let chosen = |filter: &[&String], name: &str| {
        filter.is_empty()
            || filter.iter().any(|p| pattern::matches(p.strip_prefix("peer:").unwrap_or(p), name))
    };
    let mut cases = case::parse(&data::cases(args.cases.as_deref())?)?;
    cases.retain(|case| chosen(&case_filter, &case.name) && (!args.quick || case.quick));
    ensure!(!cases.is_empty(), "no case fits --only{}", if args.quick { " and --quick" } else { "" });
    let mut peers = peer::parse(&data::peers(args.peers.as_deref())?)?;
    peers.retain(|peer| chosen(&peer_filter, &peer.name));
    ensure!(!peers.is_empty(), "no peer fits --only");

    let mut report = Report::new(cases);
    let mut installed = Vec::new();
    for peer in &peers {
        match peer.detect() {
            Ok(found) => installed.push(found),
            Err(reason) => report.absent.push((peer.name.clone(), reason)),
        }
    }
    report.peers = installed.iter().map(|i| (i.peer.name.clone(), i.version.clone())).collect();
    if args.list {
        print!("{}", text::list(&report));
        return Ok(());
    }
    let stop = signals::stop_flag()?;
    let outcome = measure_all(args, &installed, &mut report, &stop);
    let interrupted = stop.load(Ordering::Relaxed);
    report.summaries = summarize(&report.rows);
    let waited = median(report.rows.iter().filter_map(|row| row.figures.waited_for_cpu));
    if let Some(waited) = waited.filter(|&waited| waited > WAITED_MAX) {
        report.remarks.push(format!(
            "the machine was busy: server or client waited for a CPU {:.0} % of the time, so rates are too low; \
             compare p50 latencies, or run again on an idle machine",
            waited * 100.0
        ));
    }
    remark_distance(&mut report);
    write(args, &report)?;
    outcome?;
    if interrupted {
        bail!("interrupted after {} measurements", report.rows.len());
    }
    match report.failed.len() {
        0 => Ok(()),
        count => bail!("{count} of the measurements failed"),
    }
}

/// Says at which distance of the CPUs the figures were measured, where it varied.
fn remark_distance(report: &mut Report) {
    let Some(nearest) = nearest_ns(&report.rows) else { return };
    let is_far = |m: &Measurement| m.hop_ns.is_some_and(|ns| !hop::is_near(ns, nearest));
    let far = report.rows.iter().filter(|row| is_far(&row.figures)).count();
    let hop = format!("a cache line took {nearest:.0} ns from CPU to CPU");
    if far == 0 {
        return report.method += &format!("; {hop}");
    }
    let only: Vec<_> = report.summaries.iter().filter(|s| is_far(&s.median)).collect();
    let only: Vec<_> = only.iter().map(|s| format!("{} {}", s.case, s.peer)).collect();
    report.remarks.push(format!(
        "{hop}, and another time in {far} of {} repetitions, because the host moves virtual CPUs between cores: \
         these repetitions do not count{}",
        report.rows.len(),
        if only.is_empty() { String::new() } else { format!(", but for {}, where there is no other", only.join(", ")) }
    ));
}

fn measure_all(args: &BlkArgs, peers: &[Installed], report: &mut Report, stop: &AtomicBool) -> Result<()> {
    let pace = if args.quick { QUICK } else { FULL };
    let settings = Settings {
        cpus: Cpus::choose(&Machine::read(), args.server_cpu, args.client_cpu)?,
        warmup_ms: pace.warmup_ms,
        measure_ms: args.measure_ms.unwrap_or(pace.measure_ms),
        idle_ms: pace.idle_ms,
        verify_bytes: pace.verify_bytes,
        burst: crate::client::load::BURST,
        stop,
    };
    report.describe(&settings);
    if settings.cpus.is_shared() {
        report.remarks.push("one CPU for server and client: they take turns, and rates mean little".into());
    }
    if !Clock::get().is_tsc() {
        report
            .remarks
            .push("no invariant time-stamp counter: each clock read costs a system call or so".into());
    }
    let mut storage = Storage::new(args.dir.as_deref(), args.quick);
    let repetitions = args.repetitions.unwrap_or(pace.repetitions);
    report.repetitions = repetitions;
    let pairs = |case: &Case| peers.iter().filter(|peer| peer.peer.wants(&case.name)).count();
    let once = report.cases.iter().map(pairs).sum::<usize>();
    let mut progress = Progress::new(repetitions as usize * once);
    let cases = report.cases.clone();
    let load_ms = progress.total() as u64 * (settings.measure_ms + settings.warmup_ms);
    let mut kept = Kept::create(args.csv.as_deref(), &report::csv::header())?;
    let mut distance = Distance::new(settings.cpus, load_ms);
    let mut given_up = HashSet::new();
    // All peers one after another, all cases, and then again: what drifts on the machine meets every peer alike.
    for repetition in 1..=repetitions {
        for case in &cases {
            for peer in peers.iter().filter(|peer| peer.peer.wants(&case.name)) {
                let what = format!("{case} {} ({repetition}/{repetitions})", peer.peer.name);
                progress.begin(&what);
                let key = (case.name.clone(), peer.peer.name.clone());
                if given_up.contains(&key) {
                    continue;
                }
                let result =
                    distance.near(|| one(&mut storage, peer, case, &settings, repetition), Outcome::hop_ns);
                if stop.load(Ordering::Relaxed) {
                    progress.clear();
                    return Ok(());
                }
                match result {
                    Ok(Outcome::Measured(figures)) => {
                        progress.end(&what, &text::one_line(&figures));
                        let (case, peer) = key;
                        let row = Row { case, peer, repetition, figures };
                        kept.add(|| report::csv::line(&row))?;
                        report.rows.push(row);
                    }
                    Ok(Outcome::Skipped(reason)) => {
                        progress.end(&what, &format!("skipped: {reason}"));
                        // That bare and fio do only part of it is in their nature; what servers lack is news.
                        if peer.peer.kind == PeerKind::VhostUser {
                            report.skipped.push((key.0.clone(), key.1.clone(), reason));
                        }
                        given_up.insert(key);
                    }
                    Err(error) => {
                        progress.note(&format!("failed: {what}: {error:#}"));
                        report.failed.push((key.0.clone(), key.1.clone(), format!("{error:#}")));
                        given_up.insert(key);
                    }
                }
            }
        }
    }
    progress.clear();
    Ok(())
}

fn one(
    storage: &mut Storage,
    peer: &Installed,
    case: &Case,
    settings: &Settings<'_>,
    repetition: u32,
) -> Result<Outcome> {
    if !peer.peer.has_backend(case.backend) {
        return Ok(Outcome::Skipped(format!("has no backend `{}`", case.backend.name())));
    }
    match storage.target(case.backend)? {
        Ok(target) => measure(peer, case, &target, settings, repetition == 1),
        Err(reason) => Ok(Outcome::Skipped(reason)),
    }
}

fn write(args: &BlkArgs, report: &Report) -> Result<()> {
    if let Some(path) = &args.svg {
        let text = report::svg::draw(report);
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(report).context("the report as JSON")?);
    } else if args.markdown {
        print!("{}", text::markdown(report));
    } else {
        print!("{}", text::tables(report));
    }
    Ok(())
}
