//! The embedded queue: what RabbitMQ does for a fleet, inside one process.
//!
//! A message stays until it is acknowledged, comes back when its consumer goes away, and dies into the dead letters
//! when it was rejected or came back too often. It does not survive the process: jobs that must are in the ledger, from
//! where they are published again.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::DEFAULT_PREFIX;
use crate::job::{Lane, encode_model};
use crate::ports::{
    Consumer, Delivery, Destination, Message, PortError, PortResult, PublishError, Queue, Receipt, Source,
};

/// Most messages that are ready in a queue, unless set otherwise; the same as the front door's on RabbitMQ.
const DEFAULT_LIMIT: usize = 10_000;

/// A message that came back more often than this is dead; the same as `x-delivery-limit` on RabbitMQ.
const DELIVERY_LIMIT: u32 = 100;

/// The [`Queue`] port inside one process.
#[derive(Clone)]
pub struct EmbeddedQueue {
    shared: Arc<Shared>,
}

impl EmbeddedQueue {
    /// Empty queues that hold 10,000 ready messages each.
    pub fn new() -> Self {
        Self::with_limit(DEFAULT_LIMIT)
    }

    /// Empty queues that hold so many ready messages each.
    pub fn with_limit(limit: usize) -> Self {
        let fixed = [Source::FrontDoor, Source::Dead, Source::Responses, Source::Errors];
        let queues = fixed.into_iter().map(|source| (source, QueueState::default())).collect();
        let state = State { queues, next_id: 0 };
        Self { shared: Arc::new(Shared { limit, state: Mutex::new(state) }) }
    }
}

impl Default for EmbeddedQueue {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Queue for EmbeddedQueue {
    async fn declare_work(&self, model: &str) -> PortResult<()> {
        let mut state = self.shared.lock();
        for lane in Lane::ALL {
            state.queues.entry(Source::Work { model: model.to_owned(), lane }).or_default();
        }
        Ok(())
    }

    async fn publish(&self, to: &Destination, mut message: Message) -> Result<(), PublishError> {
        message.user_id = None;
        let (queue, when_full) = match to {
            Destination::FrontDoor => (Source::FrontDoor, WhenFull::Refuse),
            Destination::Work { model, lane } => {
                (Source::Work { model: model.clone(), lane: *lane }, WhenFull::Refuse)
            }
            Destination::Responses => (Source::Responses, WhenFull::DropOldest),
            Destination::Errors => (Source::Errors, WhenFull::DropOldest),
            // Nobody can read these here.
            Destination::Metrics => return Ok(()),
            Destination::Reply(name) if name.starts_with(DEFAULT_PREFIX) => {
                let message = format!("replies can't go to {name:?}, a queue of the fleet's own");
                return Err(PortError::Refused { service: SERVICE, message }.into());
            }
            Destination::Reply(_) => return Ok(()),
        };
        self.shared.publish(&queue, message, when_full)
    }

    async fn consume(&self, from: &Source, prefetch: u16) -> PortResult<Consumer> {
        let prefetch = usize::from(prefetch.max(1));
        // Never full: it holds unsettled deliveries only, and there are at most `prefetch` of them.
        let (sender, deliveries) = mpsc::channel(prefetch);
        let stop = CancellationToken::new();
        let gone = CancellationToken::new();

        let id = self.shared.subscribe(from, prefetch, sender);
        let (shared, source) = (self.shared.clone(), from.clone());
        let (stopped, dropped) = (stop.clone(), gone.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => shared.stop(&source, id),
                () = dropped.cancelled() => {}
            }
            dropped.cancelled().await;
            shared.unsubscribe(&source, id);
        });
        Ok(Consumer { deliveries, stop, guard: gone.drop_guard() })
    }

    async fn depth(&self, of: &Source) -> PortResult<Option<u64>> {
        Ok(self.shared.lock().queues.get(of).map(|queue| queue.ready.len() as u64))
    }

    async fn ready(&self) -> PortResult<()> {
        Ok(())
    }
}

const SERVICE: &str = "the embedded queue";

enum WhenFull {
    Refuse,
    DropOldest,
}

struct Shared {
    limit: usize,
    state: Mutex<State>,
}

struct State {
    queues: HashMap<Source, QueueState>,
    next_id: u64,
}

#[derive(Default)]
struct QueueState {
    /// By number of arrival, so that what comes back takes its old place.
    ready: BTreeMap<u64, Stored>,
    /// The next in turn is first.
    consumers: VecDeque<ConsumerState>,
}

struct Stored {
    message: Message,
    /// How often it was delivered and came back.
    returns: u32,
}

struct ConsumerState {
    id: u64,
    prefetch: usize,
    unsettled: BTreeMap<u64, Stored>,
    /// `None` once it is stopped.
    sender: Option<mpsc::Sender<Delivery>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn publish(self: &Arc<Self>, to: &Source, message: Message, full: WhenFull) -> Result<(), PublishError> {
        let mut state = self.lock();
        let number = state.next();
        let queue = state.queues.get_mut(to).ok_or(PublishError::Unroutable)?;
        if queue.ready.len() >= self.limit {
            match full {
                WhenFull::Refuse => return Err(PublishError::Full),
                WhenFull::DropOldest => drop(queue.ready.pop_first()),
            }
        }
        queue.ready.insert(number, Stored { message, returns: 0 });
        self.deliver(&mut state, to);
        Ok(())
    }

