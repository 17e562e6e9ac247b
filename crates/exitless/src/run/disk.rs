//! A disk on the command line: a backend, and what the guest is shown of it.

use std::num::NonZeroU16;
use std::str::FromStr;

use blk::Spec;

/// A disk of the machine.
#[derive(Clone, Debug)]
pub struct DiskOption {
    /// What it is stored in.
    pub backend: Spec,
    /// The same in the words of the command line.
    pub name: String,
    /// Queues the driver may use; None is one per virtual CPU.
    pub queues: Option<NonZeroU16>,
    /// Serial number that the driver sees.
    pub serial: String,
    /// The driver may not write.
    pub read_only: bool,
}

impl FromStr for DiskOption {
    type Err = String;

    /// `BACKEND[,option…]`: options of ours may stand anywhere behind the backend, the others are its own.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut disk = (None, String::new(), false);
        let mut rest = String::new();
        for (index, part) in parts(text).into_iter().enumerate() {
            match part.split_once('=') {
                Some(("queues", count)) if index > 0 => {
                    let count =
                        count.parse().map_err(|_| format!("queues={count}: it must be 1 to 65535"))?;
                    disk.0 = Some(count);
                }
                Some(("serial", serial)) if index > 0 => disk.1 = serial.to_owned(),
                None if index > 0 && part == "read-only" => disk.2 = true,
                _ => {
                    if index > 0 {
                        rest.push(',');
                    }
                    rest.push_str(part);
                }
            }
        }
        let backend = rest.parse::<Spec>().map_err(|error| error.to_string())?;
        Ok(Self { backend, name: rest, queues: disk.0, serial: disk.1, read_only: disk.2 })
    }
}

/// What stands between single commas; two of them are one in a path.
fn parts(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut from, mut at) = (0, 0);
    while let Some(found) = text[at..].find(',').map(|offset| at + offset) {
        if text[found + 1..].starts_with(',') {
            at = found + 2;
            continue;
        }
        parts.push(&text[from..found]);
        from = found + 1;
        at = from;
    }
    parts.push(&text[from..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_the_disk_and_of_its_backend_are_told_apart() {
        let disk: DiskOption = "file:/a,queues=4,direct=off,serial=x,read-only".parse().unwrap();
        assert_eq!(
            (disk.name.as_str(), disk.queues.map(NonZeroU16::get), disk.serial.as_str(), disk.read_only),
            ("file:/a,direct=off", Some(4), "x", true)
        );
        assert_eq!(
            format!("{:?}", disk.backend),
            format!("{:?}", "file:/a,direct=off".parse::<Spec>().unwrap())
        );
    }

    #[test]
    fn a_path_may_have_commas_and_look_like_an_option() {
        assert_eq!(parts("file:/a,,queues=2,queues=3"), ["file:/a,,queues=2", "queues=3"]);
        let disk: DiskOption = "file:/a,,queues=2".parse().unwrap();
        assert_eq!(disk.queues, None);
    }

    #[test]
    fn errors_say_what_is_allowed() {
        assert!("mem:1G,queues=0".parse::<DiskOption>().unwrap_err().contains("1 to 65535"));
        assert!("tape:/dev/st0".parse::<DiskOption>().is_err());
        assert!("mem:1G,nonsense".parse::<DiskOption>().is_err());
    }
}
