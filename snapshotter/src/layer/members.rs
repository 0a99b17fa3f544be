//! Archives that hold no filesystem but files to be picked, such as those of images: what is in them is shown, one
//! member after the other, and nothing is written anywhere.

use std::io::{self, BufRead, BufReader, Read};

use super::archive::{Archive, Kind};
use super::decompress::{classify, decompressor};
use super::error::Error;
use super::media_type::Declared;

/// How much of the archive is inflated at once.
const BUFFER_SIZE: usize = 128 * 1024;

/// One member of an archive. Names are as they stand there: no paths, and not to be taken for such.
pub enum Member<'a> {
    /// A file.
    File {
        /// Its name.
        name: &'a [u8],
        /// Its bytes.
        size: u64,
        /// What is in it; what is not read is skipped. Its errors hold an [`Error`].
        data: &'a mut dyn Read,
    },
    /// A symbolic link.
    Symlink {
        /// Its name.
        name: &'a [u8],
        /// What it points at.
        target: &'a [u8],
    },
    /// A further name of a file.
    HardLink {
        /// The name.
        name: &'a [u8],
        /// The file.
        target: &'a [u8],
    },
}

/// Shows the files and links of an archive, plain or compressed with gzip or zstd, to `visit`. Sparse files, folders and
/// devices are passed over. What stands behind the end of the archive is not read. The memory is that of one
/// decompressor and of the headers of one member, whatever the archive.
///
/// # Errors
/// Those of `visit`, and [`Error`].
pub fn read_members<E: From<Error>>(
    reader: impl Read,
    mut visit: impl FnMut(Member<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let (reader, compression) = decompressor(reader, Declared::Compressed)?;
    let inflated = Inflated { reader, compression };
    let mut archive = Archive::new(BufReader::with_capacity(BUFFER_SIZE, inflated));
    while let Some(entry) = archive.next_entry()? {
        let name = entry.name.as_slice();
        match &entry.kind {
            Kind::File { size, extents: None } => {
                visit(Member::File { name, size: *size, data: &mut Data(&mut archive) })?;
            }
            Kind::Symlink { target } => visit(Member::Symlink { name, target })?,
            Kind::HardLink { target } => visit(Member::HardLink { name, target })?,
            Kind::File { extents: Some(_), .. }
            | Kind::Folder
            | Kind::CharDevice { .. }
            | Kind::BlockDevice { .. }
            | Kind::Fifo => {}
        }
    }
    Ok(())
}

/// A decompressor whose errors say what they are.
struct Inflated<R> {
    reader: R,
    compression: &'static str,
}

impl<R: Read> Read for Inflated<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.reader.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io::Error::other(classify(error, self.compression))),
                Ok(length) => return Ok(length),
            }
        }
    }
}

/// The data of the current member.
struct Data<'a, R>(&'a mut Archive<R>);

impl<R: BufRead> Read for Data<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.0.data().map_err(io::Error::other)?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.0.consume(length);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn archive() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        builder.append_data(&mut header, "a/first", b"hello".as_slice()).unwrap();
        for (kind, name, target) in
            [(tar::EntryType::Symlink, "soft", "../x"), (tar::EntryType::Link, "hard", "a/first")]
        {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            builder.append_link(&mut header, name, target).unwrap();
        }
        header.set_entry_type(tar::EntryType::Fifo);
        header.set_size(0);
        builder.append_data(&mut header, "pipe", io::empty()).unwrap();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(4);
        builder.append_data(&mut header, "last", b"last".as_slice()).unwrap();
        builder.into_inner().unwrap()
    }

    /// What is seen; of files only those with an `l` in their name are read.
    fn seen(bytes: &[u8]) -> Result<String, Error> {
        let mut seen = String::new();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        read_members(bytes, |member| {
            let line = match member {
                Member::File { name, size, data } if name.contains(&b'l') => {
                    let mut found = String::new();
                    data.read_to_string(&mut found).map_err(|source| Error::Read { source })?;
                    format!("{} {size} {found}\n", text(name))
                }
                Member::File { name, size, .. } => format!("{} {size}\n", text(name)),
                Member::Symlink { name, target } => format!("{} -> {}\n", text(name), text(target)),
                Member::HardLink { name, target } => format!("{} = {}\n", text(name), text(target)),
            };
            seen.push_str(&line);
            Ok::<(), Error>(())
        })?;
        Ok(seen)
    }

    #[test]
    fn members_are_shown_in_their_order_however_they_are_packed() {
        let plain = archive();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        let zstd = zstd::encode_all(plain.as_slice(), 1).unwrap();
        let expected = "a/first 5\nsoft -> ../x\nhard = a/first\nlast 4 last\n";
        for packed in [&plain, &gzip.finish().unwrap(), &zstd] {
            assert_eq!(seen(packed).unwrap(), expected);
            assert!(seen(&packed[..packed.len() / 6]).is_err());
        }
    }

    #[test]
    fn an_endless_stream_costs_nothing_beyond_its_archive() {
        let mut members = 0;
        read_members(io::Cursor::new(archive()).chain(io::repeat(0)), |_| {
            members += 1;
            Ok::<(), Error>(())
        })
        .unwrap();
        assert_eq!(members, 4);
        // A header that announces more than the world has is skipped over until the stream ends.
        let mut header = tar::Header::new_gnu();
        header.set_path("big").unwrap();
        header.set_size(u64::from(u32::MAX) << 20);
        header.set_cksum();
        assert!(matches!(read_members(header.as_bytes().as_slice(), |_| Ok(())), Err(Error::Truncated)));
    }
}
