//! Which CPUs a run uses: one for the server with all its threads, another one for the load generator.

use anyhow::{Context, Result, bail};
use reactor::Machine;
use rustix::thread::{CpuSet, sched_setaffinity};

/// The two CPUs of a run; `None` where the machine has only one and nothing is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cpus {
    pub(crate) server: Option<u32>,
    pub(crate) client: Option<u32>,
}

impl Cpus {
    /// The CPUs asked for, or the first allowed CPU and the first one after it on another core.
    pub(crate) fn choose(machine: &Machine, server: Option<u32>, client: Option<u32>) -> Result<Self> {
        for cpu in [server, client].into_iter().flatten() {
            if !machine.allowed.iter().any(|allowed| allowed.id == cpu) {
                bail!("CPU {cpu} is not among the CPUs that this process may use");
            }
        }
        if server.is_some() && server == client {
            bail!("server and client need different CPUs, not both CPU {}", server.unwrap_or(0));
        }
        let other = |taken: Option<u32>| {
            let core = machine.allowed.iter().find(|cpu| Some(cpu.id) == taken).map(|cpu| cpu.core);
            let free = || machine.allowed.iter().filter(move |cpu| Some(cpu.id) != taken);
            free().find(|cpu| Some(cpu.core) != core).or_else(|| free().next()).map(|cpu| cpu.id)
        };
        if machine.allowed.len() < 2 {
            return Ok(Self { server: None, client: None });
        }
        let server = server.or_else(|| other(client));
        Ok(Self { server, client: client.or_else(|| other(server)) })
    }

    /// How many threads of a run work at once without getting in each other's way.
    pub(crate) fn is_shared(&self) -> bool {
        self.server.is_none()
    }
}

/// Binds the calling thread, and those it starts from now on, to `cpu`.
pub(crate) fn pin(cpu: Option<u32>) -> Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    sched_setaffinity(None, &set_of(cpu)).with_context(|| format!("cannot run on CPU {cpu} only"))
}

pub(crate) fn set_of(cpu: u32) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu as usize);
    set
}

#[cfg(test)]
mod tests {
    use super::*;
    use reactor::Cpu;

    fn machine(cpus: &[(u32, u32)]) -> Machine {
        Machine { allowed: cpus.iter().map(|&(id, core)| Cpu { id, core }).collect(), quota: None }
    }

    #[test]
    fn the_client_gets_another_core_where_there_is_one() {
        let threads = machine(&[(0, 0), (1, 0), (2, 2), (3, 2)]);
        let choose = |server, client| Cpus::choose(&threads, server, client).unwrap();
        assert_eq!(choose(None, None), Cpus { server: Some(0), client: Some(2) });
        assert_eq!(choose(None, Some(0)), Cpus { server: Some(2), client: Some(0) });
        assert_eq!(choose(Some(3), None), Cpus { server: Some(3), client: Some(0) });
    }

    #[test]
    fn siblings_are_better_than_one_cpu() {
        let siblings = machine(&[(4, 4), (5, 4)]);
        assert_eq!(Cpus::choose(&siblings, None, None).unwrap(), Cpus { server: Some(4), client: Some(5) });
        let lone = machine(&[(4, 4)]);
        assert!(Cpus::choose(&lone, None, None).unwrap().is_shared());
    }

    #[test]
    fn impossible_wishes_are_refused() {
        let pair = machine(&[(0, 0), (1, 1)]);
        assert!(Cpus::choose(&pair, Some(7), None).unwrap_err().to_string().contains("CPU 7"));
        assert!(Cpus::choose(&pair, Some(1), Some(1)).is_err());
    }
}
