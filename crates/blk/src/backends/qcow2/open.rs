//! Opens an image and everything that it is backed by.
//!
//! An image names its backing file and its data file, and whoever made the image may not be who runs this host: no name is
//! followed unless that is asked for, none leads to anything but a file or block device, and none back into the chain.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2::header::{Header, MAGIC, autoclear};
use qcow2::image::{Image, ReadAt};
use qcow2::prepare::{Prepared, for_writing};
use rustix::fs::{FileType, stat};

use super::Qcow2Options;
use super::chain::{Chain, Format, Layer, Tables};
use crate::backend::BackendError;
use crate::backends::file::open::open_part;
use crate::backends::file::{Direct, FileOptions, Lock, Opened};

/// The most layers. With a data file each they are few enough for the rings of every queue to know them all.
const LAYERS_MAX: usize = 64;
/// The most that the tables which stay in memory may take, of all layers together, in bytes.
const TABLES_BYTES_MAX: u64 = 256 << 20;
/// The least that a disk has, in bytes.
const DISK_BYTES_MIN: u64 = 512;

/// Opens the image at `path` with its whole chain, and locks it: what is read as shared, what is written alone. With
/// [`Lock::Late`] the top is locked while queues run, and [`prepare`] is to be called when the first does.
///
/// # Errors
/// A file cannot be opened or locked, or is no image that can be served. The message names the file.
pub(super) fn open(path: &Path, options: Qcow2Options) -> Result<Chain, BackendError> {
    let mut opening = Opening { options, seen: Vec::new(), tables_bytes: 0 };
    let mut layers = vec![opening.layer(path, Some("qcow2"), options.read_only, options.lock)?];
    if layers[0].disk_bytes() < DISK_BYTES_MIN {
        let bytes = layers[0].disk_bytes();
        return Err(failed(path, &format_args!("its disk has {bytes} bytes, and must have at least 512")));
    }
    while let Some((header, of)) = layers.last().and_then(backed) {
        let below = opening.backing(header, of, layers.len());
        let below =
            below.map_err(|error| BackendError(format!("{error} (backing file of {})", of.display())));
        layers.push(below?);
    }
    let mut chain = Chain { layers };
    if options.lock != Lock::Late {
        prepare(&mut chain, options)?;
    }
    Ok(chain)
}

/// Makes the top ready for its first queue, which has its locks: one that is to be written is repaired if it is dirty, and
/// one that others may have written since it was opened is read again.
///
/// # Errors
/// It cannot be written or read, or is another image now.
pub(super) fn prepare(chain: &mut Chain, options: Qcow2Options) -> Result<(), BackendError> {
    let Some(Layer { file, format: Format::Qcow2(image), .. }) = chain.layers.first_mut() else {
        return Ok(());
    };
    let path = &file.path;
    let mut tables = Tables(file);
    if options.lock == Lock::Late {
        tables.forget();
    }
    let new = match (options.read_only, options.lock) {
        (false, _) => {
            let (new, prepared) = for_writing(&mut tables).map_err(|error| failed(path, &error))?;
            tell(path, &prepared);
            new
        }
        (true, Lock::Late) => Image::read(&tables).map_err(|error| failed(path, &error))?,
        (true, _) => return Ok(()),
    };
    let names = |Header { layout, backing_name, backing_format, data_file_name, .. }: &Header| {
        (*layout, backing_name.clone(), backing_format.clone(), data_file_name.clone())
    };
    if names(&new.header) != names(&image.header) {
        return Err(failed(path, &"it was made anew, or over other files, since it was opened"));
    }
    **image = new;
    Ok(())
}

/// The log lines about what was changed in an image.
fn tell(path: &Path, prepared: &Prepared) {
    let Prepared { repaired, bitmaps_marked, switched_off } = prepared;
    if let Some(report) = repaired {
        tracing::warn!(
            path = %path.display(), refcounts = report.wrong_refcounts, leaks = report.leaks,
            "the image was left dirty: its refcounts were set right from its tables"
        );
    }
    if *bitmaps_marked > 0 {
        tracing::warn!(
            path = %path.display(), bitmaps = bitmaps_marked,
            "persistent bitmaps are not kept up to date and were marked inconsistent: the next backup is a full one"
        );
    }
    if switched_off & autoclear::BITMAPS != 0 {
        tracing::warn!(
            path = %path.display(),
            "the directory of persistent bitmaps is malformed: the image is taken to have none"
        );
    }
    if switched_off & !autoclear::BITMAPS != 0 {
        tracing::warn!(
            path = %path.display(), bits = format_args!("{:#x}", switched_off & !autoclear::BITMAPS),
            "autoclear features that are not known here were switched off"
        );
    }
}

/// The header that names a backing file, and the path of its image.
fn backed(layer: &Layer) -> Option<(&Header, &Path)> {
    match &layer.format {
        Format::Qcow2(image) if image.header.backing_name.is_some() => {
            Some((&image.header, &layer.file.path))
        }
        _ => None,
    }
}

/// A file, whatever path leads to it: device and inode; of a block device, which device it is.
type Identity = (u64, Option<u64>);

