//! The embedded guest: a virtual machine's whole software, in an ELF image that boots by the PVH protocol.

/// The image, as the build script made it of `crates/guest`.
pub const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));
