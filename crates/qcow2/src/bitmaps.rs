//! Persistent dirty bitmaps (sections "Bitmaps extension" and "Bitmap directory"), which are not kept up to date here: before
//! the disk changes, each is marked as one that may be wrong. Programs that use them see that and begin anew.

use crate::header::Bitmaps;
use crate::image::{Image, ImageError};
use crate::repair::WriteAt;

/// QEMU's limits: of the directory in bytes, of the number of bitmaps.
pub(crate) const DIRECTORY_BYTES_MAX: u64 = 64 << 20;
pub(crate) const COUNT_MAX: u32 = 65535;
/// Length of an entry in bytes, without its extra data and its name.
pub(crate) const ENTRY_BYTES: usize = 24;
/// Places in an entry: flags, name size, extra data size.
mod at {
    pub(super) const FLAGS: usize = 12;
    pub(super) const NAME_BYTES: usize = 18;
    pub(super) const EXTRA_BYTES: usize = 20;
}
/// Bit 0 of an entry's flags: the bitmap was not saved, and may be inconsistent.
const IN_USE: u8 = 1;

/// Marks all bitmaps of an image that are said to be consistent; returns how many were. `None` if their directory is not
/// as it should be, and nothing was written.
///
/// # Errors
/// Those of the file.
pub fn mark_inconsistent(file: &mut impl WriteAt, image: &Image) -> Result<Option<u32>, ImageError> {
    let Some(bitmaps) = image.header.bitmaps else { return Ok(Some(0)) };
    let Bitmaps { count, directory_bytes, directory_offset } = bitmaps;
    let end = directory_offset.checked_add(directory_bytes);
    let within = end.is_some_and(|end| end <= image.file_bytes) && directory_offset != 0;
    let aligned = image.header.layout.in_cluster(directory_offset) == 0;
    if !within || !aligned || directory_bytes > DIRECTORY_BYTES_MAX || count > COUNT_MAX {
        return Ok(None);
    }
    let mut directory = vec![0; directory_bytes as usize];
    file.read_at(directory_offset, &mut directory)?;
    let Some(marked) = mark(&mut directory, count) else { return Ok(None) };
    if marked > 0 {
        file.write_at(directory_offset, &directory)?;
        file.sync()?;
    }
    Ok(Some(marked))
}

/// Marks the entries of a directory.
fn mark(directory: &mut [u8], count: u32) -> Option<u32> {
    let (mut at, mut marked) = (0, 0);
    for _ in 0..count {
        let entry = directory.get_mut(at..at + ENTRY_BYTES)?;
        let number = |bytes: &[u8]| bytes.iter().fold(0, |number, &byte| number << 8 | usize::from(byte));
        let name_bytes = number(&entry[at::NAME_BYTES..at::EXTRA_BYTES]);
        let extra_bytes = number(&entry[at::EXTRA_BYTES..]);
        // Big-endian: bit 0 is in the last of four bytes.
        let flags = &mut entry[at::FLAGS + 3];
        marked += u32::from(*flags & IN_USE == 0);
        *flags |= IN_USE;
        at += (ENTRY_BYTES + name_bytes + extra_bytes).next_multiple_of(8);
        if at > directory.len() {
            return None;
        }
    }
    Some(marked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_marked_once_and_a_directory_that_is_cut_off_not_at_all() {
        let mut directory = vec![0; 32 + 40];
        directory[19] = 5;
        directory[32 + 19] = 1;
        directory[32 + 23] = 8;
        assert_eq!(mark(&mut directory.clone()[..71], 2), None, "33 bytes, which take 40");
        assert_eq!(mark(&mut directory, 1), Some(1));
        assert_eq!((directory[15], directory[32 + 15]), (1, 0));
        assert_eq!(mark(&mut directory, 2), Some(1), "the first was marked before");
        assert_eq!(mark(&mut directory, 2), Some(0));
        assert_eq!(mark(&mut directory, u32::MAX), None);
    }
}
