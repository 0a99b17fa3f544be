//! The `-info` flag: prints what this shim and its OCI runtime can do, as a `RuntimeInfo`.

use std::ffi::OsStr;
use std::io::{self, Read, Write};

use davit_proto::containerd::types::{RuntimeInfo, RuntimeVersion};
use davit_sys::process::find_program;
use prost::Message;
use prost_types::Any;

use crate::options;
use crate::runtime::DEFAULT_BINARY;

/// The name of this runtime.
const NAME: &str = "io.containerd.davit.v2";
/// The type of the runtime's own document (containerd `typeurl` of `features.Features`).
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// The most of standard input that is read.
const MAX_INPUT: u64 = 10 << 20;

/// Reads the runtime's options as an `Any` from standard input, and prints the information.
pub(crate) fn run() -> io::Result<()> {
    let mut stdin = Vec::new();
    io::stdin().take(MAX_INPUT).read_to_end(&mut stdin)?;
    let invalid =
        |error: Box<dyn std::error::Error + Send + Sync>| io::Error::new(io::ErrorKind::InvalidInput, error);
    let given = if stdin.is_empty() {
        None
    } else {
        Some(Any::decode(stdin.as_slice()).map_err(|error| invalid(error.into()))?)
    };
    let options = options::from_request(given.as_ref()).map_err(|error| invalid(error.into()))?;
    let binary = if options.binary_name.is_empty() { DEFAULT_BINARY } else { &options.binary_name };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = find_program(OsStr::new(binary), &path).ok_or_else(|| {
        let text = format!("failed to look up the path of {binary:?}: executable file not found in $PATH");
        io::Error::new(io::ErrorKind::NotFound, text)
    })?;
    // Not every runtime has this command; then it says nothing about itself.
    let features = std::process::Command::new(program).arg("features").output().ok();
    let features = features.filter(|output| output.status.success()).map(|output| output.stdout);
    let features = features.filter(|json| serde_json::from_slice::<serde::de::IgnoredAny>(json).is_ok());
    let info = RuntimeInfo {
        name: NAME.to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: String::new(),
        }),
        options: given,
        features: features.map(|value| Any { type_url: FEATURES_TYPE.to_owned(), value }),
        ..RuntimeInfo::default()
    };
    let mut stdout = io::stdout();
    stdout.write_all(&info.encode_to_vec())?;
    stdout.flush()
}
