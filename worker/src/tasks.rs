//! The worker's tasks, so that all of them can be ended at once, and so that those can be waited for that must not be.

use std::future::Future;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What runs. Each task is dropped where it stands once [`Tasks::killed`] is cancelled.
pub(crate) struct Tasks {
    /// Ends all of them.
    pub killed: CancellationToken,
    count: watch::Sender<usize>,
    settling: watch::Sender<usize>,
}

impl Tasks {
    pub fn new() -> Self {
        Self {
            killed: CancellationToken::new(),
            count: watch::Sender::new(0),
            settling: watch::Sender::new(0),
        }
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

    /// Starts one that answers and acknowledges deliveries: one that is ended on its way leaves an answer that was given
    /// and will be given again.
    pub fn spawn_settling(&self, task: impl Future<Output = ()> + Send + 'static) {
        let counted = Counted::new(&self.settling);
        self.spawn(async move {
            let _counted = counted;
            task.await;
        });
    }

    /// Waits until nothing is being answered or acknowledged, for so long at most.
    pub async fn settled(&self, limit: Duration) {
        let mut settling = self.settling.subscribe();
        let _ = tokio::time::timeout(limit, settling.wait_for(|n| *n == 0)).await;
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
