//! A reader of tar archives: one entry after the other, with every extension resolved.
//!
//! The layout of headers is that of the `tar` crate. Its iterator is not used: it splits pax records at newlines
//! (see [`pax`](super::pax)), reads extended headers of any size into memory, and knows no sparse files of the
//! pax formats. Understood are v7, ustar, pax, GNU (long names, base-256 numbers, sparse files in all four
//! formats) and star's prefix. Where readers differ, this one agrees with Go's `archive/tar`, which containerd
//! and Docker use, or refuses: an archive must not look different to a scanner than to the unpacker.
//!
//! Memory is bounded by [`EXTENDED_HEADER_LIMIT`] per extended header, three of which can describe an entry, and
//! by [`EXTENT_LIMIT`].

use std::collections::BTreeMap;
use std::io::{self, BufRead, ErrorKind};

use tar::{EntryType, GnuExtSparseHeader, Header};

use super::error::{ArchiveFault, EntryFault, Error};
use super::pax::{Records, SparseRecords, Time};

const BLOCK: usize = 512;

/// The most bytes that one extended header may have (pax records, a long name); Go's limit.
const EXTENDED_HEADER_LIMIT: u64 = 1 << 20;

/// The most extents that one sparse file may have: as many as fit in an extended header, and some.
const EXTENT_LIMIT: usize = 1 << 16;

