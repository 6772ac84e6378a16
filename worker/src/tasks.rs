//! The worker's tasks, so that all of them can be ended at once.

use std::future::Future;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What runs. Each task is dropped where it stands once [`Tasks::killed`] is cancelled.
pub(crate) struct Tasks {
    /// Ends all of them.
    pub killed: CancellationToken,
    count: watch::Sender<usize>,
}

impl Tasks {
    pub fn new() -> Self {
        Self { killed: CancellationToken::new(), count: watch::Sender::new(0) }
    }

    /// Starts one.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let killed = self.killed.clone();
        let counted = Counted::new(&self.count);
        tokio::spawn(async move {
            let _counted = counted;
            killed.run_until_cancelled(task).await;
        });
    }

    /// Ends all, and waits until they are gone.
    pub async fn kill(&self) {
        self.killed.cancel();
        let _ = self.count.subscribe().wait_for(|n| *n == 0).await;
    }
}

struct Counted(watch::Sender<usize>);

impl Counted {
    fn new(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|n| *n += 1);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}
