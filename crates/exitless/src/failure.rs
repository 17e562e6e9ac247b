//! How the program ends when it does not end well.

use std::fmt;

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
        write!(f, "{error:#}")
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Runtime(error)
    }
}
