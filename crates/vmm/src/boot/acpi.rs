//! ACPI tables: which processors and interrupt controllers there are, where PCI is, how to switch off.
//!
//! They lie one after the other, the one that leads to all others first, where kernels search for it. Nothing in them
//! changes later. Section numbers are those of ACPI 6.5.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::Flags;
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::layout;
use crate::legacy::CMOS_CENTURY;
use crate::pm1::SLEEP_TYPE_OFF;

const OEM: [u8; 6] = *b"EXITLS";
const OEM_TABLE: [u8; 8] = *b"EXITLESS";
const OEM_REVISION: u32 = 1;
/// Tables begin at multiples of this, the most that one of them (the FACS) asks for.
const ALIGN: usize = 64;

/// All tables of a machine with `cpus` processors, to be written to the beginning of [`layout::ACPI`], where the RSDP
/// is.
pub(super) fn tables(cpus: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    // The root comes first and is known last.
    let root = append(&mut bytes, &Rsdp::new(OEM, 0));
    let facs = append(&mut bytes, &FACS::new());
    let dsdt = append(&mut bytes, &dsdt());
    let fadt = append(&mut bytes, &fadt(facs, dsdt));
    let madt = append(&mut bytes, &madt(cpus));
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, 0);
    let mcfg = append(&mut bytes, &mcfg);
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    [fadt, madt, mcfg].into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = append(&mut bytes, &xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    let at = (root - layout::ACPI.start) as usize;
    bytes[at..at + rsdp.len()].copy_from_slice(&rsdp);
    bytes
}

/// Adds a table; returns its address.
fn append(bytes: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
    let at = layout::ACPI.start + bytes.len() as u64;
    table.to_aml_bytes(bytes);
    at
}

/// Fixed hardware (section 5.2.9, where the offsets are from): a PM1 register group with a power button, which can
/// switch off, the reset register, what else of a PC there is.
fn fadt(facs: u64, dsdt: u64) -> Sdt {
    const BYTES: u32 = 276;
    const MINOR_VERSION: u8 = 5;
    /// There is no VGA. Nor is there a keyboard, which kernels would wait for in vain if bit 1 said so.
    const BOOT_NO_VGA: u16 = 1 << 2;
    /// Longer than states C2 and C3 may take to leave: there are none.
    const NEVER_US: u16 = 0xFFF;
    const RESET: u8 = 6;
    // Without `PwrButton`, which would say that the power button is not in the PM1 registers.
    let flags = [Flags::Wbinvd, Flags::ProcC1, Flags::SlpButton, Flags::FixRtc, Flags::ResetRegSup];
    let mut table = Sdt::new(*b"FACP", BYTES, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.write_u32(36, facs as u32);
    table.write_u32(40, dsdt as u32);
    table.write_u16(46, layout::SCI_IRQ);
    // PM1a: its events, 4 bytes, and its control register, 2 bytes.
    table.write_u32(56, layout::PM1.start as u32);
    table.write_u32(64, layout::PM1.start as u32 + 4);
    table.write_u8(88, 4);
    table.write_u8(89, 2);
    table.write_u16(96, NEVER_US);
    table.write_u16(98, NEVER_US);
    table.write_u8(108, CMOS_CENTURY);
    table.write_u16(109, BOOT_NO_VGA);
    table.write_u32(112, flags.into_iter().fold(0, |all, flag| all | flag as u32));
    let mut register = Vec::new();
    GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, layout::RESET_PORT.into())
        .to_aml_bytes(&mut register);
    table.write_bytes(116, &register);
    table.write_u8(128, RESET);
    table.write_u8(131, MINOR_VERSION);
    table
}

