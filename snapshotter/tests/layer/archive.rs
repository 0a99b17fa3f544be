//! Archives made by hand, so that they can say what no honest program would.

use tar::{EntryType, Header};

/// An archive in the making.
#[derive(Clone, Default)]
pub(crate) struct Archive(pub(crate) Vec<u8>);

/// What an entry says besides its name, type and data.
#[derive(Clone)]
pub(crate) struct Meta {
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: u64,
    pub(crate) pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Default for Meta {
    fn default() -> Self {
        Meta { mode: 0o644, uid: 0, gid: 0, mtime: 1_700_000_000, pax: Vec::new() }
    }
}

impl Meta {
    pub(crate) fn mode(mode: u32) -> Meta {
        Meta { mode, ..Meta::default() }
    }

    pub(crate) fn pax(mut self, key: &str, value: &[u8]) -> Meta {
        self.pax.push((key.into(), value.into()));
        self
    }
}

impl Archive {
    pub(crate) fn new() -> Archive {
        Archive::default()
    }

    pub(crate) fn file(self, name: &str, data: &str) -> Archive {
        self.entry(name, b'0', "", data.as_bytes(), &Meta::default())
    }

    pub(crate) fn folder(self, name: &str) -> Archive {
        self.entry(name, b'5', "", b"", &Meta::mode(0o755))
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Archive {
        self.entry(name, b'2', target, b"", &Meta::mode(0o777))
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Archive {
        self.entry(name, b'1', target, b"", &Meta::default())
    }

    /// Any entry. Names that are too long for the header go into pax records.
    pub(crate) fn entry(mut self, name: &str, kind: u8, link: &str, data: &[u8], meta: &Meta) -> Archive {
        let mut records = Vec::new();
        for (key, value) in &meta.pax {
            records.extend_from_slice(&record(key, value));
        }
        if name.len() > 100 {
            records.extend_from_slice(&record(b"path", name.as_bytes()));
        }
        if link.len() > 100 {
            records.extend_from_slice(&record(b"linkpath", link.as_bytes()));
        }
        if !records.is_empty() {
            self = self.raw("PaxHeaders/x", b'x', "", &records, &Meta::default());
        }
        let cut = |text: &str| text[..text.len().min(100)].to_owned();
        self.raw(&cut(name), kind, &cut(link), data, meta)
    }

    /// A header and its data, and nothing else.
    pub(crate) fn raw(mut self, name: &str, kind: u8, link: &str, data: &[u8], meta: &Meta) -> Archive {
        let mut header = Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_mode(meta.mode);
        header.set_uid(meta.uid);
        header.set_gid(meta.gid);
        header.set_mtime(meta.mtime);
        header.set_size(data.len() as u64);
        header.set_entry_type(EntryType::new(kind));
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// The archive with its end.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

/// One pax record.
pub(crate) fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} ").as_bytes(), key, b"=", value, b"\n"].concat()
}
