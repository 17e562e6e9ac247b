//! Which processors there are, from the ACPI tables (ACPI 6.5, sections 5.2.5 to 5.2.12).

use alloc::vec::Vec;

use super::physical::Tables;

/// Where firmware puts the root pointer if the loader does not say.
const BIOS: core::ops::Range<u64> = 0xE_0000..0x10_0000;
const ROOT_SIGNATURE: &[u8] = b"RSD PTR ";
const HEADER_BYTES: u64 = 36;
/// Entries of the MADT begin here.
const MADT_ENTRIES: u64 = 44;
const ENTRY_LOCAL_APIC: u8 = 0;
const ENTRY_LOCAL_X2APIC: u8 = 9;
const FLAG_ENABLED: u32 = 1;
/// A table larger than this is taken for garbage.
const TABLE_BYTES_MAX: u64 = 1 << 20;

/// The ids of the local interrupt controllers of all processors that can be used; empty without tables.
///
/// `root` is the physical address of the root pointer, 0 if it must be looked for.
#[must_use]
pub fn processors(tables: &Tables, root: u64) -> Vec<u32> {
    find_madt(tables, root).map(|madt| parse_madt(tables, madt)).unwrap_or_default()
}

fn find_madt(tables: &Tables, root: u64) -> Option<u64> {
    let is_root = |&at: &u64| starts_with(tables, at, ROOT_SIGNATURE);
    let root = Some(root).filter(is_root).or_else(|| BIOS.step_by(16).find(is_root))?;
    let extended = tables.byte(root + 15)? >= 2;
    let (list, entry_bytes) =
        if extended { (tables.number(root + 24, 8)?, 8) } else { (tables.word(root + 16)?.into(), 4) };
    let end = list + length(tables, list)?;
    let entries = (list + HEADER_BYTES..end).step_by(entry_bytes);
    let mut entries = entries.filter_map(|at| tables.number(at, entry_bytes as u32));
    entries.find(|&at| starts_with(tables, at, b"APIC"))
}

fn parse_madt(tables: &Tables, madt: u64) -> Vec<u32> {
    let mut ids = Vec::new();
    let end = madt + length(tables, madt).unwrap_or(0);
    let mut at = madt + MADT_ENTRIES;
    while at + 2 <= end {
        let (Some(kind), Some(len @ 2..)) = (tables.byte(at), tables.byte(at + 1)) else { break };
        let found = match kind {
            ENTRY_LOCAL_APIC => tables.byte(at + 3).map(u32::from).zip(tables.word(at + 4)),
            ENTRY_LOCAL_X2APIC => tables.word(at + 4).zip(tables.word(at + 8)),
            _ => None,
        };
        ids.extend(found.filter(|(_, flags)| flags & FLAG_ENABLED != 0).map(|(id, _)| id));
        at += u64::from(len);
    }
    ids
}

fn length(tables: &Tables, table: u64) -> Option<u64> {
    tables.word(table.checked_add(4)?).map(u64::from).filter(|&bytes| bytes <= TABLE_BYTES_MAX)
}

fn starts_with(tables: &Tables, at: u64, signature: &[u8]) -> bool {
    signature.iter().zip(at..).all(|(&c, at)| tables.byte(at) == Some(c))
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::super::physical::sample;
    use super::*;

    fn table(signature: &[u8], body: &[u8]) -> Vec<u8> {
        let mut table = signature.to_vec();
        table.extend((HEADER_BYTES as u32 + body.len() as u32).to_le_bytes());
        table.resize(HEADER_BYTES as usize, 0);
        table.extend(body);
        table
    }

    /// A root pointer at 0xF0000, tables at 0xF0100 and 0xF0200.
    fn machine(extended: bool, entries: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 0x400];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, ROOT_SIGNATURE);
        if extended {
            put(15, &[2]);
            put(24, &0xF_0100_u64.to_le_bytes());
            put(0x100, &table(b"XSDT", &0xF_0200_u64.to_le_bytes()));
        } else {
            put(16, &0xF_0100_u32.to_le_bytes());
            put(0x100, &table(b"RSDT", &[0, 0, 0, 0, 0, 2, 0xF, 0]));
        }
        put(0x200, &table(b"APIC", &[&[0; 8], entries].concat()));
        bytes
    }

    const ENTRIES: &[u8] = &[
        0, 8, 0, 0, 1, 0, 0, 0, // the first processor
        1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // an I/O APIC
        0, 8, 1, 7, 1, 0, 0, 0, // the second
        0, 8, 2, 8, 0, 0, 0, 0, // one that is not there
        9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, // one with a large id
    ];

    #[test]
    fn processors_are_found_through_either_list() {
        for extended in [false, true] {
            let tables = sample(0xF_0000, &machine(extended, ENTRIES));
            assert_eq!(processors(&tables, 0xF_0000), [0, 7, 256]);
            assert_eq!(processors(&tables, 0), [0, 7, 256], "looked for");
        }
    }

    #[test]
    fn garbage_ends_the_list_and_nothing_else() {
        let endless = [0, 8, 0, 4, 1, 0, 0, 0, 0, 0];
        assert_eq!(processors(&sample(0xF_0000, &machine(true, &endless)), 0), [4]);
        let mut lying = machine(true, ENTRIES);
        lying[0x204..0x208].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(processors(&sample(0xF_0000, &lying), 0).is_empty());
        assert!(processors(&sample(0xF_0000, &[0; 64]), 0).is_empty());
    }
}
