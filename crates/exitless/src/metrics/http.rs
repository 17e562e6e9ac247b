//! As much of HTTP/1.1 (RFC 9112) as a scrape needs: one request, one answer, and the connection is closed.
//!
//! No clock and no socket: bytes come in, bytes go out.

/// The longest head of a request, in bytes.
pub(super) const REQUEST_BYTES_MAX: usize = 8192;
/// Where the metrics are, by convention.
pub(super) const PATH: &str = "/metrics";

const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
const PLAIN_TYPE: &str = "text/plain; charset=utf-8";

/// A request as far as it has come.
#[derive(Default)]
pub(super) struct Request {
    head: Vec<u8>,
}

impl Request {
    /// How many bytes there is room for.
    pub(super) fn room(&self) -> usize {
        REQUEST_BYTES_MAX - self.head.len()
    }

    /// Adds bytes, of which what is beyond the room is dropped; the answer, if that is the whole head or already too
    /// much. `page` is called only if it is asked for.
    pub(super) fn add(&mut self, bytes: &[u8], page: impl FnOnce() -> String) -> Option<Vec<u8>> {
        // An empty line that ends the head may have begun earlier.
        let looked_at = self.head.len().saturating_sub(3);
        self.head.extend(&bytes[..bytes.len().min(self.room())]);
        let news = &self.head[looked_at..];
        let ends = |end: &[u8]| news.windows(end.len()).any(|window| window == end);
        if ends(b"\r\n\r\n") || ends(b"\n\n") {
            Some(answer(&self.head, page))
        } else if self.room() == 0 {
            Some(refusal("431 Request Header Fields Too Large", ""))
        } else {
            None
        }
    }
}

/// The answer to a request with this head. Only its first line matters.
fn answer(head: &[u8], page: impl FnOnce() -> String) -> Vec<u8> {
    let line = head.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let Ok(line) = std::str::from_utf8(line) else { return refusal("400 Bad Request", "") };
    let mut words = line.split_ascii_whitespace();
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return refusal("400 Bad Request", "");
    };
    if !version.starts_with("HTTP/1.") {
        return refusal("505 HTTP Version Not Supported", "");
    }
    let path = target.split('?').next().unwrap_or_default();
    match (method, path) {
        ("GET" | "HEAD", PATH) => response("200 OK", METRICS_TYPE, "", &page(), method == "GET"),
        ("GET" | "HEAD", _) => {
            response("404 Not Found", PLAIN_TYPE, "", &format!("metrics are at {PATH}\n"), method == "GET")
        }
        _ => refusal("405 Method Not Allowed", "Allow: GET, HEAD\r\n"),
    }
}

fn refusal(status: &str, header: &str) -> Vec<u8> {
    response(status, PLAIN_TYPE, header, &format!("{status}\n"), true)
}

fn response(status: &str, kind: &str, header: &str, body: &str, with_body: bool) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{header}Connection: close\r\n\r\n"
    );
    [head.as_bytes(), if with_body { body.as_bytes() } else { b"" }].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ask(request: &[u8]) -> Option<String> {
        let answer = Request::default().add(request, || "page\n".to_owned());
        answer.map(|answer| String::from_utf8(answer).unwrap())
    }

    #[test]
    fn a_scrape_is_answered_with_the_page() {
        let answer = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
                      Content-Length: 5\r\nConnection: close\r\n\r\n";
        assert_eq!(ask(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").unwrap(), format!("{answer}page\n"));
        assert_eq!(ask(b"GET /metrics?a=b HTTP/1.0\n\n").unwrap(), format!("{answer}page\n"));
        assert_eq!(ask(b"HEAD /metrics HTTP/1.1\r\n\r\n").unwrap(), answer);
    }

    #[test]
    fn anything_else_is_refused_with_its_status() {
        for (request, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("GET /metrics HTTP/2\r\n\r\n", "505"),
            ("GET /metrics\r\n\r\n", "400"),
            ("\r\n\r\n", "400"),
            ("GET /metrics HTTP/1.1 x\r\n\r\n", "400"),
        ] {
            let answer = ask(request.as_bytes()).unwrap();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
        }
        assert!(ask(b"\xff\xff\r\n\r\n").unwrap().starts_with("HTTP/1.1 400 "));
    }

    #[test]
    fn a_request_may_come_in_pieces() {
        let mut request = Request::default();
        let (last, bytes) = b"GET /metrics HTTP/1.1\r\n\r\n".split_last().unwrap();
        for &byte in bytes {
            assert!(request.add(&[byte], String::new).is_none());
        }
        assert!(request.add(&[*last], String::new).is_some());
        assert!(ask(b"GET /metrics HTTP/1.1\r\n").is_none());
    }

    #[test]
    fn a_request_without_end_is_cut_off() {
        let mut request = Request::default();
        assert!(request.add(&[b'a'; REQUEST_BYTES_MAX - 1], String::new).is_none());
        let answer = request.add(&[b'a'; 1000], String::new).unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 431 "));
        assert_eq!(request.room(), 0);
    }

    proptest! {
        #[test]
        fn whatever_comes_in_whatever_pieces_is_answered_once_or_waited_for(
            pieces in prop::collection::vec("(GET |HEAD|/metrics|HTTP/1.|[\\x00-\\xff ?]{0,3}|\r?\n){0,9}|[a-z]{4096}", 0..12),
        ) {
            let mut request = Request::default();
            for piece in &pieces {
                if let Some(answer) = request.add(piece.as_bytes(), || "page\n".to_owned()) {
                    prop_assert!(answer.starts_with(b"HTTP/1.1 ") && answer.windows(4).any(|end| end == b"\r\n\r\n"));
                    break;
                }
                prop_assert!(request.room() > 0);
            }
        }
    }
}
