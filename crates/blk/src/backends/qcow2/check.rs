//! The check of an image while nobody writes it.

use std::io::ErrorKind;
use std::path::Path;

pub use qcow2::check::Report;

use super::chain::Tables;
use crate::backend::BackendError;
use crate::backends::file::hold::own;
use crate::backends::file::open::open_part;
use crate::backends::file::{Direct, FileOptions, Lock};

/// Checks the image at `path`, which is only read; other files that it names are not looked at. Nobody can write it
/// meanwhile, unless `force_share` is set: then it may be changing, and look worse than it is.
///
/// # Errors
/// It cannot be opened, is being written by another process, or is no image that can be checked.
pub fn check(path: &Path, force_share: bool) -> Result<Report, BackendError> {
    let failed =
        |error: &dyn std::fmt::Display| BackendError(format!("checking {}: {error}", path.display()));
    let options =
        FileOptions { read_only: true, direct: Direct::Off, lock: Lock::Off, ..FileOptions::default() };
    let file = open_part(path, options)?;
    // Given back when they are closed, after the check.
    let owner = file.open_again().map_err(|error| failed(&error))?;
    if !force_share {
        own(&owner, &file.buffered, path, false).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => {
                failed(&"another process writes it (--force-share looks at it all the same)")
            }
            _ => failed(&error),
        })?;
    }
    qcow2::check::check(&Tables(&file)).map_err(|error| failed(&error))
}
