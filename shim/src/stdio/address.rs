//! What a client asks for by the address of a stream.

use std::path::PathBuf;

use crate::log_file::Format;
use crate::logger;
use crate::stdio::StdioError;

/// An address taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// Nothing.
    Null,
    /// A FIFO, or a file that is there.
    Path(PathBuf),
    /// A log file.
    Log(PathBuf, Format),
    /// A logging program.
    Logger(logger::Program),
}

impl Address {
    /// Reads an address.
    ///
    /// # Errors
    /// [`StdioError::Scheme`], [`StdioError::LogOption`].
    pub(crate) fn parse(address: &str) -> Result<Address, StdioError> {
        if address.is_empty() {
            return Ok(Address::Null);
        }
        let Some((scheme, rest)) = address.split_once("://") else {
            return Ok(Address::Path(PathBuf::from(address)));
        };
        let path = || PathBuf::from(logger::decode(rest.split(['?', '#']).next().unwrap_or_default()));
        match scheme {
            "fifo" => Ok(Address::Path(path())),
            "file" => Ok(Address::Log(path(), Format::Plain)),
            "json-file" => Ok(Address::Log(path(), json_format(rest)?)),
            "binary" | "binary-v2" => {
                Ok(Address::Logger(logger::Program::parse(rest, scheme == "binary-v2")))
            }
            scheme => Err(StdioError::Scheme { scheme: scheme.to_owned() }),
        }
    }
}

/// The options of a json log, as Docker names them: `max-size` in bytes, and `max-file`.
fn json_format(rest: &str) -> Result<Format, StdioError> {
    let (mut max_size, mut max_files) = (0, 1);
    let query = rest.split('#').next().and_then(|rest| rest.split_once('?')).map_or("", |(_, query)| query);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let invalid = || StdioError::LogOption { option: pair.to_owned() };
        match key {
            "max-size" => max_size = value.parse().map_err(|_| invalid())?,
            "max-file" => max_files = value.parse().ok().filter(|files| *files > 0).ok_or_else(invalid)?,
            _ => return Err(invalid()),
        }
    }
    Ok(Format::Json { max_size, max_files })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_of_five_kinds() {
        let parse = |text| Address::parse(text).unwrap();
        assert_eq!(parse(""), Address::Null);
        assert_eq!(parse("/a b"), Address::Path("/a b".into()));
        assert_eq!(parse("fifo:///a"), Address::Path("/a".into()));
        assert_eq!(parse("file:///a%20b?x=1"), Address::Log("/a b".into(), Format::Plain));
        assert!(matches!(parse("binary:///bin/log?a=b"), Address::Logger(_)));
        assert!(matches!(Address::parse("ftp://x"), Err(StdioError::Scheme { scheme }) if scheme == "ftp"));
    }

    #[test]
    fn a_json_log_has_two_options() {
        let log = |max_size, max_files| Address::Log("/l".into(), Format::Json { max_size, max_files });
        assert_eq!(Address::parse("json-file:///l").unwrap(), log(0, 1));
        assert_eq!(Address::parse("json-file:///l?max-size=1024&max-file=3").unwrap(), log(1024, 3));
        for bad in ["max-size=x", "max-size=-1", "max-file=0", "compress=true"] {
            let error = Address::parse(&format!("json-file:///l?{bad}")).unwrap_err();
            assert!(matches!(error, StdioError::LogOption { .. }), "{bad}");
        }
    }
}