    fn subscribe(self: &Arc<Self>, to: &Source, prefetch: usize, sender: mpsc::Sender<Delivery>) -> u64 {
        let mut state = self.lock();
        let id = state.next();
        let consumer = ConsumerState { id, prefetch, unsettled: BTreeMap::new(), sender: Some(sender) };
        state.queues.entry(to.clone()).or_default().consumers.push_front(consumer);
        self.deliver(&mut state, to);
        id
    }

    /// Takes intake from a consumer; what it holds stays with it.
    fn stop(&self, source: &Source, id: u64) {
        if let Some(consumer) = self.lock().consumer(source, id) {
            consumer.sender = None;
        }
    }

    /// Gives back what a consumer holds.
    fn unsubscribe(self: &Arc<Self>, source: &Source, id: u64) {
        let mut state = self.lock();
        let Some(queue) = state.queues.get_mut(source) else { return };
        let Some(place) = queue.consumers.iter().position(|c| c.id == id) else { return };
        let Some(consumer) = queue.consumers.remove(place) else { return };
        for (number, stored) in consumer.unsettled {
            self.give_back(&mut state, source, number, stored);
        }
        self.deliver(&mut state, source);
    }

    fn settle(self: &Arc<Self>, receipt: &EmbeddedReceipt, how: Settlement) -> PortResult<()> {
        let mut state = self.lock();
        let consumer = state.consumer(&receipt.source, receipt.consumer).ok_or(PortError::Stale)?;
        // A second settlement changes nothing.
        let Some(stored) = consumer.unsettled.remove(&receipt.number) else { return Ok(()) };
        match how {
            Settlement::Done => {}
            Settlement::Requeue => self.give_back(&mut state, &receipt.source, receipt.number, stored),
            Settlement::Reject => self.bury(&mut state, &receipt.source, stored, "rejected"),
        }
        self.deliver(&mut state, &receipt.source);
        Ok(())
    }

    fn give_back(self: &Arc<Self>, state: &mut State, source: &Source, number: u64, mut stored: Stored) {
        stored.returns += 1;
        if matches!(source, Source::Work { .. }) && stored.returns > DELIVERY_LIMIT {
            self.bury(state, source, stored, "delivery_limit");
        } else if let Some(queue) = state.queues.get_mut(source) {
            queue.ready.insert(number, stored);
        }
    }

    /// Only work queues have dead letters; the headers are those that RabbitMQ sets.
    fn bury(self: &Arc<Self>, state: &mut State, source: &Source, stored: Stored, reason: &str) {
        let Source::Work { model, lane } = source else { return };
        let mut message = stored.message;
        let queue = format!("llm.work.{}.{}", encode_model(model), lane.as_str());
        message.headers.entry("x-first-death-queue".into()).or_insert(queue);
        message.headers.entry("x-first-death-reason".into()).or_insert(reason.into());
        let number = state.next();
        if let Some(dead) = state.queues.get_mut(&Source::Dead) {
            dead.ready.insert(number, Stored { message, returns: 0 });
        }
        self.deliver(state, &Source::Dead);
    }

    /// Hands ready messages to the consumers that have room, in turn.
    fn deliver(self: &Arc<Self>, state: &mut State, source: &Source) {
        let Some(queue) = state.queues.get_mut(source) else { return };
        while !queue.ready.is_empty() {
            let Some(place) = queue.consumers.iter().position(ConsumerState::has_room) else { return };
            queue.consumers.rotate_left(place);
            let Some(mut consumer) = queue.consumers.pop_front() else { return };
            if let (Some(sender), Some((number, stored))) = (&consumer.sender, queue.ready.pop_first()) {
                let delivery = Delivery {
                    message: stored.message.clone(),
                    redelivered: stored.returns > 0,
                    receipt: Arc::new(EmbeddedReceipt {
                        shared: self.clone(),
                        source: source.clone(),
                        consumer: consumer.id,
                        number,
                    }),
                };
                if sender.try_send(delivery).is_ok() {
                    consumer.unsettled.insert(number, stored);
                } else {
                    // Its receiver is gone, and it will be unsubscribed in a moment.
                    consumer.sender = None;
                    queue.ready.insert(number, stored);
                }
            }
            queue.consumers.push_back(consumer);
        }
    }
}

impl State {
    fn next(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn consumer(&mut self, source: &Source, id: u64) -> Option<&mut ConsumerState> {
        self.queues.get_mut(source)?.consumers.iter_mut().find(|c| c.id == id)
    }
}

impl ConsumerState {
    fn has_room(&self) -> bool {
        self.sender.is_some() && self.unsettled.len() < self.prefetch
    }
}

enum Settlement {
    Done,
    Requeue,
    Reject,
}

struct EmbeddedReceipt {
    shared: Arc<Shared>,
    source: Source,
    consumer: u64,
    number: u64,
}

#[async_trait]
impl Receipt for EmbeddedReceipt {
    async fn ack(&self) -> PortResult<()> {
        self.shared.settle(self, Settlement::Done)
    }

    async fn nack(&self, requeue: bool) -> PortResult<()> {
        self.shared.settle(self, if requeue { Settlement::Requeue } else { Settlement::Reject })
    }

    fn is_stale(&self) -> bool {
        self.shared.lock().consumer(&self.source, self.consumer).is_none()
    }
}
