//! How long a call may take: as long as its caller waits, less the time to answer.
//!
//! A caller sends along how long it waits (ttrpc `timeout_nano`). What hangs below us, the OCI runtime above all, is ended
//! a little earlier, so that the caller learns what hung, and not only that no answer came.

use std::time::{Duration, Instant};

use crate::executor::{Either, race};
use crate::reactor::sleep;

/// The most that is kept back for the answer.
const ANSWER: Duration = Duration::from_secs(1);

/// A point in time, or none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    /// That of a call whose caller waits so long; `None` for one that waits for ever.
    pub(crate) fn of_call(timeout: Option<Duration>) -> Deadline {
        let limit = timeout.map(|timeout| timeout.saturating_sub((timeout / 10).min(ANSWER)));
        Deadline(limit.and_then(|limit| Instant::now().checked_add(limit)))
    }

    /// So long from now.
    pub(crate) fn within(limit: Duration) -> Deadline {
        Deadline(Instant::now().checked_add(limit))
    }

    /// Does the work, or gives it up (`None`) when it is time.
    pub(crate) async fn bound<T>(self, work: impl Future<Output = T>) -> Option<T> {
        let Some(end) = self.0 else { return Some(work.await) };
        match race(work, sleep(end.saturating_duration_since(Instant::now()))).await {
            Either::First(done) => Some(done),
            Either::Second(()) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_time_is_left_for_the_answer() {
        assert_eq!(Deadline::of_call(None), Deadline(None));
        for (timeout, least) in [(500, 40), (5000, 400), (240_000, 900)] {
            let timeout = Duration::from_millis(timeout);
            let Deadline(Some(end)) = Deadline::of_call(Some(timeout)) else { panic!("no deadline") };
            let left = timeout.saturating_sub(end.saturating_duration_since(Instant::now()));
            assert!(left >= Duration::from_millis(least), "{left:?} of {timeout:?}");
        }
        assert!(Deadline::of_call(Some(Duration::MAX)).0.is_none(), "further than the clock goes");
    }

    #[test]
    fn what_takes_too_long_is_given_up() {
        let (quick, slow) = crate::executor::run(async {
            let deadline = Deadline::within(Duration::from_millis(10));
            let quick = deadline.bound(async { 1 }).await;
            (quick, deadline.bound(std::future::pending::<i32>()).await)
        });
        assert_eq!((quick, slow), (Some(1), None));
    }
}
