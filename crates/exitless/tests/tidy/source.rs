//! A Rust source, taken apart as far as the rules need it.

/// One file.
pub(crate) struct Source {
    /// Its path from the root of the workspace.
    pub(crate) path: String,
    /// Its lines as they are.
    pub(crate) text: Vec<String>,
    /// Its lines without comments.
    pub(crate) code: Vec<String>,
    /// Its lines without comments and without what is in literals.
    pub(crate) bare: Vec<String>,
    /// Which lines are compiled for tests only.
    pub(crate) test: Vec<bool>,
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let bare_text = blank(text, true);
        let mut source = Self {
            path: path.to_owned(),
            text: lines(text),
            code: lines(&blank(text, false)),
            bare: lines(&bare_text),
            test: Vec::new(),
        };
        source.test =
            if source.is_test_file() { vec![true; source.text.len()] } else { test_lines(&bare_text) };
        source
    }

    /// The crate's folder: `blk` of `crates/blk/src/lib.rs`.
    pub(crate) fn krate(&self) -> &str {
        self.path.split('/').nth(1).unwrap_or_default()
    }

    /// The numbers, from 1, and contents of `lines` that are not for tests only.
    pub(crate) fn real<'a>(&'a self, lines: &'a [String]) -> impl Iterator<Item = (usize, &'a str)> {
        let real = lines.iter().zip(&self.test).enumerate().filter(|(_, (_, test))| !**test);
        real.map(|(index, (line, _))| (index + 1, line.as_str()))
    }

    /// A finding in a line of this file.
    pub(crate) fn finding(&self, line: usize, what: impl std::fmt::Display) -> super::Finding {
        format!("{}:{line}: {what}", self.path)
    }

    fn is_test_file(&self) -> bool {
        let mut parts = self.path.split('/').skip(2);
        parts.any(|part| ["tests", "tests.rs", "benches", "examples"].contains(&part))
    }
}

/// The words of a line: what stands between characters that cannot be in a name.
pub(crate) fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// Replaces comments, and literals' contents if `literals`, by spaces. Line breaks stay.
fn blank(text: &str, literals: bool) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let (end, hide) = token(&chars, at);
        for &c in &chars[at..end] {
            let hidden = match hide {
                Hide::No => false,
                Hide::Comment => true,
                Hide::Literal => literals && c != '"' && c != '\'',
            };
            out.push(if hidden && c != '\n' { ' ' } else { c });
        }
        at = end;
    }
    out
}

#[derive(Clone, Copy)]
enum Hide {
    No,
    Comment,
    Literal,
}

/// Where the token at `at` ends, and what it is.
fn token(chars: &[char], at: usize) -> (usize, Hide) {
    let is = |at: usize, c: char| chars.get(at) == Some(&c);
    let name_before = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    match chars[at] {
        '/' if is(at + 1, '/') => {
            let end = chars[at..].iter().position(|&c| c == '\n').map_or(chars.len(), |len| at + len);
            (end, Hide::Comment)
        }
        '/' if is(at + 1, '*') => (block_comment(chars, at), Hide::Comment),
        'r' if !name_before => match raw_string(chars, at) {
            Some(end) => (end, Hide::Literal),
            None => (at + 1, Hide::No),
        },
        '"' => (string(chars, at), Hide::Literal),
        // A character, unless it is a lifetime: 'a' and '\n', but not 'a or 'static.
        '\'' if is(at + 1, '\\') => {
            let end = chars[at + 3..].iter().position(|&c| c == '\'').map_or(chars.len(), |len| at + 4 + len);
            (end, Hide::Literal)
        }
        '\'' if is(at + 2, '\'') => (at + 3, Hide::Literal),
        _ => (at + 1, Hide::No),
    }
}

fn block_comment(chars: &[char], mut at: usize) -> usize {
    let mut depth = 0;
    while at < chars.len() {
        match chars[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn raw_string(chars: &[char], at: usize) -> Option<usize> {
    let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
    let open = at + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let closes = |end: usize| {
        chars[end] == '"' && chars[end + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes
    };
    let end = (open + 1..chars.len()).find(|&end| closes(end));
    Some(end.map_or(chars.len(), |end| end + 1 + hashes))
}

fn string(chars: &[char], at: usize) -> usize {
    let mut end = at + 1;
    while end < chars.len() && chars[end] != '"' {
        end += if chars[end] == '\\' { 2 } else { 1 };
    }
    (end + 1).min(chars.len())
}

/// Which lines belong to items under `#[cfg(test)]`.
fn test_lines(bare: &str) -> Vec<bool> {
    let is_attribute = |line: &str| line.starts_with("#[cfg(test") || line.starts_with("#[cfg(all(test");
    let mut item: Option<Item> = None;
    let mut test = Vec::new();
    for line in bare.lines() {
        if item.is_none() && is_attribute(line.trim_start()) {
            item = Some(Item::default());
        }
        test.push(item.is_some());
        item = item.and_then(|item| item.after(line));
    }
    test
}

/// An item as far as it has been read.
#[derive(Default)]
struct Item {
    depth: i32,
}

impl Item {
    /// The item after another line; None if it ended there: with the brace that closes its first one, or with a
    /// semicolon before any.
    fn after(mut self, line: &str) -> Option<Self> {
        for c in line.chars() {
            self.depth += match c {
                '{' => 1,
                '}' => -1,
                _ => 0,
            };
            if self.depth == 0 && (c == '}' || c == ';') {
                return None;
            }
        }
        Some(self)
    }
}

#[test]
fn comments_and_literals_are_told_from_code() {
    let source = Source::new(
        "crates/x/src/a.rs",
        "a /* b /* c */ d */ e // f\nlet s: &'static str = \"g \\\" // h\"; let i = r#\"j \" k\"#; 'l' + '\\'' + m",
    );
    let squeeze = |lines: &[String]| {
        lines.iter().map(|line| words(line).collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
    };
    assert_eq!(squeeze(&source.code), ["a e", "let s static str g h let i r j k l m"]);
    assert_eq!(squeeze(&source.bare), ["a e", "let s static str let i m"]);
}

#[test]
fn test_code_is_told_from_real_code() {
    let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() { x }\n}\nfn c() {}\n#[cfg(test)]\nmod d;\nfn e() {}";
    let source = Source::new("crates/x/src/a.rs", text);
    let real: Vec<_> = source.real(&source.bare).map(|(line, _)| line).collect();
    assert_eq!(real, [1, 6, 9]);
    assert!(Source::new("crates/x/src/peer/tests.rs", text).test.iter().all(|&test| test));
    assert!(Source::new("crates/tests/src/a.rs", text).test.contains(&false));
}
