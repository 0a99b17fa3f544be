//! Images: names for content. That the content exists is not checked; whoever stores an image sees to it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::SystemTime;

use davit_metadata::Txn;
use davit_model::filter::{Adaptor, Filter, label_field, text_field};
use davit_model::{Digest, Labels};
use davit_oci::image;

use super::error::{Error, Object};
use super::event::Event;
use super::gc::LABEL_EXPIRE;
use super::leases;
use super::schema::{self, ImageRecord, Table, time, timestamp};
use super::{Effects, Metadata, Scope, fields};

/// What a name stands for (OCI image spec, "Descriptor").
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// The type of the content.
    pub media_type: String,
    /// The digest of the content, as a text that is checked when the image is stored.
    pub digest: String,
    /// The bytes of the content.
    pub size: i64,
    /// Free text.
    pub annotations: BTreeMap<String, String>,
}

impl From<&image::Descriptor> for Descriptor {
    fn from(descriptor: &image::Descriptor) -> Descriptor {
        Descriptor {
            media_type: descriptor.media_type.clone(),
            digest: descriptor.digest.to_string(),
            size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
            annotations: descriptor.annotations.clone(),
        }
    }
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name, any text that is not empty.
    pub name: String,
    /// Its labels.
    pub labels: Labels,
    /// What it stands for.
    pub target: Descriptor,
    /// Set by Create.
    pub created_at: SystemTime,
    /// Set by Create and Update.
    pub updated_at: SystemTime,
}

impl Default for Image {
    fn default() -> Self {
        Image {
            name: String::new(),
            labels: Labels::new(),
            target: Descriptor::default(),
            created_at: SystemTime::UNIX_EPOCH,
            updated_at: SystemTime::UNIX_EPOCH,
        }
    }
}

impl Adaptor for Image {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.first()?.as_str() {
            "name" => text_field(&self.name),
            "target" => match path.get(1)?.as_str() {
                "digest" => text_field(&self.target.digest),
                "mediatype" => text_field(&self.target.media_type),
                _ => None,
            },
            "labels" => label_field(&self.labels, &path[1..]),
            "annotations" => label_field(&self.target.annotations, &path[1..]),
            _ => None,
        }
    }
}

/// The images of a namespace.
#[derive(Clone)]
pub struct Images {
    metadata: Metadata,
    scope: Scope,
}

impl Images {
    pub(super) fn new(metadata: Metadata, scope: Scope) -> Images {
        Images { metadata, scope }
    }

