//! `redb`: one file, a copy-on-write B-tree with checksums.

use std::path::Path;

use bytes::Bytes;
use redb::{Builder, Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::{Engine, EngineError, Summary, Write, sync_folder};

const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");
const SUMMARY: TableDefinition<'_, (), &[u8]> = TableDefinition::new("summary");

/// Pages kept in memory, in bytes. All reading is done from the index, so this only saves the inner pages of
/// the tree from being read again for each commit.
const CACHE_SIZE: usize = 4 << 20;

pub(super) struct Redb {
    database: Database,
}

impl Redb {
    pub(super) fn open(path: &Path, new: bool) -> Result<Redb, EngineError> {
        let mut builder = Builder::new();
        builder.set_cache_size(CACHE_SIZE);
        if !new {
            return Ok(Redb { database: builder.open(path).map_err(failed("open"))? });
        }
        let mut redb = Redb { database: builder.create(path).map_err(failed("create"))? };
        redb.commit(&[], Summary::default())?;
        sync_folder(path.parent().unwrap_or(Path::new("/")))?;
        Ok(redb)
    }
}

impl Engine for Redb {
    fn load(&mut self, record: &mut dyn FnMut(Bytes, Bytes)) -> Result<Option<Summary>, EngineError> {
        let read = self.database.begin_read().map_err(failed("begin to read"))?;
        let table = read.open_table(RECORDS).map_err(failed("open the table"))?;
        for entry in table.iter().map_err(failed("read"))? {
            let (key, value) = entry.map_err(failed("read"))?;
            record(Bytes::copy_from_slice(key.value()), Bytes::copy_from_slice(value.value()));
        }
        let table = read.open_table(SUMMARY).map_err(failed("open the table"))?;
        let summary = table.get(()).map_err(failed("read"))?;
        Ok(summary.and_then(|bytes| Summary::from_bytes(bytes.value())))
    }

    fn commit(&mut self, writes: &[Write], summary: Summary) -> Result<(), EngineError> {
        // The default durability is `Immediate`: the commit returns after its `fdatasync`.
        let transaction = self.database.begin_write().map_err(failed("begin to write"))?;
        {
            let mut table = transaction.open_table(RECORDS).map_err(failed("open the table"))?;
            for write in writes {
                match &write.value {
                    Some(value) => drop(table.insert(&*write.key, &**value).map_err(failed("insert"))?),
                    None => drop(table.remove(&*write.key).map_err(failed("remove"))?),
                }
            }
            let mut table = transaction.open_table(SUMMARY).map_err(failed("open the table"))?;
            table.insert((), &summary.to_bytes()[..]).map_err(failed("insert"))?;
        }
        transaction.commit().map_err(failed("commit"))
    }

    fn check(&mut self) -> Result<(), EngineError> {
        match self.database.check_integrity() {
            Ok(true) => Ok(()),
            Ok(false) => Err(EngineError::Corrupt { what: "redb repaired its file".to_owned() }),
            Err(error) => Err(failed("check integrity")(error)),
        }
    }

    fn close(self: Box<Self>) -> Result<(), EngineError> {
        // Dropping the database marks the file as cleanly closed, which saves the next open a walk through it.
        drop(self.database);
        Ok(())
    }
}

fn failed<E: Into<redb::Error>>(operation: &'static str) -> impl FnOnce(E) -> EngineError {
    move |error| EngineError::Redb { operation, source: Box::new(error.into()) }
}
