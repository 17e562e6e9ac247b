//! Commands that the documentation shows.

use clap::Parser;
use clap::error::ErrorKind;
use exitless::cli::Cli;

use crate::Finding;

/// Commands of ours in the code blocks of a Markdown `document` that the program would refuse.
pub(crate) fn commands(path: &str, document: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut in_block = false;
    let mut command = String::new();
    for (index, line) in document.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
            continue;
        }
        if !in_block {
            continue;
        }
        command.push_str(line);
        if command.ends_with('\\') {
            command.pop();
            continue;
        }
        let refused = arguments(&command).and_then(|arguments| refusal(&arguments));
        findings.extend(refused.map(|reason| format!("{path}:{}: {reason}", index + 1)));
        command.clear();
    }
    findings
}

/// The words of a command of ours; None for another one, and for a synopsis.
fn arguments(line: &str) -> Option<Vec<String>> {
    let line = line.trim_start().trim_start_matches("$ ").trim_start_matches("sudo ");
    let (program, _) = line.split_once(' ')?;
    if program != "exitless" && !program.ends_with("/exitless") || line.contains(['[', '…', '<']) {
        return None;
    }
    let mut words = vec![String::new()];
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if open == c => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (None, '#' | '|' | '&' | '>' | ';') => break,
            (None, c) if c.is_whitespace() => words.push(String::new()),
            (_, c) => words.last_mut()?.push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    Some(words)
}

fn refusal(arguments: &[String]) -> Option<String> {
    let error = Cli::try_parse_from(arguments).err()?;
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => None,
        _ => Some(error.to_string().lines().next().unwrap_or_default().to_owned()),
    }
}

#[test]
fn commands_that_the_program_refuses_are_found() {
    let document = "exitless nonsense in prose\n```sh\n$ exitless blk --socket a --backend null:1G &\n\
                    exitless blk --socket a \\\n  --backends null:1G\nqemu --exitless\nexitless blk [OPTIONS]\n\
                    target/release/exitless --help # and so on\n```";
    let findings = commands("README.md", document);
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(findings[0].starts_with("README.md:5: error: unexpected argument '--backends'"), "{findings:?}");
}
