//! How the program ends when it does not end well.

use std::fmt::{self, Write as _};

/// Why the program gives up. The kinds differ in whose move it is next, and in the exit code.
#[derive(Debug)]
pub enum Failure {
    /// What was asked for makes no sense: the command line or a configuration file must change.
    Usage(anyhow::Error),
    /// It made sense and failed.
    Runtime(anyhow::Error),
}

/// Everything went well.
pub const EXIT_OK: u8 = 0;
/// See [`Failure::Runtime`].
pub const EXIT_RUNTIME: u8 = 1;
/// See [`Failure::Usage`].
pub const EXIT_USAGE: u8 = 2;

impl Failure {
    /// A failure of the caller's.
    pub(crate) fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self::Usage(error.into())
    }

    /// The code to exit with.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => EXIT_USAGE,
            Self::Runtime(_) => EXIT_RUNTIME,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Usage(error) | Self::Runtime(error)) = self;
        f.write_str(&chain(error))
    }
}

/// An error and its causes, each said once: many messages end with their cause's already.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            let _ = write!(text, ": {cause}");
        }
    }
    text
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Runtime(error)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open a: {source}")]
    struct SaysItsCause {
        source: std::io::Error,
    }

    #[test]
    fn every_cause_is_said_once() {
        let source = std::io::Error::from_raw_os_error(2);
        let cause = source.to_string();
        let error = anyhow::Error::new(SaysItsCause { source }).context("device `a`");
        assert_eq!(Failure::from(error).to_string(), format!("device `a`: cannot open a: {cause}"));
        assert_eq!(chain(&anyhow!("b").context("a")), "a: b");
    }
}
