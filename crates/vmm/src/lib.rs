//! A small monitor for KVM: virtual machines whose virtio devices, doorbells, interrupts and exits are all ours.

#![warn(missing_docs)]

pub mod pci;