/// One entry of an archive. Its data are read from the [`Archive`] before the next entry.
#[derive(Debug)]
pub(super) struct Entry {
    /// The name as it stands in the archive.
    pub(super) name: Vec<u8>,
    pub(super) kind: Kind,
    /// Permission bits, with set-id and sticky.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified: Time,
    pub(super) accessed: Option<Time>,
    /// Extended attributes by name.
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What an entry is.
#[derive(Debug)]
pub(super) enum Kind {
    File {
        /// The size of the file to make.
        size: u64,
        /// For a sparse file, where its data go; all else is a hole.
        extents: Option<Vec<Extent>>,
    },
    Folder,
    Symlink {
        target: Vec<u8>,
    },
    HardLink {
        target: Vec<u8>,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A piece of a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// An archive that is being read.
pub(super) struct Archive<R> {
    reader: R,
    /// Bytes read so far.
    position: u64,
    /// Bytes of the current entry's data that are not read yet, and the padding behind them.
    data: u64,
    padding: u64,
    ended: bool,
}

impl<R: BufRead> Archive<R> {
    /// An archive that begins at the reader's position.
    pub(super) fn new(reader: R) -> Archive<R> {
        Archive { reader, position: 0, data: 0, padding: 0, ended: false }
    }

    /// The next entry, or `None` at the end of the archive: two zero blocks, or the end of the stream at a place
    /// where a header could be (some producers leave the zero blocks out).
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, Error> {
        let mut long_name = None;
        let mut long_link = None;
        let mut records = None;
        loop {
            self.skip(self.data.saturating_add(self.padding))?;
            (self.data, self.padding) = (0, 0);
            let Some(header) = self.header()? else {
                let dangling = long_name.is_some() || long_link.is_some() || records.is_some();
                return if dangling { Err(self.fault(ArchiveFault::Dangling)) } else { Ok(None) };
            };
            let size = self.number(&header.as_old().size, "size")?;
            let repeated = |sort| ArchiveFault::Repeated { sort };
            match header.entry_type() {
                EntryType::XHeader => {
                    let data = self.extended(size)?;
                    let parsed = Records::parse(&data).map_err(|fault| self.fault(fault))?;
                    if records.replace(parsed).is_some() {
                        return Err(self.fault(repeated("pax")));
                    }
                }
                EntryType::GNULongName => {
                    if long_name.replace(c_string(self.extended(size)?)).is_some() {
                        return Err(self.fault(repeated("long name")));
                    }
                }
                EntryType::GNULongLink => {
                    if long_link.replace(c_string(self.extended(size)?)).is_some() {
                        return Err(self.fault(repeated("long link")));
                    }
                }
                // Global records set defaults for all that follow; containerd ignores them, and so must whoever
                // wants to unpack the same tree.
                EntryType::XGlobalHeader => self.expect_data(size)?,
                _ => return self.entry(&header, size, records, long_name, long_link).map(Some),
            }
        }
    }

    /// The next piece of the current entry's data, empty at their end. [`consume`](Self::consume) takes it.
    pub(super) fn data(&mut self) -> Result<&[u8], Error> {
        if self.data == 0 {
            return Ok(&[]);
        }
        let limit = usize::try_from(self.data).unwrap_or(usize::MAX);
        let buffer = fill(&mut self.reader)?;
        if buffer.is_empty() {
            return Err(Error::Truncated);
        }
        Ok(&buffer[..buffer.len().min(limit)])
    }

    /// Takes `length` bytes of what [`data`](Self::data) gave.
    pub(super) fn consume(&mut self, length: usize) {
        self.reader.consume(length);
        self.position += length as u64;
        self.data -= length as u64;
    }

    /// Reads everything behind the end of the archive, so that the whole stream was read and checked.
    pub(super) fn drain(mut self) -> Result<(), Error> {
        loop {
            let length = fill(&mut self.reader)?.len();
            if length == 0 {
                return Ok(());
            }
            self.reader.consume(length);
        }
    }

    /// Makes an entry of a header and the extended headers before it.
    fn entry(
        &mut self,
        header: &Header,
        size: u64,
        records: Option<Records>,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, Error> {
        let mut records = records.unwrap_or_default();
        let fields = header.as_old();
        let sparse = std::mem::take(&mut records.sparse);
        let name = long_name.or(records.path).unwrap_or_else(|| header_name(header));
        let name = sparse.name.clone().unwrap_or(name);
        let target = long_link.or(records.link).unwrap_or_else(|| c_string(fields.linkname.to_vec()));
        let size = records.size.unwrap_or(size);
        let type_flag = fields.linkflag[0];
        let kind = match header.entry_type() {
            // Before there was a type for folders, a name with a slash at its end was one.
            EntryType::Regular if type_flag == 0 && name.ends_with(b"/") => Kind::Folder,
            EntryType::Regular | EntryType::Continuous => self.file(size, &sparse)?,
            EntryType::GNUSparse => self.gnu_sparse_file(header, size)?,
            // Whatever size these headers give, no data follow them (as in Go).
            EntryType::Directory => Kind::Folder,
            EntryType::Symlink => Kind::Symlink { target },
            EntryType::Link => Kind::HardLink { target },
            EntryType::Fifo => Kind::Fifo,
            EntryType::Char => {
                let (major, minor) = self.device(header)?;
                Kind::CharDevice { major, minor }
            }
            EntryType::Block => {
                let (major, minor) = self.device(header)?;
                Kind::BlockDevice { major, minor }
            }
            _ => {
                let kind = char::from(type_flag);
                return Err(Error::entry(&name, EntryFault::Kind { kind }));
            }
        };
        let owner = |id: u64| match u32::try_from(id) {
            Ok(id) if id != u32::MAX => Ok(id),
            _ => Err(Error::entry(&name, EntryFault::Owner { id })),
        };
        let uid = owner(records.uid.map_or_else(|| self.number(&fields.uid, "uid"), Ok)?)?;
        let gid = owner(records.gid.map_or_else(|| self.number(&fields.gid, "gid"), Ok)?)?;
        let modified = match records.modified {
            Some(time) => time,
            None => Time::from_seconds(self.signed(&fields.mtime, "mtime")?),
        };
        // Bits above the permissions repeat the type in some archives.
        let mode = (self.number(&fields.mode, "mode")? & 0o7777) as u32;
        Ok(Entry { name, kind, mode, uid, gid, modified, accessed: records.accessed, xattrs: records.xattrs })
    }

    /// A regular file, or a sparse one of the pax formats.
    fn file(&mut self, size: u64, sparse: &SparseRecords) -> Result<Kind, Error> {
        self.expect_data(size)?;
        let version = (sparse.major, sparse.minor);
        let map = match version {
            (Some(1), Some(0)) => self.sparse_map_in_data()?,
            (None | Some(0), _) if !sparse.map.is_empty() => sparse.map.clone(),
            (Some(0), Some(0 | 1)) => Vec::new(),
            (None, None) => return Ok(Kind::File { size, extents: None }),
            _ => return Err(self.fault(ArchiveFault::Sparse)),
        };
        let real_size = sparse.size.ok_or_else(|| self.fault(ArchiveFault::Sparse))?;
        self.sparse_file(&map, real_size)
    }

    /// A sparse file of the old GNU format: the map is in the header and in blocks right behind it.
    fn gnu_sparse_file(&mut self, header: &Header, size: u64) -> Result<Kind, Error> {
        let Some(gnu) = header.as_gnu() else { return Err(self.fault(ArchiveFault::Sparse)) };
        let mut map = Vec::new();
        for extent in gnu.sparse.iter().take_while(|extent| extent.offset[0] != 0) {
            map.push(self.number(&extent.offset, "sparse offset")?);
            map.push(self.number(&extent.numbytes, "sparse numbytes")?);
        }
        let mut extended = gnu.is_extended();
        while extended {
            let mut block = GnuExtSparseHeader::new();
            self.read_exact(block.as_mut_bytes())?;
            for extent in block.sparse().iter().take_while(|extent| extent.offset[0] != 0) {
                map.push(self.number(&extent.offset, "sparse offset")?);
                map.push(self.number(&extent.numbytes, "sparse numbytes")?);
            }
            if map.len() > 2 * EXTENT_LIMIT {
                return Err(self.fault(ArchiveFault::Sparse));
            }
            extended = block.is_extended();
        }
        let real_size = self.number(&gnu.realsize, "realsize")?;
        self.expect_data(size)?;
        self.sparse_file(&map, real_size)
    }

    /// Reads the map of format 1.0, which comes before the data: decimal lines, the count of extents first,
    /// padded to a whole block.
    fn sparse_map_in_data(&mut self) -> Result<Vec<u64>, Error> {
        let mut numbers: Vec<u64> = Vec::new();
        let mut line = Vec::new();
        loop {
            let mut block = [0; BLOCK];
            if self.data < BLOCK as u64 {
                return Err(self.fault(ArchiveFault::Sparse));
            }
            self.read_exact(&mut block)?;
            self.data -= BLOCK as u64;
            for byte in block {
                if byte.is_ascii_digit() && line.len() < 20 {
                    line.push(byte);
                } else if byte == b'\n' {
                    let text = std::str::from_utf8(&line).unwrap_or_default();
                    let number =
                        text.parse().map_err(|_| self.fault(ArchiveFault::Number { field: "sparse map" }))?;
                    numbers.push(number);
                    line.clear();
                } else {
                    return Err(self.fault(ArchiveFault::Sparse));
                }
                let count = numbers.first().copied().unwrap_or(0);
                if count > EXTENT_LIMIT as u64 {
                    return Err(self.fault(ArchiveFault::Sparse));
                }
                if !numbers.is_empty() && numbers.len() as u64 == 1 + 2 * count {
                    numbers.remove(0);
                    return Ok(numbers);
                }
            }
        }
    }

    /// Checks the map of a sparse file against its size and the size of its data.
    fn sparse_file(&mut self, map: &[u64], size: u64) -> Result<Kind, Error> {
        let mut extents = Vec::with_capacity(map.len() / 2);
        let mut end = 0;
        let mut total = 0_u64;
        for pair in map.chunks(2) {
            let &[offset, length] = pair else { return Err(self.fault(ArchiveFault::Sparse)) };
            let next = offset.checked_add(length).filter(|&next| next <= size && offset >= end);
            end = next.ok_or_else(|| self.fault(ArchiveFault::Sparse))?;
            total += length;
            extents.push(Extent { offset, length });
        }
        if total != self.data || extents.len() > EXTENT_LIMIT {
            return Err(self.fault(ArchiveFault::Sparse));
        }
        Ok(Kind::File { size, extents: Some(extents) })
    }

    /// Announces `size` bytes of data behind the header just read.
    fn expect_data(&mut self, size: u64) -> Result<(), Error> {
        if size > i64::MAX as u64 {
            return Err(self.fault(ArchiveFault::Number { field: "size" }));
        }
        self.data = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    /// Reads the data of an extended header.
    fn extended(&mut self, size: u64) -> Result<Vec<u8>, Error> {
        if size > EXTENDED_HEADER_LIMIT {
            return Err(self.fault(ArchiveFault::TooLarge { size, limit: EXTENDED_HEADER_LIMIT }));
        }
        self.expect_data(size)?;
        let mut data = vec![0; size as usize];
        self.read_exact(&mut data)?;
        self.data = 0;
        Ok(data)
    }

    /// The next header block, checked; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, Error> {
        if self.ended || fill(&mut self.reader)?.is_empty() {
            return Ok(None);
        }
        let mut header = Header::new_old();
        self.read_exact(header.as_mut_bytes())?;
        let is_zero = |header: &Header| header.as_bytes().iter().all(|&byte| byte == 0);
        if is_zero(&header) {
            self.ended = true;
            if !fill(&mut self.reader)?.is_empty() {
                self.read_exact(header.as_mut_bytes())?;
                if !is_zero(&header) {
                    return Err(self.fault(ArchiveFault::LoneZeroBlock));
                }
            }
            return Ok(None);
        }
        // The sum counts its own field as blanks. Some old writers summed signed bytes.
        let bytes = header.as_bytes();
        let summed = bytes[..148].iter().chain(&[b' '; 8]).chain(&bytes[156..]);
        let unsigned: i64 = summed.clone().map(|&byte| i64::from(byte)).sum();
        let signed: i64 = summed.map(|&byte| i64::from(byte as i8)).sum();
        let expected = parse_number(&header.as_old().cksum);
        if expected != Some(unsigned) && expected != Some(signed) {
            return Err(self.fault(ArchiveFault::Checksum));
        }
        Ok(Some(header))
    }

    fn device(&self, header: &Header) -> Result<(u32, u32), Error> {
        let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
            (Some(header), _) => (&header.dev_major, &header.dev_minor),
            (None, Some(header)) => (&header.dev_major, &header.dev_minor),
            (None, None) => return Ok((0, 0)),
        };
        let number = |field: &[u8], name| {
            u32::try_from(self.number(field, name)?)
                .map_err(|_| self.fault(ArchiveFault::Number { field: name }))
        };
        Ok((number(major, "devmajor")?, number(minor, "devminor")?))
    }

    fn number(&self, field: &[u8], name: &'static str) -> Result<u64, Error> {
        u64::try_from(self.signed(field, name)?).map_err(|_| self.fault(ArchiveFault::Number { field: name }))
    }

    fn signed(&self, field: &[u8], name: &'static str) -> Result<i64, Error> {
        parse_number(field).ok_or_else(|| self.fault(ArchiveFault::Number { field: name }))
    }

    fn fault(&self, fault: ArchiveFault) -> Error {
        Error::Archive { offset: self.position, fault }
    }

    fn skip(&mut self, mut length: u64) -> Result<(), Error> {
        while length > 0 {
            let available = fill(&mut self.reader)?.len();
            if available == 0 {
                return Err(Error::Truncated);
            }
            let taken = available.min(usize::try_from(length).unwrap_or(usize::MAX));
            self.reader.consume(taken);
            self.position += taken as u64;
            length -= taken as u64;
        }
        Ok(())
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        self.reader.read_exact(buffer).map_err(stream_error)?;
        self.position += buffer.len() as u64;
        Ok(())
    }
}

fn fill<R: BufRead>(reader: &mut R) -> Result<&[u8], Error> {
    // Not a loop over `Interrupted`: the borrow of the buffer would have to be given up first.
    match reader.fill_buf() {
        Ok(buffer) => Ok(buffer),
        Err(error) => Err(stream_error(error)),
    }
}

/// The error of the stream below. The decompressor hands its own [`Error`] through inside of an [`io::Error`].
fn stream_error(error: io::Error) -> Error {
    if error.kind() == ErrorKind::UnexpectedEof && error.get_ref().is_none() {
        return Error::Truncated;
    }
    match error.downcast::<Error>() {
        Ok(error) => error,
        Err(source) => Error::Read { source },
    }
}

/// A field's text up to its first NUL.
fn c_string(mut field: Vec<u8>) -> Vec<u8> {
    let length = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    field.truncate(length);
    field
}

/// The name in a header itself: in ustar a prefix, a slash and the name.
fn header_name(header: &Header) -> Vec<u8> {
    let name = c_string(header.as_old().name.to_vec());
    let prefix = match (header.as_ustar(), header.as_gnu()) {
        // star keeps two times where the last 24 bytes of the prefix would be.
        (Some(_), _) if header.as_bytes().ends_with(b"tar\0") => &header.as_bytes()[345..476],
        (Some(ustar), _) => ustar.prefix.as_slice(),
        // GNU tar has two times there. Go before 1.8, and so Docker of 2016, took it for the prefix all the
        // same; what is no number but text was written by these.
        (None, Some(gnu)) if parse_number(&gnu.atime).is_none() || parse_number(&gnu.ctime).is_none() => {
            let prefix = &header.as_bytes()[345..500];
            if prefix.is_ascii() { prefix } else { &[] }
        }
        _ => &[],
    };
    let mut full = c_string(prefix.to_vec());
    if !full.is_empty() {
        full.push(b'/');
    }
    full.extend_from_slice(&name);
    full
}

/// A number in a header: octal digits between blanks and NULs, nothing for zero, or with the highest bit set a
/// big-endian number in two's complement. `None` for anything else and for what does not fit.
fn parse_number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let mut number: i64 = if negative { -1 } else { 0 };
        for (index, &byte) in field.iter().enumerate() {
            // The marker bit is no part of the number: in a negative one it reads as a sign bit.
            let byte = if index == 0 && !negative { byte & 0x7f } else { byte };
            number = number.checked_mul(256)? + i64::from(byte);
        }
        return Some(number);
    }
    let blank = |byte: &u8| *byte == b' ' || *byte == 0;
    let start = field.iter().position(|byte| !blank(byte)).unwrap_or(field.len());
    let text = &field[start..];
    let text = &text[..text.iter().position(blank).unwrap_or(text.len())];
    if text.is_empty() {
        return Some(0);
    }
    if !text.iter().all(|byte| (b'0'..=b'7').contains(byte)) {
        return None;
    }
    i64::from_str_radix(std::str::from_utf8(text).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A v7 header with the given fields; its sum is set.
    fn header(change: impl Fn(&mut [u8; BLOCK])) -> Vec<u8> {
        let mut block = [0; BLOCK];
        block[100..108].copy_from_slice(b"0000644\0");
        change(&mut block);
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block.to_vec()
    }

    fn first(archive: &[u8]) -> Result<Option<Entry>, Error> {
        Archive::new(archive).next_entry()
    }

    fn first_name(archive: &[u8]) -> String {
        String::from_utf8(first(archive).unwrap().unwrap().name).unwrap()
    }

    fn put(block: &mut [u8; BLOCK], offset: usize, text: &[u8]) {
        block[offset..offset + text.len()].copy_from_slice(text);
    }

    #[test]
    fn numbers_are_octal_or_binary_and_nothing_else() {
        for (field, expected) in [
            (b"0000644\0".as_slice(), Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"    ", Some(0)),
            (b"644\x0099", Some(0o644)),
            (b"77777777777\0", Some(0o77777777777)),
            (b"\x80\0\0\0\0\0\x01\0", Some(256)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"0000688\0", None),
            (b"-000644\0", None),
            (b"0x00644\0", None),
            (b"+644\0", None),
        ] {
            assert_eq!(parse_number(field), expected, "{}", field.escape_ascii());
        }
    }

    #[test]
    fn prefixes_are_those_of_the_format_that_the_header_is_in() {
        let magic = |block: &mut [u8; BLOCK], magic: &[u8]| {
            put(block, 0, b"name");
            put(block, 257, magic);
            put(block, 345, b"prefix");
        };
        assert_eq!(first_name(&header(|block| magic(block, b""))), "name");
        assert_eq!(first_name(&header(|block| magic(block, b"ustar\x0000"))), "prefix/name");
        let star = header(|block| {
            magic(block, b"ustar\x0000");
            // Two times and the mark of star, where ustar has the end of the prefix.
            put(block, 345, &[b'p'; 131]);
            put(block, 476, b"00000000000 00000000000 ");
            put(block, 508, b"tar\0");
        });
        assert_eq!(first_name(&star), format!("{}/name", "p".repeat(131)));
        // GNU tar's access time, and the prefix that old writers put in its place.
        let gnu = |text: &'static [u8]| {
            header(move |block| {
                put(block, 0, b"name");
                put(block, 257, b"ustar  \0");
                put(block, 345, text);
            })
        };
        assert_eq!(first_name(&gnu(b"13737357362\x0013737357362\0")), "name");
        assert_eq!(first_name(&gnu(b"usr/share/doc")), "usr/share/doc/name");
    }

