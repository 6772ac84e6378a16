//! Ports that fail on demand.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use stoker_shared::embedded::{EmbeddedBus, EmbeddedQueue, SqliteLedger};
use stoker_shared::envelope::Envelope;
use stoker_shared::ports::*;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

fn down<T>(service: &'static str) -> PortResult<T> {
    Err(PortError::Unavailable { service, message: "it was made to fail".into() })
}

/// A ledger that can be down.
pub struct FaultyLedger {
    pub inner: SqliteLedger,
    pub down: AtomicBool,
    /// Claims are made, but their answers are lost.
    pub deaf: AtomicBool,
}

impl FaultyLedger {
    pub fn new(inner: SqliteLedger) -> Self {
        Self { inner, down: AtomicBool::new(false), deaf: AtomicBool::new(false) }
    }

    fn check(&self) -> PortResult<()> {
        if self.down.load(SeqCst) { down("Postgres") } else { Ok(()) }
    }
}

#[async_trait]
impl Ledger for FaultyLedger {
    async fn migrate(&self) -> PortResult<()> {
        self.inner.migrate().await
    }
    async fn accept(&self, job: &NewJob) -> PortResult<Accepted> {
        self.check()?;
        self.inner.accept(job).await
    }
    async fn published(&self, key: Uuid) -> PortResult<()> {
        self.check()?;
        self.inner.published(key).await
    }
    async fn unpublished(
        &self,
        older_than_ms: u64,
        after: Option<Uuid>,
        limit: u32,
    ) -> PortResult<Vec<StoredJob>> {
        self.check()?;
        self.inner.unpublished(older_than_ms, after, limit).await
    }
    async fn expiring(&self, within_s: u64, limit: u32) -> PortResult<Vec<StoredJob>> {
        self.check()?;
        self.inner.expiring(within_s, limit).await
    }
    async fn find(&self, key: Uuid) -> PortResult<Option<JobRow>> {
        self.check()?;
        self.inner.find(key).await
    }
    async fn claim(&self, claim: &Claim) -> PortResult<Claimed> {
        self.check()?;
        let answer = self.inner.claim(claim).await;
        if self.deaf.load(SeqCst) { down("Postgres") } else { answer }
    }
    async fn release(&self, claim: &Claim) -> PortResult<()> {
        self.check()?;
        self.inner.release(claim).await
    }
    async fn commit(&self, endings: Vec<Ending>) -> PortResult<Vec<Committed>> {
        self.check()?;
        self.inner.commit(endings).await
    }
    async fn cached(&self, cache_key: &str) -> PortResult<Option<CacheRow>> {
        self.check()?;
        self.inner.cached(cache_key).await
    }
    async fn bury(&self, letter: &DeadLetter) -> PortResult<()> {
        self.check()?;
        self.inner.bury(letter).await
    }
    async fn dead_letters(&self, limit: u32) -> PortResult<Vec<DeadLetter>> {
        self.inner.dead_letters(limit).await
    }
    async fn usage(&self, tenant: &str, user_id: Option<&str>, seconds: u64) -> PortResult<UsageSummary> {
        self.inner.usage(tenant, user_id, seconds).await
    }
    async fn purge(&self, retention: Retention) -> PortResult<u64> {
        self.inner.purge(retention).await
    }
    async fn ready(&self) -> PortResult<()> {
        self.check()
    }
}

/// A bus that can be down for writers, with or without doing what it was asked.
pub struct FaultyBus {
    pub inner: EmbeddedBus,
    pub down: AtomicBool,
    /// While it is down: steps are taken all the same, but their answers are lost.
    pub deaf: AtomicBool,
    /// Workers that are said to be gone although they live, as one that was frozen for a while.
    pub slandered: Mutex<HashSet<String>>,
    /// It came back empty a moment ago.
    pub young: AtomicBool,
}

impl FaultyBus {
    pub fn new(inner: EmbeddedBus) -> Self {
        Self {
            inner,
            down: AtomicBool::new(false),
            deaf: AtomicBool::new(false),
            slandered: Mutex::default(),
            young: AtomicBool::new(false),
        }
    }
}

