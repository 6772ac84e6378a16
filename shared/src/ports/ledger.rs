//! The ledger: says what is final. One outcome and one bill per job, however often it is delivered.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::Value;
use uuid::Uuid;

use super::PortResult;
use crate::backoff::Backoff;
use crate::outcome::code;

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// Accepted, not started.
    Waiting,
    /// An attempt has claimed it.
    Running,
    /// It has its outcome.
    Done,
}

/// A row of `llm_jobs`.
#[derive(Clone, Debug, PartialEq)]
pub struct JobRow {
    /// Job key.
    pub key: Uuid,
    /// Who pays.
    pub tenant: String,
    /// Id as given.
    pub job_id: String,
    /// Hash of the body as meant.
    pub body_hash: String,
    /// The work message's body; cleared at the end.
    pub body: Option<Bytes>,
    /// The work message's headers, likewise; absent where no coordinator wrote the row.
    pub headers: Value,
    /// Where it stands.
    pub state: JobState,
    /// Newest claimed epoch; 0 while waiting.
    pub epoch: u64,
    /// Worker that holds the epoch; `None`: nobody (waiting, handed over).
    pub owner: Option<String>,
    /// Attempts that a worker's death ended.
    pub interruptions: u32,
    /// Once done.
    pub outcome: Option<Bytes>,
}

/// A job that is accepted before it is published.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Job key.
    pub key: Uuid,
    /// Who pays.
    pub tenant: String,
    /// Id as given.
    pub job_id: String,
    /// Hash of the body as meant.
    pub body_hash: String,
    /// The work message's body, to publish it again.
    pub body: Bytes,
    /// The work message's headers, likewise.
    pub headers: Value,
    /// Row expires so many seconds from now.
    pub expires_in_s: u64,
}

/// What came of accepting.
#[derive(Clone, Debug, PartialEq)]
pub enum Accepted {
    /// It is new.
    New,
    /// It was there already, with the same body.
    Same(Box<JobRow>),
    /// The id belongs to another body.
    Taken,
}

/// An accepted job that is not done, as it was written down.
#[derive(Clone, Debug)]
pub struct StoredJob {
    /// Job key.
    pub key: Uuid,
    /// The work message's body.
    pub body: Bytes,
    /// The work message's headers.
    pub headers: Value,
}

/// A compare-and-set on a job's epoch.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Job key.
    pub key: Uuid,
    /// For a new row.
    pub tenant: String,
    /// For a new row.
    pub job_id: String,
    /// For a new row.
    pub body_hash: String,
    /// The epoch that the row must hold; `None`: there must be no row.
    pub expected: Option<u64>,
    /// The new epoch, larger.
    pub epoch: u64,
    /// The new owner.
    pub worker: String,
    /// The new count of interruptions.
    pub interruptions: u32,
    /// The queue has brought the job to the claimant: it need not be published again, whether or not a confirm was noted.
    pub delivered: bool,
    /// For a new row: expires so many seconds from now.
    pub expires_in_s: u64,
}

/// What came of a [`Claim`].
#[derive(Clone, Debug, PartialEq)]
pub enum Claimed {
    /// The epoch is ours. A worker that repeats a claim it has won wins it again: it may not have heard the first time.
    Won,
    /// It is not; this is the row as it stands (done rows can't be claimed).
    Lost(Box<JobRow>),
    /// It is not, and there is no row (expected one).
    Gone,
}

impl Claim {
    /// Whether the row already says what this claim would make it say: the same worker has won this epoch, but may not
    /// have heard of it. So a claim whose answer was lost can be repeated.
    pub fn is_held_in(&self, row: &JobRow) -> bool {
        row.state == JobState::Running
            && row.epoch == self.epoch
            && row.owner.as_deref() == Some(&self.worker)
    }
}

/// A row of `llm_requests`. Times are given as ages, because the database sets all times.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestRow {
    /// The submitter's label.
    pub user_id: Option<String>,
    /// The prompt; `""` if withheld.
    pub prompt: String,
    /// The text.
    pub response: String,
    /// Model.
    pub model: String,
    /// Completion tokens.
    pub tokens: u32,
    /// Milliseconds from start to end.
    pub execution_time_ms: u32,
    /// The outcome's metadata.
    pub metadata: Value,
    /// Key used, if any.
    pub api_key_id: Option<String>,
    /// Prompt tokens.
    pub prompt_tokens: u32,
    /// Answered from the cache.
    pub cached: bool,
    /// Why it ended.
    pub finish_reason: String,
    /// If it failed.
    pub error_code: Option<String>,
    /// Worker that ended it; empty: none.
    pub worker: String,
    /// Attempts started.
    pub attempts: u32,
    /// Milliseconds ago: accepted.
    pub queued_ms_ago: Option<u64>,
    /// Milliseconds ago: started.
    pub started_ms_ago: Option<u64>,
    /// Milliseconds ago: first token.
    pub first_token_ms_ago: Option<u64>,
}

impl RequestRow {
    /// What is left of a row that the database refuses to hold: the counts that a bill needs, and an error code that
    /// says why its texts are missing.
    pub fn minimal(&self) -> Self {
        Self {
            tokens: self.tokens,
            execution_time_ms: self.execution_time_ms,
            prompt_tokens: self.prompt_tokens,
            cached: self.cached,
            finish_reason: self.finish_reason.chars().take(32).collect(),
            error_code: Some(code::UNSTORABLE.into()),
            attempts: self.attempts,
            ..Self::default()
        }
    }
}

