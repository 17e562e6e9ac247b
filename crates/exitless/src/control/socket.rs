//! The control socket's file.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::Context;
use vhost_user::Listener;

use super::server::{self, Answer};

/// For its owner alone.
const MODE: u32 = 0o600;

/// A listening control socket. Its file goes when it is dropped.
pub(crate) struct ControlSocket(Listener);

impl ControlSocket {
    /// Listens at `path`. A socket that a service has left behind is replaced.
    pub(crate) fn listen(path: &Path) -> anyhow::Result<Self> {
        Listener::new(path, MODE).map(Self).context("control socket")
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Has its connections answered for as long as the process lives.
    pub(crate) fn answer(&self, answer: Answer) -> anyhow::Result<()> {
        let listener = UnixListener::from(self.0.as_fd().try_clone_to_owned()?);
        listener.set_nonblocking(false)?;
        server::start(listener, answer).context("cannot start the control thread")
    }
}
