//! From a checked job to its stream of frames: the cache, else an identical job in flight, else the queue.
//!
//! A connected job is published by a task of its own, beside the stream: the first token does not wait for the broker's
//! confirm, and the job does not depend on the request that began it, because others may have joined. A job that nobody
//! is connected to is written to the ledger before it is published. The window that keeps the broker's queue short will
//! go in between `register` and `publish`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::counter;
use stoker_shared::config::Config;
use stoker_shared::job::{CachePolicy, Lane};
use stoker_shared::outcome::{FinishReason, JobError, Usage, code};
use stoker_shared::ports::{
    Accepted, CacheRow, Destination, JobRow, JobState, Message, NewJob, PortResult, Ports, PublishError,
};
use stoker_shared::telemetry::metric;
use uuid::Uuid;

use crate::billing::Billing;
use crate::inbox::{End, Feed, Inbox, SAME_MOMENT};
use crate::prepare::{Intent, Prepared, Travel, prepare};
use crate::routing::{Model, Patience, Router};
use crate::stored;
use crate::ticket::Ticket;

/// The cache is asked no longer than this: generating is the alternative.
const CACHE_LIMIT: Duration = Duration::from_millis(500);
/// The broker has so long, over what the adapter itself allows it.
const PUBLISH_LIMIT: Duration = Duration::from_secs(15);
/// A submitter of an asynchronous job waits no longer than this for the broker: the ledger has the job already.
const QUEUED_PUBLISH_LIMIT: Duration = Duration::from_secs(5);
/// A request joins a job that leaves it at least this share of its own time.
const LEAST_SHARE: f64 = 0.9;
/// The ledger has so long to accept a job, or to find one.
const LEDGER_LIMIT: Duration = Duration::from_secs(5);

/// Submits jobs.
pub struct Dispatch {
    /// This coordinator's id.
    pub id: String,
    /// What the operator set.
    pub config: Config,
    /// The services.
    pub ports: Ports,
    /// Who waits for which job.
    pub inbox: Arc<Inbox>,
    /// Which model serves a job.
    pub router: Router,
    /// Where rows of requests without a job go.
    pub billing: Billing,
}

/// An asynchronous job that was accepted.
pub struct Queued {
    /// Its id.
    pub id: String,
    /// Where it stands.
    pub state: JobState,
}

impl Dispatch {
    /// Submits a job for a client that is connected and waits. `only_end`: it does not read as the text comes.
    pub async fn connect(self: &Arc<Self>, intent: Intent, only_end: bool) -> Result<Ticket, JobError> {
        if !self.inbox.listening() {
            return Err(JobError::out_of_reach("bus"));
        }
        let model = self.router.route(intent.job.model_name(), Patience::Connected).await?;
        let accepted = intent.accepted;
        let caller = intent.caller.clone();
        let travel = Travel::Connected { coordinator: &self.id, channel: self.inbox.channel() };
        let prepared = prepare(intent, model, travel, &self.config.coordinator)?;
        let Prepared { envelope, model, deadline, .. } = &prepared;
        let key = envelope.key;
        let free = |ticket: Ticket, prepared: Prepared| {
            let billing = self.billing.clone();
            Ok(ticket.free(prepared.job, caller.tenant.to_string(), caller.api_key_id.clone(), billing))
        };

        // Joining someone's last seconds would cut this request's time short; someone whose deadline is later would be
        // waited for beyond this one's.
        let time = deadline.saturating_duration_since(accepted);
        let deadlines = accepted + time.mul_f64(LEAST_SHARE)..=*deadline + SAME_MOMENT;
        let joined = prepared.identity.as_deref();
        if let Some(reader) = joined.and_then(|identity| self.inbox.join(identity, &deadlines, only_end)) {
            return free(Ticket::own(key, model.clone(), accepted, reader), prepared);
        }
        if let Some((text, end)) = self.cached(&prepared).await {
            counter!(metric::CACHE_HITS, "model" => model.name.clone()).increment(1);
            let reader = self.inbox.finished(key, text, end);
            return free(Ticket::own(key, model.clone(), accepted, reader), prepared);
        }
        let message = prepared.message()?;
        let feed = Feed::new(key, prepared.identity.clone(), *deadline, true);
        let (reader, joined) = self.inbox.register(feed.clone(), &deadlines, only_end);
        let ticket = Ticket::own(key, model.clone(), accepted, reader);
        if joined {
            return free(ticket, prepared);
        }
        tokio::spawn(self.clone().publish_connected(feed, model.clone(), prepared.job.lane, message));
        Ok(ticket)
    }

