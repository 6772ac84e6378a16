//! Subscriptions: one connection of its own for all that this process listens to.
//!
//! The connection's own task reads a message, parses it and puts it into the subscribers' mailboxes: no other task is
//! woken on the way, and no subscriber can hold it up. A second task keeps the connection up: it subscribes to whatever
//! has subscribers, and after a reconnection tells them that they may have missed something. It pings Redis each second,
//! since a connection that only listens would not notice that the other end is gone.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{PushInfo, PushKind, RedisResult, Value};
use serde_json::value::RawValue;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::connection::{Connector, TIMEOUT, query};
use super::error;
use crate::frame::Frame;
use crate::mailbox::Mailbox;
use crate::ports::{CONTROL_CAPACITY, Control, Notice, PortResult};

/// How often Redis is asked whether it is still there.
const PING_PERIOD: Duration = Duration::from_secs(1);

/// Requests that are taken up together, in one round trip.
const BATCH: usize = 256;

/// What this process listens to.
pub(super) struct Subscriptions {
    routes: Arc<Routes>,
    requests: mpsc::UnboundedSender<Request>,
    connected: Arc<AtomicBool>,
    /// Cancelled when the bus is dropped.
    end: CancellationToken,
}

/// Who listens to what, by channel.
#[derive(Default)]
struct Routes(Mutex<HashMap<String, Vec<Subscriber>>>);

enum Subscriber {
    Tokens(Mailbox),
    Control(ControlRelay),
}

/// A worker's end of its two control channels.
#[derive(Clone)]
struct ControlRelay {
    words: mpsc::Sender<Control>,
    /// Told when words may have been missed.
    missed: Arc<Notify>,
}

enum Request {
    Subscribe {
        channels: Vec<String>,
        done: oneshot::Sender<()>,
    },
    /// A subscriber left.
    Prune {
        channels: Vec<String>,
    },
}

impl Subscriptions {
    /// No subscriptions, and the task that keeps the connection up.
    pub fn new(connector: Connector, end: CancellationToken) -> (Self, impl Future<Output = ()> + Send) {
        let (requests, receiver) = mpsc::unbounded_channel();
        let this = Self { routes: Arc::default(), requests, connected: Arc::default(), end };
        let keeper = Keeper {
            connector,
            routes: this.routes.clone(),
            requests: receiver,
            waiting: Vec::new(),
            connected: this.connected.clone(),
        };
        (this, keeper.run())
    }

    /// Whether the connection stands.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Subscribes to a token channel.
    pub async fn tokens(&self, channel: String) -> PortResult<mpsc::Receiver<Notice>> {
        let (mailbox, receiver) = Mailbox::new();
        let closed = mailbox.closed();
        self.routes.add(&channel, Subscriber::Tokens(mailbox));
        self.subscribe(vec![channel], closed).await?;
        Ok(receiver)
    }

    /// Subscribes to control channels. `missed` is told when words may have been lost.
    pub async fn control(
        &self,
        channels: Vec<String>,
        missed: Arc<Notify>,
    ) -> PortResult<(mpsc::Sender<Control>, mpsc::Receiver<Control>)> {
        let (words, receiver) = mpsc::channel(CONTROL_CAPACITY);
        let relay = ControlRelay { words: words.clone(), missed };
        for channel in &channels {
            self.routes.add(channel, Subscriber::Control(relay.clone()));
        }
        let watched = words.clone();
        self.subscribe(channels, async move { watched.closed().await }).await?;
        Ok((words, receiver))
    }

    /// Waits until Redis has confirmed; arranges that channels are left once `closed` resolves.
    async fn subscribe(
        &self,
        channels: Vec<String>,
        closed: impl Future<Output = ()> + Send + 'static,
    ) -> PortResult<()> {
        let (done, is_done) = oneshot::channel();
        let _ = self.requests.send(Request::Subscribe { channels: channels.clone(), done });
        let (requests, end) = (self.requests.clone(), self.end.clone());
        tokio::spawn(async move {
            if end.run_until_cancelled(closed).await.is_some() {
                let _ = requests.send(Request::Prune { channels });
            }
        });
        match timeout(TIMEOUT, is_done).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(error::unavailable("the subscription was not confirmed in time")),
        }
    }
}

impl Routes {
    /// A panic elsewhere can't have left it half-changed.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<Subscriber>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, channel: &str, subscriber: Subscriber) {
        self.lock().entry(channel.to_owned()).or_default().push(subscriber);
    }

    /// Forgets subscribers that are gone; those of the channels that nobody is left on.
    fn prune(&self, channels: HashSet<String>) -> Vec<String> {
        let mut routes = self.lock();
        let mut is_empty = |channel: &String| match routes.get_mut(channel) {
            None => false,
            Some(subscribers) => {
                subscribers.retain(|s| !s.is_closed());
                subscribers.is_empty() && routes.remove(channel).is_some()
            }
        };
        channels.into_iter().filter(|c| is_empty(c)).collect()
    }

    /// Takes in what Redis sent; must not block.
    fn receive(&self, mut data: Vec<Value>) {
        let (Some(Value::BulkString(payload)), Some(Value::BulkString(channel))) = (data.pop(), data.pop())
        else {
            return warn!("a message without channel or content is skipped");
        };
        let Ok(channel) = String::from_utf8(channel) else { return };
        let mut routes = self.lock();
        let Some(subscribers) = routes.get_mut(&channel) else { return };
        let mut frames = None;
        let mut left = subscribers.len();
        for subscriber in subscribers {
            left -= 1;
            match subscriber {
                Subscriber::Control(relay) => relay.receive(&payload),
                Subscriber::Tokens(mailbox) => {
                    let parsed = frames.get_or_insert_with(|| parse_message(&payload));
                    mailbox.deliver(if left == 0 { std::mem::take(parsed) } else { parsed.clone() });
                }
            }
        }
    }

    /// Tells all subscribers of these channels that they may have missed something.
    fn interrupt(&self, channels: &HashSet<String>) {
        for (_, subscribers) in self.lock().iter_mut().filter(|(channel, _)| channels.contains(*channel)) {
            subscribers.iter_mut().for_each(|subscriber| match subscriber {
                Subscriber::Tokens(mailbox) => mailbox.interrupt(),
                Subscriber::Control(relay) => relay.missed.notify_one(),
            });
        }
    }
}

