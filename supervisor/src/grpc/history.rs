//! The private Events service: what happened, from the history.

use std::pin::Pin;
use std::time::SystemTime;

use davit_model::Filter;
use davit_proto::containerd::types;
use davit_proto::davit::services::events::v1 as wire;
use davit_proto::davit::services::events::v1::events_server::Events;
use davit_proto::davit::services::events::v1::{entry, follow_request, list_request};
use futures::{Stream, StreamExt};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::status::invalid;
use super::{convert, notice};
use crate::events::{Envelope, Found, History, Query, Since};

/// Serves the history.
pub struct HistoryService {
    history: History,
}

impl HistoryService {
    /// A service over `history`.
    pub fn new(history: History) -> HistoryService {
        HistoryService { history }
    }

    async fn query(&self, query: Query) -> Response<Entries> {
        let found = self.history.query(notice::READING, query).await;
        Response::new(Box::pin(ReceiverStream::new(found).map(|(cursor, found)| Ok(entry(cursor, found)))))
    }
}

type Entries = Pin<Box<dyn Stream<Item = Result<wire::Entry, Status>> + Send>>;

#[tonic::async_trait]
impl Events for HistoryService {
    type ListStream = Entries;

    async fn list(&self, request: Request<wire::ListRequest>) -> Result<Response<Entries>, Status> {
        let wire::ListRequest { since, until, filters, limit } = request.into_inner();
        let since = match since {
            None => Since::Cursor(0),
            Some(list_request::Since::Time(time)) => Since::Time(moment("since", time)?),
            Some(list_request::Since::Cursor(cursor)) => Since::Cursor(cursor),
        };
        let until = until.map(|time| moment("until", time)).transpose()?;
        let filter = Filter::parse(&filters).map_err(invalid)?;
        let limit = (limit > 0).then_some(limit);
        Ok(self.query(Query { since, until, filter, limit, follow: false }).await)
    }

    type FollowStream = Entries;

    async fn follow(&self, request: Request<wire::FollowRequest>) -> Result<Response<Entries>, Status> {
        let wire::FollowRequest { since, filters } = request.into_inner();
        let since = match since {
            None => Since::Now,
            Some(follow_request::Since::Time(time)) => Since::Time(moment("since", time)?),
            Some(follow_request::Since::Cursor(cursor)) => Since::Cursor(cursor),
        };
        let filter = Filter::parse(&filters).map_err(invalid)?;
        Ok(self.query(Query { since, until: None, filter, limit: None, follow: true }).await)
    }
}

fn moment(field: &str, time: prost_types::Timestamp) -> Result<SystemTime, Status> {
    convert::time_from_wire(time).ok_or_else(|| invalid(format!("{field} is no time")))
}

fn entry(cursor: u64, found: Found) -> wire::Entry {
    let what = match found {
        Found::Event(Envelope { timestamp, namespace, topic, event, cause }) => {
            let (timestamp, event) = (Some(timestamp.into()), Some(convert::any_to_wire(event)));
            let envelope = Some(types::Envelope { timestamp, namespace, topic, event });
            entry::What::Event(wire::Event { envelope, cause: cause.name().to_owned() })
        }
        Found::Gap { lost, time } => entry::What::Gap(wire::Gap { lost, time: Some(time.into()) }),
    };
    wire::Entry { cursor, what: Some(what) }
}
