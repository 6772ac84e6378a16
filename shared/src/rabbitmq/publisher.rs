//! Publishing with confirms that nobody waits in line for.
//!
//! A few channels are shared by all callers. Each call hands its message to the socket at once and is told when the
//! broker's confirm for it is in, whatever else is on its way.
//!
//! lapin needs help in two places here. It numbers a message and queues its frames in two steps, so both must happen
//! under one lock, or two callers get each other's confirms. And it hands a returned message to whichever confirm it
//! processes next, not to that of the message itself. Hence each message carries its number ([`mark`]), and a confirm
//! is believed only after everything that lapin resolved before it has been looked at ([`Settling`]).

use std::collections::HashSet;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::task::{Context, Poll, Waker};

use futures::FutureExt;
use futures::future::BoxFuture;
use futures::task::AtomicWaker;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{Channel, Confirmation, Connection};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant};

use super::message::to_properties;
use super::topology::{self, Address, Names};
use super::{port_error, unavailable};
use crate::ports::{Message, PortError, PortResult, PublishError};

/// Channels that publishes are spread over.
const LANES: usize = 4;

/// Most messages of one channel that wait for their confirm; further callers wait for room.
const MAX_IN_FLIGHT: usize = 2048;

/// How often a caller looks whether the broker takes messages again.
const BLOCKED_PAUSE: Duration = Duration::from_millis(20);

/// What came of a message.
type Answer = Result<Confirmation, Fault>;
type Confirm = BoxFuture<'static, Answer>;
type Verdict = Result<(), PublishError>;

/// Why there is no confirm.
enum Fault {
    /// The message was not handed to the socket.
    NotSent(lapin::Error),
    /// It was, and the channel or the connection went: it may be in the queue. That can be known before the confirm is waited for.
    Unconfirmed(lapin::Error),
}

/// Publishes on one connection.
pub struct Publisher {
    connection: Arc<Connection>,
    names: Arc<Names>,
    lanes: Vec<RwLock<Arc<Lane>>>,
    turn: AtomicUsize,
    /// Held while a lane is opened again.
    repair: tokio::sync::Mutex<()>,
    /// The first refusal when the fixed queues were declared.
    refusal: Mutex<Option<PortError>>,
}

impl Publisher {
    /// Declares the fixed queues and opens the channels.
    pub async fn open(connection: Arc<Connection>, names: Arc<Names>) -> PortResult<Self> {
        let refusal = Mutex::new(topology::declare_fixed(&connection, &names).await?);
        let mut lanes = Vec::with_capacity(LANES);
        for _ in 0..LANES {
            lanes.push(RwLock::new(Lane::open(&connection).await?));
        }
        let (turn, repair) = (AtomicUsize::new(0), tokio::sync::Mutex::new(()));
        Ok(Self { connection, names, lanes, turn, repair, refusal })
    }

    /// What the broker refused when the fixed queues were declared.
    pub fn refusal(&self) -> Option<PortError> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes what the broker refused when they were declared again.
    pub fn set_refusal(&self, refusal: Option<PortError>) {
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = refusal;
    }

    /// Publishes, and waits for the confirm where the address wants it.
    pub async fn publish(&self, to: &Address, message: &Message, deadline: Instant) -> Verdict {
        let properties = to_properties(message, to.persistent)?;
        self.unblocked(deadline).await?;
        let (lane, room) = match tokio::time::timeout_at(deadline, self.lane()).await {
            Ok(free) => free?,
            Err(_) => return Err(unavailable("it confirms nothing; too many messages wait for it").into()),
        };
        let verdict = lane.send(to, message.body.clone(), properties, room)?;
        if !to.confirmed {
            return Ok(());
        }
        match tokio::time::timeout_at(deadline, verdict).await {
            Ok(Ok(verdict)) => verdict,
            // Late, or the connection is gone.
            Ok(Err(_)) | Err(_) => Err(PublishError::Unconfirmed),
        }
    }

    /// A broker that is short of memory or disk reads nothing from publishers; what is sent then waits in buffers,
    /// and is published long after its caller was told that it was not.
    async fn unblocked(&self, deadline: Instant) -> PortResult<()> {
        while self.connection.status().blocked() {
            if Instant::now() >= deadline {
                return Err(unavailable("it blocks publishers: a memory or disk alarm"));
            }
            tokio::time::sleep(BLOCKED_PAUSE).await;
        }
        Ok(())
    }

    /// The next lane in turn, with room for a message; opened again if the broker closed it.
    async fn lane(&self) -> PortResult<(Arc<Lane>, OwnedSemaphorePermit)> {
        let slot = &self.lanes[self.turn.fetch_add(1, Ordering::Relaxed) % LANES];
        let current = || slot.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut lane = current();
        if !lane.channel.status().connected() {
            let _alone = self.repair.lock().await;
            lane = current();
            if !lane.channel.status().connected() {
                // Most likely the exchange was deleted.
                self.set_refusal(topology::declare_fixed(&self.connection, &self.names).await?);
                lane = Lane::open(&self.connection).await?;
                *slot.write().unwrap_or_else(PoisonError::into_inner) = lane.clone();
            }
        }
        let room = lane.room.clone().acquire_owned().await.map_err(unavailable)?;
        Ok((lane, room))
    }
}

