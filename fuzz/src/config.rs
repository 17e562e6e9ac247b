//! Any configuration file.

use std::path::Path;

/// Reads one input as a configuration file. It is accepted or refused with a place in the file.
///
/// # Panics
/// A refusal that names no line, or a crash: a bug.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(error) = exitless::config::Config::parse(Path::new("fuzz.toml"), text) {
        assert!(error.to_string().starts_with("fuzz.toml:"), "{error}");
    }
}
