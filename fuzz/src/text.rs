//! Texts and documents: of clients, of registries, and of images.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use davit_model::filter::{Adaptor, Filter, label_field};
use davit_model::{Digest, Labels, identifier};
use davit_oci::image::{self, Target};
use davit_oci::platform::{self, Platform};
use davit_oci::reference::Reference;
use davit_oci::rootfs::Rootfs;
use davit_oci::spec::seccomp::Profile;
use davit_oci::spec::{self, Host, Options, SeccompChoice};
use davit_oci::{environment, media_type, user};

struct Object(Labels);

impl Adaptor for Object {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.first()?.as_str() {
            "name" => Some(Cow::Borrowed("web")),
            "labels" => label_field(&self.0, &path[1..]),
            _ => None,
        }
    }
}

/// Filters of list calls.
pub fn filter(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let object =
        Object(Labels::from([("a".to_owned(), "b".to_owned()), ("c/d.e".to_owned(), text.to_owned())]));
    if let Ok(filter) = text.parse::<Filter>() {
        let _ = filter.matches(&object);
    }
    let parts: Vec<String> = text.split('\0').map(str::to_owned).collect();
    if let Ok(filter) = Filter::parse(&parts) {
        let _ = filter.matches(&object);
    }
}

/// Identifiers, digests, image references, platforms: what is accepted can be a name of a file, and is the same when
/// it was printed and read again.
pub fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if identifier::validate(text).is_ok() {
        assert_file_name(text);
    }
    let _ = identifier::validate_topic(text);
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.as_str(), text);
        assert_file_name(digest.hex());
        assert_eq!(digest.hex().len(), digest.algorithm().hex_len());
    }
    if let Ok(reference) = text.parse::<Reference>() {
        assert_eq!(reference.to_string().parse(), Ok(reference.clone()));
        assert_eq!(reference.familiar().parse(), Ok(reference.clone()));
        reference.path().split('/').chain([reference.domain()]).for_each(assert_file_name);
        reference.tag().into_iter().for_each(assert_file_name);
    }
    if let Ok(platform) = Platform::parse(text) {
        assert_eq!(platform.normalized(), platform);
        assert_eq!(Platform::parse(&platform.to_string()).ok(), Some(platform));
    }
}

fn assert_file_name(name: &str) {
    let bad = name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']);
    assert!(!bad, "{name:?} is no name of a file");
}

/// The documents of images, and the runtime spec that is made of a configuration.
pub fn documents(data: &[u8]) {
    let host = Platform::parse("linux/amd64").expect("a platform");
    for media_type in [media_type::OCI_INDEX, media_type::DOCKER_MANIFEST] {
        match image::parse_target(media_type, data) {
            Ok(Target::Index(index)) => drop(platform::best(&index.manifests, &host).cloned()),
            Ok(Target::Manifest(_)) => {
                assert!(image::parse_index(data).is_err(), "one document is both manifest and index");
            }
            Err(_) => {}
        }
    }
    let profile = Profile::parse(data).map(SeccompChoice::Profile).unwrap_or_default();
    let Ok(config) = image::parse_config(data) else { return };
    let machine = Host {
        architecture: "x86_64".to_owned(),
        kernel: (6, 1),
        capabilities: u64::MAX,
        unified_cgroups: true,
        swap_limit: true,
        devices: Vec::new(),
    };
    let options = Options { id: "box".to_owned(), seccomp: profile, ..Options::default() };
    if let Ok(spec) = spec::build(&config, &user::User::default(), &options, &machine) {
        assert!(spec.process.cwd.starts_with('/'));
        assert!(!spec.process.args.is_empty());
    }
}

/// Users and groups from the files of an image: `user NUL passwd NUL group NUL environment file`.
pub fn rootfs(data: &[u8]) {
    let mut parts = data.splitn(4, |byte| *byte == 0);
    let mut next = || parts.next().unwrap_or_default();
    let (name, passwd, group, variables) = (next(), next(), next(), next());
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    fs::create_dir(folder.path().join("etc")).expect("an own folder");
    fs::write(folder.path().join("etc/passwd"), passwd).expect("an own folder");
    fs::write(folder.path().join("etc/group"), group).expect("an own folder");
    let rootfs = Rootfs::from_path(folder.path());
    if let Ok(name) = std::str::from_utf8(name) {
        if let Ok(resolved) = user::resolve(&rootfs, name, &["0".to_owned()]) {
            assert!(resolved.uid <= user::MAX_ID && resolved.groups.iter().all(|gid| *gid <= user::MAX_ID));
            assert_eq!(resolved.groups.first(), Some(&resolved.gid));
            let number = name.split(':').next().and_then(|user| user.parse::<u64>().ok());
            assert!(number.is_none_or(|number| number == u64::from(resolved.uid)), "a number became another");
        }
        let _ = rootfs.read(Path::new(name), 100);
    }
    if let Ok(text) = std::str::from_utf8(variables)
        && let Ok(entries) = environment::parse_file(text, |_| None)
    {
        let merged = environment::merge(&entries, &entries);
        assert_eq!(environment::merge(&merged, &[]), merged);
    }
}
