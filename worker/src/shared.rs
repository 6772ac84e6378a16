//! What all parts of a worker hold on to.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use stoker_engine::{Engine, ModelInfo};
use stoker_shared::config::Config;
use stoker_shared::ports::Ports;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::attempt::Table;
use crate::commit::Ended;
use crate::meter::Meter;
use crate::outbox::Steps;
use crate::tasks::Tasks;

/// How ids of workers begin; those of coordinators begin otherwise.
pub(crate) const WORKER_ID_PREFIX: &str = "w-";

/// Long prompts and response formats that are prepared at the same time.
const PREPARED_TOGETHER: usize = 4;

/// A model that this worker serves.
pub(crate) struct Served {
    pub engine: Box<dyn Engine>,
    pub meter: Meter,
}

impl Served {
    pub fn new(engine: Box<dyn Engine>) -> Self {
        let meter = Meter::new(&engine.info().name);
        Self { engine, meter }
    }

    pub fn info(&self) -> &ModelInfo {
        self.engine.info()
    }
}

/// A worker.
pub(crate) struct Shared {
    /// New at every start.
    pub id: String,
    pub config: Config,
    pub ports: Ports,
    pub tasks: Tasks,
    /// Cancelled when no more jobs are to be taken.
    pub draining: CancellationToken,
    /// Cancelled when somebody told the worker to drain.
    pub told_to_drain: CancellationToken,
    /// True once others can see that it is there: until then a job must not start here.
    pub announced: watch::Sender<bool>,
    /// What the engines did and the outbox has not looked at.
    pub steps: Arc<Steps>,
    /// One suspect at a time.
    pub suspects: Arc<Semaphore>,
    /// Long prompts and response formats that are being prepared.
    pub preparing: Arc<Semaphore>,
    /// Numbers of attempts whose log is to be opened.
    pub to_open: mpsc::UnboundedSender<u64>,
    /// Ends that are to be made final.
    pub to_commit: mpsc::UnboundedSender<Ended>,
    table: Mutex<Table>,
    served: RwLock<Vec<Arc<Served>>>,
    failed: AtomicBool,
}

/// What some parts alone read from.
pub(crate) struct Inboxes {
    pub opening: mpsc::UnboundedReceiver<u64>,
    pub commit: mpsc::UnboundedReceiver<Ended>,
}

impl Shared {
    pub fn new(config: Config, ports: Ports) -> (Arc<Self>, Inboxes) {
        // Neither channel holds more than the deliveries that the queue lets this worker have.
        let (to_open, opening) = mpsc::unbounded_channel();
        let (to_commit, commit) = mpsc::unbounded_channel();
        let shared = Self {
            id: format!("{WORKER_ID_PREFIX}{}", Uuid::new_v4()),
            config,
            ports,
            tasks: Tasks::new(),
            draining: CancellationToken::new(),
            told_to_drain: CancellationToken::new(),
            announced: watch::Sender::new(false),
            steps: Arc::new(Steps::default()),
            suspects: Arc::new(Semaphore::new(1)),
            preparing: Arc::new(Semaphore::new(PREPARED_TOGETHER)),
            to_open,
            to_commit,
            table: Mutex::new(Table::default()),
            served: RwLock::new(Vec::new()),
            failed: AtomicBool::new(false),
        };
        (Arc::new(shared), Inboxes { opening, commit })
    }

    /// Starts a task that ends with the worker.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// All jobs here. Held for moments only, never across an await.
    pub fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn serve(&self, served: Vec<Arc<Served>>) {
        *self.served.write().unwrap_or_else(PoisonError::into_inner) = served;
    }

    pub fn served(&self) -> Vec<Arc<Served>> {
        self.served.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// An engine's thread has ended. Nothing can be finished here, and others take over only what this worker is known
    /// not to run: so it stops as a whole, at once.
    pub fn engine_died(&self) {
        if !self.tasks.killed.is_cancelled() {
            self.failed.store(true, Ordering::Release);
            self.tasks.killed.cancel();
        }
    }

    /// Whether an engine died.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Waits until no job is here.
    pub async fn idle(&self) {
        while !self.table().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Lets go of all jobs and engines, so that nothing here keeps anything alive. An engine's thread may have to end a
    /// step before it is gone.
    pub async fn forget_all(&self) {
        self.table().clear();
        let served = std::mem::take(&mut *self.served.write().unwrap_or_else(PoisonError::into_inner));
        let _ = tokio::task::spawn_blocking(move || drop(served)).await;
    }
}
