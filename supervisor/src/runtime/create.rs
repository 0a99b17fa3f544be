//! The job of creating a task: bundle, shim, container. It runs to its end whether or not anyone waits for
//! it, and a failure at any step leaves nothing.

use std::path::{Path, PathBuf};

use davit_model::{Any, Coded, ErrorCode, error::chain};
use davit_shim_protocol::address;
use davit_shim_protocol::bootstrap::{PROTOCOL_TTRPC, RUNC_OPTIONS, StartResult, VERSION_3};
use davit_shim_protocol::bundle::BundleError;
use davit_snapshotter::layer;
use tracing::{Instrument, debug, info, warn};

use super::checkpoint::{Checkpoint, ROOTFS_DIFF};
use super::log::Log;
use super::owner::{Context, Message};
use super::shim::Shim;
use super::task::CreateOptions;
use super::transitions::Phase;
use super::{Error, ShimError, binary, load, owner, teardown};
use crate::lane::Lane;

/// What has been made and must be undone on failure.
#[derive(Default)]
struct Made {
    /// The binary was run: a shim may be there even if nothing is known of it.
    started: bool,
    shim: Option<Shim>,
    /// The shim is that of the sandbox, and stays.
    joined: bool,
}

/// Runs the job and reports.
pub(super) async fn run(context: Context, binary: PathBuf, options: CreateOptions) {
    let result = create(&context, &binary, options).await;
    context.report(Message::Created(result)).await;
}

async fn create(context: &Context, binary: &Path, mut options: CreateOptions) -> Result<(Shim, u32), Error> {
    let bundle_error = |source| Error::Bundle { id: context.id().to_owned(), source };
    let (bundle, spec, remembered) = (context.bundle.clone(), options.spec.take(), binary.to_owned());
    let checkpoint = options.checkpoint.clone();
    blocking(&context.shared.lane, move || {
        bundle.create(spec.as_ref().map(|spec| spec.value.as_slice()))?;
        // From here on a daemon that finds the bundle can clean up.
        let written = bundle.write_binary(&remembered).and_then(|()| match checkpoint {
            Checkpoint::Unpacked(folder) => bundle.take_checkpoint(folder.path()),
            Checkpoint::None | Checkpoint::Folder(_) | Checkpoint::FolderAndRootfs(_) => Ok(()),
        });
        written.inspect_err(|_| {
            // The first error is the one to tell.
            let _ = bundle.delete();
        })
    })
    .await
    .map_err(bundle_error)?;
    let mut made = Made::default();
    match bring_up(context, binary, options, &mut made).await {
        Ok(created) => Ok(created),
        Err(error) => {
            info!(error = chain(&error), "task could not be created");
            undo(context, binary, made).await;
            Err(error)
        }
    }
}

/// Brings the shim up and has it create the container.
///
/// The shim of a group ends with its last container, and at that moment may be the one that a new container was to
/// share. Then the container gets another shim: once, for that one is new.
async fn bring_up(
    context: &Context,
    binary: &Path,
    options: CreateOptions,
    made: &mut Made,
) -> Result<(Shim, u32), Error> {
    let first = try_to_bring_up(context, binary, options.clone(), made).await;
    let Err(error) = &first else { return first };
    if made.joined || !is_of_ending_shim(error) || load::group(context).await.is_none() {
        return first;
    }
    info!(error = chain(error), "the shim of the group has ended meanwhile; starting another");
    if let Some(shim) = made.shim.take() {
        shim.close();
    }
    if matches!(error, Error::ShimGone { .. }) {
        // It may have been killed, with the container half made.
        let _ = binary::delete(&context.shared.config, &context.bundle, binary).await;
    }
    try_to_bring_up(context, binary, options, made).await
}

/// Whether a creation may have failed because the shim was about to end.
fn is_of_ending_shim(error: &Error) -> bool {
    matches!(
        error,
        Error::StartShim { source: ShimError::Connect { .. } }
            | Error::ShimGone { .. }
            | Error::Create { code: ErrorCode::Unavailable, .. }
    )
}

