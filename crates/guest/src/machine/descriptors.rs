//! Descriptors of the processor's tables, as numbers.

/// The selector of code in ring 0, as `image/boot.s` has it.
const SELECTOR_CODE0: u64 = 0x08;
/// The selector of the first task segment; the others follow, 16 bytes each.
const SELECTOR_TASK: u64 = 0x20;
/// Bytes from one task segment to the next.
const TASK_STRIDE: u64 = 128;
const TASK_LIMIT: u64 = 103;

/// Who may go through a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    /// Interrupts and faults only.
    Hardware,
    /// Instructions of ring 3 too.
    Program,
}

/// An interrupt gate to a function in ring 0: two words. It turns interrupts off.
pub(super) fn gate(function: usize, caller: Caller) -> [u64; 2] {
    let function = function as u64;
    let kind = match caller {
        Caller::Hardware => 0x8E,
        Caller::Program => 0xEE,
    };
    let low = function & 0xFFFF | SELECTOR_CODE0 << 16 | kind << 40 | (function >> 16 & 0xFFFF) << 48;
    [low, function >> 32]
}

/// An available 64-bit task segment: where in the table it goes, and its two words.
pub(super) fn task(tasks: usize, processor: usize) -> (u64, [u64; 2]) {
    let base = tasks as u64 + TASK_STRIDE * processor as u64;
    let low = TASK_LIMIT | (base & 0xFF_FFFF) << 16 | 0x89 << 40 | (base >> 24 & 0xFF) << 56;
    (SELECTOR_TASK + 16 * processor as u64, [low, base >> 32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_scattered_as_the_processor_wants_them() {
        let words = [0x9ABC_8E00_0008_DEF0, 0x1234_5678];
        assert_eq!(gate(0x1234_5678_9ABC_DEF0, Caller::Hardware), words);
        assert_eq!(gate(0x1234_5678_9ABC_DEF0, Caller::Program), [words[0] | 3 << 45, words[1]]);
        let (at, task) = task(0x1234_5678_9ABC_DE00, 2);
        assert_eq!((at, task), (0x40, [0x9A00_89BC_DF00_0067, 0x1234_5678]));
    }
}
