//! A shim in the test's own process: a ttrpc server that does what it is told, so that tests can see what
//! reaches a shim and answer anything. Its binary is a shell script.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use davit_model::ErrorCode;
use davit_proto::containerd::task::v3 as wire;
use davit_proto::containerd::ttrpc::Request;
use davit_shim_protocol::frame::RpcError;
use davit_shim_protocol::server::{self, Handler};
use prost::Message;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

/// What a method is to answer.
pub type Answer = Result<Vec<u8>, RpcError>;

#[derive(Default)]
pub struct FakeShim {
    /// By method; others answer with an empty message.
    pub answers: Mutex<BTreeMap<&'static str, Answer>>,
    /// What a method answers first, once each.
    pub first_answers: Mutex<BTreeMap<&'static str, Vec<Answer>>>,
    /// The methods that never answer.
    pub hangs: Mutex<Vec<&'static str>>,
    /// The methods that answer only when there is a permit.
    pub held: Mutex<BTreeMap<&'static str, Arc<Semaphore>>>,
    /// The services that are known; empty for all.
    pub services: Vec<&'static str>,
    /// Every call that came.
    pub calls: Mutex<Vec<Request>>,
}

impl Handler for FakeShim {
    async fn call(&self, request: Request) -> Answer {
        self.calls.lock().unwrap().push(request.clone());
        if !self.services.is_empty() && !self.services.contains(&request.service.as_str()) {
            return Err(RpcError::new(ErrorCode::Unimplemented, format!("service {}", request.service)));
        }
        if self.hangs.lock().unwrap().iter().any(|method| *method == request.method) {
            std::future::pending::<()>().await;
        }
        let held = self.held.lock().unwrap().get(request.method.as_str()).cloned();
        if let Some(held) = held {
            held.acquire().await.unwrap().forget();
        }
        if let Some(first) = self.first_answers.lock().unwrap().get_mut(request.method.as_str())
            && !first.is_empty()
        {
            return first.remove(0);
        }
        let answers = self.answers.lock().unwrap();
        answers.get(request.method.as_str()).cloned().unwrap_or_else(|| Ok(Vec::new()))
    }
}

impl FakeShim {
    /// One that creates containers with a process of number 77.
    pub fn new() -> FakeShim {
        let shim = FakeShim::default();
        shim.answer("Create", Ok(wire::CreateTaskResponse { pid: 77 }.encode_to_vec()));
        shim.answer("Delete", Ok(wire::DeleteResponse { pid: 77, ..Default::default() }.encode_to_vec()));
        shim
    }

    pub fn answer(&self, method: &'static str, answer: Answer) {
        self.answers.lock().unwrap().insert(method, answer);
    }

    /// From now on the method answers once for each permit.
    pub fn hold(&self, method: &'static str) -> Arc<Semaphore> {
        self.held.lock().unwrap().entry(method).or_insert_with(|| Arc::new(Semaphore::new(0))).clone()
    }

    /// How often a method was called.
    pub fn count(&self, method: &str) -> usize {
        self.calls.lock().unwrap().iter().filter(|call| call.method == method).count()
    }

    /// The methods that were called, with their services.
    pub fn called(&self) -> Vec<(String, String)> {
        let calls = self.calls.lock().unwrap();
        calls.iter().map(|call| (call.service.clone(), call.method.clone())).collect()
    }
}

/// Serves until the handle is aborted.
pub fn serve(path: &Path, shim: Arc<FakeShim>) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(server::serve(listener, nix::unistd::geteuid(), shim))
}

/// A socket that goes on to listen while the servers on it come and go: the end of one ends its connections.
pub struct LastingSocket {
    listener: std::os::unix::net::UnixListener,
}

impl LastingSocket {
    pub fn bind(path: &Path) -> LastingSocket {
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        LastingSocket { listener }
    }

    /// Serves until the handle is aborted.
    pub fn serve(&self, shim: &Arc<FakeShim>) -> tokio::task::JoinHandle<()> {
        let listener = UnixListener::from_std(self.listener.try_clone().unwrap()).unwrap();
        tokio::spawn(server::serve(listener, nix::unistd::geteuid(), shim.clone()))
    }
}

/// A script that passes for a shim's binary. It keeps its arguments and its input in files beside itself, for
/// each action.
pub fn script(folder: &Path, body: &str) -> PathBuf {
    let path = folder.join("containerd-shim-fake-v1");
    let text = format!(
        "#!/bin/sh\nfor action; do :; done\necho \"$@\" > {0}/$action.arguments\nenv > {0}/$action.environment\n\
         pwd > {0}/$action.folder\n{body}\n",
        folder.display()
    );
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}
