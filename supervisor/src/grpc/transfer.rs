//! The Transfer service: what is moved from where to where, and what the client hears of it.

mod bytes;
mod credentials;
mod progress;

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;

use davit_distribution::hosts::{DIRECTORIES, HostOptions};
use davit_distribution::{CredentialSource, Options};
use davit_oci::platform::Platform;
use davit_oci::reference::Reference;
use davit_proto::any;
use davit_proto::containerd::services::transfer::v1::TransferRequest;
use davit_proto::containerd::services::transfer::v1::transfer_server::Transfer;
use davit_proto::containerd::types;
use davit_proto::containerd::types::transfer::{
    ImageExportStream, ImageImportStream, ImageStore, OciRegistry,
};
use http::{HeaderName, HeaderValue};
use prost_types::Any;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use super::context::Context;
use super::status::{from as to_status, invalid};
use crate::metadata::Scope;
use crate::streams::{Stream, Streams};
use crate::transfer::{ExportOptions, ExtraName, Listener, Local, Remote, Transfers, Unpack};
use credentials::Asking;
use progress::Reporter;

/// Serves transfers.
pub struct TransferService {
    transfers: Transfers,
    streams: Streams,
}

/// One end of a transfer.
enum End {
    Registry(Box<Remote>),
    Store(Local),
    Import { stream: Stream, compress: bool },
    Export { stream: Stream, options: ExportOptions },
}

impl TransferService {
    /// A service of `transfers` whose callers are talked to by `streams`.
    pub fn new(transfers: Transfers, streams: Streams) -> TransferService {
        TransferService { transfers, streams }
    }

    fn stream(&self, context: &Context, id: &str) -> Result<Stream, Status> {
        let (namespace, _) = context.as_given();
        self.streams.get(namespace.unwrap_or_default(), id).map_err(to_status)
    }

    /// One end; none for a kind that is not served.
    fn end(&self, context: &Context, any: &Any) -> Result<Option<End>, Status> {
        if let Some(registry) = any::unpack::<OciRegistry>(any).map_err(invalid)? {
            return self.remote(context, registry).map(|remote| Some(End::Registry(Box::new(remote))));
        }
        if let Some(import) = any::unpack::<ImageImportStream>(any).map_err(invalid)? {
            // Whatever type the client says, what the archive is packed with its first bytes tell.
            let stream = self.stream(context, &import.stream)?;
            return Ok(Some(End::Import { stream, compress: import.force_compress }));
        }
        if let Some(export) = any::unpack::<ImageExportStream>(any).map_err(invalid)? {
            let stream = self.stream(context, &export.stream)?;
            return Ok(Some(End::Export { stream, options: export_options(export) }));
        }
        let store = any::unpack::<ImageStore>(any).map_err(invalid)?;
        Ok(store.map(|store| End::Store(local(store))))
    }

    async fn export(
        &self,
        scope: &Scope,
        from: &Local,
        to: &Stream,
        options: ExportOptions,
        listener: &Listener,
    ) -> Result<(), Status> {
        let (out, pieces) = mpsc::channel(bytes::QUEUE);
        let making =
            async { self.transfers.export(scope, from, options, out, listener).await.map_err(to_status) };
        let mut sender = bytes::Sender::new(to);
        let sent = match tokio::try_join!(making, sender.send(pieces)) {
            Ok(_) => sender.end_archive().await,
            Err(status) => Err(status),
        };
        to.close();
        sent
    }

    async fn import(
        &self,
        scope: &Scope,
        from: &Stream,
        compress: bool,
        to: &Local,
        listener: &Listener,
    ) -> Result<(), Status> {
        let (out, pieces) = mpsc::channel(bytes::QUEUE);
        let mut receiving = pin!(bytes::receive(from, out));
        let mut importing = pin!(self.transfers.import(scope, pieces, compress, to, listener));
        let mut open = true;
        let done = loop {
            // Both go on where they were.
            tokio::select! {
                biased;
                // An archive may end before its stream does.
                done = &mut importing => break done.map_err(to_status),
                received = &mut receiving, if open => match received {
                    Ok(()) => open = false,
                    Err(status) => break Err(status),
                },
            }
        };
        from.close();
        done
    }

