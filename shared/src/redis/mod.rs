//! The bus on Redis (7 or later, or a compatible server).
//!
//! Commands share one multiplexed connection, reads that may take long have a small pool, and subscriptions a connection
//! of their own. Whatever must be one decision is one Lua script (`scripts/`), and one round trip. Keys and channels are
//! listed in [`names`]; all stand under the configured prefix.

mod connection;
mod error;
mod log;
mod names;
mod pool;
mod presence;
mod script;
mod subscriptions;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use crate::config::Services;
use crate::ports::{
    Append, AppendReport, Bus, Control, Liveness, Notice, Opened, Opening, PortResult, ReplayLog,
    ServedModel, WorkerPresence,
};
use connection::{Connector, Link};
use names::Names;
use pool::ReadPool;
use script::Call;
use subscriptions::Subscriptions;

/// Pause before cancellations that may have been missed are asked for again.
const CATCH_UP_PAUSE: Duration = Duration::from_millis(200);

/// The bus on Redis.
pub struct RedisBus {
    names: Names,
    link: Link,
    pool: Arc<ReadPool>,
    subscriptions: Subscriptions,
    end: CancellationToken,
    _end_with_this: DropGuard,
}

impl RedisBus {
    /// A bus that connects in the background, and reconnects for as long as it lives.
    ///
    /// # Errors
    /// If the URL can't be read.
    pub async fn connect(services: &Services) -> PortResult<Self> {
        let connector = Connector::new(&services.redis_url)?;
        let pool = Arc::new(ReadPool::new(&connector)?);
        let end = CancellationToken::new();
        let (link, keep_link) = Link::new(connector.clone());
        let (subscriptions, keep_subscriptions) = Subscriptions::new(connector, end.clone());
        tokio::spawn(end.clone().run_until_cancelled_owned(keep_link));
        tokio::spawn(end.clone().run_until_cancelled_owned(keep_subscriptions));
        let _end_with_this = end.clone().drop_guard();
        Ok(Self { names: Names::new(services), link, pool, subscriptions, end, _end_with_this })
    }
}

#[async_trait]
impl Bus for RedisBus {
    async fn open(&self, openings: &[Opening]) -> PortResult<Vec<Opened>> {
        log::open(&self.link, &self.names, openings).await
    }

    async fn append(&self, step: &[Append]) -> PortResult<AppendReport> {
        log::append(&self.link, &self.names, step).await
    }

    async fn read_log(&self, key: Uuid) -> PortResult<Option<ReplayLog>> {
        log::read(&self.pool, &self.names, key).await
    }

    async fn expire_logs(&self, keys: &[Uuid], ttl: Duration) -> PortResult<()> {
        log::expire(&self.link, &self.names, keys, ttl).await
    }

    async fn subscribe(&self, channel: &str) -> PortResult<mpsc::Receiver<Notice>> {
        self.subscriptions.tokens(self.names.tokens(channel)).await
    }

    async fn cancel(&self, key: Uuid, ttl: Duration) -> PortResult<()> {
        let (cancellation, all, channel) =
            (self.names.cancellation(key), self.names.cancellations(), self.names.control());
        let (key_text, life, word) = (key.to_string(), log::millis(ttl), control_json(&Control::Cancel(key)));
        let mut call = Call::new(&script::CANCEL);
        call.key(&cancellation).key(&all).arg(&key_text).arg(&life).arg(&channel).arg(&word);
        self.link.call(&call).await
    }

    async fn is_cancelled(&self, key: Uuid) -> PortResult<bool> {
        self.link.query(redis::cmd("EXISTS").arg(self.names.cancellation(key))).await
    }

    async fn control(&self, worker: &str) -> PortResult<mpsc::Receiver<Control>> {
        let channels = vec![self.names.control(), self.names.control_of(worker)];
        let missed = Arc::new(Notify::new());
        let (words, receiver) = self.subscriptions.control(channels, missed.clone()).await?;
        let catch_up = catch_up(self.pool.clone(), self.names.cancellations(), words, missed);
        tokio::spawn(self.end.clone().run_until_cancelled_owned(catch_up));
        Ok(receiver)
    }

    async fn tell(&self, worker: &str, control: &Control) -> PortResult<bool> {
        let mut command = redis::cmd("PUBLISH");
        command.arg(self.names.control_of(worker)).arg(control_json(control));
        let heard: u64 = self.link.query(&command).await?;
        Ok(heard > 0)
    }

    async fn announce_worker(&self, presence: &WorkerPresence) -> PortResult<()> {
        presence::announce_worker(&self.link, &self.names, presence).await
    }

    async fn announce_coordinator(&self, id: &str) -> PortResult<()> {
        presence::announce_coordinator(&self.link, &self.names, id).await
    }

    async fn retire(&self, id: &str) -> PortResult<()> {
        presence::retire(&self.link, &self.names, id).await
    }

    async fn workers(&self) -> PortResult<Vec<WorkerPresence>> {
        presence::workers(&self.pool, &self.names).await
    }

    async fn known_models(&self) -> PortResult<Vec<ServedModel>> {
        presence::known_models(&self.pool, &self.names).await
    }

    async fn worker_liveness(&self, id: &str) -> PortResult<Liveness> {
        presence::worker_liveness(&self.link, &self.names, id).await
    }

    async fn coordinator_liveness(&self, id: &str) -> PortResult<Liveness> {
        presence::coordinator_liveness(&self.link, &self.names, id).await
    }

    async fn ready(&self) -> PortResult<()> {
        if !self.subscriptions.is_connected() {
            return Err(error::unavailable("subscriptions are not connected"));
        }
        self.link.query(&redis::cmd("PING")).await
    }
}

fn control_json(control: &Control) -> String {
    serde_json::to_string(control).expect("a word has only a name and a key")
}

/// Cancellations that were published while a worker was not connected: it is told all that still stand. It ignores
/// those of jobs that it does not run.
async fn catch_up(pool: Arc<ReadPool>, all: String, words: mpsc::Sender<Control>, missed: Arc<Notify>) {
    let mut command = redis::cmd("ZRANGE");
    command.arg(all).arg(0).arg(-1);
    loop {
        tokio::select! {
            () = words.closed() => return,
            () = missed.notified() => {}
        }
        let keys: Vec<String> = loop {
            match pool.query(&command).await {
                Ok(keys) => break keys,
                Err(_) if words.is_closed() => return,
                Err(_) => sleep(CATCH_UP_PAUSE).await,
            }
        };
        for key in keys.iter().filter_map(|key| key.parse().ok()) {
            let _ = words.try_send(Control::Cancel(key));
        }
    }
}
