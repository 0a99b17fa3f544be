//! Environment variables of a process: merging lists of `KEY=value`, and `--env-file`.

use std::collections::HashMap;

use davit_model::{Coded, ErrorCode};

/// The search path of a process whose image sets none (Docker's and containerd's default).
pub const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A line of an environment file, or an option, that sets no variable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid environment variable {entry:?}: {reason}")]
pub struct EnvironmentError {
    /// What was given.
    pub entry: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Coded for EnvironmentError {
    fn code(&self) -> ErrorCode {
        ErrorCode::InvalidArgument
    }
}

/// Puts `overrides` over `base`: a key that is there keeps its place and takes the new value, a new one is appended,
/// and an entry without `=` removes its key. Of a key that occurs twice the last value counts.
pub fn merge(base: &[String], overrides: &[String]) -> Vec<String> {
    let mut merged: Vec<Option<&String>> = Vec::with_capacity(base.len() + overrides.len());
    // Images may have very many variables: each is looked up, not searched for.
    let mut places: HashMap<&str, usize> = HashMap::with_capacity(merged.capacity());
    for entry in base.iter().chain(overrides) {
        let key = key_of(entry);
        match (entry.contains('='), places.get(key).copied()) {
            (true, Some(place)) => merged[place] = Some(entry),
            (true, None) => {
                places.insert(key, merged.len());
                merged.push(Some(entry));
            }
            (false, Some(place)) => {
                merged[place] = None;
                places.remove(key);
            }
            (false, None) => {}
        }
    }
    merged.into_iter().flatten().cloned().collect()
}

/// The same with [`DEFAULT_PATH`] put in front when there is no `PATH` at all.
pub fn with_default_path(mut environment: Vec<String>) -> Vec<String> {
    if !environment.iter().any(|entry| key_of(entry) == "PATH") {
        environment.insert(0, DEFAULT_PATH.to_owned());
    }
    environment
}

/// An entry as a user gives it: `KEY=value`, or `KEY` alone, which takes its value from `lookup` (the caller's own
/// environment) and is left without a value, so that [`merge`] removes it, when that has none.
///
/// # Errors
/// [`EnvironmentError`] for an empty key or a NUL.
pub fn resolve(entry: &str, lookup: impl Fn(&str) -> Option<String>) -> Result<String, EnvironmentError> {
    let error = |reason| EnvironmentError { entry: entry.to_owned(), reason };
    if key_of(entry).is_empty() {
        return Err(error("it has no name"));
    }
    if entry.contains('\0') {
        return Err(error("it has a NUL character"));
    }
    if entry.contains('=') {
        return Ok(entry.to_owned());
    }
    Ok(lookup(entry).map_or_else(|| entry.to_owned(), |value| format!("{entry}={value}")))
}

/// The entries of an environment file: one on each line, blank lines and those that begin with `#` skipped, leading
/// blanks cut, nothing unquoted (as Docker reads them).
///
/// # Errors
/// [`EnvironmentError`] for a name that is empty or has a blank in it.
pub fn parse_file(
    text: &str,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Vec<String>, EnvironmentError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut entries = Vec::new();
    for line in text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if key_of(line).contains(char::is_whitespace) {
            let reason = "its name has a blank in it";
            return Err(EnvironmentError { entry: line.to_owned(), reason });
        }
        entries.push(resolve(line, &lookup)?);
    }
    Ok(entries)
}

fn key_of(entry: &str) -> &str {
    entry.split_once('=').map_or(entry, |(key, _)| key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[&str]) -> Vec<String> {
        entries.iter().map(|entry| (*entry).to_owned()).collect()
    }

    #[test]
    fn merging_keeps_the_order_and_removes() {
        let merged = merge(&list(&["A=1", "B=2", "C=3"]), &list(&["B=x=y", "D=4", "A", "E"]));
        assert_eq!(merged, list(&["B=x=y", "C=3", "D=4"]));
        assert_eq!(merge(&list(&["A=1", "A=2"]), &[]), list(&["A=2"]));
        assert_eq!(merge(&list(&["A=1", "B=2"]), &list(&["A", "A=3"])), list(&["B=2", "A=3"]));
    }

    #[test]
    fn as_many_variables_as_a_document_can_hold_are_merged() {
        let many: Vec<String> = (0..500_000).map(|number| format!("{number}=")).collect();
        assert_eq!(merge(&many, &many), many);
    }

    #[test]
    fn the_default_path_is_there_once() {
        assert_eq!(with_default_path(list(&["A=1"])), list(&[DEFAULT_PATH, "A=1"]));
        assert_eq!(with_default_path(list(&["PATH=/x"])), list(&["PATH=/x"]));
        assert_eq!(with_default_path(list(&["PATH="])), list(&["PATH="]));
    }

    #[test]
    fn files_as_docker_reads_them() {
        let lookup = |key: &str| (key == "HOME").then(|| "/h".to_owned());
        let text = "\u{feff}# comment\n\n  A=1 # no comment\nHOME\nGONE\nQ=\"x\"\n";
        let want = list(&["A=1 # no comment", "HOME=/h", "GONE", "Q=\"x\""]);
        assert_eq!(parse_file(text, lookup).unwrap(), want);
        assert!(parse_file("A B=1", lookup).is_err());
        assert!(parse_file("=1", lookup).is_err());
    }
}