    #[test]
    fn a_name_that_ends_in_a_slash_was_a_folder_before_there_was_a_type() {
        let old = header(|block| put(block, 0, b"name/"));
        assert!(matches!(first(&old).unwrap().unwrap().kind, Kind::Folder));
        let typed = header(|block| {
            put(block, 0, b"name/");
            block[156] = b'0';
        });
        assert!(matches!(first(&typed).unwrap().unwrap().kind, Kind::File { .. }));
    }

    #[test]
    fn sums_of_signed_bytes_are_accepted() {
        let mut block = header(|block| put(block, 0, "ü".as_bytes()));
        assert_eq!(first_name(&block), "ü");
        let sum: i64 = block[..148].iter().chain(&block[156..]).map(|&byte| i64::from(byte as i8)).sum();
        block[148..156].copy_from_slice(format!("{:06o}\0 ", sum + 8 * 32).as_bytes());
        assert_eq!(first_name(&block), "ü");
        block[0] = b'u';
        assert!(matches!(first(&block), Err(Error::Archive { fault: ArchiveFault::Checksum, .. })));
    }

    #[test]
    fn data_are_given_out_to_their_end_and_no_further() {
        let mut bytes = header(|block| {
            put(block, 0, b"one");
            put(block, 124, b"00000000005\0");
        });
        bytes.extend_from_slice(b"hello");
        bytes.resize(2 * BLOCK, b'#');
        bytes.extend(header(|block| put(block, 0, b"two")));
        let mut archive = Archive::new(io::BufReader::with_capacity(3, bytes.as_slice()));
        let mut data = Vec::new();
        assert_eq!(archive.next_entry().unwrap().unwrap().name, b"one");
        loop {
            let piece = archive.data().unwrap().to_vec();
            if piece.is_empty() {
                break;
            }
            archive.consume(piece.len());
            data.extend(piece);
        }
        assert_eq!(data, b"hello");
        assert_eq!(archive.next_entry().unwrap().unwrap().name, b"two");
        // Without the zero blocks, and once more when the end was reached.
        assert!(archive.next_entry().unwrap().is_none());
        assert!(archive.next_entry().unwrap().is_none());
    }

    proptest::proptest! {
        /// Whatever the bytes: an answer, in bounded memory, and no panic.
        #[test]
        fn any_bytes_have_an_answer(
            blocks in proptest::collection::vec((0_usize..512, proptest::prelude::any::<u8>(), 0_u8..12), 0..40),
        ) {
            let mut bytes = Vec::new();
            for (offset, value, kind) in blocks {
                bytes.extend(header(|block| {
                    put(block, 0, b"name");
                    put(block, 257, if kind & 1 == 0 { b"ustar  \0" } else { b"ustar\x0000" });
                    put(block, 124, b"00000000600\0");
                    block[156] = b"0SxLKg15S37x"[usize::from(kind)];
                    put(block, 386, b"00000000000\x0000000000600\0");
                    put(block, 483, b"00000000600\0");
                    block[offset] = value;
                }));
            }
            let mut archive = Archive::new(bytes.as_slice());
            while let Ok(Some(_)) = archive.next_entry() {
                while let Ok(length @ 1..) = archive.data().map(<[u8]>::len) {
                    archive.consume(length);
                }
            }
        }
    }
}
