//! The queue: jobs wait in it, durably, until a worker has seen them to their end.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{PortError, PortResult};
use crate::backoff::Backoff;
use crate::job::Lane;

/// Where messages are taken from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// `llm.requests`: jobs that other services enqueue.
    FrontDoor,
    /// `llm.work.<model>.<lane>`.
    Work {
        /// Model name, not encoded.
        model: String,
        /// Lane.
        lane: Lane,
    },
    /// `llm.dead`: what the broker gave up.
    Dead,
    /// `llm.responses`: for services that enqueue, and for tests.
    Responses,
    /// `llm.errors`, likewise.
    Errors,
}

/// Where messages are put.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// `llm.requests`.
    FrontDoor,
    /// `llm.work.<model>.<lane>`.
    Work {
        /// Model name, not encoded.
        model: String,
        /// Lane.
        lane: Lane,
    },
    /// `llm.responses`.
    Responses,
    /// `llm.metrics`, transient.
    Metrics,
    /// `llm.errors`.
    Errors,
    /// A queue that a submitter named in `reply_to`, through the default exchange; not mandatory: nobody may be there.
    Reply(String),
}

/// A message on its way in or out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    /// AMQP `message_id`; empty: none.
    pub id: String,
    /// JSON.
    pub body: Bytes,
    /// AMQP `correlation_id`.
    pub correlation_id: Option<String>,
    /// AMQP `reply_to`.
    pub reply_to: Option<String>,
    /// AMQP `user_id`, which the broker has checked. Only on messages that were received.
    pub user_id: Option<String>,
    /// Headers, values as text (numbers and booleans are printed; other types are left out). `traceparent` is one.
    pub headers: BTreeMap<String, String>,
}

/// Why a message was not published.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PublishError {
    /// No queue takes it (`mandatory` and returned).
    #[error("no queue takes the message")]
    Unroutable,
    /// The queue refuses it (negative confirm): it is full.
    #[error("the queue is full")]
    Full,
    /// No confirm came in time: it may or may not have been taken.
    #[error("the broker did not confirm in time; the message may or may not have been taken")]
    Unconfirmed,
    /// It was not sent.
    #[error(transparent)]
    Port(#[from] PortError),
}

/// Settles one delivery. Settling fails with [`PortError::Stale`] once the delivery's connection is gone.
#[async_trait]
pub trait Receipt: Send + Sync {
    /// The queue may forget it.
    async fn ack(&self) -> PortResult<()>;
    /// Back into the queue, or (`requeue` false) to the dead letters.
    async fn nack(&self, requeue: bool) -> PortResult<()>;
    /// Whether the delivery's connection is gone: then it comes again, and settling this one changes nothing.
    fn is_stale(&self) -> bool;
}

/// A message that was delivered, and must be settled.
#[derive(Clone)]
pub struct Delivery {
    /// The message.
    pub message: Message,
    /// Someone has had it before.
    pub redelivered: bool,
    /// Settles it.
    pub receipt: Arc<dyn Receipt>,
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("message", &self.message)
            .field("redelivered", &self.redelivered)
            .finish()
    }
}

/// A running subscription to a queue. It outlives reconnections: after one, what was not acknowledged comes again as
/// redelivered. Dropping it gives everything unacknowledged back to the queue.
#[derive(Debug)]
pub struct Consumer {
    /// What arrives. Ends only after [`Consumer::stop`].
    pub deliveries: mpsc::Receiver<Delivery>,
    /// Cancelled to stop intake.
    pub stop: CancellationToken,
    /// Held until the consumer is dropped, so that the adapter knows when to let the channel go.
    pub guard: tokio_util::sync::DropGuard,
}

impl Consumer {
    /// Takes no more deliveries; those that came can still be settled. Until [`Consumer::deliveries`] ends, what is given back may
    /// come here again.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}

/// Delivers jobs at least once.
#[async_trait]
pub trait Queue: Send + Sync + 'static {
    /// Declares a model's work queues; repeating it changes nothing.
    async fn declare_work(&self, model: &str) -> PortResult<()>;

    /// Puts a message on a queue, durably, and waits until the queue has it (`Metrics` and `Reply`: as best it can).
    async fn publish(&self, to: &Destination, message: Message) -> Result<(), PublishError>;

    /// Takes messages, at most `prefetch` unsettled at a time. Returns once the subscription stands; declares the queue
    /// if need be.
    async fn consume(&self, from: &Source, prefetch: u16) -> PortResult<Consumer>;

    /// Messages that are ready in a queue; `None` if there is no such queue.
    async fn depth(&self, of: &Source) -> PortResult<Option<u64>>;

    /// Whether the service answers now.
    async fn ready(&self) -> PortResult<()>;
}

/// How often a message is sent again that the queue does not confirm: it may close the channel over every message of its kind.
const UNCONFIRMED: u32 = 5;

/// How often a message is sent again that the queue refuses: it may be full, and also a node that goes down refuses what it has
/// not taken yet.
const REFUSED: u32 = 8;

/// Puts a message on a queue, however long that takes: a broker with an alarm delivers, but takes nothing. What the queue
/// keeps refusing, or never confirms, is given up; so is, before another try, what `is_over` says that nobody needs any more.
pub async fn publish_patiently(
    queue: &dyn Queue,
    to: &Destination,
    message: Message,
    is_over: impl Fn() -> bool,
) {
    let mut backoff = Backoff::new();
    let (mut unconfirmed, mut refused) = (0, 0);
    loop {
        match queue.publish(to, message.clone()).await {
            Ok(()) => return,
            Err(PublishError::Port(e)) if e.is_transient() => {
                tracing::debug!(job = message.id, ?to, "not published yet: {e}");
            }
            Err(PublishError::Unconfirmed) if unconfirmed < UNCONFIRMED => unconfirmed += 1,
            Err(PublishError::Full) if refused < REFUSED => refused += 1,
            Err(e) => return tracing::warn!(job = message.id, ?to, "not published: {e}"),
        }
        if is_over() {
            return tracing::debug!(job = message.id, ?to, "not published: nobody needs it any more");
        }
        backoff.pause().await;
    }
}
