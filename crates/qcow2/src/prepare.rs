//! An image's preparation for being written: repair if it was left dirty, and everything that the format asks of those
//! who do not know, or do not keep up, a part of it.

use crate::bitmaps;
use crate::check::Report;
use crate::error::FormatError;
use crate::header::{autoclear, incompatible};
use crate::image::{Image, ImageError};
use crate::repair::{RepairError, WriteAt, repair};

/// Changes that were made to an image, to be told to whoever it belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prepared {
    /// The image was dirty: what a check found before its repair.
    pub repaired: Option<Report>,
    /// Persistent bitmaps that are marked inconsistent now, and were not before.
    pub bitmaps_marked: u32,
    /// Autoclear features that were switched off. Bitmaps are among them if their directory cannot be read.
    pub switched_off: u64,
}

/// Makes an image ready to be written, durably. A crash meanwhile leaves it as it was, or with some of the changes.
///
/// # Errors
/// It is no image that can be written: one that is marked corrupt, or dirty with more wrong than its refcounts. Or its file
/// failed.
pub fn for_writing(file: &mut impl WriteAt) -> Result<(Image, Prepared), RepairError> {
    let mut image = Image::read(file)?;
    if image.header.incompatible & incompatible::CORRUPT != 0 {
        return Err(ImageError::from(FormatError::Corrupt).into());
    }
    let mut prepared = Prepared::default();
    if image.header.incompatible & incompatible::DIRTY != 0 {
        prepared.repaired = Some(repair(file)?);
        image = Image::read(file)?;
    }
    let mut kept = autoclear::RAW_DATA_FILE;
    if image.header.autoclear & autoclear::BITMAPS != 0
        && let Some(marked) = bitmaps::mark_inconsistent(file, &image)?
    {
        prepared.bitmaps_marked = marked;
        kept |= autoclear::BITMAPS;
    }
    prepared.switched_off = image.header.autoclear & !kept;
    if prepared.switched_off != 0 {
        image.header.autoclear &= kept;
        image.header.update(&mut image.header_sector);
        file.write_at(0, &image.header_sector)?;
        file.sync()?;
    }
    Ok((image, prepared))
}
