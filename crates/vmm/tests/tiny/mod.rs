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

    /// Adds 1 to 32 bits.
    pub(crate) fn increment(self, address: u32) -> Self {
        self.bytes(&[0xFF, 0x05]).word(address)
    }

    /// Waits until two words are equal.
    pub(crate) fn wait_until_equal(self, a: u32, b: u32) -> Self {
        let start = self.here();
        self.bytes(&[0xA1]).word(a).bytes(&[0x3B, 0x05]).word(b).jump_if_not_equal(start) // mov eax, [a]; cmp eax, [b]
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
