//! Opening an image.

use std::path::Path;
use std::sync::Arc;

use qcow2::image::{Image, ReadAt};

use super::Qcow2Options;
use super::chain::{Chain, Format, Layer, Tables};
use crate::backend::BackendError;
use crate::backends::file::{Direct, FileOptions, Lock, Opened};

/// Opens the image at `path`.
pub(super) fn open(path: &Path, options: Qcow2Options) -> Result<Chain, BackendError> {
    let mut layers = vec![layer(path, Some("qcow2"), options)?];
    while let Some(Layer { file, format: Format::Qcow2(image), .. }) = layers.last()
        && let Some(name) = &image.header.backing_name
    {
        if !options.backing || layers.len() > 32 {
            return Err(BackendError(format!(
                "opening {}: it refers to another file (backing=on allows that)",
                path.display()
            )));
        }
        let below = file.path().parent().unwrap_or(Path::new("")).join(name);
        let format = image.header.backing_format.clone();
        layers.push(layer(&below, format.as_deref(), Qcow2Options { read_only: true, ..options })?);
    }
    Ok(Chain { layers })
}

fn layer(path: &Path, format: Option<&str>, options: Qcow2Options) -> Result<Layer, BackendError> {
    let failed = |error: &dyn std::fmt::Display| BackendError(format!("opening {}: {error}", path.display()));
    let file_options = FileOptions {
        read_only: options.read_only,
        direct: if options.direct { Direct::On } else { Direct::Off },
        engine: options.engine,
        lock: if options.lock { Lock::On } else { Lock::Off },
        image: true,
        ..FileOptions::default()
    };
    let file = Arc::new(Opened::open(path, file_options)?);
    let tables = Tables(&file);
    if format == Some("raw") {
        let bytes = tables.file_bytes().map_err(|error| failed(&error))?;
        return Ok(Layer { file, data_file: None, format: Format::Raw { bytes } });
    }
    let mut image =
        Image::read(&tables).map_err(|error| failed(&format_args!("reading its header: {error}")))?;
    if options.direct && !options.read_only {
        // What is written past the page cache has whole blocks.
        let bytes = image.file_bytes.next_multiple_of(image.header.layout.cluster_bytes().max(4096));
        if file.extend(bytes) {
            image.file_bytes = bytes;
        }
    }
    Ok(Layer { file, data_file: None, format: Format::Qcow2(Box::new(image)) })
}