/// A row of `llm_cache`.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheRow {
    /// Covers model, revision, prompt, every sampling option and the tenant.
    pub cache_key: String,
    /// Hex SHA-256 of the prompt (chat: canonical JSON of the messages), for the guide's class.
    pub prompt_hash: String,
    /// The text.
    pub response: String,
    /// Model.
    pub model: String,
    /// `usage` and `finishReason`, to answer from.
    pub metadata: Value,
    /// Expires so many seconds from now; 0: never.
    pub expires_in_s: u64,
}

/// A row of `dead_letters`.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    /// Job key, when an id could be read.
    pub key: Option<Uuid>,
    /// Id, when one could be read.
    pub job_id: Option<String>,
    /// Who would have paid.
    pub tenant: String,
    /// The message as it came.
    pub body: Bytes,
    /// [`crate::outcome::code`]'s word.
    pub code: String,
    /// For people.
    pub reason: String,
    /// Attempts started.
    pub attempts: u32,
    /// Last worker; empty: none.
    pub worker: String,
}

/// A job's end, to be made final.
#[derive(Clone, Debug)]
pub struct Ending {
    /// Job key.
    pub key: Uuid,
    /// Who pays.
    pub tenant: String,
    /// Id as given.
    pub job_id: String,
    /// Hash of the body as meant.
    pub body_hash: String,
    /// Epoch of the attempt that ended it.
    pub epoch: u64,
    /// The outcome's bytes.
    pub outcome: Bytes,
    /// The bill.
    pub request: RequestRow,
    /// The answer to keep, if any.
    pub cache: Option<CacheRow>,
    /// Set if the job is given up.
    pub dead: Option<DeadLetter>,
    /// Row of `llm_jobs` expires so many seconds from now.
    pub expires_in_s: u64,
}

/// What came of an [`Ending`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Committed {
    /// It is final.
    Done,
    /// A newer epoch stands in the ledger: drop everything.
    Superseded,
    /// It was final already; these are the outcome's bytes.
    Already(Bytes),
}

/// Usage of a period, in the guide's sense.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UsageSummary {
    /// Jobs ended.
    pub request_count: u64,
    /// Completion tokens.
    pub total_tokens: u64,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Mean milliseconds.
    pub avg_execution_time: f64,
    /// Distinct models.
    pub models_used: Vec<String>,
}

/// How long rows are kept that carry no expiry of their own, seconds; 0: for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Rows of `llm_requests`, whoever wrote them.
    pub requests_s: u64,
    /// Rows of `dead_letters`.
    pub dead_letters_s: u64,
}

/// Says what is final.
#[async_trait]
pub trait Ledger: Send + Sync + 'static {
    /// Brings the schema up to date; safe when several start together.
    async fn migrate(&self) -> PortResult<()>;

    /// Writes an asynchronous job down (waiting), before it is published.
    async fn accept(&self, job: &NewJob) -> PortResult<Accepted>;

    /// The queue has confirmed an accepted job.
    async fn published(&self, key: Uuid) -> PortResult<()>;

    /// Jobs that are not done, were accepted more than `older_than_ms` ago and never confirmed by the queue: the next ones
    /// behind the key `after`, by key. The embedded ledger also gives, once after a start, every job that is not done: its
    /// queue is empty then.
    async fn unpublished(
        &self,
        older_than_ms: u64,
        after: Option<Uuid>,
        limit: u32,
    ) -> PortResult<Vec<StoredJob>>;

    /// Accepted jobs that are not done and whose rows expire in `within_s` seconds, the first to expire first. Where rows
    /// are kept for so long after their deadlines, these have passed.
    async fn expiring(&self, within_s: u64, limit: u32) -> PortResult<Vec<StoredJob>>;

    /// A job's row.
    async fn find(&self, key: Uuid) -> PortResult<Option<JobRow>>;

    /// Claims an epoch by compare-and-set.
    async fn claim(&self, claim: &Claim) -> PortResult<Claimed>;

    /// Hands over: owner = nobody, if `worker` still holds `epoch`; writes the row if there is none.
    async fn release(&self, claim: &Claim) -> PortResult<()>;

    /// Makes a batch of endings final in one transaction. A row that the database can't hold never blocks a job's end:
    /// it is stored in a minimal form with an error code. Answers are in the order of the endings.
    async fn commit(&self, endings: Vec<Ending>) -> PortResult<Vec<Committed>>;

    /// An unexpired answer; counts the hit.
    async fn cached(&self, cache_key: &str) -> PortResult<Option<CacheRow>>;

    /// Records a message that never became a job.
    async fn bury(&self, letter: &DeadLetter) -> PortResult<()>;

    /// The newest dead letters.
    async fn dead_letters(&self, limit: u32) -> PortResult<Vec<DeadLetter>>;

    /// Usage over the last `seconds`; of one user label, or of all.
    async fn usage(&self, tenant: &str, user_id: Option<&str>, seconds: u64) -> PortResult<UsageSummary>;

    /// Deletes what has expired, in bounded batches; how many rows.
    async fn purge(&self, retention: Retention) -> PortResult<u64>;

    /// Whether the service answers now.
    async fn ready(&self) -> PortResult<()>;
}

/// Brings the schema up to date, as soon as that can be done: a process may be there before its database. Every
/// coordinator and worker does it when it starts, so that none depends on another to have been first.
pub async fn bring_up_schema(ledger: &dyn Ledger) {
    let mut backoff = Backoff::new().longest(Duration::from_secs(5));
    while let Err(e) = ledger.migrate().await {
        tracing::warn!("can't bring the schema up to date yet: {e}");
        backoff.pause().await;
    }
}
