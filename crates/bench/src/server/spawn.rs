//! Starting a process that is bound to one CPU and dies with this one.
//!
//! Unsafe is needed for `pre_exec`, whose closure runs between `fork` and `exec`, where only the forking thread
//! exists. It makes two system calls and touches no lock and no allocator.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::sched_setaffinity;

use crate::cpus;

/// Starts `command` on `cpu`, in a process group of its own so that a Ctrl-C reaches only us. The kernel kills it
/// when the thread that called this ends.
pub(super) fn spawn(command: &mut Command, cpu: Option<u32>) -> io::Result<Child> {
    let set = cpu.map(cpus::set_of);
    let prepare = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if let Some(set) = &set {
            sched_setaffinity(None, set)?;
        }
        Ok(())
    };
    // SAFETY: the closure only makes two system calls with values it owns; neither allocates nor takes a lock.
    unsafe { command.process_group(0).pre_exec(prepare) }.spawn()
}
