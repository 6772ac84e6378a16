//! Sorts the frames of this coordinator's jobs to the requests that wait for them.
//!
//! There is one subscription for all connected jobs, on the coordinator's own token channel; one task receives from it
//! and pushes each frame into its job's [`Feed`], whose readers are woken. It waits for no client and for no service,
//! because the bus cuts subscribers that lag, without a word. Whatever is lost on the way (a gap, an interrupted
//! subscription, a silent second) is read from the replay log by [`rescue`]; [`clock`](Inbox::clock) notices silence,
//! deadlines and idle readers for all feeds together, so that no stream needs a timer of its own.

mod feed;
mod reader;
mod rescue;
mod table;

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stoker_shared::frame::{Frame, Pushed};
use stoker_shared::outcome::code;
use stoker_shared::ports::{Notice, Ports};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use uuid::Uuid;

pub use feed::{End, Feed, Heard, deadline_passed};
pub use reader::Reader;
use table::Table;

use crate::BACKOFF;

/// How often the clock looks at all feeds.
const TICK: Duration = Duration::from_millis(250);
/// How long a cancellation is kept beyond its job's deadline, for a delivery that comes late.
const CANCEL_GRACE: Duration = Duration::from_secs(60);

/// Deadlines that two requests were given at one moment may be so far apart: each counts from when it was looked at.
pub const SAME_MOMENT: Duration = Duration::from_secs(1);

/// Which deadlines of a job in flight suit a request that would join it.
pub type Deadlines = RangeInclusive<Instant>;

/// The feeds of this coordinator.
pub struct Inbox {
    channel: String,
    ports: Ports,
    table: Table,
    listening: AtomicBool,
    rescues: mpsc::UnboundedSender<Arc<Feed>>,
}

/// What keeps an inbox going; to be run as a task each.
pub struct InboxTasks {
    inbox: Arc<Inbox>,
    rescues: mpsc::UnboundedReceiver<Arc<Feed>>,
}

impl Inbox {
    /// An inbox for a coordinator, and what must run for it.
    pub fn new(coordinator: &str, ports: Ports) -> (Arc<Self>, InboxTasks) {
        let (rescues, queue) = mpsc::unbounded_channel();
        let inbox = Arc::new(Self {
            channel: stoker_shared::job::token_channel(coordinator),
            ports,
            table: Table::default(),
            listening: AtomicBool::new(false),
            rescues,
        });
        (inbox.clone(), InboxTasks { inbox, rescues: queue })
    }

    /// The channel that connected jobs stream to.
    pub fn channel(&self) -> &str {
        &self.channel
    }

    /// Whether the subscription stands, so that jobs may be published.
    pub fn listening(&self) -> bool {
        self.listening.load(Ordering::Acquire)
    }

    /// Jobs that somebody waits for.
    pub fn waiting(&self) -> usize {
        self.table.len()
    }

    /// A reader of the job in flight that means the same, if there is one whose deadline is among `deadlines`.
    pub fn join(self: &Arc<Self>, identity: &str, deadlines: &Deadlines, only_end: bool) -> Option<Reader> {
        let (feed, slot) = self.table.join(identity, |feed| enter(feed, deadlines, only_end))?;
        Some(Reader::new(self.clone(), feed, slot))
    }

    /// Registers a job and its first reader; or joins one that means the same and was registered a moment ago (true).
    /// A reader that wants only the end is not woken before it.
    pub fn register(
        self: &Arc<Self>,
        feed: Arc<Feed>,
        deadlines: &Deadlines,
        only_end: bool,
    ) -> (Reader, bool) {
        // Nobody has left a feed yet that nobody knows: there is a place.
        let slot = feed.join(only_end).unwrap_or_default();
        match self.table.insert_or_join(feed.clone(), |same| enter(same, deadlines, only_end)) {
            Some((same, slot)) => (Reader::new(self.clone(), same, slot), true),
            None => (Reader::new(self.clone(), feed, slot), false),
        }
    }

    /// A reader of a text that is already whole.
    pub fn finished(self: &Arc<Self>, key: Uuid, text: String, end: End) -> Reader {
        let feed = Feed::finished(key, text, end);
        let slot = feed.join(true).unwrap_or_default();
        Reader::new(self.clone(), feed, slot)
    }

    /// A reader of a job that streams to a channel of its own, from byte `at` on.
    pub fn attach(self: &Arc<Self>, key: Uuid, channel: String, deadline: Instant, at: usize) -> Reader {
        let join = |feed: &Feed| feed.join(false);
        let mut reader = match self.table.join_key(key, join) {
            Some((feed, slot)) => Reader::new(self.clone(), feed, slot),
            None => {
                let feed = Feed::new(key, None, deadline, false);
                let deadlines = Instant::now()..=deadline + SAME_MOMENT;
                let (reader, joined) = self.register(feed.clone(), &deadlines, false);
                if !joined {
                    feed.hold(self.pump(channel, feed.clone()));
                }
                reader
            }
        };
        reader.start_at(at);
        reader
    }