#[async_trait]
impl Bus for FaultyBus {
    async fn open(&self, openings: &[Opening]) -> PortResult<Vec<Opened>> {
        match self.down.load(SeqCst) {
            true => down("Redis"),
            false => self.inner.open(openings).await,
        }
    }
    async fn append(&self, step: &[Append]) -> PortResult<AppendReport> {
        match (self.down.load(SeqCst), self.deaf.load(SeqCst)) {
            (false, _) => self.inner.append(step).await,
            (true, false) => down("Redis"),
            (true, true) => {
                self.inner.append(step).await?;
                down("Redis")
            }
        }
    }
    async fn read_log(&self, key: Uuid) -> PortResult<Option<ReplayLog>> {
        self.inner.read_log(key).await
    }
    async fn expire_logs(&self, keys: &[Uuid], ttl: Duration) -> PortResult<()> {
        self.inner.expire_logs(keys, ttl).await
    }
    async fn subscribe(&self, channel: &str) -> PortResult<mpsc::Receiver<Notice>> {
        self.inner.subscribe(channel).await
    }
    async fn cancel(&self, key: Uuid, ttl: Duration) -> PortResult<()> {
        self.inner.cancel(key, ttl).await
    }
    async fn is_cancelled(&self, key: Uuid) -> PortResult<bool> {
        self.inner.is_cancelled(key).await
    }
    async fn control(&self, worker: &str) -> PortResult<mpsc::Receiver<Control>> {
        self.inner.control(worker).await
    }
    async fn tell(&self, worker: &str, control: &Control) -> PortResult<bool> {
        self.inner.tell(worker, control).await
    }
    async fn announce_worker(&self, presence: &WorkerPresence) -> PortResult<()> {
        self.inner.announce_worker(presence).await
    }
    async fn announce_coordinator(&self, id: &str) -> PortResult<()> {
        self.inner.announce_coordinator(id).await
    }
    async fn retire(&self, id: &str) -> PortResult<()> {
        self.inner.retire(id).await
    }
    async fn workers(&self) -> PortResult<Vec<WorkerPresence>> {
        self.inner.workers().await
    }
    async fn known_models(&self) -> PortResult<Vec<ServedModel>> {
        self.inner.known_models().await
    }
    async fn worker_liveness(&self, id: &str) -> PortResult<Liveness> {
        if self.slandered.lock().unwrap().contains(id) {
            return Ok(Liveness::Gone);
        }
        match self.inner.worker_liveness(id).await? {
            Liveness::Gone if self.young.load(SeqCst) => Ok(Liveness::Unknown),
            liveness => Ok(liveness),
        }
    }
    async fn coordinator_liveness(&self, id: &str) -> PortResult<Liveness> {
        self.inner.coordinator_liveness(id).await
    }
    async fn ready(&self) -> PortResult<()> {
        Ok(())
    }
}

/// A wire to the queue, which can be cut: what was delivered over it and not acknowledged goes back. It also sees that
/// nothing is acknowledged that is not final.
pub struct CutQueue {
    inner: Arc<EmbeddedQueue>,
    ledger: Arc<FaultyLedger>,
    /// Acknowledgements that came too early.
    pub too_early: Arc<AtomicU32>,
    /// Acknowledgements in all.
    pub acknowledged: Arc<AtomicU32>,
    /// The broker has an alarm: it takes nothing, and goes on delivering.
    pub blocked: AtomicBool,
    /// What it did not take.
    pub refused: AtomicU32,
    /// How often it was cut; and whether it comes back.
    cuts: watch::Sender<(u32, bool)>,
}

impl CutQueue {
    pub fn new(inner: Arc<EmbeddedQueue>, ledger: Arc<FaultyLedger>) -> Self {
        let cuts = watch::Sender::new((0, true));
        Self {
            inner,
            ledger,
            too_early: Arc::default(),
            acknowledged: Arc::default(),
            blocked: AtomicBool::new(false),
            refused: AtomicU32::new(0),
            cuts,
        }
    }

