//! Where metrics are served: `unix:PATH` or `IP:PORT`.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// An address to listen at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port of one of this host's addresses, or of all (`0.0.0.0` and `[::]`). Port 0 is any that is free.
    Tcp(SocketAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("a path must follow `unix:`".to_owned()),
            Some(path) => Ok(Self::Unix(path.into())),
            None => text
                .parse()
                .map(Self::Tcp)
                .map_err(|_| "it must be unix:PATH or IP:PORT, like 127.0.0.1:9100 or [::1]:9100".to_owned()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_shown() {
        for text in ["unix:/run/vm1.sock", "unix:a b", "127.0.0.1:9100", "[::1]:0", "0.0.0.0:80"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_none_is_refused_with_what_is_allowed() {
        for text in ["", "9100", ":9100", "localhost:9100", "127.0.0.1", "::1:x", "127.0.0.1:65536", "/run/a"]
        {
            assert!(text.parse::<Address>().unwrap_err().contains("unix:PATH or IP:PORT"), "{text}");
        }
        assert!("unix:".parse::<Address>().is_err());
    }
}
