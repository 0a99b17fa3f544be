//! The commands: each a struct of options and a function of the client, the options and the output.

pub(crate) mod attach;
pub(crate) mod checkpoint;
pub(crate) mod completion;
pub(crate) mod create;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod history;
pub(crate) mod images;
pub(crate) mod info;
pub(crate) mod inspect;
pub(crate) mod kill;
pub(crate) mod load;
pub(crate) mod login;
pub(crate) mod logs;
pub(crate) mod pause;
pub(crate) mod ps;
pub(crate) mod pull;
pub(crate) mod push;
pub(crate) mod reap;
pub(crate) mod rm;
pub(crate) mod rmi;
pub(crate) mod run;
pub(crate) mod save;
pub(crate) mod shim;
pub(crate) mod start;
pub(crate) mod stats;
pub(crate) mod stop;
pub(crate) mod tag;
pub(crate) mod top;
pub(crate) mod version;
pub(crate) mod wait;

use std::io::Write;

use crate::error::{Error, Result};
use crate::format;

/// Runs `work` for each of several names, prints the name of each that succeeded, and goes on after one that failed.
///
/// # Errors
/// The error itself when only one was named; else each is reported at once, and the number comes out.
async fn for_each(
    names: &[String],
    out: &mut dyn Write,
    mut work: impl AsyncFnMut(&str) -> Result<Option<String>>,
) -> Result<()> {
    let mut failed = 0;
    for name in names {
        match work(name).await {
            Ok(Some(text)) => format::line(out, text)?,
            Ok(None) => {}
            Err(error) if names.len() == 1 => return Err(error),
            Err(error) => {
                failed += 1;
                // That nobody can read it leaves the exit code.
                let _ = writeln!(std::io::stderr(), "{}", error.report());
            }
        }
    }
    if failed > 0 { Err(Error::Several { failed, all: names.len() }) } else { Ok(()) }
}
