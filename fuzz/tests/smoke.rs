//! Every target for a while with a stable compiler and without a fuzzing engine: seeds that are well formed, and
//! mutations of them by a generator that always begins with the same number.
//!
//! `DAVIT_FUZZ_SECONDS` sets how long each target runs.

use std::time::{Duration, Instant};

use davit_fuzz::{TARGETS, Target};
use davit_history::{Entry, Kind};
use davit_shim_protocol::bootstrap::{Generation, StartInput, StartResult};
use davit_shim_protocol::frame;
use davit_shim_protocol::journal::{EventRecord, ExitRecord, Journal, Record};

/// xorshift64*: all that is needed of randomness here.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Numbers at which lengths and types change their meaning.
const INTERESTING: [u8; 10] = [0, 1, 0x20, 0x2f, 0x39, 0x3a, 0x7f, 0x80, 0xfe, 0xff];

fn mutate(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut data = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(6) {
        let place = random.below(data.len() + 1);
        match random.below(6) {
            0 => data.insert(place, random.next() as u8),
            1 if place < data.len() => drop(data.remove(place)),
            2 if place < data.len() => data[place] ^= 1 << random.below(8),
            3 if place < data.len() => data[place] = INTERESTING[random.below(INTERESTING.len())],
            4 => data.truncate(place),
            _ => {
                let other = &seeds[random.below(seeds.len())];
                let end = (place + random.below(64)).min(data.len());
                let (from, length) = (random.below(other.len()), random.below(64));
                let piece = other.iter().skip(from).take(length).copied().collect::<Vec<_>>();
                data.splice(place..end, piece);
            }
        }
    }
    data.truncate(16 * 1024);
    data
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let texts = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    match target {
        "frame" => {
            let request =
                frame::request("s", "m", b"p".to_vec(), Some(Duration::from_secs(1)), &[("k", "v")]);
            let mut bytes = vec![3];
            bytes.extend(frame::encode_request(1, &request).expect("short"));
            bytes.extend(frame::encode_response(1, &Ok(b"reply".to_vec())));
            vec![bytes]
        }
        "bootstrap" => {
            let input = StartInput {
                generation: Generation::Bootstrap,
                options: None,
                debug: true,
                ttrpc_address: "/t".to_owned(),
                grpc_address: "/g".to_owned(),
                socket_dir: Some("/s".into()),
            };
            let result =
                StartResult { version: 3, address: "unix:///x".to_owned(), protocol: "ttrpc".to_owned() };
            let printed = [Generation::Plain, Generation::Json, Generation::Bootstrap];
            let mut all = vec![input.encode("box", "default", "2", "davitd")];
            all.extend(printed.map(|generation| result.print(generation)));
            all
        }
        "journal" => {
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("journal");
            let (mut journal, _) = Journal::open(&path).expect("a new file");
            let exit =
                ExitRecord { id: "box".to_owned(), pid: 1, status: 137, seconds: 1, nanos: 2, killed: false };
            let event =
                EventRecord { sequence: 1, topic: "/tasks/exit".to_owned(), ..EventRecord::default() };
            let forgotten = Record::Forgotten("box".to_owned());
            let records = [Record::Exit(exit), Record::Event(event), Record::Sent(1), forgotten];
            journal.append(&records).expect("there is space");
            let mut bytes = vec![0];
            bytes.extend(std::fs::read(&path).expect("the file"));
            vec![bytes, vec![1]]
        }
        "history" => {
            let mut bytes = vec![1];
            for cursor in [7, 9, 500] {
                let kind = if cursor == 9 { Kind::Gap(3) } else { Kind::Event(b"an event".to_vec()) };
                let time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(cursor);
                davit_history::segment::encode(&Entry { cursor, time, kind }, &mut bytes);
            }
            vec![bytes, vec![0]]
        }
        "shim_options" => {
            // Tags and lengths of the fields that are strings and flags (runc v1 options).
            let wire = b"\x08\x01\x1a\x02/g\x32\x04crun\x3a\x02/r\x40\x01".to_vec();
            let mut any = b"\x0a\x1acontainerd.runc.v1.Options\x12".to_vec();
            any.push(wire.len() as u8);
            any.extend_from_slice(&wire);
            let mut all: Vec<Vec<u8>> =
                texts(&[r#"{"binary_name":"crun","root":"/r","systemd_cgroup":true,"x":1}"#]);
            all.extend([wire, any]);
            all
        }
        "shim_stream_address" => texts(&[
            "/a b",
            "fifo:///run/x/0-stdout",
            "file:///var/log/a%20b%2f?x#y",
            "json-file:///l?max-size=1024&max-file=3",
            "binary:///usr/bin/logger?tag=a+b&c=%41&d",
            "binary-v2:///l?k",
        ]),
        "shim_specification" => texts(&[
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"p"},"linux":{"cgroupsPath":"/a/../b","namespaces":[{"type":"pid","path":""}]}}"#,
            r#"{"terminal":true,"args":["a"],"user":{"uid":1e0},"env":null}"#,
        ]),
        "shim_command_line" => texts(&[
            "-namespace\0ns\0-id=box\0--address\0/c.sock\0-debug\0start",
            "-v\0--\0delete",
            "-bundle\0/b\0-debug=false\0delete",
        ]),
        "shim_state" => vec![
            include_bytes!("../../shim/src/state/version1.state").to_vec(),
            include_bytes!("../../shim/src/state/version1.state")[12..].to_vec(),
        ],
        "filter" => {
            texts(&["name==web,labels.\"a b\"~=/x{1,3}\\//", "labels.a!=b", "name~=|(?i)w+|", "a.b.c"])
        }
        "names" => {
            texts(&["docker.io/library/a:t", digest, "linux/arm/v7", "/tasks/exit", "localhost:5000/a/b@x"])
        }
        "documents" => {
            let one = format!(r#"{{"mediaType":"x","digest":"{digest}","size":1}}"#);
            let config = r#"{"os":"linux","config":{"Env":["A=1"],"Cmd":["sh"],"WorkingDir":"/"},"rootfs":{"type":"layers"}}"#;
            let profile = r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}"#;
            texts(&[
                &format!(r#"{{"schemaVersion":2,"manifests":[{one}]}}"#),
                &format!(r#"{{"schemaVersion":2,"config":{one},"layers":[{one}]}}"#),
                config,
                profile,
            ])
        }
        "challenge" => texts(&[
            r#"Bearer realm="https://h/t?a=b",service="s",scope="repository:a/b:pull,push", Basic realm="\"x\"""#,
            "Negotiate abc==, NTLM, Digest a=b , c = d",
        ]),
        "hosts" => texts(&[
            "server = \"https://a\"\n[host.\"http://b:5000/p/../q\"]\ncapabilities = [\"pull\"]\nca = [\"x\"]\n",
            "skip_verify = true\nclient = [[\"a\", \"b\"]]\ndial_timeout = \"1m2s\"\n[header]\na = [\"b\"]\n",
        ]),
        "rootfs" => texts(&[
            "user:wheel\0root:x:0:0:::\nuser:x:7:8:::\n\0wheel:x:9:user\n\0A=1\nB\n# c\n",
            "4294967296",
        ]),
        "image_archive" => {
            let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
            let index = format!(r#"{{"manifests":[{{"mediaType":"x","digest":"{digest}","size":0}}]}}"#);
            let table = br#"[{"Config":"c.json","RepoTags":["a:1"],"Layers":["a/layer.tar","b"]}]"#;
            // Members by the number of their name; 14 is a link to `a/layer.tar`.
            let members = |members: &[(u8, &[u8])]| {
                let mut bytes = vec![1];
                for (name, data) in members {
                    bytes.extend([*name, u8::try_from(data.len()).expect("short")]);
                    bytes.extend(*data);
                }
                bytes
            };
            let mut tar = tar::Builder::new(vec![0]);
            for (name, data) in [("c.json", b"{}".as_slice()), ("manifest.json", br#"[{"Config":"c.json"}]"#)]
            {
                let mut header = tar::Header::new_gnu();
                header.set_size(data.len() as u64);
                tar.append_data(&mut header, name, data).expect("memory");
            }
            vec![
                members(&[(0, layout), (1, index.as_bytes()), (9, b"")]),
                members(&[(3, b"{}"), (4, b"layer"), (14, b"b"), (2, table)]),
                tar.into_inner().expect("memory"),
            ]
        }
        _ => {
            // Entries are made of the very bytes; and one small archive for the target that takes archives.
            let mut header = tar::Header::new_ustar();
            header.set_path("a/b").expect("a plain name");
            header.set_size(3);
            header.set_cksum();
            let mut archive = header.as_bytes().to_vec();
            archive.extend([b'x'; 512]);
            archive.extend([0; 1024]);
            let entries = |salt: u8| (0..96_u8).map(|byte| byte.wrapping_mul(37) ^ salt).collect();
            vec![archive, entries(0), entries(1), entries(90), entries(255)]
        }
    }
}

fn run((name, target): Target) {
    let seconds = std::env::var("DAVIT_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let seeds = seeds(name);
    seeds.iter().for_each(|seed| target(seed));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut runs = 0_u64;
    while Instant::now() < deadline {
        let data = mutate(&mut random, &seeds);
        if std::panic::catch_unwind(|| target(&data)).is_err() {
            panic!("target {name} fails on {data:?}");
        }
        runs += 1;
    }
    println!("{name}: {runs} inputs");
}

#[test]
fn no_target_fails_on_mutated_seeds() {
    // One after the other: a test of a few seconds should not take all of a machine.
    TARGETS.into_iter().for_each(run);
}
