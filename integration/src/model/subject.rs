//! The daemons that a model can be compared with: ours and containerd, each in a folder of its own, with a collector that
//! runs when it is asked to and at no other time.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tonic::{Code, Status};

use super::Subject;
use super::call::Call;
use super::rule::Rule;
use crate::Daemon;
use crate::peer::Containerd;

/// Ours: no collection but those that are asked for. (After one the next rests a day, so small is the share of time.)
const QUIET: &str = "
[log]
level = \"info\"
[metadata.gc]
pause_threshold = 1e-9
mutation_threshold = 0
startup_delay_ms = 86400000
";

/// The same for containerd.
const QUIET_PEER: &str = "
[plugins.\"io.containerd.gc.v1.scheduler\"]
pause_threshold = 0.000000001
mutation_threshold = 0
startup_delay = \"24h\"
";

/// The words at the end of an error's text that name its class.
const WORDS: [(Code, &str); 7] = [
    (Code::NotFound, "not found"),
    (Code::AlreadyExists, "already exists"),
    (Code::InvalidArgument, "invalid argument"),
    (Code::FailedPrecondition, "failed precondition"),
    (Code::Unimplemented, "not implemented"),
    (Code::Unavailable, "unavailable"),
    (Code::OutOfRange, "out of range"),
];

/// Starts ours.
///
/// # Errors
/// It does not start.
pub fn ours() -> Result<Daemon> {
    Daemon::start_with(&[], QUIET)
}

/// Starts containerd.
///
/// # Errors
/// It does not start.
pub fn peer() -> Result<Containerd> {
    Containerd::start_with(QUIET_PEER)
}

impl Subject for Daemon {
    fn address(&self) -> PathBuf {
        self.address()
    }

    fn kill(&mut self) -> Result<()> {
        self.stop(Signal::SIGKILL)?;
        self.restart()
    }

    fn serves(&self, _: &Call) -> bool {
        true
    }

    fn sweeps_all(&self) -> bool {
        true
    }

    fn words(&self, status: &Status) -> bool {
        // Docker Engine looks for these in the text.
        match status.code() {
            Code::NotFound | Code::AlreadyExists => {
                WORDS.iter().any(|(code, words)| *code == status.code() && status.message().ends_with(words))
            }
            _ => !status.message().is_empty(),
        }
    }

    fn blobs(&self) -> Result<BTreeSet<String>> {
        blobs(&self.path("root"))
    }

    fn ingests(&self) -> Result<usize> {
        entries(&self.path("root").join(CONTENT).join("ingest"))
    }

    fn views_have_folders(&self, _: &str) -> bool {
        false
    }

    fn snapshots(&self, snapshotter: &str) -> Result<usize> {
        entries(&snapshots(&self.path("root"), snapshotter))
    }
}

impl Subject for Containerd {
    fn address(&self) -> PathBuf {
        self.address()
    }

    fn kill(&mut self) -> Result<()> {
        self.restart()
    }

    fn serves(&self, call: &Call) -> bool {
        // Since 1.7.
        !call.method().starts_with("Store.") || self.version() >= (1, 7)
    }

    fn code(&self, status: &Status) -> Code {
        // Some errors it forgets to convert; their class is in their words.
        let ends = |(_, words): &&(Code, &str)| status.message().ends_with(words);
        match status.code() {
            // The commit of a view of `native`: it looks for its folder before it looks at its kind.
            Code::Unknown if status.message().starts_with("lstat ") => Code::FailedPrecondition,
            Code::Unknown => WORDS.iter().find(ends).map_or(Code::Unknown, |(code, _)| *code),
            code => code,
        }
    }

    fn sweeps_all(&self) -> bool {
        false
    }

    fn words(&self, _: &Status) -> bool {
        true
    }

    fn blobs(&self) -> Result<BTreeSet<String>> {
        blobs(&self.folder().join("root"))
    }

    fn ingests(&self) -> Result<usize> {
        entries(&self.folder().join("root").join(CONTENT).join("ingest"))
    }

    fn views_have_folders(&self, snapshotter: &str) -> bool {
        snapshotter == "overlayfs"
    }

    fn snapshots(&self, snapshotter: &str) -> Result<usize> {
        entries(&snapshots(&self.folder().join("root"), snapshotter))
    }
}

impl Containerd {
    /// The rules that this version does not have, or not yet.
    pub fn unknown_rules(&self) -> Vec<Rule> {
        let mut rules = OTHERWISE.to_vec();
        let since = [
            ((1, 7), &[Rule::SandboxLabelsKeep, Rule::ContainerNamesItsSandbox][..]),
            (
                (2, 0),
                &[
                    Rule::ImageIsDeletedForItsTargetOnly,
                    Rule::LeasesHoldImages,
                    Rule::ExpiringImageIsLeased,
                    Rule::ExpiredImageGoes,
                    Rule::RefImage,
                    Rule::TargetIsLeased,
                ],
            ),
            (
                (2, 2),
                &[
                    Rule::BackRefContent,
                    Rule::BackRefImage,
                    Rule::BackRefSnapshot,
                    Rule::BackRefContainer,
                    Rule::CommitMayRebase,
                ],
            ),
            ((2, 3), &[Rule::Condition]),
        ];
        // It takes a container without a spec, which no task can be made of: its check looks for a null that is not one.
        rules.extend((self.version() >= (1, 7)).then_some(Rule::SpecIsRequired));
        rules.extend(since.iter().filter(|(since, _)| self.version() < *since).flat_map(|(_, rules)| *rules));
        rules
    }
}

/// Where we differ from every containerd, on purpose.
const OTHERWISE: [Rule; 8] = [
    // An ingest that was resumed and has another digest in the end spoils every further attempt.
    Rule::SpoiltIngestGoes,
    // It keeps the size of an ingest only if it is told when the ingest begins.
    Rule::LaterTotalIsKept,
    // An ingest that is begun anew keeps the data from before behind what is written now, or below what is shared.
    Rule::OtherTotalBeginsAnew,
    // A snapshot whose last child was collected can never be removed by a client.
    Rule::CollectionFreesTheParent,
    // What is written to a reference of a deleted namespace can come up again in the next one of that name.
    Rule::NamespaceTakesItsIngests,
    // It keeps the extensions that an update leaves out, although it answers without them.
    Rule::ExtensionsAreReplaced,
    // It takes labels of any length for sandboxes, and for sandboxes alone.
    Rule::SandboxLabelsAreChecked,
    // A Prepare that is refused by the snapshotter, or for its lease, leaves an empty namespace.
    Rule::RefusedCallsLeaveNoNamespace,
];

const CONTENT: &str = "io.containerd.content.v1.content";

fn snapshots(root: &Path, snapshotter: &str) -> PathBuf {
    root.join(format!("io.containerd.snapshotter.v1.{snapshotter}/snapshots"))
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(names),
        entries => entries.with_context(|| folder.display().to_string())?,
    };
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

fn entries(folder: &Path) -> Result<usize> {
    Ok(names(folder)?.len())
}

fn blobs(root: &Path) -> Result<BTreeSet<String>> {
    let names = names(&root.join(CONTENT).join("blobs/sha256"))?;
    Ok(names.into_iter().map(|name| format!("sha256:{name}")).collect())
}
