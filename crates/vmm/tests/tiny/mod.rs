//! The smallest kernels: a few instructions in 32-bit mode, in an ELF file with a PVH note.
//!
//! Assembled here by hand, so that the tests of the monitor need no tool chain, no guest and no firmware.

// Every test uses a part.
#![allow(dead_code)]

/// Where the program is loaded and entered.
pub(crate) const BASE: u32 = 0x20_0000;
/// Memory that programs may use: nothing else is there.
pub(crate) const SCRATCH: u32 = 0x30_0000;

/// A program under construction. Methods append instructions.
#[derive(Clone, Default)]
pub(crate) struct Program(Vec<u8>);

impl Program {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn word(self, word: u32) -> Self {
        self.bytes(&word.to_le_bytes())
    }

    /// Where the next instruction is.
    pub(crate) fn here(&self) -> u32 {
        BASE + self.0.len() as u32
    }

    /// `bytes` in the midst of the program, and their address.
    fn data(self, bytes: &[u8]) -> (Self, u32) {
        let program = self.bytes(&[0xE9]).word(bytes.len() as u32); // jmp over
        let at = program.here();
        (program.bytes(bytes), at)
    }

    /// Prints by one string instruction.
    pub(crate) fn print(self, text: &str) -> Self {
        let (program, at) = self.data(text.as_bytes());
        program.bytes(&[0xBE]).word(at).print_from_esi(text.len() as u32) // mov esi, at
    }

    /// Prints `bytes` bytes of the kernel's command line.
    pub(crate) fn print_command_line(self, bytes: u32) -> Self {
        self.bytes(&[0x8B, 0x73, 0x18]).print_from_esi(bytes) // mov esi, [ebx + 24]
    }

    fn print_from_esi(self, bytes: u32) -> Self {
        self.bytes(&[0xB9])
            .word(bytes) // mov ecx, bytes
            .bytes(&[0x66, 0xBA, 0xF8, 0x03]) // mov dx, 0x3F8
            .bytes(&[0xFC, 0xF3, 0x6E]) // cld; rep outsb
    }

