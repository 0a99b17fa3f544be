//! Makes tar archives out of arbitrary bytes: well formed ones, with hostile names in hostile orders. Mutated archives
//! hardly ever get past the checksum of their first header.

use tar::{EntryType, Header};

/// What paths are made of: names that the format gives a meaning, that climb, and that meet one another.
const COMPONENTS: [&str; 16] = [
    "a",
    "b",
    "c",
    "..",
    ".",
    "",
    "canary",
    ".wh.a",
    ".wh.canary",
    ".wh..wh..opq",
    ".wh...",
    ".wh.",
    ".wh..wh.plnk",
    "root",
    "ab",
    "lower",
];

const KINDS: [EntryType; 8] = [
    EntryType::Regular,
    EntryType::Directory,
    EntryType::Symlink,
    EntryType::Link,
    EntryType::Char,
    EntryType::Fifo,
    EntryType::Directory,
    EntryType::Symlink,
];

/// The archive that `data` describes. `outside` is the absolute path of a folder that no entry may reach.
pub(crate) fn archive(data: &[u8], outside: &str) -> Vec<u8> {
    let mut source = Source(data);
    let mut archive = Vec::new();
    // More entries than this find nothing that fewer do not.
    for _ in 0..64 {
        let Some(first) = source.byte() else { break };
        let kind = KINDS[usize::from(first % 8)];
        let name = source.path(outside);
        let link = if matches!(kind, EntryType::Symlink | EntryType::Link) {
            source.path(outside)
        } else {
            String::new()
        };
        if first & 0x80 != 0 {
            let key = if first & 0x40 != 0 { "user.fuzz" } else { "trusted.overlay.redirect" };
            let mut records = record(&format!("SCHILY.xattr.{key}"), &name);
            records.extend(record("path", &name));
            push(&mut archive, EntryType::XHeader, b"pax", b"", 0, &records);
        }
        let mode = u32::from(source.byte().unwrap_or(0)) << 4 | 0o7;
        let body = vec![b'x'; if kind == EntryType::Regular { usize::from(first) } else { 0 }];
        push(&mut archive, kind, name.as_bytes(), link.as_bytes(), mode, &body);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// Up to five components behind an optional beginning; each takes half a byte.
    fn path(&mut self, outside: &str) -> String {
        let shape = self.byte().unwrap_or(0);
        let mut path = match shape & 0x30 {
            0x10 => "/".to_owned(),
            0x20 => format!("{outside}/"),
            _ => String::new(),
        };
        let count = usize::from(shape & 7) % 5 + 1;
        let mut components = Vec::with_capacity(count + 1);
        while components.len() < count {
            let byte = usize::from(self.byte().unwrap_or(0));
            components.extend([COMPONENTS[byte & 15], COMPONENTS[byte >> 4]]);
        }
        components.truncate(count);
        path.push_str(&components.join("/"));
        path
    }
}

/// A pax record, whose length counts its own digits.
fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len() + 1;
    while length != rest.len() + length.to_string().len() {
        length = rest.len() + length.to_string().len();
    }
    format!("{length}{rest}").into_bytes()
}

fn push(archive: &mut Vec<u8>, kind: EntryType, name: &[u8], link: &[u8], mode: u32, body: &[u8]) {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(body.len() as u64);
    let fields = header.as_old_mut();
    // Not through `set_path`, which refuses what is interesting here.
    let (name_length, link_length) = (name.len().min(99), link.len().min(99));
    fields.name[..name_length].copy_from_slice(&name[..name_length]);
    fields.linkname[..link_length].copy_from_slice(&link[..link_length]);
    header.set_cksum();
    archive.extend_from_slice(header.as_bytes());
    archive.extend_from_slice(body);
    archive.resize(archive.len().next_multiple_of(512), 0);
}