    /// An image.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn get(&self, name: &str) -> Result<Image, Error> {
        let record = schema::load(&self.metadata.view(), &Table::Image.key(self.scope.namespace(), name))?;
        record
            .map(|record| from_record(name, record))
            .ok_or_else(|| Error::not_found(Object::Image(name.to_owned())))
    }

    /// The images that match one of the filters (`name`, `target.digest`, `target.mediatype`, `labels.*`,
    /// `annotations.*`), by name.
    ///
    /// # Errors
    /// [`Error::Filter`].
    pub fn list(&self, filters: &[String]) -> Result<Vec<Image>, Error> {
        let filter = Filter::parse(filters)?;
        let view = self.metadata.view();
        let mut images = Vec::new();
        for (key, value) in view.scan(&Table::Image.key(self.scope.namespace(), "")) {
            let (_, name) = Table::Image.split(&key)?;
            let image = from_record(name, schema::decode(&key, &value)?);
            if filter.matches(&image) {
                images.push(image);
            }
        }
        Ok(images)
    }

    /// Stores an image under a new name. Its times are those of `source_date_epoch`, or now. One that expires is
    /// attached to the caller's lease.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`]; [`Error::Invalid`], [`Error::Label`] or [`Error::Digest`] for what cannot be;
    /// [`Error::NotFound`] for the lease.
    pub async fn create(
        &self,
        mut image: Image,
        source_date_epoch: Option<SystemTime>,
    ) -> Result<Image, Error> {
        validate(&image)?;
        drop_empty(&mut image);
        image.created_at = source_date_epoch.unwrap_or_else(SystemTime::now);
        image.updated_at = image.created_at;
        let scope = self.scope.clone();
        let change = move |txn: &mut Txn<'_>| {
            let key = Table::Image.key(scope.namespace(), &image.name);
            // First, as in containerd: a lease that is not there is what a client is told of.
            attach_if_expiring(txn, &scope, &image)?;
            if txn.get(&key).is_some() {
                return Err(Error::already_exists(Object::Image(image.name)));
            }
            schema::touch_namespace(txn, scope.namespace());
            schema::store(txn, &key, &to_record(&image));
            let event = Event::ImageCreate { name: image.name.clone(), labels: image.labels.clone() };
            Ok((image, Effects::event(event)))
        };
        self.metadata.write(&self.scope, change).await
    }

    /// Takes the fields that `paths` names from `image`: `labels`, `labels.KEY`, `target`, `annotations`,
    /// `annotations.KEY`; all of them without any.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Field`], and those of [`create`](Images::create).
    pub async fn update(
        &self,
        image: Image,
        paths: &[String],
        source_date_epoch: Option<SystemTime>,
    ) -> Result<Image, Error> {
        if image.name.is_empty() {
            return Err(Error::Invalid { rule: "Image.Name required" });
        }
        let (scope, paths) = (self.scope.clone(), paths.to_vec());
        let change = move |txn: &mut Txn<'_>| {
            let key = Table::Image.key(scope.namespace(), &image.name);
            let Some(record) = schema::load::<ImageRecord>(txn, &key)? else {
                return Err(Error::not_found(Object::Image(image.name)));
            };
            let target = record.digest.clone();
            let mut updated = from_record(&image.name, record);
            if paths.is_empty() {
                updated.labels.clone_from(&image.labels);
                updated.target.clone_from(&image.target);
            }
            for path in paths {
                let annotations = &mut updated.target.annotations;
                if fields::replace("labels", &path, &mut updated.labels, &image.labels)
                    || fields::replace("annotations", &path, annotations, &image.target.annotations)
                {
                    continue;
                }
                if path != "target" {
                    return Err(Error::Field { path, object: format!("image {:?}", image.name) });
                }
                updated.target.clone_from(&image.target);
            }
            validate(&updated)?;
            drop_empty(&mut updated);
            attach_if_expiring(txn, &scope, &updated)?;
            updated.updated_at = source_date_epoch.unwrap_or_else(SystemTime::now);
            schema::store(txn, &key, &to_record(&updated));
            let event = Event::ImageUpdate { name: updated.name.clone(), labels: updated.labels.clone() };
            // The name may have been all that kept its old target.
            let removed = updated.target.digest != target;
            Ok((updated, Effects { removed, ..Effects::event(event) }))
        };
        self.metadata.write(&self.scope, change).await
    }

    /// Deletes a name; with a `target`, only if it has this digest. With `sync`, returns when all that was kept
    /// by it alone is gone, from the backends as well.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::ImageTarget`]; [`Error::CollectionFailed`] with `sync`.
    pub async fn delete(&self, name: &str, target: Option<&str>, sync: bool) -> Result<(), Error> {
        let (scope, name) = (self.scope.clone(), name.to_owned());
        let target = target.filter(|digest| !digest.is_empty()).map(str::to_owned);
        let change = move |txn: &mut Txn<'_>| {
            let key = Table::Image.key(scope.namespace(), &name);
            let Some(record) = schema::load::<ImageRecord>(txn, &key)? else {
                return Err(Error::not_found(Object::Image(name)));
            };
            if let Some(wanted) = target
                && wanted != record.digest
            {
                return Err(Error::ImageTarget { name, found: record.digest, wanted });
            }
            txn.delete(&key);
            leases::detach(txn, &scope, &leases::image(&name));
            Ok(((), Effects::removed().with_event(Event::ImageDelete { name })))
        };
        self.metadata.write(&self.scope, change).await?;
        if sync { self.metadata.collected().await } else { Ok(()) }
    }
}

/// An image without expiry is a root by itself; one with is kept by the lease as well.
fn attach_if_expiring(txn: &mut Txn<'_>, scope: &Scope, image: &Image) -> Result<(), Error> {
    if image.labels.contains_key(LABEL_EXPIRE) {
        leases::attach(txn, scope, &leases::image(&image.name))?;
    }
    Ok(())
}

fn drop_empty(image: &mut Image) {
    fields::drop_empty(&mut image.labels);
    fields::drop_empty(&mut image.target.annotations);
}

fn validate(image: &Image) -> Result<(), Error> {
    if image.name.is_empty() {
        return Err(Error::Invalid { rule: "Image.Name required" });
    }
    fields::check_labels("image.Labels", &image.labels)?;
    image.target.digest.parse::<Digest>().map_err(|source| Error::Digest {
        field: "target.Digest",
        digest: image.target.digest.clone(),
        source,
    })?;
    if image.target.size <= 0 {
        return Err(Error::Invalid { rule: "target.Size must be greater than zero" });
    }
    if image.target.media_type.is_empty() {
        return Err(Error::Invalid { rule: "target.MediaType must be set" });
    }
    Ok(())
}

fn from_record(name: &str, record: ImageRecord) -> Image {
    Image {
        name: name.to_owned(),
        labels: record.labels,
        target: Descriptor {
            media_type: record.media_type,
            digest: record.digest,
            size: record.size,
            annotations: record.annotations,
        },
        created_at: time(record.created),
        updated_at: time(record.updated),
    }
}

fn to_record(image: &Image) -> ImageRecord {
    ImageRecord {
        labels: image.labels.clone(),
        created: timestamp(image.created_at),
        updated: timestamp(image.updated_at),
        media_type: image.target.media_type.clone(),
        digest: image.target.digest.clone(),
        size: image.target.size,
        annotations: image.target.annotations.clone(),
    }
}
