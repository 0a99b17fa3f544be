//! How a daemon starts a shim and learns where it listens, in the three generations that exist.
//!
//! | daemon | environment | stdin of `start` | stdout it understands |
//! |---|---|---|---|
//! | 1.6 | `TTRPC_ADDRESS` | nothing or `google.protobuf.Any` | bare address |
//! | 1.7 to 2.2 | and `GRPC_ADDRESS`, `NAMESPACE` | the same | bare address; JSON (1.7: of a version up to 2) |
//! | 2.3 and later, davitd | the same | `BootstrapParams` | and `BootstrapResult` |
//!
//! The daemon reads stdout and stderr of `start` together until both are closed, so a shim prints nothing
//! else. Both directions are here: what a shim parses and prints, and what a daemon writes and parses.

use std::path::PathBuf;

use davit_model::{Any, Coded, ErrorCode};
use davit_proto::containerd::runtime::bootstrap::v1::{
    BootstrapParams, BootstrapResult, Extension, LogLevel,
};
use prost::Message;
use serde::{Deserialize, Serialize};

/// The version of the task API that a shim claims when it serves `containerd.task.v3`.
pub const VERSION_3: i32 = 3;
/// The version for daemons that know `containerd.task.v2` alone.
pub const VERSION_2: i32 = 2;
/// The only protocol of this project.
pub const PROTOCOL_TTRPC: &str = "ttrpc";

/// The name of the options message of `runc`-like runtimes.
pub const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";

/// Which of the protocols the daemon speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generation {
    /// containerd 1.6: a bare address.
    Plain,
    /// containerd 1.7 to 2.2: options as `Any` in, JSON out.
    Json,
    /// containerd 2.3 and davitd: protobuf both ways.
    Bootstrap,
}

/// The part of the environment and of the flags of a `start` that matters here.
#[derive(Debug, Clone, Default)]
pub struct StartEnvironment {
    /// `-id`.
    pub id: String,
    /// `-address`.
    pub grpc_address: String,
    /// `-debug`.
    pub debug: bool,
    /// `TTRPC_ADDRESS`.
    pub ttrpc_address: Option<String>,
    /// True if `GRPC_ADDRESS` or `NAMESPACE` is set: the daemon is 1.7 or later.
    pub knows_json: bool,
}

/// What a daemon tells a shim that it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartInput {
    /// The protocol that it was told in, and that the answer is due in.
    pub generation: Generation,
    /// The runtime's options, unread.
    pub options: Option<Any>,
    /// True if the shim is to log all that it does.
    pub debug: bool,
    /// Where events are sent to.
    pub ttrpc_address: String,
    /// The daemon's API, of which the name of the shim's socket is made.
    pub grpc_address: String,
    /// The folder for the shim's socket, if not the default one.
    pub socket_dir: Option<PathBuf>,
}

impl StartInput {
    /// Reads what a daemon wrote to the stdin of `start`.
    ///
    /// `BootstrapParams` and `Any` overlap on the wire: both begin with a string in field 1, and the options in field 2
    /// of an `Any` may be text by chance. The former is it if that string is the id of the `-id` flag, and an address
    /// of the daemon follows, which is always sent: an `Any` has no third field. The id alone does not tell, for a
    /// container may have the name of a type. Bytes that are neither are ignored, as containerd's shims do it, since
    /// all that they could hold comes with `Create` again.
    pub fn parse(stdin: &[u8], environment: &StartEnvironment) -> StartInput {
        let mut input = StartInput {
            generation: if environment.knows_json { Generation::Json } else { Generation::Plain },
            options: None,
            debug: environment.debug,
            ttrpc_address: environment.ttrpc_address.clone().unwrap_or_default(),
            grpc_address: environment.grpc_address.clone(),
            socket_dir: None,
        };
        if stdin.is_empty() {
            return input;
        }
        match BootstrapParams::decode(stdin) {
            Ok(params) if is_for(&params, &environment.id) => {
                input.generation = Generation::Bootstrap;
                input.debug |= params.log_level <= LogLevel::Debug as i32;
                if !params.containerd_ttrpc_address.is_empty() {
                    input.ttrpc_address = params.containerd_ttrpc_address;
                }
                if !params.containerd_grpc_address.is_empty() {
                    input.grpc_address = params.containerd_grpc_address;
                }
                input.socket_dir = params.socket_dir.filter(|folder| !folder.is_empty()).map(PathBuf::from);
                input.options = options_extension(params.extensions);
            }
            Ok(_) | Err(_) => {
                input.options = prost_types::Any::decode(stdin)
                    .ok()
                    .filter(|any| !any.type_url.is_empty())
                    .map(|any| Any { type_url: any.type_url, value: any.value });
            }
        }
        input
    }

