//! The stream around the archive: compression, truncation, damage, and what comes behind the end.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use davit_content_store::Hasher;
use davit_model::{Algorithm, Coded, ErrorCode};
use davit_snapshotter::layer::{Applied, Error, apply_to_folder};
use davit_snapshotter::layer::{ApplyOptions, apply};
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::archive::Archive;
use crate::tree::bind;

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    zstd::encode_all(data, 1).unwrap()
}

fn sample() -> Vec<u8> {
    let numbers: String = (0..30_000).map(|number| format!("{number} ")).collect();
    Archive::new()
        .folder("d")
        .file("d/numbers", &numbers)
        .symlink("d/link", "numbers")
        .file("e", "end")
        .finish()
}

fn apply_here(data: &[u8]) -> (tempfile::TempDir, Result<Applied, Error>) {
    let root = tempfile::tempdir().unwrap();
    let result = apply_to_folder(data, root.path());
    (root, result)
}

#[test]
fn every_compression_gives_the_digest_of_the_plain_stream() {
    let plain = sample();
    let expected = Applied { digest: Hasher::digest_of(Algorithm::Sha256, &plain), size: plain.len() as u64 };
    let (first, second) = plain.split_at(700);
    let members = [gzip(first), gzip(second)].concat();
    let frames = [zstd(first), zstd(second)].concat();
    for data in [plain.clone(), gzip(&plain), zstd(&plain), members, frames] {
        let (root, result) = apply_here(&data);
        assert_eq!(result.unwrap(), expected);
        assert_eq!(fs::read_to_string(root.path().join("e")).unwrap(), "end");
    }
}

#[test]
fn media_types_decide_before_anything_is_read() {
    struct Unread;
    impl Read for Unread {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            panic!("read");
        }
    }
    for media_type in [
        "application/vnd.oci.image.layer.v1.tar+encrypted",
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
        "application/vnd.oci.image.config.v1+json",
        "",
    ] {
        let error = apply(Unread, media_type, &[], &ApplyOptions::default()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unimplemented, "{media_type}");
    }
    let root = tempfile::tempdir().unwrap();
    let mounts = bind(root.path(), "rw");
    for media_type in [
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ] {
        // Whichever compression is named, the bytes decide.
        for data in [sample(), gzip(&sample()), zstd(&sample())] {
            apply(data.as_slice(), media_type, &mounts, &ApplyOptions::default()).unwrap();
        }
    }
    let plain = "application/vnd.oci.image.layer.v1.tar";
    apply(sample().as_slice(), plain, &mounts, &ApplyOptions::default()).unwrap();
    let error = apply(gzip(&sample()).as_slice(), plain, &mounts, &ApplyOptions::default()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidArgument);
}

#[test]
fn a_truncated_stream_is_an_error_wherever_it_ends() {
    let plain = sample();
    let headers: Vec<usize> = {
        // Where a header could be, the end of the stream ends the archive.
        let numbers = plain.windows(9).position(|window| window == b"d/numbers").unwrap();
        let link = plain.windows(6).position(|window| window == b"d/link").unwrap();
        vec![0, numbers, link, link + 512, link + 1536, link + 2048]
    };
    for length in (0..plain.len() - 1024).step_by(1021) {
        if headers.contains(&length) {
            continue;
        }
        let (_root, result) = apply_here(&plain[..length]);
        let error = result.expect_err(&format!("{length}"));
        assert!(matches!(error, Error::Truncated | Error::Archive { .. }), "{length}: {error:?}");
    }
    for packed in [gzip(&plain), zstd(&plain)] {
        for length in (4..packed.len()).step_by(487).chain([packed.len() - 1, packed.len() - 8]) {
            let (_root, result) = apply_here(&packed[..length]);
            let error = result.expect_err(&format!("{length} of {}", packed.len()));
            assert!(matches!(error, Error::Truncated), "{length}: {error:?}");
            assert_eq!(error.code(), ErrorCode::DataLoss);
            assert!(error.to_string().contains("unexpected EOF"));
        }
    }
}

#[test]
fn a_damaged_stream_is_an_error_wherever_it_is_hurt() {
    let packed = gzip(&sample());
    // Not in the ten bytes of gzip's header, whose time and system do not matter.
    for index in (10..packed.len()).step_by(509).chain([packed.len() - 5, packed.len() - 1]) {
        let mut hurt = packed.clone();
        hurt[index] ^= 0x55;
        let (_root, result) = apply_here(&hurt);
        assert!(result.is_err(), "{index}");
    }
}

#[test]
fn what_follows_the_archive_belongs_to_the_digest_and_to_nothing_else() {
    let long = [sample(), vec![0; 1 << 20], b"and more".to_vec()].concat();
    let (_root, result) = apply_here(&gzip(&long));
    assert_eq!(result.unwrap().digest, Hasher::digest_of(Algorithm::Sha256, &long));
    for garbage in [b"garbage behind the last member".to_vec(), vec![0; 512]] {
        let (_root, result) = apply_here(&[gzip(&sample()), garbage].concat());
        assert_eq!(result.unwrap_err().code(), ErrorCode::DataLoss);
    }
    // Members behind the end of the archive are read, too: a damaged one is found.
    let mut second = gzip(&vec![0; 100_000]);
    let middle = second.len() / 2;
    second[middle] ^= 0x55;
    let (_root, result) = apply_here(&[gzip(&sample()), second].concat());
    assert!(result.is_err());
}

#[test]
fn an_empty_stream_is_an_empty_layer() {
    for data in [Vec::new(), gzip(b""), vec![0; 1024], gzip(&[0; 1024])] {
        let (root, result) = apply_here(&data);
        result.unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}

#[test]
fn an_error_of_the_blob_is_told_from_damage() {
    struct Failing(usize);
    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return Err(io::Error::from_raw_os_error(5));
            }
            self.0 -= 1;
            let data = gzip(&sample());
            let length = data.len().min(buffer.len()).min(100);
            buffer[..length].copy_from_slice(&data[..length]);
            Ok(length)
        }
    }
    for reads in [0, 1] {
        let root = tempfile::tempdir().unwrap();
        let error = apply_to_folder(Failing(reads), root.path()).unwrap_err();
        let Error::Read { source } = &error else { panic!("{error:?}") };
        assert_eq!(source.raw_os_error(), Some(5));
    }
}

#[test]
fn memory_stays_bounded_whatever_a_window_or_header_claims() {
    // A frame that asks for a window of 2 GiB.
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(31).unwrap();
    encoder.include_contentsize(false).unwrap();
    encoder.write_all(&sample()).unwrap();
    let (_root, result) = apply_here(&encoder.finish().unwrap());
    assert_eq!(result.unwrap_err().code(), ErrorCode::DataLoss);
    assert!(!Path::new("/proc/self/status").exists() || peak_memory_kib() < 1 << 20);
}

fn peak_memory_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
