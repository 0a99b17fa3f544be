//! Clients of other makes: what they put on the wire that ours does not.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use davit_integration::daemon::ok;
use davit_integration::{Daemon, wait};

use crate::root;

const METHOD: &str = "/containerd.services.version.v1.Version/Version";

/// A frame of HTTP/2 (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The headers of a call, as literals that are put into the dynamic table (RFC 7541, section 6.2.1).
fn headers(authority: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86]; // POST, http
    let mut literal = |index: &[u8], value: &str| {
        block.extend(index);
        // Shorter than 127 bytes, so that one byte holds the length.
        block.push(value.len() as u8);
        block.extend(value.as_bytes());
    };
    literal(&[0x41], authority);
    literal(&[0x44], METHOD);
    literal(b"\x40\x02te", "trailers");
    literal(&[0x5f], "application/grpc");
    block
}

/// One call of Version for each block of headers, on one connection; what each was answered.
fn calls(socket: &Path, blocks: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(wait::PATIENCE))?;
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    sent.extend(frame(0x4, 0, 0, b""));
    stream.write_all(&sent)?;
    let mut answers = Vec::new();
    for (at, block) in blocks.iter().enumerate() {
        let id = 2 * at as u32 + 1;
        stream.write_all(&[frame(0x1, 0x4, id, block), frame(0x0, 0x1, id, &[0; 5])].concat())?;
        answers.push(answer(&mut stream, id)?);
    }
    Ok(answers)
}

/// The data of a stream up to its end.
fn answer(stream: &mut UnixStream, id: u32) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    loop {
        let mut header = [0; 9];
        stream.read_exact(&mut header).context("the daemon closed the connection")?;
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        let (kind, flags) = (header[3], header[4]);
        let of = u32::from_be_bytes(header[5..9].try_into()?);
        let mut payload = vec![0; length as usize];
        stream.read_exact(&mut payload)?;
        match kind {
            0x4 if flags == 0 => stream.write_all(&frame(0x4, 0x1, 0, b""))?,
            0x0 if of == id => data.extend(payload),
            0x3 | 0x7 => bail!("frame {kind:#x} with {payload:?}"),
            _ => {}
        }
        if matches!(kind, 0x0 | 0x1) && of == id && flags & 0x1 != 0 {
            return Ok(data);
        }
    }
}

#[test]
fn a_call_may_have_any_authority() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let path = daemon.address().display().to_string();
    let encoded = path.trim_start_matches('/').replace('/', "%2F");
    let refers = |authority: &str| {
        let mut block = headers(authority);
        // Everything from the dynamic table, newest first: the same call once more.
        block.truncate(2);
        block.extend([0xc1, 0xc0, 0xbf, 0xbe]);
        block
    };
    for authority in ["localhost", "", "davit.sock:0", &path, &encoded, "a b\"<>|\u{e4}"] {
        // An empty one is what h2 still refuses; no client is known that sends it.
        let outcome = calls(
            &daemon.address(),
            &[headers(authority), headers(authority), refers(authority), headers("localhost")],
        );
        if authority.is_empty() {
            ensure!(outcome.is_err());
            continue;
        }
        for answer in outcome.with_context(|| format!("authority {authority:?}"))? {
            ensure!(String::from_utf8_lossy(&answer).contains("davit"), "{authority:?}: {answer:?}");
        }
    }
    Ok(())
}

/// gRPC's own library for Python, which speaks through the C core that many languages share.
const PYTHON: &str = r#"
import sys, grpc
socket, namespace = sys.argv[1:]
for options in [], [("grpc.default_authority", socket)]:
    with grpc.insecure_channel("unix:" + socket, options=options) as channel:
        call = channel.unary_unary("/containerd.services.version.v1.Version/Version")
        assert b"davit" in call(b"", timeout=30)
        headers = [("containerd-namespace", namespace)]
        # A message of 100 kB, and a stream in each direction.
        create = channel.unary_unary("/containerd.services.leases.v1.Leases/Create")
        write = channel.stream_stream("/containerd.services.content.v1.Content/Write")
        blob = b"x" * 100000
        # ref = 1, data = 5... of WriteContentRequest: action 1, ref 2, data 6.
        request = b"\x08\x01" + b"\x12\x03ref" + b"\x32\xa0\x8d\x06" + blob
        answers = list(write(iter([request]), timeout=30, metadata=headers))
        assert answers, "no answer"
        abort = channel.unary_unary("/containerd.services.content.v1.Content/Abort")
        abort(b"\x0a\x03ref", timeout=30, metadata=headers)
print(grpc.__version__)
"#;

#[test]
fn grpcs_c_core_is_served() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let with_grpc = |python: &&str| {
        let import = Command::new(python).args(["-c", "import grpc"]).output();
        import.is_ok_and(|output| output.status.success())
    };
    let chosen = std::env::var("DAVIT_PYTHON").unwrap_or_else(|_| "python3".into());
    let Some(python) = [chosen.as_str(), "/usr/bin/python3"].into_iter().find(with_grpc) else {
        eprintln!("skipped: no python3 has the package grpc (Debian: python3-grpcio)");
        return Ok(());
    };
    let daemon = Daemon::start()?;
    let script =
        Command::new(python).args(["-c", PYTHON]).arg(daemon.address()).arg(daemon.namespace()).output()?;
    let version = ok(script)?;
    eprintln!("grpcio {}", version.trim());
    Ok(())
}
