//! The command line, in the form of Go's `flag` package, which every daemon writes: one dash or two, values
//! after
//! `=` or as the next argument, booleans alone or with `=`, and the first word that is no flag ends the
//! flags.

use std::path::PathBuf;

/// What the shim is asked to do, and about what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// `-namespace`.
    pub(crate) namespace: String,
    /// `-id`.
    pub(crate) id: String,
    /// `-address`: the daemon's gRPC socket.
    pub(crate) address: String,
    /// `-publish-binary`: of no use since events go by ttrpc.
    pub(crate) publish_binary: String,
    /// `-bundle`: only with `delete`; else it is the working directory.
    pub(crate) bundle: Option<PathBuf>,
    /// `-socket`: listen there instead of on the inherited socket.
    pub(crate) socket: Option<PathBuf>,
    /// `-debug`.
    pub(crate) debug: bool,
    /// `-v` or `-version`.
    pub(crate) version: bool,
    /// `-info`.
    pub(crate) info: bool,
    /// `-upgrade-check`: say whether the state at standard input is understood.
    pub(crate) upgrade_check: bool,
    /// `-upgrade-state`: go on from the state at this descriptor.
    pub(crate) upgrade_state: Option<i32>,
    /// The word after the flags: `start`, `delete`, or nothing to serve.
    pub(crate) action: Option<String>,
}

/// A command line that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ArgumentError {
    /// A flag that no daemon has.
    #[error("flag provided but not defined: -{name}")]
    Unknown {
        /// The flag.
        name: String,
    },
    /// The command line ends where a value is due.
    #[error("flag needs an argument: -{name}")]
    MissingValue {
        /// The flag.
        name: String,
    },
    /// A value that is no number.
    #[error("invalid value {value:?} for -{name}")]
    NotNumber {
        /// The flag.
        name: String,
        /// What was given.
        value: String,
    },
    /// A boolean that is neither true nor false.
    #[error("invalid boolean value {value:?} for -{name}")]
    NotBoolean {
        /// The flag.
        name: String,
        /// What was given.
        value: String,
    },
}

/// Reads a command line without its first word, the program.
pub(crate) fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Arguments, ArgumentError> {
    let mut parsed = Arguments::default();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let flag = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-'));
        let Some(flag) = flag.filter(|flag| !flag.is_empty()) else {
            // A lone `--` ends the flags too.
            parsed.action = if argument == "--" { arguments.next() } else { Some(argument) };
            break;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        match name {
            "debug" => parsed.debug = boolean(name, value)?,
            "v" | "version" => parsed.version = boolean(name, value)?,
            "info" => parsed.info = boolean(name, value)?,
            "upgrade-check" => parsed.upgrade_check = boolean(name, value)?,
            "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket" | "debug-socket"
            | "upgrade-state" => {
                let value = match value.or_else(|| arguments.next()) {
                    Some(value) => value,
                    None => return Err(ArgumentError::MissingValue { name: name.to_owned() }),
                };
                match name {
                    "namespace" => parsed.namespace = value,
                    "id" => parsed.id = value,
                    "address" => parsed.address = value,
                    "publish-binary" => parsed.publish_binary = value,
                    "bundle" => {
                        parsed.bundle = Some(value).filter(|path| !path.is_empty()).map(PathBuf::from)
                    }
                    "socket" => {
                        parsed.socket = Some(value).filter(|path| !path.is_empty()).map(PathBuf::from)
                    }
                    "upgrade-state" => match value.parse() {
                        Ok(number) => parsed.upgrade_state = Some(number),
                        Err(_) => return Err(ArgumentError::NotNumber { name: name.to_owned(), value }),
                    },
                    // There is no profiler to serve.
                    _ => {}
                }
            }
            _ => return Err(ArgumentError::Unknown { name: name.to_owned() }),
        }
    }
    Ok(parsed)
}

/// The words that Go's `strconv.ParseBool` takes.
fn boolean(name: &str, value: Option<String>) -> Result<bool, ArgumentError> {
    match value.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(ArgumentError::NotBoolean { name: name.to_owned(), value: value.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(words: &str) -> Result<Arguments, ArgumentError> {
        parse(words.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn what_daemons_write_is_understood() {
        let start =
            line("-namespace ns -address /c.sock -publish-binary /bin/c -id box -debug start").unwrap();
        assert_eq!((start.namespace.as_str(), start.id.as_str(), start.debug), ("ns", "box", true));
        assert_eq!(start.action.as_deref(), Some("start"));
        let delete = line("--namespace=ns --id=box -bundle /b -debug=false delete -debug").unwrap();
        assert_eq!(delete.bundle, Some(PathBuf::from("/b")));
        assert_eq!((delete.action.as_deref(), delete.debug), (Some("delete"), false));
        assert!(line("-v").unwrap().version);
        assert!(line("-info").unwrap().info);
        assert_eq!(line("-id box").unwrap().action, None);
        assert_eq!(line("-id box -- start").unwrap().action.as_deref(), Some("start"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(line("-frob"), Err(ArgumentError::Unknown { name: "frob".into() }));
        assert_eq!(line("-id"), Err(ArgumentError::MissingValue { name: "id".into() }));
        assert!(matches!(line("-debug=maybe"), Err(ArgumentError::NotBoolean { .. })));
    }
}
