//! The limit on open descriptors: raised as far as it goes, and compared with what will be needed.

use anyhow::anyhow;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::failure::Failure;

/// For what comes and goes: connections, I/O threads, files that are looked at for a moment.
const SPARE: u64 = 16;

/// What a device takes beyond what is open, once all of its queues run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    pub(crate) queues: u64,
    pub(crate) per_queue: u64,
    pub(crate) besides: u64,
}

/// Lets this process have as many descriptors as it may: every queue takes a few, and every device one for each
/// region of its guest's memory.
pub(crate) fn allow() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Refuses devices whose queues cannot all run at once, instead of the guest that is the first to need too many.
pub(crate) fn expect(needs: impl IntoIterator<Item = Need>) -> Result<(), Failure> {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return Ok(()) };
    // Where nobody says how many are open, opening them will.
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as u64;
    check(open, limit, needs)
}

fn check(open: u64, limit: u64, needs: impl IntoIterator<Item = Need>) -> Result<(), Failure> {
    let (mut queues, mut total) = (0u64, open.saturating_add(SPARE));
    for need in needs {
        queues = queues.saturating_add(need.queues);
        let more = need.queues.saturating_mul(need.per_queue).saturating_add(need.besides);
        total = total.saturating_add(more);
    }
    if total <= limit {
        return Ok(());
    }
    Err(Failure::Runtime(anyhow!(
        "{queues} queues need at least {total} open files, and the limit is {limit}: raise it (ulimit -Hn, \
         LimitNOFILE=), or have fewer queues"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_devices_need_is_compared_with_the_limit() {
        let needs =
            || [Need { queues: 4, per_queue: 6, besides: 3 }, Need { queues: 1, per_queue: 2, besides: 3 }];
        assert!(check(10, 10 + SPARE + 32, needs()).is_ok());
        let Err(Failure::Runtime(error)) = check(10, 10 + SPARE + 31, needs()) else { panic!("too few") };
        assert!(error.to_string().starts_with("5 queues need at least 58 open files"), "{error}");
        let endless = Need { queues: u64::MAX, per_queue: u64::MAX, besides: u64::MAX };
        assert!(check(u64::MAX, u64::MAX - 1, [endless, endless]).is_err());
    }
}
