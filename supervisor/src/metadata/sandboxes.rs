//! Sandboxes: what several containers share, as a record. What runs is the business of the runtime.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::SystemTime;

use davit_metadata::Txn;
use davit_model::filter::{Adaptor, Filter, label_field, text_field};
use davit_model::{Any, Labels, identifier};

use super::containers::Runtime;
use super::error::{Error, Object};
use super::schema::{self, AnyRecord, SandboxRecord, Table, time, timestamp};
use super::{Effects, Metadata, Scope, fields};

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    /// Its id, an identifier.
    pub id: String,
    /// Its labels.
    pub labels: Labels,
    /// The runtime of its shim.
    pub runtime: Runtime,
    /// The spec, passed on as it is.
    pub spec: Option<Any>,
    /// The name of the controller that runs it.
    pub sandboxer: String,
    /// What clients keep with it.
    pub extensions: BTreeMap<String, Any>,
    /// Set by Create.
    pub created_at: SystemTime,
    /// Set by Create and Update.
    pub updated_at: SystemTime,
}

impl Default for Sandbox {
    fn default() -> Self {
        Sandbox {
            id: String::new(),
            labels: Labels::new(),
            runtime: Runtime::default(),
            spec: None,
            sandboxer: String::new(),
            extensions: BTreeMap::new(),
            created_at: SystemTime::UNIX_EPOCH,
            updated_at: SystemTime::UNIX_EPOCH,
        }
    }
}

impl Adaptor for Sandbox {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.first()?.as_str() {
            "id" => text_field(&self.id),
            "labels" => label_field(&self.labels, &path[1..]),
            _ => None,
        }
    }
}

/// The sandboxes of a namespace. Changes of them send no events: their controllers do.
#[derive(Clone)]
pub struct Sandboxes {
    metadata: Metadata,
    scope: Scope,
}

impl Sandboxes {
    pub(super) fn new(metadata: Metadata, scope: Scope) -> Sandboxes {
        Sandboxes { metadata, scope }
    }