    /// Waits until so many deliveries were acknowledged over it.
    pub async fn acknowledged(&self, count: u32) {
        let enough = async || self.acknowledged.load(SeqCst) >= count;
        super::eventually("the deliveries are acknowledged", enough).await;
    }

    /// Breaks the connection; it is made again at once, or stays broken.
    pub fn cut(&self, comes_back: bool) {
        self.cuts.send_modify(|(n, back)| (*n, *back) = (*n + 1, comes_back));
    }
}

struct Watched {
    inner: Arc<dyn Receipt>,
    key: Option<Uuid>,
    ledger: Arc<FaultyLedger>,
    too_early: Arc<AtomicU32>,
    acknowledged: Arc<AtomicU32>,
}

#[async_trait]
impl Receipt for Watched {
    async fn ack(&self) -> PortResult<()> {
        if let Some(key) = self.key {
            let row = self.ledger.inner.find(key).await?;
            let is_final = row.is_some_and(|row| row.state == JobState::Done);
            self.too_early.fetch_add(u32::from(!is_final), SeqCst);
        }
        self.inner.ack().await?;
        self.acknowledged.fetch_add(1, SeqCst);
        Ok(())
    }
    async fn nack(&self, requeue: bool) -> PortResult<()> {
        self.inner.nack(requeue).await
    }
    fn is_stale(&self) -> bool {
        self.inner.is_stale()
    }
}

#[async_trait]
impl Queue for CutQueue {
    async fn declare_work(&self, model: &str) -> PortResult<()> {
        self.inner.declare_work(model).await
    }
    async fn publish(&self, to: &Destination, message: Message) -> Result<(), PublishError> {
        if self.blocked.load(SeqCst) {
            self.refused.fetch_add(1, SeqCst);
            return Ok(down("RabbitMQ")?);
        }
        self.inner.publish(to, message).await
    }
    async fn consume(&self, from: &Source, prefetch: u16) -> PortResult<Consumer> {
        let (sender, deliveries) = mpsc::channel(1024);
        let (stop, gone) = (CancellationToken::new(), CancellationToken::new());
        let (inner, from) = (self.inner.clone(), from.clone());
        let (stopped, dropped) = (stop.clone(), gone.clone());
        let mut cuts = self.cuts.subscribe();
        let mut wire = inner.consume(&from, prefetch).await?;
        let (ledger, too_early) = (self.ledger.clone(), self.too_early.clone());
        let acknowledged = self.acknowledged.clone();
        let watched = move |delivery: Delivery| {
            let watched = Watched {
                inner: delivery.receipt.clone(),
                key: Envelope::from_headers(&delivery.message.headers).map(|e| e.key),
                ledger: ledger.clone(),
                too_early: too_early.clone(),
                acknowledged: acknowledged.clone(),
            };
            Delivery { receipt: Arc::new(watched), ..delivery }
        };
        tokio::spawn(async move {
            let mut sender = Some(sender);
            loop {
                tokio::select! {
                    () = dropped.cancelled() => return,
                    () = stopped.cancelled(), if sender.is_some() => {
                        wire.stop();
                        while let Some(delivery) = wire.deliveries.recv().await {
                            let _ = sender.as_ref().unwrap().send(watched(delivery)).await;
                        }
                        sender = None;
                    }
                    _ = cuts.changed() => {
                        drop(wire);
                        if !cuts.borrow_and_update().1 {
                            return dropped.cancelled().await;
                        }
                        wire = inner.consume(&from, prefetch).await.unwrap();
                    }
                    Some(delivery) = wire.deliveries.recv(), if sender.is_some() => {
                        let _ = sender.as_ref().unwrap().send(watched(delivery)).await;
                    }
                }
            }
        });
        Ok(Consumer { deliveries, stop, guard: gone.drop_guard() })
    }
    async fn depth(&self, of: &Source) -> PortResult<Option<u64>> {
        self.inner.depth(of).await
    }
    async fn ready(&self) -> PortResult<()> {
        self.inner.ready().await
    }
}
