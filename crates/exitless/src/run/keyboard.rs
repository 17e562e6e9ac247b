//! What comes on stdin is typed on the machine's serial console.
//!
//! On a terminal all keys are the guest's, so there is a way out that no guest can close, the one that QEMU's users know:
//! Ctrl-A begins an escape. It is found however far the guest is behind with its input.

use std::io::{self, Write};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmm::Machine;

use super::terminal::Terminal;

/// What to say to whoever sits at the terminal.
pub(super) const NOTICE: &str =
    "all keys are the guest's; Ctrl-A x ends the machine, Ctrl-A Ctrl-A sends a Ctrl-A";

/// The guest's serial port takes so few bytes at a time that it may have to catch up.
const FULL: Duration = Duration::from_millis(5);
/// What is typed ahead of the guest at a terminal, in bytes; what follows is dropped, as terminals do.
const AHEAD_BYTES_MAX: usize = 4096;

/// Types what comes on stdin, for as long as there is a machine; with escapes at a terminal.
pub(super) fn start(machine: &Arc<Machine>, terminal: Option<Arc<Terminal>>) -> anyhow::Result<()> {
    let keyboard = Keyboard {
        machine: Arc::downgrade(machine),
        terminal,
        escapes: Escapes::default(),
        waiting: Vec::new(),
    };
    thread::Builder::new()
        .name("console".into())
        .spawn(move || keyboard.run())
        .context("cannot start a thread")?;
    Ok(())
}

struct Keyboard {
    machine: Weak<Machine>,
    terminal: Option<Arc<Terminal>>,
    escapes: Escapes,
    /// What the guest has not taken yet.
    waiting: Vec<u8>,
}

impl Keyboard {
    fn run(mut self) {
        let stdin = io::stdin();
        let mut bytes = [0; 256];
        let mut open = true;
        while open || !self.waiting.is_empty() {
            // Who writes to a pipe may be kept waiting, who sits at a terminal is heard.
            let listens = open && (self.waiting.is_empty() || self.terminal.is_some());
            if !listens {
                thread::sleep(FULL);
            } else if self.waiting.is_empty() || readable(&stdin) {
                match rustix::io::read(&stdin, &mut bytes) {
                    Ok(count @ 1..) => {
                        if !self.take(&bytes[..count]) {
                            return;
                        }
                    }
                    Err(Errno::INTR) => {}
                    Ok(0) | Err(_) => open = false,
                }
            }
            let Some(machine) = self.machine.upgrade() else { return };
            let taken = machine.input(&self.waiting);
            self.waiting.drain(..taken);
        }
    }

    /// Takes what was read. False if it is the end.
    fn take(&mut self, bytes: &[u8]) -> bool {
        let Some(terminal) = &self.terminal else {
            self.waiting.extend(bytes);
            return true;
        };
        for &byte in bytes {
            match self.escapes.after(byte) {
                Key::Typed(byte) if self.waiting.len() < AHEAD_BYTES_MAX => self.waiting.push(byte),
                Key::Typed(_) | Key::None => {}
                Key::Help => {
                    let _ = writeln!(io::stderr(), "\n{NOTICE}");
                }
                Key::End => {
                    terminal.give_back();
                    if let Some(machine) = self.machine.upgrade() {
                        machine.stop();
                    }
                    return false;
                }
            }
        }
        true
    }
}

/// Waits a little for something to read.
fn readable(stdin: &io::Stdin) -> bool {
    let timeout = Timespec { tv_sec: 0, tv_nsec: FULL.subsec_nanos().into() };
    poll(&mut [PollFd::new(stdin, PollFlags::IN)], Some(&timeout)).is_ok_and(|ready| ready > 0)
}

/// Ctrl-A.
const ESCAPE: u8 = 1;

/// Finds escapes among keys.
#[derive(Default)]
struct Escapes {
    begun: bool,
}

/// What a key means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    /// It is the guest's.
    Typed(u8),
    /// It is part of an escape.
    None,
    /// How does one get out?
    Help,
    /// Out.
    End,
}

impl Escapes {
    fn after(&mut self, byte: u8) -> Key {
        if !std::mem::replace(&mut self.begun, false) {
            self.begun = byte == ESCAPE;
            return if self.begun { Key::None } else { Key::Typed(byte) };
        }
        match byte {
            ESCAPE => Key::Typed(ESCAPE),
            b'x' => Key::End,
            b'h' | b'?' => Key::Help,
            _ => Key::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_told_from_the_guests_keys() {
        let keys = |typed: &[u8]| {
            let mut escapes = Escapes::default();
            typed.iter().map(|&byte| escapes.after(byte)).collect::<Vec<_>>()
        };
        use Key::{End, Help, None, Typed};
        assert_eq!(keys(b"x\x03\t\x1b[A"), [b'x', 3, 9, 27, b'[', b'A'].map(Typed));
        assert_eq!(keys(b"\x01\x01x"), [None, Typed(1), Typed(b'x')]);
        assert_eq!(keys(b"\x01?\x01hh"), [None, Help, None, Help, Typed(b'h')]);
        assert_eq!(keys(b"\x01q\x01x"), [None, None, None, End]);
    }

    #[test]
    fn what_comes_from_a_pipe_is_the_guests_without_exception() {
        let mut pipe = Keyboard {
            machine: Weak::new(),
            terminal: None,
            escapes: Escapes::default(),
            waiting: Vec::new(),
        };
        assert!(pipe.take(b"\x01x"));
        assert_eq!(pipe.waiting, b"\x01x");
    }
}