/// Interrupt controllers (section 5.2.12).
fn madt(cpus: usize) -> Sdt {
    /// With the two 8259s of a PC.
    const PCAT_COMPAT: u32 = 1;
    const HEADER_BYTES: u32 = 36;
    let mut table = Sdt::new(*b"APIC", HEADER_BYTES, 4, OEM, OEM_TABLE, OEM_REVISION);
    let mut body = Vec::new();
    body.extend(layout::LOCAL_APIC.to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    for cpu in 0..cpus as u8 {
        ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(cpus as u8, layout::IO_APIC, 0).to_aml_bytes(&mut body);
    body.extend(level_high(layout::SCI_IRQ));
    table.append_slice(&body);
    table
}

/// An interrupt source override (section 5.2.12.5): `irq` of the ISA bus is level-triggered and active high.
fn level_high(irq: u16) -> [u8; 10] {
    const LEVEL_HIGH: u8 = 0b1101;
    [2, 10, 0, irq as u8, irq as u8, 0, 0, 0, LEVEL_HIGH, 0]
}

/// What is not fixed: PCI, the serial port, the panic device, and how to switch off.
fn dsdt() -> Sdt {
    const HEADER_BYTES: u32 = 36;
    let mut body = Vec::new();
    let off = SLEEP_TYPE_OFF as u8;
    Name::new("_S5_".into(), &Package::new(vec![&off, &off, &ZERO, &ZERO])).to_aml_bytes(&mut body);
    pci(&mut body);
    serial(&mut body);
    panic(&mut body);
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
}

/// The PCI host bridge with its windows and no interrupt pins, and beside it the configuration space, which is no
/// resource of the bridge (PCI Firmware Specification 3.3, section 4.1.2).
fn pci(body: &mut Vec<u8>) {
    const IO_BELOW: (u16, u16) = (0, layout::PCI_PORTS.start as u16 - 1);
    const IO_ABOVE: (u16, u16) = (layout::PCI_PORTS.end as u16, u16::MAX);
    let cacheable = AddressSpaceCacheable::NotCacheable;
    let (low, high) = (layout::PCI_WINDOW_32, layout::PCI_WINDOW_64);
    let ports = layout::PCI_PORTS.start as u16;
    // A name holds what it was made of, so that nothing has to outlive these lines.
    let windows = crs(&[
        &AddressSpace::<u16>::new_bus_number(0, 0),
        &IO::new(ports, ports, 1, (layout::PCI_PORTS.end - layout::PCI_PORTS.start) as u8),
        &AddressSpace::<u16>::new_io(IO_BELOW.0, IO_BELOW.1, None),
        &AddressSpace::<u16>::new_io(IO_ABOVE.0, IO_ABOVE.1, None),
        &AddressSpace::<u32>::new_memory(cacheable, true, low.start as u32, (low.end - 1) as u32, None),
        &AddressSpace::<u64>::new_memory(cacheable, true, high.start, high.end - 1, None),
    ]);
    let no_pins = Name::new("_PRT".into(), &Package::new(vec![]));
    let older = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    device(body, "PCI0", "PNP0A08", &[&older, &windows, &no_pins]);
    let ecam = (layout::ECAM.start as u32, (layout::ECAM.end - layout::ECAM.start) as u32);
    device(body, "MBRD", "PNP0C02", &[&crs(&[&Memory32Fixed::new(true, ecam.0, ecam.1)])]);
}

fn serial(body: &mut Vec<u8>) {
    let port = layout::COM1.start as u16;
    let length = (layout::COM1.end - layout::COM1.start) as u8;
    let line = Interrupt::new(true, true, false, false, layout::COM1_IRQ);
    device(body, "COM1", "PNP0501", &[&crs(&[&IO::new(port, port, 0, length), &line])]);
}

/// The panic device of QEMU's machines, by the name that drivers know it by.
fn panic(body: &mut Vec<u8>) {
    /// Present, enabled, shown, and working (section 6.3.7).
    const STATUS: u8 = 0xF;
    let port = layout::PANIC.start as u16;
    let status = Name::new("_STA".into(), &STATUS);
    let resources = crs(&[&IO::new(port, port, 1, 1)]);
    named(body, "PEVT", &"QEMU0001", &[&status, &resources]);
}

/// A device's resources.
fn crs(resources: &[&dyn Aml]) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(resources.to_vec()))
}

/// A device on the system bus, the only one of its kind, with an EISA ID.
fn device(body: &mut Vec<u8>, name: &str, id: &str, more: &[&dyn Aml]) {
    named(body, name, &EISAName::new(id), more);
}

/// The same with an ID of any kind.
fn named(body: &mut Vec<u8>, name: &str, id: &dyn Aml, more: &[&dyn Aml]) {
    let (hid, uid) = (Name::new("_HID".into(), id), Name::new("_UID".into(), &ZERO));
    let children = [&hid as &dyn Aml, &uid].into_iter().chain(more.iter().copied()).collect();
    Scope::new("_SB_".into(), vec![&Device::new(Path::new(name), children)]).to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    /// The table at a guest address, its checksum checked.
    fn table(bytes: &[u8], address: usize) -> &[u8] {
        let at = address - layout::ACPI.start as usize;
        let table = &bytes[at..at + u32_at(bytes, at + 4)];
        assert!(sums_to_zero(table), "{:?}", std::str::from_utf8(&table[..4]));
        table
    }

    #[test]
    fn every_table_is_found_from_the_root_and_adds_up() {
        let bytes = tables(2);
        assert!(bytes.starts_with(b"RSD PTR ") && sums_to_zero(&bytes[..20]) && sums_to_zero(&bytes[..36]));
        let xsdt = table(&bytes, u32_at(&bytes, 24));
        let found: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table(&bytes, u64::from_le_bytes(entry.try_into().unwrap()) as usize))
            .collect();
        assert_eq!(found.iter().map(|table| &table[..4]).collect::<Vec<_>>(), [b"FACP", b"APIC", b"MCFG"]);
        assert_eq!(&table(&bytes, u32_at(found[0], 40))[..4], b"DSDT");
        assert_eq!(u32_at(found[2], 44), layout::ECAM.start as usize);
    }

    #[test]
    fn the_power_button_is_fixed_hardware_and_the_panic_device_has_its_port() {
        let bytes = tables(1);
        let xsdt = table(&bytes, u32_at(&bytes, 24));
        let fadt = table(&bytes, u32_at(xsdt, 36));
        let control_method_button = Flags::PwrButton as usize;
        assert_eq!(u32_at(fadt, 112) & control_method_button, 0);
        let dsdt = table(&bytes, u32_at(fadt, 40));
        let at = dsdt.windows(8).position(|name| name == b"QEMU0001").unwrap();
        // An I/O port descriptor (section 6.4.2.5), and the end tag of the resources.
        let port = [0x47, 1, 5, 5, 5, 5, 1, 1, 0x79];
        assert!(dsdt[at..].windows(port.len()).any(|bytes| bytes == port));
        assert!(dsdt[at..].windows(4).any(|name| name == b"_STA"));
    }

    #[test]
    fn tables_of_the_largest_machine_fit_where_kernels_search() {
        let bytes = tables(crate::VCPUS_MAX);
        assert!(bytes.len() as u64 <= layout::ACPI.end - layout::ACPI.start);
    }
}
