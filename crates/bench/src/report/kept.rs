//! A file that gets a line as soon as something was measured, so that a run which ends early loses nothing.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The file, if one is wanted.
#[derive(Debug)]
pub(crate) struct Kept(Option<(PathBuf, File)>);

impl Kept {
    /// Makes the file and writes its header.
    ///
    /// # Errors
    /// It cannot be written. Better now than after the measurements.
    pub(crate) fn create(path: Option<&Path>, header: &str) -> Result<Self> {
        let Some(path) = path else { return Ok(Self(None)) };
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut kept = Self(Some((path.to_owned(), file)));
        kept.add(|| header.to_owned())?;
        Ok(kept)
    }

    /// Adds a line, which ends as lines of the format do.
    pub(crate) fn add(&mut self, line: impl FnOnce() -> String) -> Result<()> {
        let Some((path, file)) = &mut self.0 else { return Ok(()) };
        file.write_all(line().as_bytes()).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_in_the_file_as_soon_as_they_are_added() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.csv");
        let mut kept = Kept::create(Some(&path), "a,b\r\n").unwrap();
        kept.add(|| "1,2\r\n".into()).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a,b\r\n1,2\r\n");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_refused_by_name() {
        let error = Kept::create(Some(Path::new("/nonexistent/rows.csv")), "").unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/rows.csv"), "{error:#}");
        Kept::create(None, "").unwrap().add(|| unreachable!("nobody wants it")).unwrap();
    }
}