async fn try_to_bring_up(
    context: &Context,
    binary: &Path,
    options: CreateOptions,
    made: &mut Made,
) -> Result<(Shim, u32), Error> {
    let config = &context.shared.config;
    let start_error = |source| Error::StartShim { source };
    let given = options.task_options.filter(|any| !any.value.is_empty()).or(options.runtime_options);
    let shim_options =
        with_default_runtime(given, &options.runtime, config.default_runtime_binary.as_deref());
    let log = Log::open(&context.bundle).map_err(start_error)?;
    let told = match existing_shim(
        context,
        &options.sandbox_id,
        &options.task_api_address,
        options.task_api_version,
    )? {
        Some(told) => {
            made.joined = true;
            told
        }
        None => {
            made.started = true;
            binary::start(config, &context.bundle, binary, shim_options.as_ref())
                .await
                .map_err(start_error)?
        }
    };
    debug!(address = told.address, version = told.version, "shim");
    // Before anything is asked of the shim: a daemon that dies from here on finds it again.
    let (bundle, recorded, sandbox) = (context.bundle.clone(), told.clone(), options.sandbox_id.clone());
    let joined = made.joined;
    let record = blocking(&context.shared.lane, move || {
        if joined {
            bundle.write_sandbox(&sandbox)?;
        }
        bundle.write_bootstrap(&recorded)
    });
    let connect = Shim::connect(&context.bundle, &told, joined, &config.timeouts);
    let (recorded, connected) = tokio::join!(record, connect);
    let shim = connected.map_err(start_error)?;
    made.shim = Some(shim.clone());
    recorded.map_err(|source| start_error(ShimError::Record { source }))?;
    let span = owner::span(context.namespace(), context.id());
    tokio::spawn(log.follow(shim.closed()).instrument(span));
    let images = match &options.checkpoint {
        Checkpoint::None => String::new(),
        Checkpoint::Folder(path) | Checkpoint::FolderAndRootfs(path) => path.display().to_string(),
        Checkpoint::Unpacked(_) => context.bundle.checkpoint().display().to_string(),
    };
    let mut pid = shim
        .create(
            config.timeouts.create,
            context.bundle.path(),
            options.rootfs,
            options.stdio,
            images,
            shim_options,
        )
        .await
        .map_err(|error| match error {
            Error::Shim { code, message } => Error::Create { code, message },
            other => other,
        })?;
    if let Checkpoint::FolderAndRootfs(path) = &options.checkpoint {
        apply_rootfs_diff(context, path).await?;
        pid = shim.start("").await?;
    }
    Ok((shim, pid))
}

/// Puts what the container had written at its checkpoint into the root filesystem that the shim has mounted, if that lies
/// beside the images.
async fn apply_rootfs_diff(context: &Context, images: &Path) -> Result<(), Error> {
    let path = images.parent().unwrap_or(images).join(ROOTFS_DIFF);
    let rootfs = context.bundle.path().join("rootfs");
    let (archive, lane) = (path.clone(), &context.shared.lane);
    let apply = move || match std::fs::File::open(&archive) {
        Ok(archive) => layer::apply_to_folder(archive, &rootfs).map(drop),
        Err(error) => {
            debug!(%error, path = %archive.display(), "no changes of the root filesystem");
            Ok(())
        }
    };
    match lane.run(apply).await {
        Ok(applied) => applied.map_err(|source| Error::RootfsDiff { path, source }),
        Err(_) => Err(Error::Stopping),
    }
}

/// The shim that the container is to join instead of getting its own: the one that a sandbox controller
/// named, or that of its sandbox if it is one that can hold several.
fn existing_shim(
    context: &Context,
    sandbox_id: &str,
    address: &str,
    version: u32,
) -> Result<Option<StartResult>, Error> {
    if !address.is_empty() {
        let wrong = || Error::TaskApiAddress { address: address.to_owned() };
        let (protocol, rest) = address.split_once('+').ok_or_else(wrong)?;
        address::parse(rest).map_err(|_| wrong())?;
        if protocol != PROTOCOL_TTRPC {
            return Err(wrong());
        }
        let version = i32::try_from(version).unwrap_or(VERSION_3);
        return Ok(Some(StartResult { version, address: rest.to_owned(), protocol: protocol.to_owned() }));
    }
    if sandbox_id.is_empty() {
        return Ok(None);
    }
    let sandbox = context.shared.get(context.namespace(), sandbox_id);
    let view = sandbox.map(|task| task.view.borrow().clone()).filter(|view| view.phase == Phase::Live);
    let told = view.and_then(|view| view.shim).map(|shim| shim.bootstrap());
    let told = told.or_else(|| context.shared.sandboxes.bootstrap(context.namespace(), sandbox_id));
    // A shim of version 2 is asked by running its binary: only that knows whether it groups.
    Ok(told.filter(|told| told.version >= VERSION_3))
}