/// A chain that is being opened.
struct Opening {
    options: Qcow2Options,
    seen: Vec<Identity>,
    tables_bytes: u64,
}

impl Opening {
    /// Opens the backing layer that a header names, below `above` layers.
    fn backing(&mut self, header: &Header, of: &Path, above: usize) -> Result<Layer, BackendError> {
        let name = header.backing_name.as_deref().unwrap_or_default();
        let path = self.follow(name, of)?;
        if above == LAYERS_MAX {
            return Err(failed(&path, &format_args!("a chain has at most {LAYERS_MAX} layers")));
        }
        let lock = if self.options.lock == Lock::Off { Lock::Off } else { Lock::On };
        self.layer(&path, header.backing_format.as_deref(), true, lock)
    }

    /// Opens a layer of this format; without one, its first bytes say.
    fn layer(
        &mut self,
        path: &Path,
        format: Option<&str>,
        read_only: bool,
        lock: Lock,
    ) -> Result<Layer, BackendError> {
        let file = self.file(path, read_only, lock)?;
        let tables = Tables(&file);
        let is_qcow2 = match format {
            Some("qcow2") => true,
            Some("raw") => false,
            Some(other) => {
                return Err(failed(
                    path,
                    &format_args!("format {other:?}, and only raw and qcow2 are known"),
                ));
            }
            None => {
                let mut magic = [0; 4];
                tables.read_at(0, &mut magic).map_err(|error| failed(path, &error))?;
                u32::from_be_bytes(magic) == MAGIC
            }
        };
        if !is_qcow2 {
            let bytes = tables.file_bytes().map_err(|error| failed(path, &error))?;
            return Ok(Layer { file, data_file: None, format: Format::Raw { bytes } });
        }
        let image = Image::read(&tables).map_err(|error| failed(path, &error))?;
        // A guest that had this as a raw disk may have written the header.
        if format.is_none() && (image.header.backing_name.is_some() || image.header.has_data_file()) {
            return Err(failed(
                path,
                &"it names another file, and what names it does not say that it is qcow2 (`qemu-img rebase -u -F qcow2` does)",
            ));
        }
        self.tables_bytes += (image.l1.len() + image.refcount_table.len()) as u64 * 8;
        if self.tables_bytes > TABLES_BYTES_MAX {
            return Err(failed(path, &"the tables of the chain are larger than 256 MiB"));
        }
        let data_file = self.data_file(&image.header, path, read_only, lock)?;
        Ok(Layer { file, data_file, format: Format::Qcow2(Box::new(image)) })
    }

    /// Opens the data file of an image that has one.
    fn data_file(
        &mut self,
        header: &Header,
        of: &Path,
        read_only: bool,
        lock: Lock,
    ) -> Result<Option<Arc<Opened>>, BackendError> {
        if !header.has_data_file() {
            return Ok(None);
        }
        let Some(name) = header.data_file_name.as_deref() else {
            return Err(failed(of, &"its data are in another file, and it does not name that"));
        };
        let file = self.follow(name, of).and_then(|path| self.file(&path, read_only, lock));
        file.map(Some).map_err(|error| BackendError(format!("{error} (data file of {})", of.display())))
    }

    /// Opens and locks a file, once.
    fn file(&mut self, path: &Path, read_only: bool, lock: Lock) -> Result<Arc<Opened>, BackendError> {
        // Looked at before it is opened: that alone may do something, or wait.
        let stat = stat(path).map_err(|error| failed(path, &error))?;
        let identity = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => (stat.st_dev, Some(stat.st_ino)),
            FileType::BlockDevice => (stat.st_rdev, None),
            _ => return Err(failed(path, &"it must be a regular file or a block device")),
        };
        if self.seen.contains(&identity) {
            return Err(failed(path, &"it is in the chain already, which would be a loop"));
        }
        self.seen.push(identity);
        let direct = if self.options.direct { Direct::On } else { Direct::Off };
        let engine = self.options.engine;
        let options = FileOptions { read_only, direct, engine, lock, image: true, ..FileOptions::default() };
        Ok(Arc::new(open_part(path, options)?))
    }

    /// The path that a name in the image at `of` means: relative ones begin where that path does.
    fn follow(&self, name: &str, of: &Path) -> Result<PathBuf, BackendError> {
        if !self.options.backing {
            return Err(failed(
                of,
                &format_args!("it refers to another file, {name:?} (backing=on allows that)"),
            ));
        }
        let mark = name.find([':', '/']).unwrap_or(name.len());
        if name[mark..].starts_with(':') {
            let protocol = &name[..mark];
            return Err(failed(
                of,
                &format_args!(
                    "it refers to {name:?}: protocols ({protocol:?}) are not supported, only paths of files"
                ),
            ));
        }
        if name.is_empty() || name.contains('\0') {
            return Err(failed(of, &format_args!("it refers to {name:?}, which is no path")));
        }
        Ok(of.parent().unwrap_or(Path::new("")).join(name))
    }
}

fn failed(path: &Path, error: &dyn Display) -> BackendError {
    BackendError(format!("opening {}: {error}", path.display()))
}

#[cfg(test)]
mod tests;
