//! `davit version`.

use std::io::Write;

use crate::client::Client;
use crate::error::{CallContext, Result};
use crate::format::line;

/// `davit version`: that of the client even when there is no daemon.
pub(crate) async fn run(client: Result<Client>, out: &mut dyn Write) -> Result<()> {
    line(out, "Client:")?;
    line(out, format!(" Version:    {}", env!("CARGO_PKG_VERSION")))?;
    line(out, format!(" OS/Arch:    linux/{}", std::env::consts::ARCH))?;
    let version = client?.version().version(()).await.call("ask for the daemon's version")?;
    line(out, "Server:")?;
    line(out, format!(" Version:    {}", version.version))?;
    line(out, format!(" Revision:   {}", version.revision))
}
