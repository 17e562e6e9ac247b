//! What a row is measured under: a backend, an access pattern, a depth, a number of jobs.

use crate::backend::BackendKind;
use crate::case::Op;

/// The size of every request: that of the published measurements.
pub(crate) const BLOCK_BYTES: u32 = 4096;

/// One column of conditions; every row is measured under each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Condition {
    pub(crate) backend: BackendKind,
    pub(crate) op: Op,
    /// Requests in flight in each queue.
    pub(crate) qd: u16,
    /// vCPUs, each of which drives a queue.
    pub(crate) jobs: u16,
}

impl Condition {
    /// The backend's name in the report: whether a file is on a disk is all that matters here.
    pub(crate) fn backend_name(&self) -> &'static str {
        match self.backend {
            BackendKind::Null => "null",
            BackendKind::Memory => "mem",
            BackendKind::Tmpfs => "tmpfs",
            BackendKind::Disk => "file",
        }
    }

    /// The condition of these names, where there is one.
    pub(crate) fn parse(backend: &str, op: &str, qd: u16, jobs: u16) -> Option<Self> {
        let all = Matrix::full(1);
        let named = |condition: &Self| condition.backend_name() == backend && condition.op.name() == op;
        all.conditions().into_iter().find(named).map(|condition| Self { qd, jobs, ..condition })
    }

    pub(crate) fn title(&self) -> String {
        let jobs = if self.jobs == 1 { "1 job".to_owned() } else { format!("{} jobs", self.jobs) };
        format!("{}, {}, {} in flight, {jobs}", self.backend_name(), self.op.name(), self.qd)
    }
}

/// How much is measured.
#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    pub(crate) backends: Vec<BackendKind>,
    pub(crate) ops: Vec<Op>,
    pub(crate) depths: Vec<u16>,
    pub(crate) jobs: Vec<u16>,
}

impl Matrix {
    /// For two minutes.
    pub(crate) fn quick() -> Self {
        Self {
            backends: vec![BackendKind::Null, BackendKind::Memory],
            ops: vec![Op::RandRead],
            depths: vec![1, 32],
            jobs: vec![1],
        }
    }

    /// Everything. More jobs than `jobs_max` would share CPUs among more than two threads each.
    pub(crate) fn full(jobs_max: u16) -> Self {
        let doubling = std::iter::successors(Some(4_u16), |jobs| jobs.checked_mul(2));
        Self {
            backends: vec![BackendKind::Null, BackendKind::Memory, BackendKind::Disk],
            ops: vec![Op::RandRead, Op::RandWrite],
            depths: vec![1, 32, 128],
            jobs: [1, 2].into_iter().chain(doubling.take_while(|&jobs| jobs <= jobs_max)).collect(),
        }
    }

    /// Every combination.
    pub(crate) fn conditions(&self) -> Vec<Condition> {
        let mut all = Vec::new();
        for &backend in &self.backends {
            for &op in &self.ops {
                for &jobs in &self.jobs {
                    all.extend(self.depths.iter().map(|&qd| Condition { backend, op, qd, jobs }));
                }
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_more_jobs_where_there_are_cpus_for_them() {
        assert_eq!(Matrix::full(1).jobs, [1, 2]);
        assert_eq!(Matrix::full(8).jobs, [1, 2, 4, 8]);
        assert_eq!(Matrix::quick().conditions().len(), 4);
        assert_eq!(Matrix::full(1).conditions().len(), 3 * 2 * 3 * 2);
    }

    #[test]
    fn conditions_have_titles() {
        let conditions = Matrix::full(1).conditions();
        assert_eq!(conditions[0].title(), "null, randread, 1 in flight, 1 job");
        assert_eq!(conditions[35].title(), "file, randwrite, 128 in flight, 2 jobs");
    }
}
