//! The limit on open descriptors, compared with what will be needed.

use anyhow::ensure;
use rustix::process::{Resource, getrlimit};

/// For what comes and goes: connections, files that are looked at for a moment.
const SPARE: u64 = 16;

/// Whether the process may open so many more.
///
/// # Errors
/// It may not: what is open, what is wanted, and what the limit is.
pub(crate) fn expect(more: u64) -> anyhow::Result<()> {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return Ok(()) };
    // Where nobody says how many are open, opening them will.
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64);
    ensure!(
        open.saturating_add(more).saturating_add(SPARE) <= limit,
        "{open} descriptors are open, and up to {more} more will be needed: the limit is {limit} (`ulimit -n`). \
         Fewer queues need fewer"
    );
    Ok(())
}
