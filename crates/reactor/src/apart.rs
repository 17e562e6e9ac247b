//! Threads with a table of descriptors of their own.
//!
//! Closing a descriptor can wait for ever: for the program that serves its file system (FUSE), or for a pipe's other
//! end. While a thread waits in such a call nothing else in its table of descriptors goes away, not even when the
//! process is killed: locks and sockets stay. So descriptors that somebody hostile chose belong into a table in which
//! there is nothing else. Threads of one process usually share one table; here a thread leaves it.
//!
//! Such a thread takes no signals: a handler that writes to a descriptor, to wake somebody, would write to another file
//! here, or to none.
//!
//! Unsafe is needed for calls that `rustix` has no safe form of, because a number that means one file in one thread
//! means another file, or none, in such a thread. Here every number is owned by exactly one table: see below.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::mpsc;
use std::thread;

use rustix::event::epoll;

use crate::spare::run_as_helper;

/// No thread could be had; the descriptors come back. Closing them here may wait.
#[derive(Debug)]
pub struct NotSpawned {
    /// The system's reason.
    pub error: io::Error,
    /// What the thread was to have.
    pub fds: Vec<OwnedFd>,
}

impl From<NotSpawned> for io::Error {
    fn from(refused: NotSpawned) -> Self {
        refused.error
    }
}

/// Runs `run` on a new thread whose table of descriptors has `fds` and no others. Neither the calling thread's table
/// nor anything but `fds` is seen there, so `run` captures nothing. Returns when the descriptors have changed hands:
/// `run` begins when the caller has closed its own, so what closes a file for the last time is not the caller. It runs
/// on the CPUs of [helpers](crate::helper_cpus).
///
/// Where the system does not allow a table of its own (a filter of system calls, say) the thread shares the caller's.
/// Best called on a thread that has few descriptors: for a moment they are in both tables.
///
/// # Errors
/// The system refuses another thread.
pub fn spawn_apart(name: &str, fds: Vec<OwnedFd>, run: fn(Vec<OwnedFd>)) -> Result<(), NotSpawned> {
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let (tell, told) = mpsc::sync_channel(1);
    let (let_go, is_let_go) = mpsc::sync_channel::<()>(1);
    // The thread begins with the caller's mask.
    let blocked = SignalsBlocked::new();
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(move || {
        run_as_helper();
        let apart = leave_table(&numbers);
        let _ = tell.send(apart);
        // SAFETY: open in this thread's table: it is a copy in which they were kept, and the caller goes on owning
        // the numbers in its own; or the table is the caller's, who then gives up the numbers.
        let fds = numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
        // An error: the caller has nothing more to say.
        let _ = is_let_go.recv();
        run(fds);
    });
    drop(blocked);
    if let Err(error) = spawned {
        return Err(NotSpawned { error, fds });
    }
    if told.recv().unwrap_or(false) {
        drop(fds);
    } else {
        // The thread owns them, in the table that is shared.
        fds.into_iter().map(IntoRawFd::into_raw_fd).for_each(|_| ());
    }
    drop(let_go);
    Ok(())
}

/// All signals are blocked for the calling thread, until this is dropped.
struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    fn new() -> Self {
        let mut all = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        // SAFETY: the first call fills `all`, and the second reads it and fills `before`. Neither can fail: the pointers are
        // good and the operation is one that there is.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
            Self(before.assume_init())
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: reads a set that the system filled.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// Makes a table of descriptors for the calling thread, with `keep` and nothing behind 0, 1 and 2; false if the system
/// does not allow that, and then nothing has changed.
fn leave_table(keep: &[RawFd]) -> bool {
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    let above = |fd: RawFd| fd + 1;
    // What is above the last is not even copied.
    if !close_range(keep.last().map_or(0, |&fd| above(fd)), RawFd::MAX, libc::CLOSE_RANGE_UNSHARE) {
        return false;
    }
    let mut from = 0;
    for fd in keep {
        if from < fd {
            close_range(from, fd - 1, 0);
        }
        from = above(fd);
    }
    occupy_standard();
    true
}

/// Puts a file that takes and gives nothing where the standard streams were: a message to one of them must not get into
/// a file that comes to have its number, and whoever reads what this process wrote must not wait for this thread.
fn occupy_standard() {
    while let Ok(file) = epoll::create(epoll::CreateFlags::CLOEXEC) {
        if file.as_raw_fd() > libc::STDERR_FILENO {
            break;
        }
        let _ = file.into_raw_fd();
    }
}

fn close_range(first: RawFd, last: RawFd, flags: libc::c_uint) -> bool {
    // SAFETY: passes three numbers. With UNSHARE, or after it, only numbers of this thread's own table are closed, and
    // nobody owns one of those: `spawn_apart` has not yet made anything of them.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) == 0 }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// What the thread sees in its table, by number, on the socket it was given.
    fn list(fds: Vec<OwnedFd>) {
        let mut stream = UnixStream::from(fds.into_iter().next().unwrap());
        let own = stream.as_raw_fd();
        let mut found: Vec<RawFd> = std::fs::read_dir("/proc/thread-self/fd")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().ok())
            .filter(|&fd| fd > 2 && fd != own)
            .collect();
        found.sort_unstable();
        writeln!(stream, "{found:?}").unwrap();
    }

    /// The signals that are blocked, on the socket it was given.
    fn blocked_signals(fds: Vec<OwnedFd>) {
        let mut stream = UnixStream::from(fds.into_iter().next().unwrap());
        stream.write_all(mask().as_bytes()).unwrap();
    }

    /// The mask of this thread, in hexadecimal.
    fn mask() -> String {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap().trim().to_owned()
    }

    #[test]
    fn a_thread_takes_no_signals_and_the_caller_goes_on_as_before() {
        let before = mask();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        spawn_apart("apart", vec![theirs.into()], blocked_signals).unwrap();
        let mut found = String::new();
        ours.read_to_string(&mut found).unwrap();
        let blocked = u64::from_str_radix(&found, 16).unwrap();
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1] {
            assert!(blocked >> (signal - 1) & 1 == 1, "signal {signal} is not in {found}");
        }
        assert_eq!(mask(), before);
    }

    /// Whether the file it was given is still in the caller's table, on that file.
    fn is_still_the_callers(fds: Vec<OwnedFd>) {
        let mut stream = UnixStream::from(fds.into_iter().next().unwrap());
        let of = |path: &str| std::fs::read_link(path).ok();
        let name = of(&format!("/proc/thread-self/fd/{}", stream.as_raw_fd()));
        assert!(name.is_some());
        let table = std::fs::read_dir("/proc/self/fd").unwrap();
        let found =
            table.filter_map(|entry| entry.ok()).any(|entry| std::fs::read_link(entry.path()).ok() == name);
        writeln!(stream, "{found}").unwrap();
    }

    #[test]
    fn what_closes_a_file_for_the_last_time_is_not_the_caller() {
        for _ in 0..100 {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            spawn_apart("apart", vec![theirs.into()], is_still_the_callers).unwrap();
            let mut found = String::new();
            ours.read_to_string(&mut found).unwrap();
            assert_eq!(found, "false\n");
        }
    }

    #[test]
    fn a_thread_has_what_it_was_given_and_nothing_else() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        spawn_apart("apart", vec![theirs.into()], list).unwrap();
        let mut found = String::new();
        // It ends: the caller's copy of the other end was closed.
        ours.read_to_string(&mut found).unwrap();
        // The list itself was being read.
        assert_eq!(found.matches(',').count(), 0, "{found}");
        assert!(found.starts_with('['), "{found}");
        drop(file);
    }
}
