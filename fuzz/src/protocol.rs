//! What a daemon and a shim say to each other, and the journal that a shim leaves.

use std::fs;

use davit_shim_protocol::bootstrap::{Generation, StartEnvironment, StartInput, StartResult};
use davit_shim_protocol::frame::{self, Decoder, Received};
use davit_shim_protocol::journal::{self as journals, Journal, JournalError, Record};

/// Frames of ttrpc: whatever way the bytes are cut, the frames are the same, and they are those that would be written.
pub fn frame(data: &[u8]) {
    let Some((&cut, stream)) = data.split_first() else { return };
    let whole = decode(stream, stream.len().max(1));
    assert_eq!(whole, decode(stream, usize::from(cut).max(1)), "frames depend on how the bytes arrive");
    let mut written = Vec::new();
    for received in whole {
        let Received::Frame(frame) = received else { return };
        written.extend(
            frame::encode(frame.stream, frame.kind, frame.flags, &frame.payload).expect("it fitted once"),
        );
        if let Ok(request) = frame::decode_request(&frame.payload) {
            let _ = (frame::timeout(&request), frame::metadata(&request, frame::NAMESPACE_KEY));
            let again = frame::encode_request(frame.stream, &request).expect("not longer than what was read");
            assert_eq!(frame::decode_request(&again[frame::HEADER_LENGTH..]), Ok(request));
        }
        let answer = frame::decode_response(&frame.payload);
        let again = frame::encode_response(frame.stream, &answer);
        assert_eq!(frame::decode_response(&again[frame::HEADER_LENGTH..]), answer);
    }
    assert!(stream.starts_with(&written), "frames are not what was read");
}

fn decode(stream: &[u8], step: usize) -> Vec<Received> {
    let mut decoder = Decoder::new();
    let mut found = Vec::new();
    for chunk in stream.chunks(step) {
        decoder.feed(chunk);
        found.extend(std::iter::from_fn(|| decoder.next_frame()));
    }
    found
}

/// What a daemon writes to a shim that starts, and what the shim prints.
pub fn bootstrap(data: &[u8]) {
    let environment = StartEnvironment {
        id: "box".to_owned(),
        grpc_address: "/run/davit/davit.sock".to_owned(),
        debug: false,
        ttrpc_address: Some("/run/davit/davit.sock.ttrpc".to_owned()),
        knows_json: data.first().is_some_and(|byte| byte & 1 == 1),
    };
    let input = StartInput::parse(data, &environment);
    let again = input.encode("box", "default", "2.3.4", "davitd");
    assert_eq!(StartInput::parse(&again, &environment), input);
    if let Ok(result) = StartResult::parse(data) {
        assert_eq!(StartResult::parse(&result.print(Generation::Bootstrap)), Ok(result.clone()));
        assert_eq!(StartResult::parse(&result.to_json()), Ok(result));
    }
}

/// A journal with anything in it: opening it repairs its end and nothing else, and what is appended is read again.
pub fn journal(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let path = folder.path().join(journals::FILE_NAME);
    // Noise hardly ever begins with the right header.
    let (kind, rest) = data.split_first().map_or((0, data), |(kind, rest)| (*kind, rest));
    let mut bytes = if kind & 1 == 1 { b"DAVITJ\x01\0".to_vec() } else { Vec::new() };
    bytes.extend_from_slice(rest);
    fs::write(&path, &bytes).expect("a file in an own folder");
    let seen = journals::read(&path);
    let opened = Journal::open(&path);
    let (Ok(seen), Ok((mut journal, contents))) = (&seen, opened) else {
        assert!(matches!(seen, Err(JournalError::Magic { .. } | JournalError::Version { .. })), "{seen:?}");
        assert_eq!(fs::read(&path).expect("the file"), bytes, "a refused file is left alone");
        return;
    };
    assert_eq!(*seen, contents);
    let forgotten = Record::Forgotten("an id that noise does not make".to_owned());
    let sent = Record::Sent(u64::MAX);
    journal.append(&[forgotten, sent]).expect("there is space");
    let after = journals::read(&path).expect("it was a journal before");
    assert!(!after.torn, "the end was repaired");
    assert_eq!((after.exits, after.last_sequence), (contents.exits, contents.last_sequence));
}