    fn remote(&self, context: &Context, registry: OciRegistry) -> Result<Remote, Status> {
        let text = registry.reference;
        let reference: Reference = text.parse().map_err(to_status)?;
        let resolver = registry.resolver.unwrap_or_default();
        let directories = match resolver.host_dir.as_str() {
            "" => DIRECTORIES.iter().map(PathBuf::from).collect(),
            folder => vec![PathBuf::from(folder)],
        };
        let plain_http = match resolver.default_scheme.as_str() {
            "" => None,
            "http" => Some(true),
            "https" => Some(false),
            other => return Err(invalid(format!("unknown default scheme {other:?}"))),
        };
        let credentials: Option<Arc<dyn CredentialSource>> = match resolver.auth_stream.as_str() {
            "" => None,
            id => Some(Arc::new(Asking::new(self.stream(context, id)?, &text))),
        };
        let mut headers = Vec::new();
        for (name, value) in &resolver.headers {
            // The value may be a key, and is in no text.
            let refused = || invalid(format!("unusable header {name:?}"));
            let value: HeaderValue = value.parse().map_err(|_| refused())?;
            headers.push((name.parse::<HeaderName>().map_err(|_| refused())?, value));
        }
        let hosts = HostOptions { directories, plain_http };
        let options = Options { hosts, credentials, headers, ..Options::default() };
        Ok(Remote { text, reference, options })
    }
}

fn platform(platform: types::Platform) -> Platform {
    let types::Platform { os, architecture, variant, .. } = platform;
    Platform { architecture, os, variant }.normalized()
}

fn local(store: ImageStore) -> Local {
    let unpack = |unpack: types::transfer::UnpackConfiguration| Unpack {
        platform: unpack.platform.map_or_else(Platform::host, platform),
        snapshotter: unpack.snapshotter,
    };
    let extra = |extra: types::transfer::ImageReference| ExtraName {
        name: extra.name,
        is_prefix: extra.is_prefix,
        allow_overwrite: extra.allow_overwrite,
        add_digest: extra.add_digest,
        skip_named_digest: extra.skip_named_digest,
    };
    Local {
        name: store.name,
        labels: store.labels,
        platforms: store.platforms.into_iter().map(platform).collect(),
        all_metadata: store.all_metadata,
        manifest_limit: usize::try_from(store.manifest_limit).unwrap_or(usize::MAX),
        extra_names: store.extra_references.into_iter().map(extra).collect(),
        unpacks: store.unpacks.into_iter().map(unpack).collect(),
    }
}

fn export_options(export: ImageExportStream) -> ExportOptions {
    let mut platforms: Vec<Platform> = export.platforms.into_iter().map(platform).collect();
    if platforms.is_empty() {
        platforms.push(Platform::host());
    }
    ExportOptions {
        platforms,
        all_platforms: export.all_platforms,
        for_docker: !export.skip_compatibility_manifest,
        skip_non_distributable: export.skip_non_distributable,
    }
}

/// Sends back what comes, which is how clients try a way (containerd's `echo`).
async fn echo(from: &Stream, to: &Stream) -> Result<(), Status> {
    let (out, pieces) = mpsc::channel(bytes::QUEUE);
    let mut sender = bytes::Sender::new(to);
    let echoed = tokio::try_join!(bytes::receive(from, out), sender.send(pieces)).map(drop);
    from.close();
    to.close();
    echoed
}

#[tonic::async_trait]
impl Transfer for TransferService {
    async fn transfer(&self, request: Request<TransferRequest>) -> Result<Response<()>, Status> {
        let context = Context::of(&request);
        let scope = context.scope()?;
        let TransferRequest { source, destination, options } = request.into_inner();
        let (source, destination) = (source.unwrap_or_default(), destination.unwrap_or_default());
        let progress = options.unwrap_or_default().progress_stream;
        let stream = if progress.is_empty() { None } else { Some(self.stream(&context, &progress)?) };
        let reporter = Reporter::new(stream);
        let listener = reporter.listener();
        let ends = (self.end(&context, &source)?, self.end(&context, &destination)?);
        let is_prefix = |local: &Local| local.extra_names.iter().any(|extra| extra.is_prefix);
        let done = match ends {
            (Some(End::Registry(from)), Some(End::Store(to))) => {
                self.transfers.pull(&scope, &from, &to, &listener).await.map_err(to_status)
            }
            (Some(End::Store(from)), Some(End::Registry(to))) => {
                self.transfers.push(&scope, &from, &to, &listener).await.map_err(to_status)
            }
            // Images are not looked up by prefix, there as here.
            (Some(End::Store(from)), Some(End::Export { stream, options })) if !is_prefix(&from) => {
                self.export(&scope, &from, &stream, options, &listener).await
            }
            (Some(End::Store(from)), Some(End::Store(to))) => {
                self.transfers.tag(&scope, &from, &to).await.map_err(to_status)
            }
            (Some(End::Import { stream, compress }), Some(End::Store(to))) => {
                self.import(&scope, &stream, compress, &to, &listener).await
            }
            (Some(End::Import { stream: from, .. }), Some(End::Export { stream: to, .. })) => {
                echo(&from, &to).await
            }
            _ => {
                let (source, destination) = (&source.type_url, &destination.type_url);
                let text = format!("method Transfer not implemented for {source} to {destination}");
                return Err(Status::unimplemented(text));
            }
        };
        reporter.finish().await;
        done.map(Response::new)
    }
}
