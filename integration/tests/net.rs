//! What the daemon serves beside its socket: the API over TCP, pages, and what it checks before it serves at all.

mod certificates;
mod diagnostics;
mod startup;
mod tcp;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use davit_integration::wait;

/// The status and the body of a page on a unix socket.
fn page(socket: &Path, method: &str, target: &str) -> Result<(String, String)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(wait::PATIENCE))?;
    write!(stream, "{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    let status = head.lines().next().and_then(|line| line.strip_prefix("HTTP/1.1 "));
    Ok((status.unwrap_or_default().to_owned(), body.to_owned()))
}
