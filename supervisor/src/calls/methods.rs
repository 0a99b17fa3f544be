//! The methods of the API, by which calls are counted. What a client makes up is not among them, and costs no memory.

use std::collections::HashMap;

/// The services and their methods; `<` marks one whose client sends a stream, `>` one whose server does.
const SERVICES: &[(&str, &[&str])] = &[
    (
        "containerd.services.containers.v1.Containers",
        &["Create", "Delete", "Get", "List", "ListStream>", "Update"],
    ),
    (
        "containerd.services.content.v1.Content",
        &["Abort", "Delete", "Info", "List>", "ListStatuses", "Read>", "Status", "Update", "Write<>"],
    ),
    ("containerd.services.diff.v1.Diff", &["Apply", "Diff"]),
    ("containerd.services.events.v1.Events", &["Forward", "Publish", "Subscribe>"]),
    ("containerd.services.images.v1.Images", &["Create", "Delete", "Get", "List", "Update"]),
    ("containerd.services.introspection.v1.Introspection", &["PluginInfo", "Plugins", "Server"]),
    (
        "containerd.services.leases.v1.Leases",
        &["AddResource", "Create", "Delete", "DeleteResource", "List", "ListResources"],
    ),
    ("containerd.services.mounts.v1.Mounts", &["Activate", "Deactivate", "Info", "List>", "Update"]),
    ("containerd.services.namespaces.v1.Namespaces", &["Create", "Delete", "Get", "List", "Update"]),
    (
        "containerd.services.sandbox.v1.Controller",
        &["Create", "Metrics", "Platform", "Shutdown", "Start", "Status", "Stop", "Update", "Wait"],
    ),
    ("containerd.services.sandbox.v1.Store", &["Create", "Delete", "Get", "List", "Update"]),
    (
        "containerd.services.snapshots.v1.Snapshots",
        &["Cleanup", "Commit", "List>", "Mounts", "Prepare", "Remove", "Stat", "Update", "Usage", "View"],
    ),
    ("containerd.services.streaming.v1.Streaming", &["Stream<>"]),
    (
        "containerd.services.tasks.v1.Tasks",
        &[
            "Checkpoint",
            "CloseIO",
            "Create",
            "Delete",
            "DeleteProcess",
            "Exec",
            "Get",
            "Kill",
            "List",
            "ListPids",
            "Metrics",
            "Pause",
            "ResizePty",
            "Resume",
            "Start",
            "Update",
            "Wait",
        ],
    ),
    ("containerd.services.transfer.v1.Transfer", &["Transfer"]),
    ("containerd.services.version.v1.Version", &["Version"]),
    ("davit.services.events.v1.Events", &["Follow>", "List>"]),
    ("davit.services.shims.v1.Shims", &["List", "Upgrade"]),
    ("grpc.health.v1.Health", &["Check", "List", "Watch>"]),
];

/// One method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Method {
    /// The service with its package.
    pub(crate) service: &'static str,
    /// The method itself.
    pub(crate) name: &'static str,
    /// `unary` and the like, in the words of the clients of Prometheus for gRPC.
    pub(crate) kind: &'static str,
}

/// All methods, in a fixed order.
pub(crate) fn all() -> Vec<Method> {
    let methods = SERVICES.iter().flat_map(|(service, methods)| {
        methods.iter().map(|marked| {
            let name = marked.trim_end_matches(['<', '>']);
            let kind = match &marked[name.len()..] {
                "<>" => "bidi_stream",
                "<" => "client_stream",
                ">" => "server_stream",
                _ => "unary",
            };
            Method { service, name, kind }
        })
    });
    methods.collect()
}

/// The places of methods in the list by the path of their calls, `/package.Service/Method`.
pub(crate) fn by_path(methods: &[Method]) -> HashMap<String, usize> {
    let paths = methods.iter().enumerate();
    paths.map(|(at, method)| (format!("/{}/{}", method.service, method.name), at)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The list says what the `.proto` files say of the services that are served by gRPC.
    #[test]
    fn the_list_is_complete() {
        let mut wire: Vec<String> = Vec::new();
        let mut service = "";
        for line in include_str!("../../../proto/wire.txt").lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words.as_slice() {
                ["service", name] => service = name,
                [name, method, request, response] if *name == service => {
                    let mark = |text: &str, mark| if text.starts_with("stream<") { mark } else { "" };
                    wire.push(format!("{service}/{method}{}{}", mark(request, "<"), mark(response, ">")));
                }
                _ => service = "",
            }
        }
        let served = |name: &str| {
            name.starts_with("davit.services.")
                || name.starts_with("containerd.services.") && !name.contains(".ttrpc.")
        };
        wire.retain(|method| served(method));
        let listed = SERVICES.iter().filter(|(service, _)| served(service));
        let listed =
            listed.flat_map(|(service, methods)| methods.iter().map(move |m| format!("{service}/{m}")));
        let mut listed: Vec<String> = listed.collect();
        wire.sort();
        listed.sort();
        assert_eq!(listed, wire);
    }

    #[test]
    fn methods_are_found_by_their_paths() {
        let methods = all();
        let paths = by_path(&methods);
        let write = methods[paths["/containerd.services.content.v1.Content/Write"]];
        assert_eq!((write.name, write.kind), ("Write", "bidi_stream"));
        assert_eq!(methods[paths["/grpc.health.v1.Health/Watch"]].kind, "server_stream");
        assert!(!paths.contains_key("/x/Y"));
    }
}
