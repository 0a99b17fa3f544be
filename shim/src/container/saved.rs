//! A container on its way through an upgrade.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use super::Container;
use crate::cgroup::{Cgroup, oom};
use crate::deadline::Deadline;
use crate::executor::spawn;
use crate::log;
use crate::outbox::ContainerJournal;
use crate::process::Process;
use crate::runtime::Runtime;
use crate::shim::Shim;
use crate::state;
use crate::sync::{Condition, Lock};

impl Container {
    /// Describes the container for [`Container::restore`]; `journal` is where its journal is described. To be called when
    /// nothing is being done with it.
    pub(crate) fn save(&self, journal: u32, lend: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> state::Container {
        let (oom_event, oom_reported) = match self.oom.borrow().as_deref() {
            Some(watch) => watch.save(lend),
            None => (0, None),
        };
        state::Container {
            id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            journal,
            init: Some(self.init.save(lend)),
            execs: self.execs.borrow().values().map(|exec| exec.save(lend)).collect(),
            mounted: self.rootfs.is_some(),
            runtime: self.runtime.binary.clone(),
            runtime_root: self.runtime.root.display().to_string(),
            systemd_cgroup: self.runtime.systemd_cgroup,
            io_uid: self.io_owner.0,
            io_gid: self.io_owner.1,
            cgroup: self.cgroup.borrow().as_ref().map(Cgroup::save).unwrap_or_default(),
            oom_event,
            oom_reported,
            checkpoint: self.checkpoint.borrow().clone(),
        }
    }

    /// The container that was saved. Nothing happens with it before [`Container::watch_again`].
    ///
    /// # Errors
    /// A process cannot be waited for.
    pub(crate) fn restore(
        shim: &Rc<Shim>,
        saved: state::Container,
        journal: Rc<ContainerJournal>,
        take: &mut dyn FnMut(u32) -> io::Result<OwnedFd>,
    ) -> io::Result<Rc<Container>> {
        let bundle = PathBuf::from(saved.bundle);
        let mut execs = std::collections::BTreeMap::new();
        for exec in saved.execs {
            let exec = Process::restore(exec, take)?;
            execs.insert(exec.id.clone(), Rc::new(exec));
        }
        let init = Process::restore(saved.init.unwrap_or_default(), take)?;
        let container = Rc::new(Container {
            id: saved.id,
            shim: shim.clone(),
            runtime: Runtime {
                binary: saved.runtime,
                root: PathBuf::from(saved.runtime_root),
                bundle: bundle.clone(),
                systemd_cgroup: saved.systemd_cgroup,
                oom_score_adj: shim.oom_score_adj,
                deadline: Deadline::default(),
            },
            journal,
            rootfs: saved.mounted.then(|| bundle.join("rootfs")),
            bundle,
            cgroup: RefCell::new(Cgroup::restore(saved.cgroup)),
            oom: RefCell::default(),
            running_execs: Cell::new(execs.values().filter(|exec| exec.is_under_way()).count()),
            execs: RefCell::new(execs),
            init_dead: Cell::new(init.recorded().is_some()),
            init: Rc::new(init),
            checkpoint: RefCell::new(saved.checkpoint),
            pausing: Cell::new(false),
            oom_event: Cell::new(0),
            changed: Condition::default(),
            lifecycle: Lock::default(),
            io_owner: (saved.io_uid, saved.io_gid),
        });
        let cgroup = container.cgroup.borrow().clone();
        if let Some(cgroup) = cgroup.filter(|_| container.init.is_under_way()) {
            match oom::Watch::restore(&cgroup, saved.oom_event, saved.oom_reported, take) {
                Ok(Some(watch)) => container.watch_oom(watch),
                Ok(None) => {}
                Err(error) => {
                    log::error(format_args!("failed to watch oom events of {}: {error}", container.id));
                }
            }
        }
        Ok(container)
    }

    /// Goes on to wait for the ends of its processes.
    pub(crate) fn watch_again(self: &Rc<Container>) {
        let container = self.clone();
        match (self.init.recorded(), self.init.awaited()) {
            _ if !self.init.is_under_way() => {}
            (Some(ended), _) => {
                spawn(async move { container.init_ended(ended).await });
            }
            (None, Some(awaited)) => self.watch_init(awaited),
            (None, None) => {}
        }
        for exec in self.execs.borrow().values().filter(|exec| exec.is_under_way()).cloned() {
            let container = self.clone();
            match (exec.recorded(), exec.awaited()) {
                (Some(ended), _) => {
                    spawn(async move { container.exec_ended(&exec, ended).await });
                }
                (None, Some(awaited)) => self.watch_exec(exec, awaited),
                (None, None) => {}
            }
        }
    }
}
