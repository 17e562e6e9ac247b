//! Why an image is refused.

/// Why an image cannot be opened, or is not what it says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The first bytes are no qcow2 header.
    #[error("is no qcow2 image: it begins with {0:#010x}, not 0x514649fb")]
    Magic(u32),
    /// The file ends within what must be there.
    #[error("ends within its {0}: the image was cut off")]
    Short(&'static str),
    /// A version that is not known.
    #[error("has version {0}: versions 2 and 3 are known")]
    Version(u32),
    /// Encryption.
    #[error("is encrypted ({0}): encrypted images are not supported; convert it with `qemu-img convert`")]
    Encrypted(&'static str),
    /// Incompatible features that are not known, by the name that the image has for them where it has one.
    #[error("needs features that are not known here: {0}")]
    Features(String),
    /// A field of the header is out of its range.
    #[error("header field {field} is {value}: allowed is {allowed}")]
    Field {
        /// The field's name in the specification.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What would be.
        allowed: &'static str,
    },
    /// A header extension that contradicts the header or is malformed.
    #[error("header extension {0} is malformed")]
    Extension(&'static str),
    /// A table or cluster lies where it cannot be.
    #[error("{what} at {offset:#x} is not where one can be")]
    Place {
        /// Of what.
        what: &'static str,
        /// Its offset in the file in bytes.
        offset: u64,
    },
    /// The image was marked corrupt by whoever found it so.
    #[error(
        "is marked corrupt: it can be read, but not be written before it was repaired (`qemu-img check -r all`)"
    )]
    Corrupt,
}