    /// The kept answer, if there may be one and the ledger gives it in time.
    pub async fn cached(&self, prepared: &Prepared) -> Option<(String, End)> {
        if prepared.cache != CachePolicy::Use {
            return None;
        }
        let key = prepared.envelope.cache_key.as_deref()?;
        match tokio::time::timeout(CACHE_LIMIT, self.ports.ledger.cached(key)).await {
            Ok(Ok(row)) => row.map(answer),
            Ok(Err(e)) => {
                tracing::debug!("the cache can't be asked: {e}");
                None
            }
            Err(_) => None,
        }
    }

    async fn publish_connected(
        self: Arc<Self>,
        feed: Arc<Feed>,
        model: Arc<Model>,
        lane: Lane,
        message: Message,
    ) {
        let error = match self.publish(&model, lane, message, PUBLISH_LIMIT).await {
            Ok(()) => return,
            Err(PublishError::Unconfirmed) if feed.begun() => {
                tracing::info!(job = %feed.key, "no confirm came, but a worker has the job");
                return;
            }
            Err(e) => e,
        };
        tracing::warn!(job = %feed.key, "not published: {error}");
        if matches!(error, PublishError::Unconfirmed) {
            self.inbox.cancel(feed.key, feed.deadline);
        }
        self.inbox.fail(&feed, refusal(&error, &model));
    }

    /// Puts a job on its work queue and awaits the confirm; declares the queue if it is missing.
    pub async fn publish(
        &self,
        model: &Model,
        lane: Lane,
        message: Message,
        limit: Duration,
    ) -> Result<(), PublishError> {
        let to = Destination::Work { model: model.name.to_string(), lane };
        let attempt = async {
            match self.ports.queue.publish(&to, message.clone()).await {
                Err(PublishError::Unroutable) => {
                    self.router.registry.declare_now(&model.name).await;
                    self.ports.queue.publish(&to, message).await
                }
                settled => settled,
            }
        };
        tokio::time::timeout(limit, attempt).await.unwrap_or(Err(PublishError::Unconfirmed))
    }

    /// Accepts a job that nobody is connected to: into the ledger, then onto the queue. Once the ledger has it, it is
    /// accepted, whatever the broker says: what waits there is published again until it is confirmed.
    pub async fn enqueue(self: &Arc<Self>, intent: Intent, id: Option<String>) -> Result<Queued, JobError> {
        let chosen = id.as_ref().map(|id| (intent.caller.tenant.clone(), id.clone(), intent.job.body_hash()));
        let prepared = match self.prepare_queued(intent, id).await {
            Ok(prepared) => prepared,
            // What was accepted once stays so, even if it would be refused now.
            Err(error) => {
                let Some((tenant, id, body_hash)) = chosen else { return Err(error) };
                let known = self.known(&tenant, &id, &body_hash).await?;
                return known.map(|row| Queued { id, state: row.state }).ok_or(error);
            }
        };
        let message = prepared.message()?;
        let id = message.id.clone();
        match self.accept(&prepared, &message).await? {
            Accepted::New => {}
            Accepted::Same(row) => return Ok(Queued { id, state: row.state }),
            Accepted::Taken => return Err(id_taken(&id)),
        }
        let key = prepared.envelope.key;
        if let Some((text, end)) = self.cached(&prepared).await {
            counter!(metric::CACHE_HITS, "model" => prepared.model.name.clone()).increment(1);
            match crate::closing::answer_from_cache(self, &prepared, text, end).await {
                Ok(()) => return Ok(Queued { id, state: JobState::Done }),
                Err(e) => {
                    tracing::warn!(job = %key, "the cached answer can't be made final, so it runs: {e}")
                }
            }
        }
        match self.publish(&prepared.model, prepared.job.lane, message, QUEUED_PUBLISH_LIMIT).await {
            Ok(()) => self.confirm(key),
            Err(e) => tracing::warn!(job = %key, "accepted, but not on the queue yet: {e}"),
        }
        Ok(Queued { id, state: JobState::Waiting })
    }