/// One channel, and what was sent on it since its task looked last.
struct Lane {
    channel: Channel,
    room: Arc<Semaphore>,
    sent: Arc<Sent>,
    numbers: AtomicU64,
    settling: JoinHandle<()>,
}

#[derive(Default)]
struct Sent {
    list: Mutex<Vec<InFlight>>,
    task: AtomicWaker,
}

impl Sent {
    fn lock(&self) -> MutexGuard<'_, Vec<InFlight>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct InFlight {
    number: u64,
    confirm: Confirm,
    caller: oneshot::Sender<Verdict>,
    _room: OwnedSemaphorePermit,
}

impl Lane {
    async fn open(connection: &Connection) -> PortResult<Arc<Self>> {
        let channel = connection.create_channel().await.map_err(port_error)?;
        channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(port_error)?;
        let sent = Arc::new(Sent::default());
        let mut settling = Settling { sent: sent.clone(), ..Default::default() };
        let task = tokio::spawn(poll_fn(move |cx| settling.poll(cx)));
        Ok(Arc::new(Self {
            channel,
            room: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            sent,
            numbers: AtomicU64::new(0),
            settling: task,
        }))
    }

    /// Queues a message for the socket. The receiver hears what came of it.
    fn send(
        &self,
        to: &Address,
        body: bytes::Bytes,
        properties: lapin::BasicProperties,
        room: OwnedSemaphorePermit,
    ) -> PortResult<oneshot::Receiver<Verdict>> {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let (caller, verdict) = oneshot::channel();
        let (channel, exchange, key) = (self.channel.clone(), to.exchange.clone(), to.key.clone());
        let options = BasicPublishOptions { mandatory: to.mandatory, ..Default::default() };
        let properties = properties.with_app_id(mark(number));
        let mut confirm: Confirm = async move {
            let sent = channel.basic_publish(exchange, key, options, &body, properties).await;
            sent.map_err(Fault::NotSent)?.await.map_err(Fault::Unconfirmed)
        }
        .boxed();

        let mut sent = self.sent.lock();
        // The first poll numbers the message and queues its frames; the task polls it from then on.
        match confirm.poll_unpin(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Err(Fault::NotSent(error))) => return Err(port_error(error)),
            Poll::Ready(answer) => confirm = std::future::ready(answer).boxed(),
            Poll::Pending => {}
        }
        sent.push(InFlight { number, confirm, caller, _room: room });
        drop(sent);
        self.sent.task.wake();
        Ok(verdict)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.settling.abort();
    }
}

/// What a message carries so that it is known when it is returned.
fn mark(number: u64) -> ShortString {
    format!("stoker/{number}").into()
}

fn marked(properties: &lapin::BasicProperties) -> Option<u64> {
    properties.app_id().as_ref()?.as_str().strip_prefix("stoker/")?.parse().ok()
}

/// Looks at all confirms of a lane, pass after pass.
///
/// lapin resolves confirms one after the other, and a returned message is in a confirm that it resolved no later than
/// the message's own. So when a pass finds a confirm resolved, the next pass finds all that may hold its return.
#[derive(Default)]
struct Settling {
    sent: Arc<Sent>,
    in_flight: Vec<InFlight>,
    /// Found resolved in the pass before.
    resolved: Vec<(InFlight, Answer)>,
    returned: HashSet<u64>,
}

impl Settling {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.sent.task.register(cx.waker());
        loop {
            self.in_flight.append(&mut self.sent.lock());
            let found = self.pass(cx);
            for (message, answer) in std::mem::replace(&mut self.resolved, found) {
                let returned = self.returned.remove(&message.number);
                let _ = message.caller.send(verdict(answer, returned));
            }
            if self.resolved.is_empty() {
                return Poll::Pending;
            }
        }
    }

    fn pass(&mut self, cx: &mut Context<'_>) -> Vec<(InFlight, Answer)> {
        let mut found = Vec::new();
        let mut place = 0;
        while let Some(message) = self.in_flight.get_mut(place) {
            let Poll::Ready(answer) = message.confirm.poll_unpin(cx) else {
                place += 1;
                continue;
            };
            if let Ok(Confirmation::Ack(Some(message)) | Confirmation::Nack(Some(message))) = &answer {
                self.returned.extend(marked(&message.properties));
            }
            found.push((self.in_flight.swap_remove(place), answer));
        }
        found
    }
}

fn verdict(answer: Answer, returned: bool) -> Verdict {
    match answer {
        Ok(_) if returned => Err(PublishError::Unroutable),
        Ok(Confirmation::Nack(_)) => Err(PublishError::Full),
        Ok(Confirmation::Ack(_) | Confirmation::NotRequested) => Ok(()),
        Err(Fault::NotSent(error)) => Err(port_error(error).into()),
        Err(Fault::Unconfirmed(error)) => {
            if error.is_amqp_error() {
                tracing::error!(%error, "RabbitMQ closed a publishing channel");
            }
            Err(PublishError::Unconfirmed)
        }
    }
}