/// Adds the configured OCI runtime to options that name none. Protobuf merges what is appended, so nothing
/// else of the options is touched.
fn with_default_runtime(options: Option<Any>, runtime: &str, default: Option<&str>) -> Option<Any> {
    use davit_proto::containerd::runc::v1::Options;
    use prost::Message as _;

    let Some(default) = default else { return options };
    let runc = matches!(runtime, "io.containerd.runc.v2" | "io.containerd.davit.v2");
    let mut options = match options {
        Some(options) if options.type_url.rsplit('/').next() == Some(RUNC_OPTIONS) => options,
        Some(other) => return Some(other),
        None if runc => Any { type_url: RUNC_OPTIONS.to_owned(), value: Vec::new() },
        None => return None,
    };
    match Options::decode(options.value.as_slice()) {
        Ok(given) if given.binary_name.is_empty() => {
            let addition = Options { binary_name: default.to_owned(), ..Options::default() };
            options.value.extend_from_slice(&addition.encode_to_vec());
        }
        // What cannot be read is the shim's to refuse.
        Ok(_) | Err(_) => {}
    }
    Some(options)
}

/// Takes back what a failed creation has made.
async fn undo(context: &Context, binary: &Path, made: Made) {
    let timeouts = &context.shared.config.timeouts;
    let mut shim = made.shim;
    if shim.is_none() && made.started {
        // The binary failed or said nothing that makes sense, but may have left a shim where one would be.
        shim = load::find_unannounced(context).await;
    }
    if shim.is_none() && made.started {
        teardown::kill_lost_shim(context, binary).await;
    }
    // Until the shim has said itself that it holds nothing of the container, its binary is asked to make
    // sure.
    let mut clean = !made.started;
    if let Some(shim) = &shim {
        clean = match shim.delete_within(timeouts.cleanup, "").await {
            Ok(_) => true,
            Err(error) => error.code() == ErrorCode::NotFound,
        };
        // One that does not say that it holds nothing may be at work on the container still, and then it does not end.
        if !made.joined && (!teardown::end_shim(context, shim).await || !clean) {
            teardown::kill_shim(context, binary, shim).await;
        }
        shim.close();
    }
    if !clean {
        match binary::delete(&context.shared.config, &context.bundle, binary).await {
            Ok(_) => {}
            Err(error) => debug!(error = chain(&error), "shim delete after a failed create"),
        }
    }
    if !made.joined {
        teardown::remove_socket(context).await;
    }
    let bundle = context.bundle.clone();
    if let Err(error) = blocking(&context.shared.lane, move || bundle.delete()).await {
        warn!(error = chain(&error), "cannot delete the bundle of a task that could not be created");
    }
}

/// Runs work that may block in the lane of the runtime.
pub(super) async fn blocking<T: Send + 'static>(
    lane: &Lane,
    work: impl FnOnce() -> Result<T, BundleError> + Send + 'static,
) -> Result<T, BundleError> {
    match lane.run(work).await {
        Ok(result) => result,
        Err(error) => Err(BundleError::Io {
            operation: "work on",
            path: PathBuf::from("bundle"),
            source: std::io::Error::other(error),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use davit_proto::containerd::runc::v1::Options;
    use prost::Message as _;

    fn runc_options(options: &Options) -> Any {
        Any { type_url: RUNC_OPTIONS.to_owned(), value: options.encode_to_vec() }
    }

    #[test]
    fn the_default_runtime_fills_a_gap_and_nothing_else() {
        let fill = |options| with_default_runtime(options, "io.containerd.runc.v2", Some("crun"));
        let name = |any: Option<Any>| Options::decode(any.unwrap().value.as_slice()).unwrap().binary_name;
        assert_eq!(name(fill(None)), "crun");
        let chosen = runc_options(&Options { binary_name: "youki".into(), ..Options::default() });
        assert_eq!(fill(Some(chosen.clone())), Some(chosen));
        // A field of a later release stays.
        let mut with_unknown = runc_options(&Options { root: "/r".into(), ..Options::default() });
        with_unknown.value.extend_from_slice(&[0xfa, 0x7, 1, b'x']);
        let filled = fill(Some(with_unknown.clone())).unwrap();
        assert!(filled.value.starts_with(&with_unknown.value));
        assert_eq!(name(Some(filled)), "crun");
        let other = Any { type_url: "runtimeoptions.v1.Options".into(), value: vec![1] };
        assert_eq!(fill(Some(other.clone())), Some(other));
        assert_eq!(with_default_runtime(None, "io.containerd.kata.v2", Some("crun")), None);
        assert_eq!(with_default_runtime(None, "io.containerd.runc.v2", None), None);
    }
}
