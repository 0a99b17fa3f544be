//! Images made on the spot from the host's static busybox: no registry, nothing downloaded.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// The name that [`busybox`] gives its image.
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";

/// Where Debian's `busybox-static` puts the program.
const HOST_BUSYBOX: &str = "/bin/busybox";

/// The programs that the image has as links.
const APPLETS: &[&str] = &[
    "sh", "ls", "cat", "echo", "sleep", "true", "false", "id", "env", "ps", "kill", "dd", "head", "tail",
    "wc", "touch", "mkdir", "rm", "mount", "umount", "stty", "tty", "hostname", "date", "seq", "yes", "grep",
    "sed", "cut", "test", "mknod", "ln", "chmod", "chown", "stat", "ip", "nproc", "readlink", "usleep",
    "sync", "tr", "expr", "printf", "free",
];

/// An entry of a layer.
pub struct Entry<'a> {
    /// The path without a leading slash.
    pub path: &'a str,
    /// What it is.
    pub kind: EntryType,
    /// The permission bits.
    pub mode: u32,
    /// A link's target, or the content.
    pub data: &'a [u8],
}

/// A tar of entries owned by root with a time of zero, byte for byte the same each time.
///
/// # Errors
/// An entry that tar cannot hold.
pub fn layer(entries: &[Entry<'_>]) -> Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    for entry in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        if entry.kind.is_symlink() || entry.kind.is_hard_link() {
            header.set_size(0);
            let target = std::str::from_utf8(entry.data)?;
            builder.append_link(&mut header, entry.path, target)?;
        } else {
            header.set_size(entry.data.len() as u64);
            builder.append_data(&mut header, entry.path, entry.data)?;
        }
    }
    Ok(builder.into_inner()?)
}

/// The root filesystem of a small image: busybox, its links, and the files that programs look for.
///
/// # Errors
/// The host has no static busybox.
pub fn busybox_layer() -> Result<Vec<u8>> {
    let busybox = fs::read(HOST_BUSYBOX)
        .with_context(|| format!("{HOST_BUSYBOX} is missing: apt-get install busybox-static"))?;
    let folder = |path, mode| Entry { path, kind: EntryType::Directory, mode, data: b"" };
    let file = |path, mode, data| Entry { path, kind: EntryType::Regular, mode, data };
    let mut entries = vec![
        folder("bin/", 0o755),
        folder("dev/", 0o755),
        folder("etc/", 0o755),
        folder("proc/", 0o755),
        folder("root/", 0o700),
        folder("sys/", 0o755),
        folder("tmp/", 0o1777),
        folder("usr/", 0o755),
        folder("usr/bin/", 0o755),
        file(
            "etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        ),
        file("etc/group", 0o644, b"root:x:0:\nnobody:x:65534:\n"),
        file("bin/busybox", 0o755, &busybox),
    ];
    let links: Vec<String> = APPLETS.iter().map(|applet| format!("bin/{applet}")).collect();
    for link in &links {
        entries.push(Entry { path: link, kind: EntryType::Symlink, mode: 0o777, data: b"busybox" });
    }
    entries.push(Entry { path: "usr/bin/env", kind: EntryType::Symlink, mode: 0o777, data: b"/bin/busybox" });
    layer(&entries)
}

/// `sha256:…` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A layer as it is stored.
pub struct Stored {
    /// Its media type, behind `application/vnd.oci.image.`.
    pub kind: &'static str,
    /// Its bytes.
    pub blob: Vec<u8>,
    /// The digest of what it unpacks to.
    pub diff_id: String,
}

/// Writes an OCI archive of one image with these uncompressed layers.
///
/// # Errors
/// The file cannot be written.
pub fn oci_archive(path: &Path, name: &str, layers: &[Vec<u8>], config: &serde_json::Value) -> Result<()> {
    let plain =
        |layer: &Vec<u8>| Stored { kind: "layer.v1.tar", blob: layer.clone(), diff_id: digest(layer) };
    let layers: Vec<Stored> = layers.iter().map(plain).collect();
    oci_archive_of(path, name, &layers, config)
}

/// Writes an OCI archive of one image with layers of any types.
///
/// # Errors
/// The file cannot be written.
pub fn oci_archive_of(path: &Path, name: &str, layers: &[Stored], config: &serde_json::Value) -> Result<()> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = serde_json::to_vec(&json!({
        "created": "2026-01-01T00:00:00Z",
        "architecture": architecture,
        "os": "linux",
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| &layer.diff_id).collect::<Vec<_>>() },
    }))?;
    let descriptor = |kind: &str, bytes: &[u8]| json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest(bytes), "size": bytes.len() });
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", &config),
        "layers": layers.iter().map(|layer| descriptor(layer.kind, &layer.blob)).collect::<Vec<_>>(),
    }))?;
    let mut entry = descriptor("manifest.v1+json", &manifest);
    entry["annotations"] = json!({
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rsplit(':').next().unwrap_or("latest"),
    });
    entry["platform"] = json!({ "architecture": architecture, "os": "linux" });
    let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": [entry] }))?;

    let mut files = vec![
        ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ("index.json".to_owned(), index),
    ];
    for blob in layers.iter().map(|layer| &layer.blob).chain([&config, &manifest]) {
        files.push((format!("blobs/sha256/{}", &digest(blob)[7..]), blob.clone()));
    }
    let mut file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let entries: Vec<Entry<'_>> = files
        .iter()
        .map(|(path, data)| Entry { path, kind: EntryType::Regular, mode: 0o644, data })
        .collect();
    file.write_all(&layer(&entries)?)?;
    Ok(())
}

/// Writes an OCI archive with the image [`BUSYBOX`].
///
/// # Errors
/// The host has no busybox, or the file cannot be written.
pub fn busybox(path: &Path) -> Result<()> {
    let config = json!({ "Env": ["PATH=/bin:/usr/bin"], "Cmd": ["sh"], "WorkingDir": "/" });
    oci_archive(path, BUSYBOX, &[busybox_layer()?], &config)
}
