//! The service's end of the control socket: a thread that accepts, and one for each connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::{REQUEST_BYTES_MAX, Request, Response};

/// The most connections at a time. Each costs a thread.
const CONNECTIONS_MAX: usize = 8;
/// How long a connection may be silent.
const SILENCE_S_MAX: u64 = 60;
/// Commands need no deep stacks.
const STACK_BYTES: usize = 256 << 10;

/// What answers.
pub(crate) type Answer = Arc<dyn Fn(Request) -> Response + Send + Sync>;

/// Starts to answer the connections of `listener`, until the process ends.
pub(super) fn start(listener: UnixListener, answer: Answer) -> io::Result<()> {
    let connections = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        loop {
            match listener.accept() {
                Ok((stream, _)) => admit(stream, &connections, &answer),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a control connection");
                    // Out of descriptors, most likely; trying again at once would only fill the log.
                    thread::sleep(Duration::from_secs(1));
                }
            }
        }
    };
    thread::Builder::new().name("control".to_owned()).stack_size(STACK_BYTES).spawn(accept)?;
    Ok(())
}

/// Gives a connection its thread, if there is one left for it.
fn admit(mut stream: UnixStream, connections: &Arc<AtomicUsize>, answer: &Answer) {
    let place = Place::take(connections);
    let Some(place) = place else {
        let refusal = Response::Error(format!("more than {CONNECTIONS_MAX} connections"));
        let _ = send(&mut stream, &refusal);
        return;
    };
    let answer = answer.clone();
    let started =
        thread::Builder::new().name("control".to_owned()).stack_size(STACK_BYTES).spawn(move || {
            let _place = place;
            if let Err(error) = converse(stream, &answer) {
                tracing::debug!(%error, "control connection ended");
            }
        });
    if let Err(error) = started {
        tracing::warn!(%error, "cannot start a thread for a control connection");
    }
}

/// One of the connections there may be.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(connections: &Arc<AtomicUsize>) -> Option<Self> {
        let place = Self(connections.clone());
        (connections.fetch_add(1, Ordering::Relaxed) < CONNECTIONS_MAX).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn converse(mut stream: UnixStream, answer: &Answer) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(SILENCE_S_MAX)))?;
    stream.set_write_timeout(Some(Duration::from_secs(SILENCE_S_MAX)))?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut line = Vec::new();
    loop {
        line.clear();
        let len = lines.by_ref().take(REQUEST_BYTES_MAX).read_until(b'\n', &mut line)?;
        if len == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') && len as u64 == REQUEST_BYTES_MAX {
            return send(
                &mut stream,
                &Response::Error(format!("a command has at most {REQUEST_BYTES_MAX} bytes")),
            );
        }
        let response = match serde_json::from_slice(&line) {
            Ok(request) => answer(request),
            Err(error) => Response::Error(format!("not a command: {error}")),
        };
        send(&mut stream, &response)?;
    }
}

fn send(stream: &mut UnixStream, response: &Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    stream.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection that is answered as `converse` does, with errors that echo the request.
    fn connect() -> (UnixStream, BufReader<UnixStream>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let answer: Answer = Arc::new(|request| Response::Error(format!("{request:?}")));
        admit(theirs, &Arc::default(), &answer);
        ours.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        (ours.try_clone().unwrap(), BufReader::new(ours))
    }

    fn answer(to: &mut BufReader<UnixStream>) -> String {
        let mut line = String::new();
        to.read_line(&mut line).unwrap();
        line
    }

    #[test]
    fn commands_are_answered_one_by_one_and_nonsense_does_not_end_the_connection() {
        let (mut to, mut from) = connect();
        to.write_all(b"{\"command\":\"list\"}\n\xff\n{\"command\":\"stats\"}\n").unwrap();
        assert_eq!(answer(&mut from), "{\"error\":\"List\"}\n");
        assert!(answer(&mut from).starts_with("{\"error\":\"not a command: "));
        assert_eq!(answer(&mut from), "{\"error\":\"Stats\"}\n");
    }

    #[test]
    fn a_line_without_end_is_cut_off() {
        let (mut to, mut from) = connect();
        to.write_all(&[b' '; REQUEST_BYTES_MAX as usize]).unwrap();
        assert_eq!(answer(&mut from), "{\"error\":\"a command has at most 4096 bytes\"}\n");
        assert_eq!(answer(&mut from), "", "the connection is closed");
    }

    #[test]
    fn there_are_places_for_so_many_connections() {
        let connections = Arc::default();
        let mut places: Vec<_> = (0..CONNECTIONS_MAX).map(|_| Place::take(&connections)).collect();
        assert!(places.iter().all(Option::is_some));
        assert!(Place::take(&connections).is_none());
        places.pop();
        assert!(Place::take(&connections).is_some());
    }
}
