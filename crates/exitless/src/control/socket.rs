//! The control socket's file.

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, anyhow, bail};
use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt,
};

use super::server::{self, Answer};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 8;

/// A listening control socket. Its file goes when it is dropped.
pub(crate) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Listens at `path`, for its owner alone. A socket that a service has left behind is replaced.
    pub(crate) fn listen(path: &Path) -> anyhow::Result<Self> {
        remove_stale(path)
            .and_then(|()| bind_at(path))
            .with_context(|| format!("control socket {}", path.display()))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Has its connections answered for as long as the process lives.
    pub(crate) fn answer(&self, answer: Answer) -> anyhow::Result<()> {
        server::start(self.listener.try_clone()?, answer).context("cannot start the control thread")
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "control socket not removed");
        }
    }
}

fn bind_at(path: &Path) -> anyhow::Result<ControlSocket> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The file is made with the permissions of the socket, so that at no time anybody else can connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(ControlSocket { listener: socket.into(), path: path.to_owned() })
}

fn remove_stale(path: &Path) -> anyhow::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => bail!("it exists and is not a socket"),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(fs::remove_file(path)?),
        Err(error) => Err(anyhow!(error).context("cannot find out who uses it")),
        Ok(stream) => match sockopt::socket_peercred(&stream) {
            Ok(owner) => bail!("it is in use by process {}", owner.pid.as_raw_nonzero()),
            Err(_) => bail!("it is in use"),
        },
    }
}
