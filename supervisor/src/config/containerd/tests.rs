use super::*;

fn load(text: &str) -> Result<(Config, Vec<String>), ConfigError> {
    let file: Table = toml::from_str(text).unwrap();
    assert!(is_one(&file), "{text}");
    read(Path::new("/etc/containerd/config.toml"), file)
}

/// What Docker Engine 20.10 writes for the containerd that it starts.
#[test]
fn a_file_without_version_is_understood() {
    let text = r#"
        disabled_plugins = ["cri"]
        oom_score = 0
        root = "/var/lib/docker/containerd/daemon"
        state = "/var/run/docker/containerd/daemon"
        [grpc]
          address = "/var/run/docker/containerd/containerd.sock"
          gid = 5
          max_recv_message_size = 16777216
        [debug]
          address = "/var/run/docker/containerd/containerd-debug.sock"
          level = "warning"
          uid = 0
        [metrics]
          address = ""
          grpc_histogram = false
        [plugins]
          [plugins.linux]
            shim = "containerd-shim"
          [plugins.restart]
            interval = "1m"
    "#;
    let (config, ignored) = load(text).unwrap();
    assert_eq!(config.root, Path::new("/var/lib/docker/containerd/daemon"));
    assert_eq!(config.grpc.address, Path::new("/var/run/docker/containerd/containerd.sock"));
    assert_eq!((config.grpc.uid, config.grpc.gid), (0, 5));
    assert_eq!((config.log.level.as_str(), config.restart.interval), ("warn", 60));
    assert_eq!(config.diagnostics.address, Path::new("/var/run/docker/containerd/containerd-debug.sock"));
    assert_eq!(config.plugin_list.disabled, ["io.containerd.grpc.v1.cri"]);
    assert_eq!(ignored, ["plugins.\"io.containerd.runtime.v1.linux\""]);
    config.validate().unwrap();
}

#[test]
fn the_newest_version_has_its_settings_elsewhere() {
    let text = r#"
        version = 4
        [debug]
          format = "json"
        [timeouts]
          "io.containerd.timeout.shim.load" = "1.5s"
          "io.containerd.timeout.bolt.open" = "0s"
          "io.containerd.timeout.cri.defercleanup" = "1m"
        [plugins."io.containerd.server.v1.grpc"]
          address = "/s"
          gid = 7
        [plugins."io.containerd.server.v1.ttrpc"]
          address = "/s.ttrpc"
        [plugins."io.containerd.server.v1.grpc-tcp"]
          address = ":7777"
          tls_ca = "/ca"
          tls_cert = "/cert"
          tls_key = "/key"
          tls_common_name = "windows"
          max_recv_message_size = 5
        [plugins."io.containerd.monitor.container.v1.restart"]
          interval = "2s"
        [plugins."io.containerd.server.v1.metrics"]
          address = "127.0.0.1:1338"
        [plugins."io.containerd.shim.v1.manager"]
          env = ["A=b"]
          socket_dir = "/run/s"
    "#;
    let (config, ignored) = load(text).unwrap();
    assert_eq!((config.grpc.address.as_path(), config.grpc.gid), (Path::new("/s"), 7));
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.metrics.address, "127.0.0.1:1338");
    assert_eq!((config.runtime.timeouts.load, config.restart.interval), (2, 2));
    assert_eq!(config.runtime.socket_dir, Path::new("/run/s"));
    assert_eq!(config.runtime.environment, ["A=b"]);
    assert_eq!(config.grpc.tcp.address, "[::]:7777");
    assert_eq!(
        [&config.grpc.tcp.ca, &config.grpc.tcp.cert, &config.grpc.tcp.key],
        ["/ca", "/cert", "/key"].map(Path::new)
    );
    config.validate().unwrap();
    let expected = [
        "plugins.\"io.containerd.server.v1.grpc-tcp\".max_recv_message_size",
        "plugins.\"io.containerd.server.v1.grpc-tcp\".tls_common_name",
        "timeouts.\"io.containerd.timeout.cri.defercleanup\"",
    ];
    assert_eq!(ignored, expected);
    // The places are containerd's where the file names none.
    assert_eq!(config.root, Path::new("/var/lib/containerd"));
}

