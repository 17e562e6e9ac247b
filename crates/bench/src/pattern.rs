//! Patterns that choose cases by name.

/// Whether `name` fits `pattern`: `*` stands for any text; a pattern without one fits every name that contains it.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(last) = parts.next_back() else { return name.contains(pattern) };
    let Some(rest) = name.strip_prefix(first) else { return false };
    let Some(mut middle) = rest.strip_suffix(last) else { return false };
    for part in parts {
        match middle.find(part) {
            Some(at) => middle = &middle[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn a_plain_word_may_stand_anywhere() {
        assert!(matches("null", "a/null/b"));
        assert!(!matches("nil", "a/null/b"));
    }

    #[test]
    fn a_star_is_any_text_and_the_rest_must_fit() {
        assert!(matches("*/qd1", "null/split/qd1"));
        assert!(!matches("*/qd1", "null/split/qd128"));
        assert!(matches("null/*/qd*", "null/split/qd128"));
        assert!(!matches("null/*x*/qd1", "null/split/qd1"));
        assert!(matches("*", "anything"));
        assert!(!matches("ab*ba", "aba"), "the ends do not overlap");
    }
}
