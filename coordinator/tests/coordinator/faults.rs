//! Real (embedded) ports that fail on demand: what a broker or bus does on a bad day, at a moment that a test chooses.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use stoker_shared::ports::*;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

/// How publishing to work queues goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirms {
    /// As it should.
    Prompt,
    /// The message is taken at once, its confirm comes when this is over.
    Late,
    /// The message is taken, and nothing is ever heard of it.
    TakenAndLost,
    /// The message never arrives, and nothing is ever heard of it.
    Lost,
    /// The broker can't be reached.
    Down,
    /// It has an alarm: whatever is published waits.
    Alarm,
}

/// A queue with confirms that can be interfered with.
pub struct FaultyQueue {
    inner: Arc<dyn Queue>,
    mode: watch::Sender<Confirms>,
    full: Mutex<Option<String>>,
}

impl FaultyQueue {
    /// Over a queue that works.
    pub fn new(inner: Arc<dyn Queue>) -> Arc<Self> {
        Arc::new(Self { inner, mode: watch::Sender::new(Confirms::Prompt), full: Mutex::default() })
    }

    /// From now on.
    pub fn set(&self, mode: Confirms) {
        self.mode.send_replace(mode);
    }

    /// From now on this model's queues are full.
    pub fn refuse(&self, model: &str) {
        *self.full.lock().unwrap() = Some(model.into());
    }
}

fn down<T>(service: &'static str) -> PortResult<T> {
    Err(PortError::Unavailable { service, message: "connection refused".into() })
}

#[async_trait]
impl Queue for FaultyQueue {
    async fn declare_work(&self, model: &str) -> PortResult<()> {
        self.inner.declare_work(model).await
    }

    async fn publish(&self, to: &Destination, message: Message) -> Result<(), PublishError> {
        if *self.mode.borrow() == Confirms::Alarm {
            return Err(down::<()>("RabbitMQ").unwrap_err().into());
        }
        let Destination::Work { model, .. } = to else { return self.inner.publish(to, message).await };
        if self.full.lock().unwrap().as_ref() == Some(model) {
            return Err(PublishError::Full);
        }
        let mode = *self.mode.borrow();
        match mode {
            Confirms::Prompt => self.inner.publish(to, message).await,
            Confirms::Late => {
                self.inner.publish(to, message).await?;
                let _ = self.mode.subscribe().wait_for(|mode| *mode != Confirms::Late).await;
                Ok(())
            }
            Confirms::TakenAndLost => {
                self.inner.publish(to, message).await?;
                tokio::time::sleep(Duration::from_millis(300)).await;
                Err(PublishError::Unconfirmed)
            }
            Confirms::Lost => {
                tokio::time::sleep(Duration::from_millis(300)).await;
                Err(PublishError::Unconfirmed)
            }
            Confirms::Down | Confirms::Alarm => Err(down::<()>("RabbitMQ").unwrap_err().into()),
        }
    }

    async fn consume(&self, from: &Source, prefetch: u16) -> PortResult<Consumer> {
        self.inner.consume(from, prefetch).await
    }

    async fn depth(&self, of: &Source) -> PortResult<Option<u64>> {
        self.inner.depth(of).await
    }

    async fn ready(&self) -> PortResult<()> {
        if *self.mode.borrow() == Confirms::Down { down("RabbitMQ") } else { self.inner.ready().await }
    }
}

/// A bus that loses what it is told to lose, and that can be down.
pub struct FaultyBus {
    inner: Arc<dyn Bus>,
    /// Frames with one of these indices (of the first token) never reach a subscriber; bit n: index n.
    lost: Arc<AtomicU32>,
    down: AtomicBool,
    /// Logs read.
    pub reads: AtomicU32,
}

impl FaultyBus {
    /// Over a bus that works.
    pub fn new(inner: Arc<dyn Bus>) -> Arc<Self> {
        Arc::new(Self { inner, lost: Arc::default(), down: AtomicBool::new(false), reads: AtomicU32::new(0) })
    }

    /// From now on these frames are lost on their way.
    pub fn lose(&self, seqs: impl IntoIterator<Item = u32>) {
        self.lost.store(seqs.into_iter().fold(0, |bits, seq| bits | 1 << seq), Ordering::SeqCst);
    }

    /// Whether it is down.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    fn up(&self) -> PortResult<&dyn Bus> {
        if self.down.load(Ordering::SeqCst) { down("Redis") } else { Ok(self.inner.as_ref()) }
    }
}

#[async_trait]
impl Bus for FaultyBus {
    async fn open(&self, openings: &[Opening]) -> PortResult<Vec<Opened>> {
        self.up()?.open(openings).await
    }

    async fn append(&self, step: &[Append]) -> PortResult<AppendReport> {
        self.up()?.append(step).await
    }

    async fn read_log(&self, key: Uuid) -> PortResult<Option<ReplayLog>> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.up()?.read_log(key).await
    }

    async fn expire_logs(&self, keys: &[Uuid], ttl: Duration) -> PortResult<()> {
        self.up()?.expire_logs(keys, ttl).await
    }

    async fn subscribe(&self, channel: &str) -> PortResult<mpsc::Receiver<Notice>> {
        let mut whole = self.up()?.subscribe(channel).await?;
        let (sender, receiver) = mpsc::channel(64);
        let lost = self.lost.clone();
        tokio::spawn(async move {
            while let Some(notice) = whole.recv().await {
                let rest = match notice {
                    Notice::Frames(mut frames) => {
                        let bits = lost.load(Ordering::SeqCst);
                        frames.retain(|f| bits & 1_u32.checked_shl(f.seq).unwrap_or(0) == 0);
                        Notice::Frames(frames)
                    }
                    other => other,
                };
                if sender.send(rest).await.is_err() {
                    return;
                }
            }
        });
        Ok(receiver)
    }

    async fn cancel(&self, key: Uuid, ttl: Duration) -> PortResult<()> {
        self.up()?.cancel(key, ttl).await
    }

    async fn is_cancelled(&self, key: Uuid) -> PortResult<bool> {
        self.up()?.is_cancelled(key).await
    }

    async fn control(&self, worker: &str) -> PortResult<mpsc::Receiver<Control>> {
        self.up()?.control(worker).await
    }

    async fn tell(&self, worker: &str, control: &Control) -> PortResult<bool> {
        self.up()?.tell(worker, control).await
    }

    async fn announce_worker(&self, presence: &WorkerPresence) -> PortResult<()> {
        self.up()?.announce_worker(presence).await
    }

    async fn announce_coordinator(&self, id: &str) -> PortResult<()> {
        self.up()?.announce_coordinator(id).await
    }

    async fn retire(&self, id: &str) -> PortResult<()> {
        self.up()?.retire(id).await
    }

    async fn workers(&self) -> PortResult<Vec<WorkerPresence>> {
        self.up()?.workers().await
    }

    async fn known_models(&self) -> PortResult<Vec<ServedModel>> {
        self.up()?.known_models().await
    }

    async fn worker_liveness(&self, id: &str) -> PortResult<Liveness> {
        self.up()?.worker_liveness(id).await
    }

    async fn coordinator_liveness(&self, id: &str) -> PortResult<Liveness> {
        self.up()?.coordinator_liveness(id).await
    }

    async fn ready(&self) -> PortResult<()> {
        self.up()?.ready().await
    }
}