    /// Writes a byte to a port.
    pub(crate) fn out8(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0xB0, value, 0x66, 0xBA, low, high, 0xEE]) // mov al, value; mov dx, port; out dx, al
    }

    /// Writes 16 bits to a port.
    pub(crate) fn out16(self, port: u16, value: u16) -> Self {
        let ([a, b], [low, high]) = (value.to_le_bytes(), port.to_le_bytes());
        self.bytes(&[0x66, 0xB8, a, b, 0x66, 0xBA, low, high, 0x66, 0xEF])
    }

    /// Writes 32 bits to a port.
    pub(crate) fn out32(self, port: u16, value: u32) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0xB8]).word(value).bytes(&[0x66, 0xBA, low, high, 0xEF])
    }

    /// Reads 1, 2 or 4 bytes from a port, for nothing.
    pub(crate) fn read_port(self, port: u16, bytes: usize) -> Self {
        let [low, high] = port.to_le_bytes();
        let program = self.bytes(&[0x66, 0xBA, low, high]); // mov dx, port
        match bytes {
            1 => program.bytes(&[0xEC]),
            2 => program.bytes(&[0x66, 0xED]),
            _ => program.bytes(&[0xED]),
        }
    }

    /// Waits until one of `bits` is set in 16 bits of a port.
    pub(crate) fn wait_for_port(self, port: u16, bits: u16) -> Self {
        let ([a, b], [low, high]) = (bits.to_le_bytes(), port.to_le_bytes());
        self.bytes(&[0x66, 0xBA, low, high, 0x66, 0xED]) // next: mov dx, port; in ax, dx
            .bytes(&[0x66, 0xA9, a, b, 0x74, 0xF4]) // test ax, bits; jz next
    }

    /// Reads a byte from a port and prints it.
    pub(crate) fn print_port(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xBA, low, high, 0xEC, 0x66, 0xBA, 0xF8, 0x03, 0xEE])
    }

    /// Prints what is typed, up to `last` and that too.
    pub(crate) fn echo_until(self, last: u8) -> Self {
        self.bytes(&[0x66, 0xBA, 0xFD, 0x03, 0xEC]) // next: mov dx, 0x3FD; in al, dx
            .bytes(&[0xA8, 0x01, 0x74, 0xF7]) // test al, 1; jz next
            .bytes(&[0x66, 0xBA, 0xF8, 0x03, 0xEC, 0xEE]) // mov dx, 0x3F8; in al, dx; out dx, al
            .bytes(&[0x3C, last, 0x75, 0xED]) // cmp al, last; jne next
    }

    /// Writes 32 bits.
    pub(crate) fn write32(self, address: u32, value: u32) -> Self {
        self.bytes(&[0xC7, 0x05]).word(address).word(value)
    }

    /// Writes 16 bits.
    pub(crate) fn write16(self, address: u32, value: u16) -> Self {
        self.bytes(&[0x66, 0xC7, 0x05]).word(address).bytes(&value.to_le_bytes())
    }

    /// Writes 8 bits.
    pub(crate) fn write8(self, address: u32, value: u8) -> Self {
        self.bytes(&[0xC6, 0x05]).word(address).bytes(&[value])
    }

    /// Reads 1, 2 or 4 bytes, for nothing.
    pub(crate) fn read(self, address: u32, bytes: usize) -> Self {
        match bytes {
            1 => self.bytes(&[0xA0]).word(address),
            2 => self.bytes(&[0x66, 0xA1]).word(address),
            _ => self.bytes(&[0xA1]).word(address),
        }
    }

    /// Adds to 32 bits.
    pub(crate) fn add(self, address: u32, value: u32) -> Self {
        self.bytes(&[0x81, 0x05]).word(address).word(value)
    }

    /// Fills 32-bit words.
    pub(crate) fn fill(self, address: u32, words: u32, value: u32) -> Self {
        let program = self.bytes(&[0xBF]).word(address).bytes(&[0xB9]).word(words); // mov edi, address; mov ecx, words
        program.bytes(&[0xB8]).word(value).bytes(&[0xFC, 0xF3, 0xAB]) // mov eax, value; cld; rep stosd
    }

    /// Adds 1 to 32 bits.
    pub(crate) fn increment(self, address: u32) -> Self {
        self.bytes(&[0xFF, 0x05]).word(address)
    }

    /// Waits until two words are equal.
    pub(crate) fn wait_until_equal(self, a: u32, b: u32) -> Self {
        let start = self.here();
        self.bytes(&[0xA1]).word(a).bytes(&[0x3B, 0x05]).word(b).jump_if_not_equal(start) // mov eax, [a]; cmp eax, [b]
    }

    /// Waits until two words of 16 bits are equal.
    pub(crate) fn wait_until_equal16(self, a: u32, b: u32) -> Self {
        let start = self.here();
        let program = self.bytes(&[0x66, 0xA1]).word(a); // mov ax, [a]
        program.bytes(&[0x66, 0x3B, 0x05]).word(b).jump_if_not_equal(start) // cmp ax, [b]
    }

    /// Ends the machine with a status unless two words are equal.
    pub(crate) fn exit_unless_equal(self, a: u32, b: u32, status: u8) -> Self {
        let end = Self::new().exit(status).0;
        let program = self.bytes(&[0xA1]).word(a).bytes(&[0x3B, 0x05]).word(b); // mov eax, [a]; cmp eax, [b]
        program.bytes(&[0x0F, 0x84]).word(end.len() as u32).bytes(&end) // je over
    }

    /// Waits until a word has a value.
    pub(crate) fn wait_for(self, address: u32, value: u32) -> Self {
        let start = self.here();
        self.bytes(&[0x81, 0x3D]).word(address).word(value).jump_if_not_equal(start)
    }

    /// Goes on at `to` unless the word has the value.
    pub(crate) fn repeat_until(self, to: u32, address: u32, value: u32) -> Self {
        self.bytes(&[0x81, 0x3D]).word(address).word(value).jump_if_not_equal(to)
    }

    fn jump_if_not_equal(self, to: u32) -> Self {
        let next = self.here() + 6;
        self.bytes(&[0x0F, 0x85]).word(to.wrapping_sub(next))
    }

    /// Goes on at `to`.
    pub(crate) fn jump(self, to: u32) -> Self {
        let next = self.here() + 5;
        self.bytes(&[0xE9]).word(to.wrapping_sub(next))
    }

    /// Begins a part that is jumped over; the number is for [`Program::land`].
    pub(crate) fn skip(self) -> (Self, usize) {
        let program = self.bytes(&[0xE9]).word(0);
        let from = program.0.len();
        (program, from)
    }

    /// Where [`Program::skip`] leads.
    pub(crate) fn land(mut self, from: usize) -> Self {
        let distance = (self.0.len() - from) as u32;
        self.0[from - 4..from].copy_from_slice(&distance.to_le_bytes());
        self
    }

    /// Copies `code` to `to`.
    pub(crate) fn copy(self, code: &[u8], to: u32) -> Self {
        let (program, at) = self.data(code);
        let program = program.bytes(&[0xBE]).word(at).bytes(&[0xBF]).word(to); // mov esi, at; mov edi, to
        program.bytes(&[0xB9]).word(code.len() as u32).bytes(&[0xFC, 0xF3, 0xA4]) // mov ecx, len; cld; rep movsb
    }

    /// Ends the machine with a status.
    pub(crate) fn exit(self, status: u8) -> Self {
        self.out8(0x501, status).halt()
    }

    /// Waits for ever.
    pub(crate) fn halt(self) -> Self {
        self.bytes(&[0xFA, 0xF4, 0xEB, 0xFD]) // cli; hlt; jmp to hlt
    }

    /// A fault, with nobody to handle it, nor the fault that follows from that.
    pub(crate) fn triple_fault(self) -> Self {
        self.bytes(&[0x0F, 0x0B]) // ud2
    }

    /// The program as an ELF file, for as long as the tests run.
    pub(crate) fn elf(self) -> &'static [u8] {
        Box::leak(elf(&self.0, true).into_boxed_slice())
    }

    /// The same without the note that makes it bootable.
    pub(crate) fn elf_without_note(self) -> &'static [u8] {
        Box::leak(elf(&self.0, false).into_boxed_slice())
    }
}