    /// A sandbox.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn get(&self, id: &str) -> Result<Sandbox, Error> {
        let record = schema::load(&self.metadata.view(), &Table::Sandbox.key(self.scope.namespace(), id))?;
        record.map(|record| from_record(id, record)).ok_or_else(|| absent(id))
    }

    /// The sandboxes that match one of the filters (`id`, `labels.*`), by id.
    ///
    /// # Errors
    /// [`Error::Filter`].
    pub fn list(&self, filters: &[String]) -> Result<Vec<Sandbox>, Error> {
        let filter = Filter::parse(filters)?;
        let view = self.metadata.view();
        let mut sandboxes = Vec::new();
        for (key, value) in view.scan(&Table::Sandbox.key(self.scope.namespace(), "")) {
            let (_, id) = Table::Sandbox.split(&key)?;
            let sandbox = from_record(id, schema::decode(&key, &value)?);
            if filter.matches(&sandbox) {
                sandboxes.push(sandbox);
            }
        }
        Ok(sandboxes)
    }

    /// Makes a sandbox; the times of the argument are ignored.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`]; [`Error::Identifier`] or [`Error::Label`] for what cannot be.
    pub async fn create(&self, mut sandbox: Sandbox) -> Result<Sandbox, Error> {
        validate(&sandbox)?;
        fields::drop_empty(&mut sandbox.labels);
        sandbox.created_at = SystemTime::now();
        sandbox.updated_at = sandbox.created_at;
        let namespace = self.scope.namespace.clone();
        let change = move |txn: &mut Txn<'_>| {
            let key = Table::Sandbox.key(&namespace, &sandbox.id);
            if txn.get(&key).is_some() {
                return Err(Error::already_exists(Object::Sandbox(sandbox.id)));
            }
            schema::touch_namespace(txn, &namespace);
            schema::store(txn, &key, &to_record(&sandbox));
            Ok((sandbox, Effects::none()))
        };
        self.metadata.write(&self.scope, change).await
    }

    /// Takes the fields that `paths` names from `sandbox`: `labels`, `labels.KEY`, `extensions`, `extensions.KEY`,
    /// `runtime`, `spec`. Without any, these four are all taken, and the runtime's name must be that of the sandbox.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Field`], [`Error::Immutable`], [`Error::Label`].
    pub async fn update(&self, sandbox: Sandbox, paths: &[String]) -> Result<Sandbox, Error> {
        let (namespace, mut paths) = (self.scope.namespace.clone(), paths.to_vec());
        let change = move |txn: &mut Txn<'_>| {
            let key = Table::Sandbox.key(&namespace, &sandbox.id);
            let record: SandboxRecord = schema::load(txn, &key)?.ok_or_else(|| absent(&sandbox.id))?;
            let mut updated = from_record(&sandbox.id, record);
            if paths.is_empty() {
                if updated.runtime.name != sandbox.runtime.name {
                    return Err(Error::Immutable { field: "sandbox.Runtime.Name" });
                }
                paths = ["labels", "extensions", "spec", "runtime"].map(str::to_owned).to_vec();
            }
            for path in paths {
                if fields::replace("labels", &path, &mut updated.labels, &sandbox.labels)
                    || fields::replace("extensions", &path, &mut updated.extensions, &sandbox.extensions)
                {
                    continue;
                }
                match path.as_str() {
                    "runtime" => updated.runtime.clone_from(&sandbox.runtime),
                    "spec" => updated.spec.clone_from(&sandbox.spec),
                    _ => return Err(Error::Field { path, object: format!("sandbox {:?}", sandbox.id) }),
                }
            }
            validate(&updated)?;
            fields::drop_empty(&mut updated.labels);
            updated.updated_at = SystemTime::now();
            schema::store(txn, &key, &to_record(&updated));
            Ok((updated, Effects::none()))
        };
        self.metadata.write(&self.scope, change).await
    }

    /// Deletes the record.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn delete(&self, id: &str) -> Result<(), Error> {
        let (namespace, id) = (self.scope.namespace.clone(), id.to_owned());
        let change = move |txn: &mut Txn<'_>| {
            let key = Table::Sandbox.key(&namespace, &id);
            if txn.get(&key).is_none() {
                return Err(absent(&id));
            }
            txn.delete(&key);
            Ok(((), Effects::removed()))
        };
        self.metadata.write(&self.scope, change).await
    }
}

fn absent(id: &str) -> Error {
    Error::not_found(Object::Sandbox(id.to_owned()))
}

fn validate(sandbox: &Sandbox) -> Result<(), Error> {
    identifier::validate(&sandbox.id)
        .map_err(|source| Error::Identifier { field: "invalid sandbox ID", source })?;
    fields::check_labels("sandbox.Labels", &sandbox.labels)
}

fn from_record(id: &str, record: SandboxRecord) -> Sandbox {
    Sandbox {
        id: id.to_owned(),
        labels: record.labels,
        runtime: Runtime { name: record.runtime, options: record.runtime_options.map(Any::from) },
        spec: record.spec.map(Any::from),
        sandboxer: record.sandboxer,
        extensions: record.extensions.into_iter().map(|(name, any)| (name, Any::from(any))).collect(),
        created_at: time(record.created),
        updated_at: time(record.updated),
    }
}

fn to_record(sandbox: &Sandbox) -> SandboxRecord {
    let extensions = &sandbox.extensions;
    SandboxRecord {
        labels: sandbox.labels.clone(),
        created: timestamp(sandbox.created_at),
        updated: timestamp(sandbox.updated_at),
        runtime: sandbox.runtime.name.clone(),
        runtime_options: sandbox.runtime.options.clone().map(AnyRecord::from),
        spec: sandbox.spec.clone().map(AnyRecord::from),
        sandboxer: sandbox.sandboxer.clone(),
        extensions: extensions
            .iter()
            .map(|(name, any)| (name.clone(), AnyRecord::from(any.clone())))
            .collect(),
    }
}