    /// What a daemon writes to the stdin of `start`, in the generation of this input.
    pub fn encode(&self, id: &str, namespace: &str, daemon_version: &str, daemon_binary: &str) -> Vec<u8> {
        let options = self
            .options
            .as_ref()
            .map(|any| prost_types::Any { type_url: any.type_url.clone(), value: any.value.clone() });
        match self.generation {
            Generation::Plain | Generation::Json => {
                options.map(|options| options.encode_to_vec()).unwrap_or_default()
            }
            Generation::Bootstrap => BootstrapParams {
                instance_id: id.to_owned(),
                namespace: namespace.to_owned(),
                log_level: if self.debug { LogLevel::Debug as i32 } else { LogLevel::Info as i32 },
                containerd_version: daemon_version.to_owned(),
                containerd_ttrpc_address: self.ttrpc_address.clone(),
                containerd_grpc_address: self.grpc_address.clone(),
                containerd_binary: daemon_binary.to_owned(),
                extensions: options.map(|options| Extension { value: Some(options) }).into_iter().collect(),
                socket_dir: self.socket_dir.as_ref().map(|folder| folder.display().to_string()),
            }
            .encode_to_vec(),
        }
    }
}

fn is_for(params: &BootstrapParams, id: &str) -> bool {
    let addresses = [&params.containerd_grpc_address, &params.containerd_ttrpc_address];
    !id.is_empty() && params.instance_id == id && addresses.into_iter().any(|address| !address.is_empty())
}

/// The runtime's options among the extensions: those of `runc` if they are there, else the first.
fn options_extension(extensions: Vec<Extension>) -> Option<Any> {
    let mut options: Vec<Any> = extensions
        .into_iter()
        .filter_map(|extension| extension.value)
        .map(|any| Any { type_url: any.type_url, value: any.value })
        .collect();
    let is_runc = |any: &Any| any.type_url.rsplit('/').next() == Some(RUNC_OPTIONS);
    let index = options.iter().position(is_runc).unwrap_or(0);
    (index < options.len()).then(|| options.swap_remove(index))
}

/// Where a shim listens: what `start` prints, and what `bootstrap.json` in the bundle holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartResult {
    /// The version of the task API, 2 or 3.
    #[serde(default)]
    pub version: i32,
    /// Such as `unix:///run/containerd/s/…`.
    #[serde(default)]
    pub address: String,
    /// `ttrpc` (or `grpc`, of foreign shims).
    #[serde(default)]
    pub protocol: String,
}

/// An answer of `start` that names no shim.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartResultError {
    /// It printed nothing.
    #[error("shim printed no address")]
    Empty,
    /// Neither protobuf nor JSON, nor an address.
    #[error("shim printed {text:?} instead of an address")]
    Garbage {
        /// The start of what it printed.
        text: String,
    },
    /// It speaks a later task API.
    #[error("unsupported shim version ({version}): not implemented")]
    Version {
        /// The version that it claims.
        version: i32,
    },
}

impl Coded for StartResultError {
    fn code(&self) -> ErrorCode {
        match self {
            StartResultError::Empty | StartResultError::Garbage { .. } => ErrorCode::Unknown,
            StartResultError::Version { .. } => ErrorCode::Unimplemented,
        }
    }
}

impl StartResult {
    /// The result of a ttrpc shim at `address` for a daemon of this generation, with the version to claim.
    pub fn for_generation(generation: Generation, address: String) -> StartResult {
        let version = match generation {
            // 1.7 refuses a version above 2, and cannot be told from 2.0 to 2.2, which accept it.
            Generation::Plain | Generation::Json => VERSION_2,
            Generation::Bootstrap => VERSION_3,
        };
        StartResult { version, address, protocol: PROTOCOL_TTRPC.to_owned() }
    }

    /// The bytes that a shim prints for a daemon of this generation.
    pub fn print(&self, generation: Generation) -> Vec<u8> {
        match generation {
            Generation::Plain => self.address.clone().into_bytes(),
            Generation::Json => self.to_json(),
            Generation::Bootstrap => BootstrapResult {
                version: self.version,
                address: self.address.clone(),
                protocol: self.protocol.clone(),
                ..BootstrapResult::default()
            }
            .encode_to_vec(),
        }
    }

