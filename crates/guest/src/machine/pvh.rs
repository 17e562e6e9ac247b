//! What the loader says (the PVH boot protocol's `hvm_start_info`, version 1).

use alloc::string::String;

use super::physical::Tables;

const MAGIC: u32 = 0x336E_C578;
const COMMAND_LINE: u64 = 24;
const ROOT_POINTER: u64 = 32;
const MEMORY_MAP: u64 = 40;
const MEMORY_MAP_ENTRIES: u64 = 48;
const ENTRY_BYTES: u64 = 24;
const ENTRIES_MAX: u32 = 128;
const TYPE_RAM: u32 = 1;
/// The longest command line, in bytes.
pub const COMMAND_LINE_BYTES_MAX: usize = 2048;

/// The start information, taken over.
pub struct StartInfo<'a> {
    tables: &'a Tables,
    at: u64,
}

impl<'a> StartInfo<'a> {
    /// The information at a physical address, if it is that.
    #[must_use]
    pub fn new(tables: &'a Tables, at: u64) -> Option<Self> {
        (tables.word(at)? == MAGIC && tables.word(at + 4)? >= 1).then_some(Self { tables, at })
    }

    /// Where the ACPI tables begin; 0 if the loader does not say.
    #[must_use]
    pub fn root_pointer(&self) -> u64 {
        self.tables.number(self.at + ROOT_POINTER, 8).unwrap_or(0)
    }

    /// Where the RAM ends that holds `addr`.
    #[must_use]
    pub fn end_of_ram(&self, addr: u64) -> Option<u64> {
        let entries = self.tables.word(self.at + MEMORY_MAP_ENTRIES)?.min(ENTRIES_MAX);
        let map = self.tables.number(self.at + MEMORY_MAP, 8)?;
        (0..u64::from(entries)).find_map(|i| {
            let entry = map.checked_add(i * ENTRY_BYTES)?;
            let (start, len) = (self.tables.number(entry, 8)?, self.tables.number(entry + 8, 8)?);
            let end = start.checked_add(len)?;
            let holds = self.tables.word(entry + 16)? == TYPE_RAM && (start..end).contains(&addr);
            holds.then_some(end)
        })
    }

    /// The command line; None if it is too long or not text.
    #[must_use]
    pub fn command_line(&self) -> Option<String> {
        let at = self.tables.number(self.at + COMMAND_LINE, 8)?;
        let mut line = String::new();
        if at == 0 {
            return Some(line);
        }
        for i in 0..=COMMAND_LINE_BYTES_MAX as u64 {
            match self.tables.byte(at.checked_add(i)?)? {
                0 => return Some(line),
                byte if byte.is_ascii() => line.push(byte.into()),
                _ => return None,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::super::physical::sample;
    use super::*;

    const AT: u64 = 0x1000;

    fn start_info(command_line: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut words = |words: &[u64]| bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        words(&[u64::from(MAGIC) | 1 << 32, 0, 0, AT + 0x80, 0xF_0000, AT + 56, 2]);
        words(&[0, 0x9_FC00, 1, 0x10_0000, 0x800_0000, 1]);
        bytes.resize(0x80, 0);
        bytes.extend(command_line);
        bytes
    }

    #[test]
    fn a_loader_is_understood() {
        let tables = sample(AT, &start_info(b"job=blk qd=4\0"));
        let info = StartInfo::new(&tables, AT).unwrap();
        assert_eq!(info.command_line().unwrap(), "job=blk qd=4");
        assert_eq!(info.root_pointer(), 0xF_0000);
        assert_eq!(info.end_of_ram(0x20_0000), Some(0x810_0000));
        assert_eq!(info.end_of_ram(0xA_0000), None);
    }

    #[test]
    fn what_is_no_start_information_is_refused() {
        assert!(StartInfo::new(&sample(AT, &[0; 64]), AT).is_none());
        assert!(StartInfo::new(&sample(AT, &[0; 64]), 16).is_none());
        let endless = sample(AT, &start_info(b"job"));
        assert!(StartInfo::new(&endless, AT).unwrap().command_line().is_none());
    }
}
