//! Byte counts as people write them: `8G`, `512M`, `4096`. A `B` or `iB` behind the unit changes nothing, as in the
//! sizes of backends.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

/// Units in ascending order; each is 1024 times the one before it, and the first is 1 KiB.
const UNITS: [char; 4] = ['K', 'M', 'G', 'T'];
const ALLOWED: &str =
    "a number of bytes, at least 1, alone or with a unit K, M, G or T (powers of 1024), like 8G";

/// A number of bytes, more than none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub NonZeroU64);

/// A text that is not a number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it must be {ALLOWED}")]
pub struct SizeError;

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let power = match unit.to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 1,
            "M" | "MB" | "MIB" => 2,
            "G" | "GB" | "GIB" => 3,
            "T" | "TB" | "TIB" => 4,
            _ => return Err(SizeError),
        };
        let number: u64 = digits.parse().map_err(|_| SizeError)?;
        let bytes = number.checked_mul(1 << (10 * power)).ok_or(SizeError)?;
        NonZeroU64::new(bytes).map(Self).ok_or(SizeError)
    }
}

impl fmt::Display for Size {
    /// In the largest unit of which it is a whole number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let power = (self.0.get().trailing_zeros() / 10).min(UNITS.len() as u32);
        let number = self.0.get() >> (10 * power);
        match power.checked_sub(1) {
            Some(unit) => f.pad(&format!("{number}{}", UNITS[unit as usize])),
            None => f.pad(&number.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_unit() {
        for (text, bytes) in [
            ("1", 1),
            ("4096", 4096),
            ("8G", 8 << 30),
            ("512m", 512 << 20),
            ("3k", 3 << 10),
            ("2TiB", 2 << 40),
            ("5MB", 5 << 20),
        ] {
            assert_eq!(text.parse::<Size>().map(|size| size.0.get()), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in ["", "0", "0G", "G", "-1", "+1", "1.5G", "8X", "8GiBi", "8 G", "99999999999T", "x"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError), "{text}");
        }
    }

    #[test]
    fn sizes_are_written_in_the_largest_whole_unit() {
        for text in ["1", "1023", "1K", "1536", "1536M", "8G", "2T", "5000T"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
    }
}