#[test]
fn what_cannot_be_is_refused_and_named() {
    for (text, words) in [
        ("version = 5", "expected containerd config version equal to or less than `4`, got `5`"),
        ("version = 2\nroot = 3", "root: want a text"),
        ("version = 2\n[grpc]\nuid = -1", "grpc.uid: want a number that is not negative"),
        (
            "version = 2\n[plugins.\"io.containerd.internal.v1.restart\"]\ninterval = \"soon\"",
            "interval: want a time",
        ),
        ("version = 2\nplugins = 1", "plugins: want a table"),
        ("version = 2\n[timeouts]\n\"any.other\" = \"soon\"", "timeouts.any.other: want a time"),
        ("version = 2\n[debug]\nformat = \"xml\"", "debug.format: want text or json"),
        (
            "version = 2\nrequired_plugins = [\"cri\"]",
            "invalid required plugin URI \"cri\" expect io.containerd.x.vx",
        ),
        ("version = 2\ndisabled_plugins = [\"cri\"]", "invalid disabled plugin URI"),
    ] {
        let error = load(text).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn imports_are_laid_over_what_imports_them() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    std::fs::create_dir(folder.path().join("conf.d")).unwrap();
    write("conf.d/a.toml", "version = 2\nroot = \"/a\"\nstate = \"/a-state\"\n");
    write("conf.d/b.toml", "version = 2\nroot = \"/b\"\nimports = [\"../main.toml\"]\n[grpc]\ngid = 3\n");
    write("conf.d/c.txt", "this is no TOML");
    let main = folder.path().join("main.toml");
    let read_main = |text: &str| read(&main, toml::from_str(text).unwrap());
    let text =
        "version = 2\nroot = \"/main\"\nimports = [\"conf.d/*.toml\"]\n[grpc]\naddress = \"/s\"\ngid = 1\n";
    let (config, ignored) = read_main(text).unwrap();
    assert_eq!((config.root.as_path(), config.state.as_path()), (Path::new("/b"), Path::new("/a-state")));
    assert_eq!((config.grpc.address.as_path(), config.grpc.gid), (Path::new("/s"), 3));
    assert_eq!(ignored, [] as [&str; 0]);

    let error = read_main("version = 1\nimports = [\"conf.d/a.toml\"]\n").unwrap_err().to_string();
    assert!(error.contains("drop-in config version 2 higher than root config version 1"), "{error}");
    assert!(read_main("version = 2\nimports = [\"absent.toml\"]\n").is_err());
    assert!(read_main("version = 2\nimports = [\"absent/*.toml\"]\n").is_ok());
}

#[test]
fn durations_are_gos() {
    for (text, expected) in [("10s", 10.0), ("1h30m", 5400.0), ("1.5s", 1.5), ("250ms", 0.25), ("0", 0.0)] {
        assert_eq!(seconds(text), Some(expected), "{text}");
    }
    for text in ["", "10", "s", "-1s", "1x", "1.1.1s"] {
        assert_eq!(seconds(text), None, "{text}");
    }
}

/// Each setting of the server is where its version has it, and the plugin's goes before.
#[test]
fn servers_are_configured_at_both_places() {
    let text = r#"
        version = 2
        oom_score = -500
        temp = "/t"
        required_plugins = ["io.containerd.grpc.v1.cri"]
        [cgroup]
          path = "/supervisor"
        [grpc]
          tcp_address = "127.0.0.1:1"
          tcp_tls_ca = "/ca"
          tcp_tls_cert = "/cert"
          tcp_tls_key = "/key"
        [debug]
          address = "127.0.0.1:6060"
          uid = 3
          gid = 4
        [metrics]
          grpc_histogram = true
        [plugins."io.containerd.monitor.v1.cgroups"]
          no_prometheus = true
        [plugins."io.containerd.server.v1.debug"]
          address = "/d"
          uid = 5
        [plugins."io.containerd.tracing.processor.v1.otlp"]
          endpoint = "collector:4317"
          protocol = "grpc"
          insecure = true
        [plugins."io.containerd.internal.v1.tracing"]
          service_name = "node"
          sampling_ratio = 0.5
        [plugins."io.containerd.metadata.v1.bolt"]
          content_sharing_policy = "isolated"
        [plugins."io.containerd.gc.v1.scheduler"]
          pause_threshold = 0.1
          mutation_threshold = 7
          schedule_delay = "1.5s"
          startup_delay = "2s"
        [timeouts]
          "io.containerd.timeout.metrics.shimstats" = "4s"
    "#;
    let (config, ignored) = load(text).unwrap();
    assert_eq!(ignored, ["debug.address"], "there is no debug server on TCP");
    config.validate().unwrap();
    assert_eq!((config.process.oom_score, config.process.temp.as_path()), (-500, Path::new("/t")));
    assert_eq!(config.process.cgroup, Path::new("/supervisor"));
    assert_eq!(config.plugin_list.required, ["io.containerd.grpc.v1.cri"]);
    assert_eq!(config.plugin_list.disabled, ["io.containerd.monitor.task.v1.cgroups"]);
    assert_eq!(config.grpc.tcp.address, "127.0.0.1:1");
    let diagnostics = &config.diagnostics;
    assert_eq!((diagnostics.address.as_path(), diagnostics.uid, diagnostics.gid), (Path::new("/d"), 5, 4));
    assert!(config.metrics.grpc_histogram);
    assert_eq!(config.tracing.endpoint, "http://collector:4317");
    assert_eq!((config.tracing.protocol, config.tracing.sampling_ratio), (TracingProtocol::Grpc, 0.5));
    assert_eq!(config.metadata.sharing, Sharing::Isolated);
    assert_eq!((config.metadata.gc.mutation_threshold, config.metadata.gc.schedule_delay_ms), (7, 1500));
    assert_eq!(config.runtime.timeouts.stats, 4);
}

#[test]
fn old_names_of_plugins_become_full() {
    let text =
        "disabled_plugins = [\"cri\", \"aufs\", \"tasks-service\"]\nrequired_plugins = [\"overlayfs\"]\n";
    let (config, _) = load(text).unwrap();
    let expected = [
        "io.containerd.grpc.v1.cri",
        "io.containerd.snapshotter.v1.aufs",
        "io.containerd.service.v1.tasks-service",
    ];
    assert_eq!(config.plugin_list.disabled, expected);
    assert_eq!(config.plugin_list.required, ["io.containerd.snapshotter.v1.overlayfs"]);
}
