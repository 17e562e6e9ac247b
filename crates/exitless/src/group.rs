//! Groups by name.

use std::fs;

use anyhow::{Context, bail};

const GROUPS: &str = "/etc/group";

/// The number of the group that is written as `text`: by its number, or by its name in `/etc/group`.
pub(crate) fn find(text: &str) -> anyhow::Result<u32> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let groups = fs::read_to_string(GROUPS).with_context(|| format!("cannot read {GROUPS}"))?;
    match number_of(&groups, text) {
        Some(number) => Ok(number),
        None => bail!("there is no group `{text}` in {GROUPS}; give its number if it is kept elsewhere"),
    }
}

/// A line is `name:password:number:members` (group(5)).
fn number_of(groups: &str, name: &str) -> Option<u32> {
    let mut fields = groups.lines().map(|line| line.split(':'));
    let mut line = fields.find(|fields| fields.clone().next() == Some(name))?;
    line.nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_name_and_number() {
        let groups = "root:x:0:\nkvm:x:104:qemu,me\nbroken\nworse:x:y:\n";
        assert_eq!(number_of(groups, "kvm"), Some(104));
        for name in ["kv", "qemu", "broken", "worse", ""] {
            assert_eq!(number_of(groups, name), None, "{name}");
        }
        assert_eq!(find("104").unwrap(), 104);
        assert!(find("no such group").unwrap_err().to_string().contains("no group `no such group`"));
    }
}
