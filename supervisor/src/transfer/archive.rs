//! An archive on its way into content: its blobs as they come, and then the index of its images.
//!
//! All of it blocks, on a thread that is counted for transfers, and all that it makes belongs to a lease.

use std::collections::HashMap;
use std::io::{self, Read};

use davit_distribution::Sink as _;
use davit_model::{Digest, Labels};
use davit_oci::archive::{ArchiveError, Contents, Passing, Saved};
use davit_oci::chain::sha256;
use davit_oci::image::{self, Descriptor, Index, MAX_DOCUMENT_SIZE};
use davit_oci::media_type::{self, Compression};
use davit_oci::platform::Platform;
use davit_snapshotter::layer::{Member, read_members};
use flate2::write::GzEncoder;
use tokio::runtime::Handle;

use super::Error;
use super::export::annotate;
use super::store::NsSink;
use super::unpack::UNCOMPRESSED;
use crate::metadata::{self, Content, IoWriter, NsWriter};
use crate::unique::unique;

/// How much of a blob is written at once.
const BUFFER_SIZE: usize = 256 << 10;

/// Where the blobs of one archive go.
pub(super) struct Depot {
    content: Content,
    sink: NsSink,
    runtime: Handle,
    /// What the names of its ingests begin with.
    name: String,
    count: usize,
}

impl Depot {
    /// A depot in `content`, whose lease `sink` knows.
    pub(super) fn new(content: Content, sink: NsSink) -> Depot {
        let name = format!("import-{}", unique());
        Depot { content, sink, runtime: Handle::current(), name, count: 0 }
    }

    /// Stores what an archive holds, and returns its index: that of a layout, or one that is made of Docker's table. With
    /// `compress`, layers of such a table are stored compressed.
    ///
    /// # Errors
    /// [`Error`]; what is stored by then is the lease's.
    pub(super) fn store(mut self, archive: impl Read, compress: bool) -> Result<Descriptor, Error> {
        let mut contents = Contents::default();
        read_members(archive, |member| match member {
            Member::File { name, size, data } => {
                contents.file(name, size, data, &mut |passing, data| self.blob(passing, data))
            }
            Member::Symlink { name, target } => Ok(contents.link(name, target, true)?),
            Member::HardLink { name, target } => Ok(contents.link(name, target, false)?),
        })?;
        if let Some((index, _)) = contents.layout()? {
            return self.document(media_type::OCI_INDEX, index);
        }
        let saved = contents.saved()?.ok_or(ArchiveError::Unrecognized)?;
        let packed = self.packed()?;
        let mut manifests = Vec::new();
        for image in saved {
            self.image(image, compress, &packed, &mut manifests)?;
        }
        let index = Index { schema_version: 2, media_type: String::new(), manifests };
        self.document(
            media_type::OCI_INDEX,
            &serde_json::to_vec(&index).expect("an index has string keys only"),
        )
    }

    /// Makes the manifest of one image of Docker's table.
    fn image(
        &mut self,
        mut image: Saved,
        compress: bool,
        packed: &HashMap<String, Digest>,
        manifests: &mut Vec<Descriptor>,
    ) -> Result<(), Error> {
        for layer in &mut image.layers {
            self.pack(layer, compress, packed)?;
        }
        let names = std::mem::take(&mut image.names);
        let digest = &image.config.digest;
        let config = self.sink.read(digest, MAX_DOCUMENT_SIZE);
        let config = config.map_err(|source| Error::Content { digest: digest.clone(), source })?;
        let config = image::parse_config(&config);
        let config = config.map_err(|source| Error::Document { digest: digest.clone(), source })?;
        let (mut manifest, bytes) = image.manifest();
        self.document(media_type::DOCKER_MANIFEST, &bytes)?;
        manifest.platform = Some(Platform::of(&config).normalized());
        if names.is_empty() {
            manifests.push(manifest.clone());
        }
        for name in names {
            let mut named = manifest.clone();
            annotate(&mut named.annotations, &name.to_string());
            manifests.push(named);
        }
        Ok(())
    }

    /// Content that is the compressed form of something, by the digest of that.
    fn packed(&self) -> Result<HashMap<String, Digest>, Error> {
        let infos = self.content.list(&[format!("labels.{UNCOMPRESSED:?}")])?;
        let uncompressed = |labels: &Labels| labels.get(UNCOMPRESSED).cloned();
        Ok(infos.into_iter().filter_map(|info| Some((uncompressed(&info.labels)?, info.digest))).collect())
    }

