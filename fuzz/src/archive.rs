//! Archives of images: whatever is in one, its tables name nothing but what was handed on.

use std::collections::HashMap;
use std::error::Error;
use std::io::Read;

use davit_model::Digest;
use davit_oci::archive::{Contents, Passing};
use davit_oci::chain::sha256;
use davit_oci::image::parse_manifest;
use davit_snapshotter::layer::{Member, read_members};

type Failed = Box<dyn Error + Send + Sync>;

/// The names that mean something, and some that only look so.
const NAMES: [&str; 10] = [
    "oci-layout",
    "index.json",
    "manifest.json",
    "./c.json",
    "a/layer.tar",
    "a/../b",
    "../index.json",
    "/manifest.json",
    "a/VERSION",
    "blobs/sha256/e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
];

/// An even first byte: a tar, plain or compressed. An odd one: members, each a name, a length and that many bytes.
pub fn image_archive(data: &[u8]) {
    let Some((&way, rest)) = data.split_first() else { return };
    let (mut contents, mut stored) = (Contents::default(), HashMap::new());
    let mut store = |passing: &Passing<'_>, data: &mut dyn Read| {
        let mut bytes = Vec::new();
        data.read_to_end(&mut bytes)?;
        assert!(!passing.name.starts_with('/') && !passing.name.split('/').any(|part| part == ".."));
        let digest = sha256(&bytes);
        if passing.expected.as_ref().is_some_and(|expected| *expected != digest) {
            return Err(Failed::from("another digest"));
        }
        stored.insert(digest.clone(), bytes.len() as u64);
        Ok(digest)
    };
    let read = if way & 1 == 0 {
        read_members(rest, |member| match member {
            Member::File { name, size, data } => contents.file(name, size, data, &mut store),
            Member::Symlink { name, target } => Ok(contents.link(name, target, true)?),
            Member::HardLink { name, target } => Ok(contents.link(name, target, false)?),
        })
    } else {
        members(rest, &mut contents, &mut store)
    };
    if read.is_ok() {
        check(&contents, &stored, rest);
    }
}

type Store<'a> = dyn FnMut(&Passing<'_>, &mut dyn Read) -> Result<Digest, Failed> + 'a;

fn members(mut rest: &[u8], contents: &mut Contents, store: &mut Store<'_>) -> Result<(), Failed> {
    while let [name, length, tail @ ..] = rest {
        let (mut data, tail) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = tail;
        let place = usize::from(*name);
        match NAMES.get(place) {
            Some(name) => contents.file(name.as_bytes(), data.len() as u64, &mut data, store)?,
            None => contents.link(data, NAMES[place % NAMES.len()].as_bytes(), place % 2 == 0)?,
        }
    }
    Ok(())
}

fn check(contents: &Contents, stored: &HashMap<Digest, u64>, archive: &[u8]) {
    if let Ok(Some((index, parsed))) = contents.layout() {
        assert!(!index.is_empty());
        for manifest in parsed.manifests {
            assert!(!contents.has(&manifest.digest) || stored.contains_key(&manifest.digest));
        }
    }
    let Ok(Some(saved)) = contents.saved() else { return };
    for image in saved {
        for part in image.layers.iter().chain([&image.config]) {
            assert_eq!(stored.get(&part.digest), Some(&part.size), "in {} bytes", archive.len());
        }
        for name in &image.names {
            assert!(name.tag().is_some() || name.digest().is_some());
        }
        let layers = image.layers.len();
        let (descriptor, bytes) = image.manifest();
        assert_eq!((&descriptor.digest, descriptor.size), (&sha256(&bytes), bytes.len() as u64));
        let parsed = parse_manifest(&bytes).expect("a manifest that was just made");
        assert_eq!(parsed.layers.len(), layers);
    }
}
