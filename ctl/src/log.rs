//! The logs of containers in the background: where they are, what they are called, and the options of Docker's for them.
//!
//! A log is `NAME-json.log` in Docker's format, its older parts `NAME-json.log.1`, `.2` and so on; the shim writes and
//! rotates it, so that it can be read at any time. Shims that are not Davit's write plain text, `NAME.log`.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::format;

/// The end of the name of a log of JSON lines.
const JSON: &str = "-json.log";
/// The annotation by which a shim learns whether a container waits for its log.
pub(crate) const MODE_ANNOTATION: &str = "io.davit.stdio.mode";
/// The runtimes whose shim writes JSON.
const RUNTIMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.davit.v2"];

/// `--log-opt`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct LogOptions {
    max_size: Option<u64>,
    max_files: Option<u32>,
    /// `blocking` or `non-blocking`.
    pub(crate) mode: Option<String>,
}

impl LogOptions {
    /// Reads the options as they were given, `KEY=VALUE` each.
    ///
    /// # Errors
    /// [`Error::Usage`] for one that is unknown, or has no such value.
    pub(crate) fn parse(texts: &[String]) -> Result<LogOptions> {
        let mut options = LogOptions::default();
        for text in texts {
            let hint = "the options are max-size=SIZE (such as 10m), max-file=NUMBER (1 to 1000) and mode=blocking|non-blocking";
            let invalid = || Error::usage(format!("invalid log option {text:?}"), hint);
            let (key, value) = text.split_once('=').ok_or_else(invalid)?;
            match key {
                "max-size" if value == "-1" => options.max_size = None,
                "max-size" => {
                    let size = format::parse_size(value).ok().filter(|size| *size > 0);
                    options.max_size = Some(size.ok_or_else(invalid)?);
                }
                "max-file" => {
                    let files = value.parse().ok().filter(|files| (1..=MOST_FILES).contains(files));
                    options.max_files = Some(files.ok_or_else(invalid)?);
                }
                "mode" if ["blocking", "non-blocking"].contains(&value) => {
                    options.mode = Some(value.to_owned());
                }
                _ => return Err(invalid()),
            }
        }
        Ok(options)
    }

    /// What a container's label says of the rotation; empty for none.
    pub(crate) fn label(&self) -> String {
        let size = self.max_size.map(|size| format!("max-size={size}"));
        let files = self.max_files.map(|files| format!("max-file={files}"));
        size.into_iter().chain(files).collect::<Vec<_>>().join("&")
    }
}

/// The most files of a log; each is looked for when the container is removed.
const MOST_FILES: u32 = 1000;

/// The name of a container's log. `can_be_json` says whether the daemon is one whose shim knows json logs.
pub(crate) fn file_name(id: &str, runtime: &str, can_be_json: bool) -> String {
    let is_json = can_be_json && RUNTIMES.contains(&runtime);
    format!("{id}{}", if is_json { JSON } else { ".log" })
}

/// All that a container's log may be called.
pub(crate) fn names(id: &str) -> [String; 2] {
    [JSON, ".log"].map(|end| format!("{id}{end}"))
}

/// Whether a log is one of JSON lines.
pub(crate) fn is_json(log: &Path) -> bool {
    log.as_os_str().as_encoded_bytes().ends_with(JSON.as_bytes())
}

/// The address by which a shim writes to the log.
pub(crate) fn address(log: &Path, options: &str) -> String {
    match (is_json(log), options) {
        (true, "") => format!("json-file://{}", log.display()),
        (true, options) => format!("json-file://{}?{options}", log.display()),
        (false, _) => format!("file://{}", log.display()),
    }
}

/// An older part of a log.
pub(crate) fn rotated(log: &Path, number: u32) -> PathBuf {
    let mut name = log.to_owned().into_os_string();
    name.push(format!(".{number}"));
    name.into()
}

/// How many files a log has at most, by its container's label.
pub(crate) fn max_files(options: &str) -> u32 {
    let value = options.split('&').find_map(|option| option.strip_prefix("max-file="));
    value.and_then(|value| value.parse().ok()).map_or(1, |files: u32| files.min(MOST_FILES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_dockers() {
        let parse = |texts: &[&str]| {
            LogOptions::parse(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
        };
        let options = parse(&["max-size=10m", "max-file=3", "mode=blocking"]).unwrap();
        assert_eq!(options.label(), "max-size=10485760&max-file=3");
        assert_eq!(options.mode.as_deref(), Some("blocking"));
        assert_eq!(max_files(&options.label()), 3);
        assert_eq!(parse(&[]).unwrap().label(), "");
        assert_eq!(max_files("max-file=4000000000"), 1000, "whoever has written that");
        for bad in [
            "max-size",
            "max-size=0",
            "max-size=x",
            "max-file=0",
            "max-file=1001",
            "mode=maybe",
            "compress=true",
        ] {
            assert!(parse(&[bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_shims_that_know_json_are_asked_for_it() {
        let log = PathBuf::from("/l").join(file_name("box", "io.containerd.runc.v2", true));
        assert_eq!(address(&log, "max-size=5"), "json-file:///l/box-json.log?max-size=5");
        assert_eq!(rotated(&log, 2), Path::new("/l/box-json.log.2"));
        let log = PathBuf::from("/l").join(file_name("box", "io.containerd.runc.v2", false));
        assert_eq!(address(&log, "max-size=5"), "file:///l/box.log");
        assert_eq!(file_name("box", "io.containerd.kata.v2", true), "box.log");
    }
}
