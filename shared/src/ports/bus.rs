//! The bus: carries tokens to whoever reads them now, remembers the running half of each text, and knows who is there.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::PortResult;
use crate::frame::Frame;

/// How long a presence lasts unless it is renewed.
pub const PRESENCE_PERIOD: Duration = Duration::from_secs(3);

/// Words that a control channel holds for a worker that does not read them. So many that only a process that hangs
/// misses one; places are allocated as they fill.
pub(crate) const CONTROL_CAPACITY: usize = 1 << 20;

/// The replay log's header: who may append to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogHeader {
    /// Epoch of the attempt.
    pub epoch: u64,
    /// Its worker's id.
    pub worker: String,
    /// The seed that its random numbers come from.
    pub seed: u64,
    /// Weights revision.
    pub revision: String,
    /// The token channel that its frames go to; empty: its writer did not say.
    #[serde(default)]
    pub channel: String,
}

/// A job's replay log.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplayLog {
    /// Who may append.
    pub header: LogHeader,
    /// All records, in order.
    pub frames: Vec<Frame>,
}

/// The start of an attempt: writes the log's header.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Job key.
    pub key: Uuid,
    /// The attempt.
    pub header: LogHeader,
    /// When the log expires.
    pub ttl: Duration,
}

/// What came of an [`Opening`].
#[derive(Clone, Debug, PartialEq)]
pub enum Opened {
    /// The log is ours. Records are those of earlier attempts, empty on a first one.
    Started {
        /// Records so far.
        frames: Vec<Frame>,
        /// The job has been cancelled.
        cancelled: bool,
    },
    /// A newer epoch (or another header with the same one) holds the log; it was left as it is.
    Superseded {
        /// That epoch.
        epoch: u64,
    },
}

/// One job's part of a step: a record for its log, published at the same time.
#[derive(Clone, Debug)]
pub struct Append {
    /// Job key.
    pub key: Uuid,
    /// Epoch of the writer; refused unless it holds the log.
    pub epoch: u64,
    /// Channel to publish to, without prefix handling: as in the job.
    pub channel: String,
    /// A [`Frame`] as JSON.
    pub record: Bytes,
    /// The log may not be open yet: opens it for the writer if there is none. A log that another attempt holds is left
    /// as it is. A worker that gives a job to its engine while the log is being opened sends its first records so.
    pub opening: Option<Opening>,
}

/// What came of one [`Append`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// Recorded and published.
    Accepted,
    /// A newer epoch holds the log; nothing was recorded or published.
    Superseded,
    /// The writer's log is not there: the service lost it, and at most an older epoch has opened one since. Nothing was
    /// recorded or published. Open it again and append everything.
    Missing,
}

/// What came of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AppendReport {
    /// In the order of the step.
    pub jobs: Vec<Appended>,
    /// Channels that frames were published to and nobody listens on.
    pub unheard: Vec<String>,
}

/// What a subscriber to a token channel hears.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// Frames of any number of jobs.
    Frames(Vec<Frame>),
    /// The subscription was interrupted: frames may be missing, read the logs.
    Interrupted,
}

/// A word to workers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Control {
    /// End this job.
    Cancel(Uuid),
    /// Take no more jobs, hand over what runs, exit.
    Drain,
    /// Nothing: asks whether anybody hears it.
    Ping,
}

/// A model that a worker serves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServedModel {
    /// Name.
    pub name: String,
    /// Weights revision.
    pub revision: String,
    /// Context length, tokens.
    pub context: u32,
    /// Architecture.
    pub architecture: String,
    /// Number format.
    pub format: String,
    /// Most jobs that run together.
    pub slots: u32,
    /// Jobs that run.
    pub active: u32,
}

/// What a worker says of itself each second.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkerPresence {
    /// New at every start.
    pub id: String,
    /// Version of the software.
    pub version: String,
    /// What it serves.
    pub models: Vec<ServedModel>,
    /// `cpu`, `wgpu`, `cuda`, `echo`.
    pub backend: String,
    /// Device, for people.
    pub device: String,
    /// Most jobs that run together, all models.
    pub slots: u32,
    /// Jobs that run.
    pub active: u32,
    /// Lately.
    pub tokens_per_second: f64,
    /// It takes no more jobs.
    pub draining: bool,
}

/// What is known of another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// It is there.
    Alive,
    /// It is gone: its control channel reaches nobody, or its presence has expired.
    Gone,
    /// Its presence is missing, but so would everybody's be: the service came back empty a moment ago.
    Unknown,
}

/// Carries tokens, remembers running texts, knows who is there.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Writes headers, reads logs and cancellations, for a batch of attempts in one round trip.
    async fn open(&self, openings: &[Opening]) -> PortResult<Vec<Opened>>;

    /// Records and publishes one step of many jobs atomically: one message per channel, refused jobs left out.
    /// After an error it is open whether the step was taken; readers tolerate records that are repeated. That the
    /// connection was lost is an error even once it is back: the service may have lost the newest records, so open the
    /// logs again.
    async fn append(&self, step: &[Append]) -> PortResult<AppendReport>;

    /// Reads a log; `None` if there is none.
    async fn read_log(&self, key: Uuid) -> PortResult<Option<ReplayLog>>;

    /// Makes logs of ended jobs expire early; none expires later than it would have.
    async fn expire_logs(&self, keys: &[Uuid], ttl: Duration) -> PortResult<()>;

    /// Subscribes to a token channel. Returns once the subscription stands; it outlives reconnections.
    /// A subscriber that does not keep up loses messages and hears [`Notice::Interrupted`].
    async fn subscribe(&self, channel: &str) -> PortResult<mpsc::Receiver<Notice>>;

    /// Leaves a cancellation for whoever runs or will run the job, then tells all workers.
    async fn cancel(&self, key: Uuid, ttl: Duration) -> PortResult<()>;

    /// Whether a job was cancelled.
    async fn is_cancelled(&self, key: Uuid) -> PortResult<bool>;

    /// What is said to all workers and to this one. Subscribed when it returns; outlives reconnections.
    async fn control(&self, worker: &str) -> PortResult<mpsc::Receiver<Control>>;

    /// Says something to one worker; whether anybody heard it.
    async fn tell(&self, worker: &str, control: &Control) -> PortResult<bool>;

    /// Renews a worker's presence and registers its models.
    async fn announce_worker(&self, presence: &WorkerPresence) -> PortResult<()>;

    /// Renews a coordinator's presence.
    async fn announce_coordinator(&self, id: &str) -> PortResult<()>;

    /// Withdraws a presence at a clean end.
    async fn retire(&self, id: &str) -> PortResult<()>;

    /// All workers that are there.
    async fn workers(&self) -> PortResult<Vec<WorkerPresence>>;

    /// Every model that a worker ever announced here, whether or not it is served now.
    async fn known_models(&self) -> PortResult<Vec<ServedModel>>;

    /// Whether a worker's process is there: its control channel has a receiver and its presence is fresh.
    async fn worker_liveness(&self, id: &str) -> PortResult<Liveness>;

    /// Whether the service came back empty a moment ago, so that what it does not know means nothing yet.
    async fn may_have_forgotten(&self) -> PortResult<bool> {
        // Nobody has this name. Then nobody is gone, or nobody can tell.
        Ok(self.worker_liveness("").await? == Liveness::Unknown)
    }

    /// Whether a coordinator's presence is fresh.
    async fn coordinator_liveness(&self, id: &str) -> PortResult<Liveness>;

    /// Whether the service answers now.
    async fn ready(&self) -> PortResult<()>;
}