    async fn prepare_queued(&self, intent: Intent, id: Option<String>) -> Result<Prepared, JobError> {
        let model = self.router.route(intent.job.model_name(), Patience::Queued).await?;
        prepare(intent, model, Travel::Queued { id, front_door: false }, &self.config.coordinator)
    }

    /// Writes a job down in the ledger.
    pub async fn accept(&self, prepared: &Prepared, message: &Message) -> Result<Accepted, JobError> {
        let new = new_job(prepared, message, self.config.coordinator.job_retention_s);
        in_time(self.ports.ledger.accept(&new)).await
    }

    /// The job of a tenant with an id that it chose, if it was accepted with the same body.
    pub async fn known(&self, tenant: &str, id: &str, body_hash: &str) -> Result<Option<JobRow>, JobError> {
        let row = in_time(self.ports.ledger.find(stoker_shared::envelope::key_of(tenant, id))).await?;
        Ok(row.filter(|row| row.body_hash == body_hash))
    }

    /// Notes, in the background, that the queue has an accepted job. Should that fail, the job is published again, and
    /// the claim in the ledger keeps it from running twice.
    pub fn confirm(self: &Arc<Self>, key: Uuid) {
        let this = self.clone();
        tokio::spawn(async move {
            if let Err(e) = this.ports.ledger.published(key).await {
                tracing::debug!(job = %key, "the ledger does not know yet that the job is on the queue: {e}");
            }
        });
    }

    /// A tenant's job by the id that it was given.
    pub async fn find(&self, tenant: &str, id: &str) -> Result<Option<JobRow>, JobError> {
        let given = stoker_shared::envelope::key_of(tenant, id);
        let minted: Option<Uuid> = id.parse().ok();
        for key in std::iter::once(given).chain(minted) {
            let found = in_time(self.ports.ledger.find(key)).await?;
            if let Some(row) = found.filter(|row| row.tenant == tenant) {
                return Ok(Some(row));
            }
        }
        Ok(None)
    }
}

/// The error of a job whose id another one has.
pub fn id_taken(id: &str) -> JobError {
    let message = format!("the id {id:?} belongs to a job with another body");
    JobError::field(code::ID_TAKEN, "id", message)
}

fn new_job(prepared: &Prepared, message: &Message, retention_s: u64) -> NewJob {
    let envelope = &prepared.envelope;
    let until = prepared.deadline.saturating_duration_since(Instant::now()).as_secs();
    NewJob {
        key: envelope.key,
        tenant: envelope.tenant.clone(),
        job_id: message.id.clone(),
        body_hash: envelope.body_hash.clone(),
        body: message.body.clone(),
        headers: stored::headers(message),
        expires_in_s: until + retention_s,
    }
}

/// What a kept answer says.
fn answer(row: CacheRow) -> (String, End) {
    let field = |name: &str| row.metadata.get(name).cloned();
    let usage: Usage = field("usage").and_then(|u| serde_json::from_value(u).ok()).unwrap_or_default();
    let reason = field("finishReason").and_then(|r| serde_json::from_value(r).ok());
    (row.response, End::new(reason.unwrap_or(FinishReason::Stop), usage, None))
}

/// What a caller is told about a job that could not be published.
pub fn refusal(error: &PublishError, model: &Model) -> JobError {
    match error {
        PublishError::Full => JobError::new(
            code::QUEUE_FULL,
            format!("the queue of the model {:?} is full; try again", model.name),
        ),
        PublishError::Unroutable => {
            let message = format!("there is no queue for the model {:?} now", model.name);
            JobError::field(code::MODEL_UNAVAILABLE, "model", message)
        }
        PublishError::Unconfirmed => JobError::new(
            code::SERVICE_UNAVAILABLE,
            "the broker did not confirm the job in time; it was cancelled, try again",
        ),
        PublishError::Port(_) => JobError::out_of_reach("broker"),
    }
}

/// What the ledger answers, if it does so in time.
async fn in_time<T>(answer: impl Future<Output = PortResult<T>>) -> Result<T, JobError> {
    let answer = tokio::time::timeout(LEDGER_LIMIT, answer).await;
    answer.map_err(|_| ledger_down("it does not answer"))?.map_err(|e| ledger_down(&e.to_string()))
}

fn ledger_down(said: &str) -> JobError {
    tracing::warn!("the ledger is unavailable: {said}");
    JobError::out_of_reach("database")
}
