//! What every access to guest memory relies on.
//!
//! Areas, segments and the slots of a virtual machine compute addresses from what a [`Backing`] says and go there, so
//! whoever implements it vouches for it: that is why the trait is unsafe. Nothing is done here.
#![allow(unsafe_code)]

/// What keeps the host side of a region mapped.
///
/// # Safety
/// `base` and `len` are always the same, and what lies there is memory that this process may read and write through
/// raw pointers and atomics while others do, for as long as the value lives.
pub unsafe trait Backing: Send + Sync {
    /// Address of the first byte in this process. It stays mapped, readable and writable, for `len` bytes and for
    /// as long as the value lives.
    fn base(&self) -> core::ptr::NonNull<u8>;

    /// Bytes that are mapped.
    fn len(&self) -> usize;

    /// Whether nothing is mapped.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The memory behind the mapping has been taken away (its file was truncated); what is read there is zeros.
    fn is_poisoned(&self) -> bool {
        false
    }
}
