//! Runtime specs as whole documents: the default one against a golden file, and what each option changes in it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use davit_oci::image::ImageConfig;
use davit_oci::spec::{
    BindMount, Device, Host, Limits, Network, Options, SeccompChoice, SpecError, TmpfsMount, build,
};
use davit_oci::user::User;
use serde_json::{Value, json};

fn image() -> ImageConfig {
    serde_json::from_value(json!({
        "os": "linux", "architecture": "amd64",
        "config": {"Env": ["PATH=/bin", "A=image"], "Entrypoint": ["/init"], "Cmd": ["sh"], "WorkingDir": "/work"},
        "rootfs": {"type": "layers", "diff_ids": []},
    }))
    .unwrap()
}

fn host() -> Host {
    Host {
        architecture: "x86_64".to_owned(),
        kernel: (6, 1),
        capabilities: (1 << 41) - 1,
        unified_cgroups: true,
        swap_limit: true,
        devices: vec![Device::from_host("/dev/zero".as_ref(), "/dev/zero", "rwm").unwrap()],
    }
}

fn options() -> Options {
    Options { id: "0123456789abcdef".to_owned(), namespace: "default".to_owned(), ..Options::default() }
}

fn root() -> User {
    User { uid: 0, gid: 0, groups: vec![0, 10] }
}

fn spec(options: &Options) -> Value {
    serde_json::from_slice(&build(&image(), &root(), options, &host()).unwrap().to_json()).unwrap()
}

fn mount<'a>(spec: &'a Value, destination: &str) -> Option<&'a Value> {
    spec["mounts"].as_array().unwrap().iter().find(|mount| mount["destination"] == destination)
}

#[test]
fn the_default_spec_is_the_golden_one() {
    let mut have = spec(&options());
    // The list of system calls has its own tests.
    have["linux"]["seccomp"]["syscalls"].take();
    let want: Value = serde_json::from_str(include_str!("golden/default.json")).unwrap();
    assert_eq!(have, want, "{}", serde_json::to_string_pretty(&have).unwrap());
}

#[test]
fn commands_by_dockers_table() {
    let args = |entrypoint: Option<&[&str]>, args: &[&str]| {
        let own = |list: &[&str]| list.iter().map(|part| (*part).to_owned()).collect::<Vec<_>>();
        let options = Options { entrypoint: entrypoint.map(own), args: own(args), ..options() };
        spec(&options)["process"]["args"].clone()
    };
    assert_eq!(args(None, &[]), json!(["/init", "sh"]));
    assert_eq!(args(None, &["ls", "-l"]), json!(["/init", "ls", "-l"]));
    assert_eq!(args(Some(&["/bin/ls"]), &[]), json!(["/bin/ls"]));
    assert_eq!(args(Some(&["/bin/ls"]), &["-l"]), json!(["/bin/ls", "-l"]));
    assert_eq!(args(Some(&[""]), &["ls"]), json!(["ls"]));
    let options = Options { entrypoint: Some(vec![String::new()]), ..options() };
    assert!(matches!(build(&image(), &root(), &options, &host()), Err(SpecError::NoCommand)));
}

#[test]
fn a_user_other_than_root_holds_no_capabilities() {
    let user = User { uid: 1000, gid: 1000, groups: vec![1000] };
    let spec = build(&image(), &user, &options(), &host()).unwrap();
    let spec: Value = serde_json::from_slice(&spec.to_json()).unwrap();
    let capabilities = &spec["process"]["capabilities"];
    assert_eq!(capabilities["effective"], json!([]));
    assert_eq!(capabilities["permitted"], json!([]));
    assert_eq!(capabilities["bounding"].as_array().unwrap().len(), 14);
}

#[test]
fn a_privileged_container_has_everything() {
    let spec = spec(&Options { privileged: true, ..options() });
    assert_eq!(spec["process"]["capabilities"]["effective"].as_array().unwrap().len(), 41);
    assert!(spec["linux"].get("seccomp").is_none());
    assert_eq!(spec["linux"]["maskedPaths"], json!([]));
    assert_eq!(spec["linux"]["devices"][0]["path"], "/dev/zero");
    assert_eq!(spec["linux"]["resources"]["devices"], json!([{"allow": true, "access": "rwm"}]));
    assert!(mount(&spec, "/sys").unwrap()["options"].as_array().unwrap().contains(&json!("rw")));
}