    /// The JSON form, that of `bootstrap.json`.
    pub fn to_json(&self) -> Vec<u8> {
        // A struct of a number and two strings has no way to fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads what a shim printed, in the order in which containerd 2.3 tries: protobuf, JSON, bare address.
    /// Also reads `bootstrap.json` and the `address` file of a bundle.
    ///
    /// # Errors
    /// [`StartResultError`].
    pub fn parse(printed: &[u8]) -> Result<StartResult, StartResultError> {
        let result = parse_form(printed)?;
        if result.version > VERSION_3 {
            return Err(StartResultError::Version { version: result.version });
        }
        Ok(result)
    }
}

fn parse_form(printed: &[u8]) -> Result<StartResult, StartResultError> {
    // Text never decodes: `{` and `u` begin fields of types that such text cannot go on with.
    if let Ok(result) = BootstrapResult::decode(printed)
        && !result.address.is_empty()
    {
        let protocol = if result.protocol.is_empty() { PROTOCOL_TTRPC.to_owned() } else { result.protocol };
        return Ok(StartResult { version: result.version.max(VERSION_2), address: result.address, protocol });
    }
    let trimmed = printed.trim_ascii();
    if trimmed.is_empty() {
        return Err(StartResultError::Empty);
    }
    if let Ok(mut result) = serde_json::from_slice::<StartResult>(trimmed)
        && result.version >= VERSION_2
        && !result.address.is_empty()
    {
        if result.protocol.is_empty() {
            PROTOCOL_TTRPC.clone_into(&mut result.protocol);
        }
        return Ok(result);
    }
    match std::str::from_utf8(trimmed) {
        Ok(address) if address.contains("://") && !address.contains(char::is_whitespace) => Ok(StartResult {
            version: VERSION_2,
            address: address.to_owned(),
            protocol: PROTOCOL_TTRPC.to_owned(),
        }),
        Ok(_) | Err(_) => {
            let text = String::from_utf8_lossy(trimmed).chars().take(1000).collect();
            Err(StartResultError::Garbage { text })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn environment() -> StartEnvironment {
        StartEnvironment {
            id: "box".to_owned(),
            grpc_address: "/run/c.sock".to_owned(),
            debug: false,
            ttrpc_address: Some("/run/c.sock.ttrpc".to_owned()),
            knows_json: true,
        }
    }

    fn options() -> Any {
        Any { type_url: RUNC_OPTIONS.to_owned(), value: vec![0x32, 4, b'c', b'r', b'u', b'n'] }
    }

    #[test]
    fn each_generation_is_told_apart() {
        for generation in [Generation::Plain, Generation::Json, Generation::Bootstrap] {
            for options in [None, Some(options())] {
                let mut environment = environment();
                environment.knows_json = generation != Generation::Plain;
                let sent = StartInput {
                    generation,
                    options,
                    debug: generation == Generation::Bootstrap,
                    ttrpc_address: "/run/c.sock.ttrpc".to_owned(),
                    grpc_address: "/run/c.sock".to_owned(),
                    socket_dir: (generation == Generation::Bootstrap).then(|| PathBuf::from("/run/x/s")),
                };
                let bytes = sent.encode("box", "default", "2.3.4", "/usr/bin/davitd");
                assert_eq!(StartInput::parse(&bytes, &environment), sent);
            }
        }
    }

    #[test]
    fn bootstrap_of_another_id_is_not_believed() {
        let input = StartInput {
            generation: Generation::Bootstrap,
            options: None,
            debug: false,
            ttrpc_address: "/other".to_owned(),
            grpc_address: "/other".to_owned(),
            socket_dir: None,
        };
        let bytes = input.encode("other", "default", "", "");
        let parsed = StartInput::parse(&bytes, &environment());
        assert_eq!(parsed.generation, Generation::Json);
        assert_eq!(parsed.grpc_address, "/run/c.sock");
    }

    #[test]
    fn options_of_a_container_with_the_name_of_their_type_stay_options() {
        let mut environment = environment();
        environment.id = RUNC_OPTIONS.to_owned();
        // The options are text too, so that the bytes are well formed as either message.
        let options = Any { value: b"2\x04crun".to_vec(), ..options() };
        let sent = StartInput {
            generation: Generation::Json,
            options: Some(options),
            debug: false,
            ttrpc_address: "/run/c.sock.ttrpc".to_owned(),
            grpc_address: "/run/c.sock".to_owned(),
            socket_dir: None,
        };
        let bytes = sent.encode(RUNC_OPTIONS, "default", "1.7.0", "/usr/bin/containerd");
        assert_eq!(BootstrapParams::decode(bytes.as_slice()).unwrap().instance_id, RUNC_OPTIONS);
        assert_eq!(StartInput::parse(&bytes, &environment), sent);
    }

    #[test]
    fn a_result_is_read_in_every_form() {
        for generation in [Generation::Plain, Generation::Json, Generation::Bootstrap] {
            let result = StartResult::for_generation(generation, "unix:///run/containerd/s/ab".to_owned());
            assert_eq!(StartResult::parse(&result.print(generation)).unwrap(), result);
            assert_eq!(StartResult::parse(&result.to_json()).unwrap(), result);
        }
        let plain = StartResult::parse(b"unix:///run/containerd/s/ab\n").unwrap();
        assert_eq!((plain.version, plain.protocol.as_str()), (2, "ttrpc"));
    }

    #[test]
    fn what_is_no_result_is_refused() {
        assert_eq!(StartResult::parse(b" \n"), Err(StartResultError::Empty));
        assert_eq!(
            StartResult::parse(br#"{"version":4,"address":"unix:///x","protocol":"ttrpc"}"#),
            Err(StartResultError::Version { version: 4 })
        );
        for garbage in [
            &b"panic: something"[..],
            b"{}",
            b"{\"version\":1,\"address\":\"x\"}",
            b"\xff\xfe",
            b"warning\nunix:///x",
        ] {
            assert!(
                matches!(StartResult::parse(garbage), Err(StartResultError::Garbage { .. })),
                "{garbage:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn noise_is_harmless(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = StartResult::parse(&bytes);
            let _ = StartInput::parse(&bytes, &environment());
        }
    }
}