    /// Takes content that is the layer compressed, or makes such.
    fn pack(
        &mut self,
        layer: &mut Descriptor,
        compress: bool,
        packed: &HashMap<String, Digest>,
    ) -> Result<(), Error> {
        if let Some(digest) = packed.get(layer.digest.as_str()) {
            let failed = |source| Error::Content { digest: digest.clone(), source };
            if let Some(size) = self.sink.size(digest).map_err(failed)? {
                let mut start = Vec::new();
                let reader = self.runtime.block_on(self.content.reader(digest))?;
                let read = reader.take(Compression::MAGIC_LENGTH as u64).read_to_end(&mut start);
                read.map_err(|source| Error::Read { digest: digest.clone(), source })?;
                *layer = Descriptor::new(Compression::detect(&start).docker_layer(), digest.clone(), size);
                return Ok(());
            }
        }
        if compress && layer.media_type == media_type::DOCKER_LAYER {
            *layer = self.compressed(&layer.digest)?;
        }
        Ok(())
    }

    /// Stores content once more, compressed with gzip.
    fn compressed(&mut self, digest: &Digest) -> Result<Descriptor, Error> {
        let failed = |source| Error::Compress { digest: digest.clone(), source };
        let reader = self.runtime.block_on(self.content.reader(digest))?;
        let mut output = IoWriter::new(self.writer(0, None)?);
        let mut encoder = GzEncoder::new(&mut output, flate2::Compression::default());
        let copied = io::copy(&mut io::BufReader::with_capacity(BUFFER_SIZE, reader), &mut encoder);
        let ended = copied.and_then(|_| encoder.finish().map(drop));
        let writer = output.into_writer()?;
        ended.map_err(failed)?;
        let size = writer.status().offset;
        let labels = Labels::from([(UNCOMPRESSED.to_owned(), digest.to_string())]);
        let packed = commit(writer, size, None, labels)?;
        Ok(Descriptor::new(media_type::DOCKER_LAYER_GZIP, packed, size))
    }

    /// Stores a document.
    fn document(&mut self, media_type: &str, mut bytes: &[u8]) -> Result<Descriptor, Error> {
        let (digest, size) = (sha256(bytes), bytes.len() as u64);
        let passing = Passing { name: "", size, expected: Some(digest.clone()) };
        self.blob(&passing, &mut bytes)?;
        Ok(Descriptor::new(media_type, digest, size))
    }

    /// Stores a blob of the archive, unless it is there.
    fn blob(&mut self, passing: &Passing<'_>, data: &mut dyn Read) -> Result<Digest, Error> {
        let Passing { name, size, expected } = passing;
        let mut writer = match (self.writer(*size, expected.as_ref()), expected) {
            (Err(Error::Metadata(metadata::Error::AlreadyExists { .. })), Some(digest)) => {
                check_size(digest, self.content.info(digest)?.size, *size)?;
                return Ok(digest.clone());
            }
            (writer, _) => writer?,
        };
        // Another namespace may have it, and share it: then there is nothing to write.
        if *size == 0 || writer.status().offset < *size {
            let mut buffer = vec![0; BUFFER_SIZE];
            loop {
                let failed = |source| ArchiveError::Read { name: (*name).to_owned(), source };
                match data.read(&mut buffer).map_err(failed)? {
                    0 => break,
                    length => writer.write(&buffer[..length])?,
                }
            }
        }
        commit(writer, *size, expected.as_ref(), Labels::new())
    }

    fn writer(&mut self, size: u64, expected: Option<&Digest>) -> Result<NsWriter, Error> {
        self.count += 1;
        let reference = format!("{}-{}", self.name, self.count);
        Ok(self.runtime.block_on(self.content.writer(&reference, size, expected))?)
    }
}

/// Refuses content that has another size than what stands for it says.
pub(super) fn check_size(digest: &Digest, found: u64, wanted: u64) -> Result<(), Error> {
    if found == wanted {
        return Ok(());
    }
    Err(Error::Size { digest: digest.clone(), found, wanted })
}

fn commit(
    mut writer: NsWriter,
    size: u64,
    expected: Option<&Digest>,
    labels: Labels,
) -> Result<Digest, Error> {
    match writer.commit(size, expected, labels) {
        Ok(()) | Err(metadata::Error::AlreadyExists { .. }) => Ok(writer.digest()),
        Err(error) => Err(error.into()),
    }
}