/// The registers of the local APIC by which one processor starts another.
const ICR: u32 = 0xFEE0_0300;
const ICR_HIGH: u32 = 0xFEE0_0310;

impl Program {
    /// Starts the second processor in real mode at the start of a page below 1 MiB.
    pub(crate) fn start_second(self, trampoline: u32) -> Self {
        self.write32(0xFEE0_00F0, 0x1FF) // its own local APIC, on
            .write32(ICR_HIGH, 1 << 24)
            .write32(ICR, 0x4500) // INIT
            .write32(ICR, 0x4600 | trampoline >> 12) // SIPI
    }
}

/// Real-mode code for the page at `page`, below 64 KiB, that goes on at `entry` in flat 32-bit mode.
pub(crate) fn to_protected_mode(page: u16, entry: u32) -> Vec<u8> {
    const GDT_POINTER: u16 = 0x40;
    const GDT: u16 = 0x48;
    const CODE: u64 = 0x00CF_9B00_0000_FFFF;
    const DATA: u64 = 0x00CF_9300_0000_FFFF;
    let [low, high] = (page + GDT_POINTER).to_le_bytes();
    let mut code = vec![0xFA, 0x31, 0xC0, 0x8E, 0xD8]; // cli; xor ax, ax; mov ds, ax
    code.extend([0x66, 0x0F, 0x01, 0x16, low, high]); // lgdt [pointer]
    code.extend([0x0F, 0x20, 0xC0, 0x66, 0x83, 0xC8, 1, 0x0F, 0x22, 0xC0]); // mov eax, cr0; or eax, 1; mov cr0, eax
    let next = u32::from(page) + code.len() as u32 + 8;
    code.extend([0x66, 0xEA]); // jmp 8:next
    code.extend(next.to_le_bytes());
    code.extend([8, 0]);
    code.extend([0x66, 0xB8, 16, 0, 0x8E, 0xD8, 0x8E, 0xC0, 0x8E, 0xD0]); // mov ax, 16; mov ds, es and ss, ax
    let after = u32::from(page) + code.len() as u32 + 5;
    code.push(0xE9); // jmp entry
    code.extend(entry.wrapping_sub(after).to_le_bytes());
    code.resize(GDT_POINTER.into(), 0);
    code.extend((3 * 8 - 1u16).to_le_bytes());
    code.extend(u32::from(page + GDT).to_le_bytes());
    code.resize(GDT.into(), 0);
    code.extend([0, CODE, DATA].map(u64::to_le_bytes).as_flattened());
    code
}

/// Real-mode code of a processor that was just started: prints a letter on the serial port, then sets the byte at
/// `flag`, which is below 64 KiB, to 1, and halts.
pub(crate) fn started_processor(letter: u8, flag: u16) -> Vec<u8> {
    let [low, high] = flag.to_le_bytes();
    vec![
        0xB0, letter, 0xBA, 0xF8, 0x03, 0xEE, // mov al, letter; mov dx, 0x3F8; out dx, al
        0x31, 0xC0, 0x8E, 0xD8, // xor ax, ax; mov ds, ax
        0xC6, 0x06, low, high, 1, // mov byte [flag], 1
        0xF4, 0xEB, 0xFD, // hlt; jmp to hlt
    ]
}

fn elf(code: &[u8], with_note: bool) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let mut note = Vec::new();
    // The name's and the description's sizes, XEN_ELFNOTE_PHYS32_ENTRY, "Xen", the entry.
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), BASE] {
        note.extend(word.to_le_bytes());
    }
    let code_at = note_at + note.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes()); // an executable, for x86-64
    }
    file.extend(1u32.to_le_bytes());
    for long in [u64::from(BASE), HEADER, 0] {
        file.extend(long.to_le_bytes()); // the entry, program headers, no section headers
    }
    file.extend(0u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, if with_note { 2 } else { 1 }, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut header = |kind: u32, at: u64, address: u64, len: u64| {
        file.extend([kind.to_le_bytes(), 7u32.to_le_bytes()].concat());
        for long in [at, address, address, len, len, 4] {
            file.extend(long.to_le_bytes());
        }
    };
    header(1, code_at, BASE.into(), code.len() as u64);
    header(4, note_at, 0, note.len() as u64);
    file.extend(note);
    file.extend(code);
    file
}
