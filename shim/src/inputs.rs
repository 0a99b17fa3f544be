//! What the shim reads from others, as one function of bytes each, for the fuzz targets. A function panics when a promise
//! is broken; what is refused is fine.

use std::path::Component;

use prost::Message;

use crate::spec::{Specification, process_with_terminal};
use crate::state::State;
use crate::stdio::Address;
use crate::{arguments, options};

/// The options of a runtime: from a client, and as they were kept in the bundle by us or by a peer.
pub fn options(data: &[u8]) {
    let any = prost_types::Any { type_url: "containerd.runc.v1.Options".to_owned(), value: data.to_vec() };
    if let Ok(options) = options::from_request(Some(&any)) {
        let kept = options::from_stored(&options::to_stored(&options).expect("strings and numbers"));
        assert_eq!((kept.binary_name, kept.root), (options.binary_name, options.root));
        assert_eq!(kept.systemd_cgroup, options.systemd_cgroup);
    }
    let _ = options::from_stored(data);
    if let Ok(any) = prost_types::Any::decode(data) {
        let _ = options::from_request(Some(&any));
    }
}

/// The address of a stream: the same when it is read again, and no part of a path that is none.
pub fn stream_address(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(address) = Address::parse(text) {
        assert_eq!(Address::parse(text).ok(), Some(address));
    }
}

/// `config.json`, and the process document of an exec, which stays what it was but for its terminal.
pub fn specification(data: &[u8]) {
    if let Ok(specification) = serde_json::from_slice::<Specification>(data) {
        let _ = (specification.group(), specification.shares_pid_namespace());
        if let Some(cgroup) = specification.cgroup() {
            assert!(cgroup.components().all(|part| matches!(part, Component::Normal(_))), "{cgroup:?}");
        }
    }
    if let Ok(document) = process_with_terminal(data, true) {
        let again = process_with_terminal(&document, true).expect("it was an object before");
        assert_eq!(document, again);
    }
}

/// A command line, its words separated by NUL.
pub fn command_line(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = arguments::parse(text.split('\0').map(str::to_owned));
}

/// The state that an upgrade hands on: what is accepted means the same when it is written and read again.
pub fn state(data: &[u8]) {
    let given = State::decode(data).map(|state| state.seal()).unwrap_or_default();
    for bytes in [data, &given] {
        if let Ok(state) = State::open(bytes) {
            assert!(State::open(&state.seal()).is_ok_and(|again| again == state));
        }
    }
}