    /// Forwards a job's own channel for as long as somebody reads it.
    fn pump(self: &Arc<Self>, channel: String, feed: Arc<Feed>) -> AbortHandle {
        let inbox = self.clone();
        let task = tokio::spawn(async move {
            let mut backoff = BACKOFF;
            while !feed.ended() {
                match inbox.ports.bus.subscribe(&channel).await {
                    Ok(mut notices) => {
                        // Whatever was said before the subscription stood is in the log.
                        inbox.rescue(&feed);
                        backoff.reset();
                        while let Some(notice) = notices.recv().await {
                            inbox.take(notice);
                        }
                    }
                    Err(e) => tracing::debug!(job = %feed.key, "can't subscribe to {channel} yet: {e}"),
                }
                backoff.pause().await;
            }
        });
        task.abort_handle()
    }

    /// Ends a job's stream here with an error, and forgets it.
    pub fn fail(&self, feed: &Arc<Feed>, error: stoker_shared::outcome::JobError) {
        feed.fail(error);
        self.table.remove(feed);
    }

    /// Tells workers to end a job, in the background.
    pub fn cancel(&self, key: Uuid, deadline: Instant) {
        let bus = self.ports.bus.clone();
        let ttl = deadline.saturating_duration_since(Instant::now()) + CANCEL_GRACE;
        tokio::spawn(async move {
            let mut backoff = BACKOFF;
            for _ in 0..5 {
                match bus.cancel(key, ttl).await {
                    Ok(()) => return,
                    Err(e) => tracing::warn!(job = %key, "can't cancel yet: {e}"),
                }
                backoff.pause().await;
            }
        });
    }

    /// A reader's place is given up; the last one to leave cancels.
    fn leave(&self, feed: &Arc<Feed>, slot: usize) {
        if !feed.leave(slot) {
            return;
        }
        self.table.remove(feed);
        if feed.owned && !feed.ended() {
            tracing::debug!(job = %feed.key, "everybody has left: cancelling");
            self.cancel(feed.key, feed.deadline);
        }
    }

    /// Has a job's log read.
    fn rescue(&self, feed: &Arc<Feed>) {
        if feed.start_rescue() {
            // Fails only when the coordinator is on its way out.
            let _ = self.rescues.send(feed.clone());
        }
    }

    /// Sorts what a subscription heard.
    fn take(&self, notice: Notice) {
        match notice {
            Notice::Frames(frames) => self.sort(&frames),
            Notice::Interrupted => self.table.all().iter().for_each(|feed| self.rescue(feed)),
        }
    }

    fn sort(&self, frames: &[Frame]) {
        let now = Instant::now();
        for (feed, frame) in self.table.find(frames) {
            match feed.push(frame, now) {
                Pushed::Gap => self.rescue(&feed),
                Pushed::Advanced if frame.is_last() => self.table.remove(&feed),
                Pushed::Advanced | Pushed::Nothing => {}
            }
        }
    }
}

/// A place in a job in flight, unless it is over or its time is not what is wanted.
fn enter(feed: &Feed, deadlines: &Deadlines, only_end: bool) -> Option<usize> {
    if feed.ended() || !deadlines.contains(&feed.deadline) { None } else { feed.join(only_end) }
}

impl InboxTasks {
    /// Receives, watches the clock and reads logs until dropped. The three go on side by side, on tasks of their own.
    pub async fn run(self) {
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(receive(self.inbox.clone()));
        tasks.spawn(clock(self.inbox.clone()));
        tasks.spawn(rescue::run(self.inbox, self.rescues));
        while let Some(result) = tasks.join_next().await {
            if let Err(e) = result {
                tracing::error!("a task of the inbox ended: {e}");
            }
        }
    }
}

/// Receives from the coordinator's own channel. The adapter outlives reconnections; the loop is for its beginnings.
async fn receive(inbox: Arc<Inbox>) {
    let mut backoff = BACKOFF;
    loop {
        match inbox.ports.bus.subscribe(&inbox.channel).await {
            Ok(mut notices) => {
                inbox.listening.store(true, Ordering::Release);
                inbox.take(Notice::Interrupted);
                backoff.reset();
                while let Some(notice) = notices.recv().await {
                    inbox.take(notice);
                }
                inbox.listening.store(false, Ordering::Release);
                tracing::warn!("the subscription to {} ended; subscribing again", inbox.channel);
            }
            Err(e) => tracing::warn!("can't subscribe to {} yet: {e}", inbox.channel),
        }
        backoff.pause().await;
    }
}

/// Notices silence, deadlines and idle readers.
async fn clock(inbox: Arc<Inbox>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = Instant::now();
        for feed in inbox.table.all() {
            let tick = feed.tick(now);
            if tick.expired {
                tracing::info!(job = %feed.key, code = code::DEADLINE, "the deadline passed");
                inbox.fail(&feed, deadline_passed());
                if feed.owned {
                    inbox.cancel(feed.key, feed.deadline);
                }
            } else if tick.silent {
                inbox.rescue(&feed);
            }
        }
    }
}
