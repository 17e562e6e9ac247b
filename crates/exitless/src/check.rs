//! `exitless check`: an image's soundness, told as `qemu-img check` does.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;
use blk::backends::qcow2::check::{Report, check};
use serde_json::json;

use crate::failure::{EXIT_OK, Failure};

/// The image is corrupt.
const EXIT_CORRUPT: u8 = 2;
/// The image has leaks.
const EXIT_LEAKS: u8 = 3;

/// Checks an image; returns what to print and the code to exit with.
pub(crate) fn run(path: &Path, json: bool, force_share: bool) -> Result<(String, u8), Failure> {
    let report = check(path, force_share).context("the image was not checked")?;
    let text = if json { as_json(path, &report) } else { as_text(&report) };
    Ok((text, code(&report)))
}

fn code(report: &Report) -> u8 {
    match (report.corruptions, report.leaks) {
        (0, 0) => EXIT_OK,
        (0, _) => EXIT_LEAKS,
        _ => EXIT_CORRUPT,
    }
}

fn as_json(path: &Path, report: &Report) -> String {
    let answer = json!({
        "filename": path.to_string_lossy(),
        "format": "qcow2",
        "check-errors": 0,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "image-end-offset": report.image_end,
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "compressed-clusters": report.compressed_clusters,
        "findings": report.findings,
    });
    format!("{answer}\n")
}

fn as_text(report: &Report) -> String {
    let Report { corruptions, leaks, .. } = *report;
    let mut text = String::new();
    // Writing to a string does not fail.
    for finding in &report.findings {
        let kind = if finding.starts_with("leaked") { "LEAK" } else { "ERROR" };
        let _ = writeln!(text, "{kind} {finding}");
    }
    let untold = (corruptions + leaks).saturating_sub(report.findings.len() as u64);
    if untold > 0 {
        let _ = writeln!(text, "and {untold} more");
    }
    if corruptions > 0 {
        let _ = writeln!(
            text,
            "\n{corruptions} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it."
        );
    }
    if leaks > 0 {
        let _ = writeln!(
            text,
            "\n{leaks} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data."
        );
    }
    if corruptions + leaks == 0 {
        text.push_str("No errors were found on the image.\n");
    }
    let percent = |part: u64, of: u64| if of == 0 { 0.0 } else { part as f64 * 100.0 / of as f64 };
    let _ = writeln!(
        text,
        "{}/{} = {:.2}% allocated, {:.2}% compressed clusters\nImage end offset: {}",
        report.allocated_clusters,
        report.total_clusters,
        percent(report.allocated_clusters, report.total_clusters),
        percent(report.compressed_clusters, report.allocated_clusters),
        report.image_end
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corruptions_weigh_more_than_leaks() {
        let report = |corruptions, leaks| Report { corruptions, leaks, ..Report::default() };
        let codes = [(0, 0), (0, 7), (1, 0), (1, 7)].map(|(bad, leaks)| code(&report(bad, leaks)));
        assert_eq!(codes, [0, 3, 2, 2]);
    }

    #[test]
    fn what_was_only_counted_is_said_to_be() {
        let findings = vec!["leaked cluster 5: refcount 1, 0 references".to_owned()];
        let report =
            Report { leaks: 3, total_clusters: 8, allocated_clusters: 1, findings, ..Report::default() };
        let text = as_text(&report);
        for line in ["LEAK leaked cluster 5", "and 2 more", "3 leaked clusters", "1/8 = 12.50% allocated"] {
            assert!(text.contains(line), "{text}");
        }
        assert!(as_text(&Report::default()).starts_with("No errors"));
    }
}
