//! Connections of strangers that have not yet said what they want.
//!
//! Anybody may connect and then say nothing. Each such connection is a task with a deadline of its own, and there is room
//! for so many: one too many ends the oldest, so that who opens connections cannot keep others out.

use std::collections::VecDeque;
use std::future::Future;

use tokio::task::{AbortHandle, JoinSet};

/// The tasks of strangers. Dropping it ends them.
pub(crate) struct Crowd {
    room: usize,
    tasks: JoinSet<()>,
    /// The oldest first.
    handles: VecDeque<AbortHandle>,
}

impl Crowd {
    /// One of `room` strangers at most.
    pub(crate) fn new(room: usize) -> Crowd {
        Crowd { room, tasks: JoinSet::new(), handles: VecDeque::new() }
    }

    /// Begins with another one. False if the oldest had to go for it.
    pub(crate) fn admit(&mut self, task: impl Future<Output = ()> + Send + 'static) -> bool {
        while self.tasks.try_join_next().is_some() {}
        self.handles.retain(|handle| !handle.is_finished());
        let is_full = self.handles.len() >= self.room;
        if is_full && let Some(oldest) = self.handles.pop_front() {
            oldest.abort();
        }
        self.handles.push_back(self.tasks.spawn(task));
        !is_full
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn one_too_many_ends_the_oldest() {
        let mut crowd = Crowd::new(2);
        let mut ends = Vec::new();
        for is_admitted in [true, true, false] {
            let (end, ended) = oneshot::channel::<()>();
            let task = async move {
                let _end = end;
                std::future::pending::<()>().await;
            };
            assert_eq!(crowd.admit(task), is_admitted);
            ends.push(ended);
        }
        assert!((&mut ends[0]).await.is_err(), "it is dropped");
        assert!(ends[1..].iter_mut().all(|end| end.try_recv() == Err(oneshot::error::TryRecvError::Empty)));
        // Who has ended takes no room.
        drop(crowd);
        let mut crowd = Crowd::new(1);
        let (end, ended) = oneshot::channel::<()>();
        assert!(crowd.admit(async move { drop(end) }));
        assert!(ended.await.is_err());
        while crowd.tasks.join_next().await.is_some() {}
        assert!(crowd.admit(async {}));
    }
}
