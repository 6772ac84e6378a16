//! What a delivery asks for, read once when it arrives, and whom to answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoker_shared::envelope::Envelope;
use stoker_shared::job::{self, Job, Lane};
use stoker_shared::outcome::JobError;
use stoker_shared::ports::{Delivery, Message, Receipt};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::shared::Served;

/// How long the traces of a job outlive its deadline.
const GRACE: Duration = Duration::from_secs(120);
/// How long a job without a deadline may take. Coordinators set one on every job.
const NO_DEADLINE: Duration = Duration::from_secs(86_400);

/// A job as it was accepted.
pub(crate) struct Ticket {
    pub envelope: Envelope,
    pub job: Job,
    /// As its submitter gave it.
    pub id: String,
    /// Token channel.
    pub channel: String,
    /// As it was delivered.
    pub body: Bytes,
    pub deadline: Option<OffsetDateTime>,
    /// What runs it.
    pub served: Arc<Served>,
    pub lane: Lane,
    /// The key that its frames carry: none where the id is the key.
    pub frame_key: Option<Uuid>,
    /// The body is not a job; it was accepted all the same, so it must end.
    pub fault: Option<JobError>,
}

/// One delivery of a job: whom to answer, and what to acknowledge.
pub(crate) struct Waiter {
    pub receipt: Arc<dyn Receipt>,
    pub front_door: bool,
    pub reply_to: Option<String>,
    pub correlation_id: Option<String>,
    pub traceparent: Option<String>,
}

impl Ticket {
    /// Reads a message; `None` if no coordinator published it.
    pub fn read(message: &Message, served: &Arc<Served>, lane: Lane) -> Option<Self> {
        let envelope = Envelope::from_headers(&message.headers)?;
        let parsed = job::parse_json::<Job>(&message.body).and_then(|job| job.check().map(|()| job));
        let (job, fault) = match parsed {
            Ok(job) => (job, None),
            Err(error) => (Job::default(), Some(error)),
        };
        let id = match &job.id {
            Some(id) => id.clone(),
            None if !message.id.is_empty() => message.id.clone(),
            None => envelope.key.to_string(),
        };
        let channel = match (&job.stream_to, &envelope.coordinator) {
            (Some(channel), _) => channel.clone(),
            (None, Some(coordinator)) => job::token_channel(coordinator),
            (None, None) => job::token_channel(&id),
        };
        let deadline = job.deadline_at();
        let frame_key = (id.parse() != Ok(envelope.key)).then_some(envelope.key);
        let (body, served) = (message.body.clone(), served.clone());
        Some(Self { envelope, job, id, channel, body, deadline, served, lane, frame_key, fault })
    }

    pub fn key(&self) -> Uuid {
        self.envelope.key
    }

    /// Whether another message with this job's key means the same job. Messages marked once carry no hash: nobody else
    /// can have chosen their id.
    pub fn means(&self, body_hash: &str) -> bool {
        let ours = &self.envelope.body_hash;
        ours.is_empty() || body_hash.is_empty() || ours == body_hash
    }

    /// What is left until the deadline; zero once it has passed.
    pub fn time_left(&self) -> Duration {
        match self.deadline {
            Some(at) => (at - OffsetDateTime::now_utc()).try_into().unwrap_or(Duration::ZERO),
            None => NO_DEADLINE,
        }
    }

    /// The deadline on the clock that engines use.
    pub fn deadline_instant(&self) -> Option<Instant> {
        // One that is further away than the clock goes is none.
        self.deadline.and_then(|_| Instant::now().checked_add(self.time_left()))
    }

    pub fn has_expired(&self) -> bool {
        self.deadline.is_some() && self.time_left().is_zero()
    }

    /// How long its log is kept.
    pub fn log_ttl(&self) -> Duration {
        self.time_left() + GRACE
    }

    /// How long its row in `llm_jobs` is kept, seconds: as long as a redelivery is to be recognised.
    pub fn row_ttl_s(&self, retention_s: u64) -> u64 {
        self.time_left().as_secs() + retention_s
    }

    /// The seed of its random numbers. Coordinators set one on every job; without it, what is the same in all attempts.
    pub fn seed(&self) -> u64 {
        self.job.options.seed.map_or_else(|| self.key().as_u64_pair().1, |seed| seed as u64)
    }

    /// Milliseconds since a coordinator accepted it.
    pub fn age_ms(&self) -> u64 {
        let now_ms = OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
        u64::try_from(now_ms - i128::from(self.envelope.accepted_ms)).unwrap_or(0)
    }
}

impl Waiter {
    /// Of a delivery whose ticket was read.
    pub fn new(delivery: Delivery, ticket: &Ticket) -> Self {
        Self { front_door: ticket.envelope.front_door, ..Self::unread(delivery) }
    }

    /// Of a delivery that is no job.
    pub fn unread(delivery: Delivery) -> Self {
        let mut message = delivery.message;
        Self {
            receipt: delivery.receipt,
            front_door: false,
            reply_to: message.reply_to,
            correlation_id: message.correlation_id,
            traceparent: message.headers.remove("traceparent"),
        }
    }
}
