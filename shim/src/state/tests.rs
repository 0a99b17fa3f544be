use super::*;

fn full() -> State {
    let process = |id: &str, pidfd| Process {
        id: id.to_owned(),
        stdout: "/run/out".to_owned(),
        state: ProcessState::Running.into(),
        pid: 42,
        pidfd,
        ..Process::default()
    };
    State {
        descriptors: vec![3, 7, 8, 9],
        listener: 3,
        socket: Some(SocketFile { path: b"/run/containerd/s/ab".to_vec(), device: 1, inode: 2 }),
        upgrades: 5,
        caller: Some(Caller { connection: 0, stream: 11 }),
        before: Some(Program { version: "0.1.0".to_owned(), build: "a".to_owned(), ..Program::default() }),
        journals: vec![Journal {
            file: 7,
            path: "/b/journal".to_owned(),
            length: 300,
            exits: vec![ExitRecord {
                id: "e".to_owned(),
                pid: 43,
                status: 7,
                seconds: 1,
                nanos: 2,
                ..ExitRecord::default()
            }],
            running: vec![StartRecord { id: "box".to_owned(), pid: 42, start_time: 99 }],
        }],
        sequence: 1000,
        queue: vec![Queued { sequence: 1000, journal: 0, offset: 8, event: None }],
        containers: vec![Container {
            id: "box".to_owned(),
            bundle: "/b".to_owned(),
            init: Some(process("box", 8)),
            execs: vec![Process {
                recorded: Some(Ended { status: 7, seconds: 1, nanos: 2 }),
                published: true,
                state: ProcessState::Stopped.into(),
                ..process("e", 0)
            }],
            mounted: true,
            runtime: "runc".to_owned(),
            runtime_root: "/run/containerd/runc/ns".to_owned(),
            cgroup: vec![CgroupFolder {
                controller: "memory".to_owned(),
                path: "/sys/fs/cgroup/memory/box".to_owned(),
            }],
            oom_reported: Some(0),
            ..Container::default()
        }],
        connections: vec![Connection {
            socket: 9,
            partial: vec![0, 0],
            answers: vec![1, 2, 3],
            calls: vec![Call { stream: 9, request: vec![0x0a, 0], left_micros: Some(77) }],
            ..Connection::default()
        }],
        daemon: "/run/davit/davit.sock.ttrpc".to_owned(),
        oom_score_adj: Some(-998),
    }
}

#[test]
fn what_is_sealed_is_opened() {
    assert_eq!(State::open(&full().seal()).unwrap(), full());
    assert_eq!(State::open(&State::default().seal()).unwrap(), State::default());
}

/// Every program from now on has to go on from these bytes, which version 1 wrote. They may be changed as long as no
/// release has that version, and never after.
#[test]
fn the_first_version_stays_readable() {
    let fixture = include_bytes!("version1.state");
    assert_eq!(State::open(fixture).unwrap(), full());
    assert_eq!(&full().seal(), fixture);
}

#[test]
fn a_newer_version_is_refused() {
    let mut bytes = full().seal();
    bytes[6] = 2;
    assert!(matches!(State::open(&bytes), Err(StateError::Version { version: 2 })));
    bytes[6] = 0;
    assert!(matches!(State::open(&bytes), Err(StateError::Version { version: 0 })));
}

#[test]
fn fields_of_newer_programs_do_no_harm() {
    let mut message = full().encode_to_vec();
    // Field 1000, a text.
    prost::encoding::string::encode(1000, &"new".to_owned(), &mut message);
    let mut bytes = full().seal();
    bytes.truncate(HEAD);
    bytes[8..HEAD].copy_from_slice(&crc32c::crc32c(&message).to_le_bytes());
    bytes.extend_from_slice(&message);
    assert_eq!(State::open(&bytes).unwrap(), full());
}

#[test]
fn damage_is_noticed() {
    let sealed = full().seal();
    for length in 0..sealed.len() {
        assert!(State::open(&sealed[..length]).is_err(), "cut to {length}");
    }
    for at in 0..sealed.len() {
        let mut bytes = sealed.clone();
        bytes[at] ^= 0x10;
        assert!(State::open(&bytes).is_err(), "a flipped bit at {at}");
    }
    assert!(matches!(State::open(b"#!/bin/sh\necho"), Err(StateError::Magic)));
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let wrong: [fn(&mut State); 9] = [
        |state| state.descriptors.push(3),
        |state| state.descriptors.push(2),
        |state| state.listener = 4,
        |state| state.journals[0].file = 4,
        |state| state.connections[0].socket = 4,
        |state| state.queue[0].journal = 1,
        |state| state.containers[0].journal = 1,
        |state| state.containers[0].init = None,
        |state| state.caller = Some(Caller { connection: 1, stream: 1 }),
    ];
    for (index, spoil) in wrong.iter().enumerate() {
        let mut state = full();
        spoil(&mut state);
        assert!(matches!(State::open(&state.seal()), Err(StateError::Inconsistent { .. })), "case {index}");
    }
    let mut state = full();
    state.containers[0].execs[0].state = 77;
    assert!(State::open(&state.seal()).is_err(), "a state that only a newer program knows");
    state = full();
    state.containers[0].init.as_mut().unwrap().pidfd = 4;
    assert!(State::open(&state.seal()).is_err());
}