impl Subscriber {
    fn is_closed(&self) -> bool {
        match self {
            Self::Tokens(mailbox) => mailbox.is_closed(),
            Self::Control(relay) => relay.words.is_closed(),
        }
    }
}

impl ControlRelay {
    fn receive(&self, payload: &[u8]) {
        match serde_json::from_slice(payload) {
            Ok(word) => {
                if let Err(mpsc::error::TrySendError::Full(word)) = self.words.try_send(word) {
                    warn!(?word, "a worker does not listen to its control channel");
                }
            }
            Err(error) => warn!(%error, "a control message that can't be read is skipped"),
        }
    }
}

/// The frames of a message. One that can't be read (of a newer version, say) does not take the others with it.
fn parse_message(payload: &[u8]) -> Vec<Frame> {
    let error = match serde_json::from_slice(payload) {
        Ok(frames) => return frames,
        Err(error) => error,
    };
    warn!(%error, "a message that can't be read is skipped, in whole or in part");
    let parts: Vec<&RawValue> = serde_json::from_slice(payload).unwrap_or_default();
    parts.into_iter().filter_map(|part| serde_json::from_str(part.get()).ok()).collect()
}

/// Keeps the connection up, and subscribed to what has subscribers.
struct Keeper {
    connector: Connector,
    routes: Arc<Routes>,
    requests: mpsc::UnboundedReceiver<Request>,
    /// Those whose subscription Redis has not confirmed yet.
    waiting: Vec<oneshot::Sender<()>>,
    connected: Arc<AtomicBool>,
}

impl Keeper {
    async fn run(mut self) {
        // Channels that Redis has confirmed, on this connection or an earlier one.
        let mut confirmed = HashSet::new();
        loop {
            let lost = Arc::new(Notify::new());
            let (routes, notify) = (self.routes.clone(), lost.clone());
            let pushed = move |info: PushInfo| match info.kind {
                PushKind::Message => routes.receive(info.data),
                PushKind::Disconnection => notify.notify_one(),
                _ => {}
            };
            let mut connection = self.connector.connect("subscriptions", pushed, |_| {}).await;
            let Err(error) = self.serve(&mut connection, &mut confirmed, &lost).await else { return };
            self.connected.store(false, Ordering::Relaxed);
            warn!(%error, "the connection to Redis for subscriptions is lost");
        }
    }

    /// Serves requests until the connection is lost (an error), or nobody is left to make any.
    async fn serve(
        &mut self,
        connection: &mut MultiplexedConnection,
        confirmed: &mut HashSet<String>,
        lost: &Notify,
    ) -> RedisResult<()> {
        self.resubscribe(connection, confirmed).await?;
        self.connected.store(true, Ordering::Relaxed);
        let mut ping = interval(PING_PERIOD);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                n = self.requests.recv_many(&mut batch, BATCH) => match n {
                    0 => return Ok(()),
                    _ => self.take_up(connection, confirmed, batch.drain(..)).await?,
                },
                _ = ping.tick() => query::<()>(connection, &redis::cmd("PING")).await?,
                () = lost.notified() => return Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset).into()),
            }
        }
    }

    /// Subscribes to everything that has subscribers, and tells those who were subscribed before.
    async fn resubscribe(
        &mut self,
        connection: &mut MultiplexedConnection,
        confirmed: &mut HashSet<String>,
    ) -> RedisResult<()> {
        let known: HashSet<String> = self.routes.lock().keys().cloned().collect();
        self.routes.prune(known);
        let all: Vec<String> = self.routes.lock().keys().cloned().collect();
        if !all.is_empty() {
            connection.subscribe(&all).await?;
        }
        self.routes.interrupt(confirmed);
        *confirmed = all.into_iter().collect();
        // Those who wait registered their channels before they asked.
        self.confirm();
        Ok(())
    }

    async fn take_up(
        &mut self,
        connection: &mut MultiplexedConnection,
        confirmed: &mut HashSet<String>,
        batch: impl Iterator<Item = Request>,
    ) -> RedisResult<()> {
        let (mut joined, mut left) = (HashSet::new(), HashSet::new());
        for request in batch {
            match request {
                Request::Subscribe { channels, done } => {
                    joined.extend(channels.into_iter().filter(|c| !confirmed.contains(c)));
                    self.waiting.push(done);
                }
                Request::Prune { channels } => left.extend(channels),
            }
        }
        if !joined.is_empty() {
            connection.subscribe(joined.iter().collect::<Vec<_>>()).await?;
            confirmed.extend(joined);
        }
        self.confirm();
        let left = self.routes.prune(left);
        if !left.is_empty() {
            confirmed.retain(|channel| !left.contains(channel));
            connection.unsubscribe(&left).await?;
        }
        Ok(())
    }

    /// Lets those go on who waited for their channels. Whoever gave up waiting is pruned like any other.
    fn confirm(&mut self) {
        for done in self.waiting.drain(..) {
            let _ = done.send(());
        }
    }
}
