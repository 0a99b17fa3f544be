//! Checkpoints: what the client asks for, as arguments of the runtime, which leaves the work to criu.

use std::ffi::OsStr;

use davit_proto::any;
use davit_proto::containerd::runc::v1::CheckpointOptions;
use davit_proto::containerd::task::v3::CheckpointTaskRequest;

use crate::error::TaskError;
use crate::runtime::Runtime;

/// Writes a checkpoint of a container to `request.path`.
pub(crate) async fn run(
    runtime: &Runtime,
    id: &str,
    request: &CheckpointTaskRequest,
) -> Result<(), TaskError> {
    let options = match &request.options {
        Some(options) => any::unpack::<CheckpointOptions>(options)
            .map_err(|source| TaskError::Decode { what: "checkpoint options", source })?
            .ok_or_else(|| TaskError::OptionsType { type_url: options.type_url.clone() })?,
        None => CheckpointOptions::default(),
    };
    let given = !options.work_path.is_empty();
    let work =
        if given { options.work_path.clone() } else { format!("{}/criu-work", runtime.bundle.display()) };
    let arguments = arguments(&options, &request.path, &work, id);
    let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    let result = runtime.simple("checkpoint failed", &arguments).await;
    if !given {
        // The log of a failure is worth more than the rest of the folder.
        let log = runtime.bundle.join("criu-dump.log");
        if result.is_err() {
            let _ = std::fs::copy(std::path::Path::new(&work).join("dump.log"), log);
        }
        let _ = std::fs::remove_dir_all(&work);
    }
    Ok(result?)
}

fn arguments(options: &CheckpointOptions, path: &str, work: &str, id: &str) -> Vec<String> {
    let mut arguments = ["checkpoint", "--image-path", path, "--work-path", work].map(str::to_owned).to_vec();
    let flags = [
        (!options.exit, "--leave-running"),
        (options.open_tcp, "--tcp-established"),
        (options.external_unix_sockets, "--ext-unix-sk"),
        (options.terminal, "--shell-job"),
        (options.file_locks, "--file-locks"),
    ];
    arguments.extend(flags.into_iter().filter(|(wanted, _)| *wanted).map(|(_, flag)| flag.to_owned()));
    for namespace in &options.empty_namespaces {
        arguments.extend(["--empty-ns".to_owned(), namespace.clone()]);
    }
    arguments.push(id.to_owned());
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_flags() {
        let options = CheckpointOptions {
            exit: true,
            open_tcp: true,
            empty_namespaces: vec!["network".into()],
            ..CheckpointOptions::default()
        };
        assert_eq!(
            arguments(&options, "/image", "/work", "box").join(" "),
            "checkpoint --image-path /image --work-path /work --tcp-established --empty-ns network box"
        );
        let line = arguments(&CheckpointOptions::default(), "/i", "/w", "box").join(" ");
        assert_eq!(line, "checkpoint --image-path /i --work-path /w --leave-running box");
    }
}
