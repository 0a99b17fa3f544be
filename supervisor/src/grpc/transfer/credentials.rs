//! Credentials that the client is asked for, on the stream that it has opened for it.

use std::time::Duration;

use davit_distribution::{CredentialError, CredentialSource, Credentials, Secret};
use davit_proto::any;
use davit_proto::containerd::types::transfer::{AuthRequest, AuthResponse, AuthType};
use futures::future::{BoxFuture, FutureExt};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::grpc::convert::{any_from_wire, any_to_wire};
use crate::streams::Stream;

/// The time for an answer, which a person may have to type: the transfer keeps others from their turn meanwhile.
const PATIENCE: Duration = Duration::from_secs(120);

/// Asks the client of a transfer.
#[derive(Debug)]
pub(super) struct Asking {
    stream: Stream,
    reference: String,
    /// Whether a question is under way. One that was given up leaves an answer that is meant for another host: nothing
    /// is asked on the stream after that.
    asked: Mutex<bool>,
}

impl Asking {
    /// Asks on `stream`, for the sake of the image `reference`.
    pub(super) fn new(stream: Stream, reference: &str) -> Asking {
        Asking { stream, reference: reference.to_owned(), asked: Mutex::new(false) }
    }

    async fn ask(&self, host: &str) -> Result<Credentials, CredentialError> {
        let mut asked = self.asked.lock().await;
        if *asked {
            return Err(failed("an earlier question was not answered"));
        }
        *asked = true;
        let question = AuthRequest {
            host: host.to_owned(),
            reference: self.reference.clone(),
            wwwauthenticate: Vec::new(),
        };
        let sent = self.stream.send(any_from_wire(any::pack(&question))).await;
        sent.map_err(|_| failed("the client is gone"))?;
        let answer = timeout(PATIENCE, self.stream.receive()).await;
        let answer = answer.ok().and_then(|answer| answer.ok().flatten());
        let answer = answer.ok_or_else(|| failed("the client does not answer"))?;
        *asked = false;
        // What cannot be read may hold a secret all the same, and is in no text.
        match any::unpack::<AuthResponse>(&any_to_wire(answer)) {
            Ok(Some(answer)) => read(answer),
            Ok(None) | Err(_) => Err(failed("the client's answer is no AuthResponse")),
        }
    }
}

impl CredentialSource for Asking {
    fn credentials<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Credentials, CredentialError>> {
        self.ask(host).boxed()
    }
}

fn failed(reason: &str) -> CredentialError {
    CredentialError { reason: reason.to_owned() }
}

/// What an answer means. containerd's client sends an empty token if it knows nothing of the host.
fn read(answer: AuthResponse) -> Result<Credentials, CredentialError> {
    let kind = answer.auth_type();
    let AuthResponse { secret, username, .. } = answer;
    let secret = Secret::new(secret);
    Ok(match kind {
        AuthType::None => Credentials::Anonymous,
        _ if secret.is_empty() && username.is_empty() => Credentials::Anonymous,
        AuthType::Credentials => Credentials::Password { username, password: secret },
        AuthType::Refresh => Credentials::IdentityToken(secret),
        AuthType::Header => Credentials::Header(secret),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streams::Streams;
    use futures::StreamExt;

    fn answer(kind: AuthType, username: &str, secret: &str) -> AuthResponse {
        let (username, secret) = (username.to_owned(), secret.to_owned());
        AuthResponse { auth_type: kind.into(), secret, username, expire_at: None }
    }

    #[test]
    fn an_answer_means_what_containerds_client_means_by_it() {
        assert_eq!(read(answer(AuthType::Refresh, "", "")), Ok(Credentials::Anonymous));
        assert_eq!(read(answer(AuthType::None, "u", "p")), Ok(Credentials::Anonymous));
        let token = Credentials::IdentityToken(Secret::new("t"));
        assert_eq!(read(answer(AuthType::Refresh, "", "t")), Ok(token));
        let password = Credentials::Password { username: "u".to_owned(), password: Secret::new("p") };
        assert_eq!(read(answer(AuthType::Credentials, "u", "p")), Ok(password));
        assert_eq!(read(answer(AuthType::Header, "", "h")), Ok(Credentials::Header(Secret::new("h"))));
    }

    #[tokio::test]
    async fn the_answer_of_a_question_that_was_given_up_goes_to_no_other_host() {
        let streams = Streams::default();
        let (to_service, from_service) = streams.register("ns", None, "auth").unwrap().split();
        let asking = Asking::new(streams.get("ns", "auth").unwrap(), "a.example/b:1");
        let mut questions = std::pin::pin!(from_service);
        tokio::select! {
            _ = asking.ask("a.example") => panic!("nobody has answered"),
            question = questions.next() => {
                let question = any::unpack::<AuthRequest>(&any_to_wire(question.unwrap())).unwrap().unwrap();
                assert_eq!((question.host.as_str(), question.reference.as_str()), ("a.example", "a.example/b:1"));
            }
        }
        let late = any::pack(&answer(AuthType::Credentials, "u", "for a.example"));
        assert!(to_service.send(any_from_wire(late)).await);
        assert!(asking.ask("b.example").await.is_err());
    }
}