#[test]
fn limits_become_resources() {
    let limits = Limits {
        memory: Some(64 << 20),
        cpus: Some(1.5),
        pids: Some(100),
        cpuset_cpus: Some("0-1".to_owned()),
        ..Limits::default()
    };
    let resources = spec(&Options { limits, ..options() })["linux"]["resources"].clone();
    assert_eq!(resources["memory"], json!({"limit": 64 << 20, "swap": 128 << 20}));
    assert_eq!(resources["cpu"], json!({"quota": 150_000, "period": 100_000, "cpus": "0-1"}));
    assert_eq!(resources["pids"], json!({"limit": 100}));
    let bad = [
        Limits { memory: Some(1024), ..Limits::default() },
        Limits { memory: Some(64 << 20), memory_swap: Some(1 << 20), ..Limits::default() },
        Limits { memory_swap: Some(1 << 20), ..Limits::default() },
        Limits { cpus: Some(-1.0), ..Limits::default() },
        Limits { cpus: Some(f64::NAN), ..Limits::default() },
    ];
    for limits in bad {
        let options = Options { limits: limits.clone(), ..options() };
        let result = build(&image(), &root(), &options, &host());
        assert!(matches!(result, Err(SpecError::Limit { .. })), "{limits:?}");
    }
}

#[test]
fn mounts_replace_defaults_and_stay_in_order() {
    let bind = |destination: &str, read_only| BindMount {
        source: "/host".to_owned(),
        destination: destination.to_owned(),
        read_only,
        propagation: String::new(),
    };
    let tmpfs =
        TmpfsMount { destination: "/run".to_owned(), options: vec!["size=1m".to_owned(), "exec".to_owned()] };
    let spec = spec(&Options {
        binds: vec![bind("/a/b/c", true), bind("/a", false), bind("/dev/shm/", false)],
        tmpfs: vec![tmpfs],
        ..options()
    });
    let destinations: Vec<&str> = spec["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mount| mount["destination"].as_str().unwrap())
        .collect();
    assert_eq!(destinations[destinations.len() - 4..], ["/a", "/run", "/dev/shm", "/a/b/c"]);
    assert_eq!(mount(&spec, "/dev/shm").unwrap()["type"], "bind");
    assert_eq!(mount(&spec, "/a/b/c").unwrap()["options"], json!(["rbind", "ro", "rprivate"]));
    assert_eq!(mount(&spec, "/run").unwrap()["options"], json!(["nosuid", "nodev", "size=1m", "exec"]));
    let refused = |binds| build(&image(), &root(), &Options { binds, ..options() }, &host()).unwrap_err();
    assert!(matches!(
        refused(vec![bind("/a", true), bind("/a/../a", true)]),
        SpecError::DuplicateMount { .. }
    ));
    assert!(matches!(refused(vec![bind("a", true)]), SpecError::NotAbsolute { .. }));
    assert!(matches!(refused(vec![bind("/a/..", true)]), SpecError::RootMount));
    for target in ["/", "/a/.."] {
        let tmpfs = vec![TmpfsMount { destination: target.to_owned(), options: Vec::new() }];
        let error = build(&image(), &self::root(), &Options { tmpfs, ..options() }, &host()).unwrap_err();
        assert!(matches!(error, SpecError::RootMount), "{error}");
    }
}

#[test]
fn variables_network_and_filter() {
    let spec = spec(&Options {
        env: vec!["A=mine".to_owned(), "PATH".to_owned(), "B=2".to_owned()],
        terminal: true,
        hostname: "box".to_owned(),
        network: Network::Host,
        seccomp: SeccompChoice::Unconfined,
        no_new_privileges: true,
        ..options()
    });
    assert_eq!(spec["process"]["env"], json!(["HOSTNAME=box", "TERM=xterm", "A=mine", "B=2"]));
    assert_eq!(spec["hostname"], "box");
    assert_eq!(spec["process"]["noNewPrivileges"], true);
    assert!(spec["linux"].get("seccomp").is_none() && spec["linux"].get("sysctl").is_none());
    let namespaces = spec["linux"]["namespaces"].as_array().unwrap();
    assert!(!namespaces.iter().any(|namespace| namespace["type"] == "network"));
}
