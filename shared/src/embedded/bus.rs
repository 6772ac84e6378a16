//! The embedded bus: logs, channels and presences of one process.
//!
//! One lock guards all of it, so that a step is atomic and its frames reach every subscriber in the order in which the
//! steps were taken. Nothing waits while holding it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::warn;
use uuid::Uuid;

use crate::frame::Frame;
use crate::mailbox::Mailbox;
use crate::ports::{
    Append, AppendReport, Appended, Bus, CONTROL_CAPACITY, Control, Liveness, LogHeader, Notice, Opened,
    Opening, PRESENCE_PERIOD, PortResult, ReplayLog, ServedModel, WorkerPresence,
};

/// How often expired entries are looked for; until then they only take memory.
const SWEEP_PERIOD: Duration = Duration::from_secs(5);

/// The bus inside one process.
#[derive(Debug)]
pub struct EmbeddedBus {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    logs: HashMap<Uuid, Log>,
    /// When each cancellation expires.
    cancelled: HashMap<Uuid, Instant>,
    workers: BTreeMap<String, (WorkerPresence, Instant)>,
    coordinators: HashMap<String, Instant>,
    models: BTreeMap<String, ServedModel>,
    subscribers: HashMap<String, Vec<Mailbox>>,
    controls: HashMap<String, Vec<mpsc::Sender<Control>>>,
    next_sweep: Instant,
}

#[derive(Debug)]
struct Log {
    header: LogHeader,
    records: Vec<Bytes>,
    expires: Instant,
}

impl Log {
    /// Whether another attempt holds it that is not older than this one.
    fn is_newer_than(&self, attempt: &LogHeader) -> bool {
        self.header.epoch > attempt.epoch || self.header.epoch == attempt.epoch && self.header != *attempt
    }
}

impl EmbeddedBus {
    /// An empty bus.
    pub fn new() -> Self {
        let state = State {
            logs: HashMap::new(),
            cancelled: HashMap::new(),
            workers: BTreeMap::new(),
            coordinators: HashMap::new(),
            models: BTreeMap::new(),
            subscribers: HashMap::new(),
            controls: HashMap::new(),
            next_sweep: Instant::now() + SWEEP_PERIOD,
        };
        Self { state: Mutex::new(state) }
    }

    /// The state, without what has expired. A panic elsewhere can't have left it half-changed in a way that matters.
    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if state.next_sweep <= now {
            state.sweep(now);
        }
        state
    }
}

impl Default for EmbeddedBus {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    fn sweep(&mut self, now: Instant) {
        self.logs.retain(|_, log| log.expires > now);
        self.cancelled.retain(|_, expires| *expires > now);
        self.workers.retain(|_, (_, expires)| *expires > now);
        self.coordinators.retain(|_, expires| *expires > now);
        self.subscribers.retain(|_, mailboxes| mailboxes.iter().any(|m| !m.is_closed()));
        self.controls.retain(|_, receivers| receivers.iter().any(|r| !r.is_closed()));
        self.next_sweep = now + SWEEP_PERIOD;
    }

    fn log(&mut self, key: Uuid) -> Option<&mut Log> {
        self.logs.get_mut(&key).filter(|log| log.expires > Instant::now())
    }

    fn is_cancelled(&self, key: Uuid) -> bool {
        self.cancelled.get(&key).is_some_and(|expires| *expires > Instant::now())
    }

    fn open(&mut self, opening: &Opening) -> Opened {
        let cancelled = self.is_cancelled(opening.key);
        let expires = Instant::now() + opening.ttl;
        match self.log(opening.key) {
            Some(log) if log.is_newer_than(&opening.header) => Opened::Superseded { epoch: log.header.epoch },
            Some(log) => {
                log.header = opening.header.clone();
                log.expires = expires;
                Opened::Started { frames: parse(&log.records), cancelled }
            }
            None => {
                let log = Log { header: opening.header.clone(), records: Vec::new(), expires };
                self.logs.insert(opening.key, log);
                Opened::Started { frames: Vec::new(), cancelled }
            }
        }
    }

    fn append(&mut self, job: &Append) -> Appended {
        if let Some(opening) = &job.opening {
            match self.log(job.key) {
                None => drop(self.open(opening)),
                Some(log) if log.is_newer_than(&opening.header) => return Appended::Superseded,
                Some(_) => {}
            }
        }
        match self.log(job.key) {
            Some(log) if log.header.epoch == job.epoch => {
                log.records.push(job.record.clone());
                Appended::Accepted
            }
            Some(log) if log.header.epoch > job.epoch => Appended::Superseded,
            _ => Appended::Missing,
        }
    }

    /// Publishes records as one message; whether anybody listens.
    fn publish(&mut self, channel: &str, records: &[Bytes]) -> bool {
        let Some(mailboxes) = self.subscribers.get_mut(channel) else { return false };
        mailboxes.retain(|m| !m.is_closed());
        if mailboxes.is_empty() {
            self.subscribers.remove(channel);
            return false;
        }
        let frames = parse(records);
        let (last, others) = mailboxes.split_last_mut().expect("it is not empty");
        others.iter_mut().for_each(|m| m.deliver(frames.clone()));
        last.deliver(frames);
        true
    }

    /// Says something to those who listen as `worker`; whether anybody does.
    fn tell(&mut self, worker: &str, control: &Control) -> bool {
        let Some(receivers) = self.controls.get_mut(worker) else { return false };
        receivers.retain(|r| !r.is_closed());
        receivers.iter().for_each(|r| send_control(r, control));
        !receivers.is_empty()
    }
}

fn send_control(receiver: &mpsc::Sender<Control>, control: &Control) {
    if let Err(mpsc::error::TrySendError::Full(_)) = receiver.try_send(control.clone()) {
        warn!(?control, "a worker does not listen to its control channel");
    }
}

fn parse(records: &[Bytes]) -> Vec<Frame> {
    let parse = |record: &Bytes| match serde_json::from_slice(record) {
        Ok(frame) => Some(frame),
        Err(error) => {
            warn!(%error, "a record that is not a frame is skipped");
            None
        }
    };
    records.iter().filter_map(parse).collect()
}

#[async_trait]
impl Bus for EmbeddedBus {
    async fn open(&self, openings: &[Opening]) -> PortResult<Vec<Opened>> {
        let mut state = self.state();
        Ok(openings.iter().map(|o| state.open(o)).collect())
    }

    async fn append(&self, step: &[Append]) -> PortResult<AppendReport> {
        let mut state = self.state();
        let jobs: Vec<Appended> = step.iter().map(|job| state.append(job)).collect();
        let mut messages: Vec<(&str, Vec<Bytes>)> = Vec::new();
        for (job, _) in step.iter().zip(&jobs).filter(|(_, appended)| **appended == Appended::Accepted) {
            match messages.iter_mut().find(|(channel, _)| *channel == job.channel) {
                Some((_, records)) => records.push(job.record.clone()),
                None => messages.push((&job.channel, vec![job.record.clone()])),
            }
        }
        messages.retain(|(channel, records)| !state.publish(channel, records));
        Ok(AppendReport {
            jobs,
            unheard: messages.into_iter().map(|(channel, _)| channel.to_owned()).collect(),
        })
    }

    async fn read_log(&self, key: Uuid) -> PortResult<Option<ReplayLog>> {
        let log = self.state().log(key).map(|log| (log.header.clone(), log.records.clone()));
        Ok(log.map(|(header, records)| ReplayLog { header, frames: parse(&records) }))
    }

    async fn expire_logs(&self, keys: &[Uuid], ttl: Duration) -> PortResult<()> {
        let mut state = self.state();
        let expires = Instant::now() + ttl;
        for key in keys {
            if let Some(log) = state.log(*key) {
                log.expires = log.expires.min(expires);
            }
        }
        Ok(())
    }

    async fn subscribe(&self, channel: &str) -> PortResult<mpsc::Receiver<Notice>> {
        let (mailbox, receiver) = Mailbox::new();
        self.state().subscribers.entry(channel.to_owned()).or_default().push(mailbox);
        Ok(receiver)
    }

    async fn cancel(&self, key: Uuid, ttl: Duration) -> PortResult<()> {
        let mut state = self.state();
        state.cancelled.insert(key, Instant::now() + ttl);
        state.controls.values().flatten().for_each(|r| send_control(r, &Control::Cancel(key)));
        Ok(())
    }

    async fn is_cancelled(&self, key: Uuid) -> PortResult<bool> {
        Ok(self.state().is_cancelled(key))
    }

    async fn control(&self, worker: &str) -> PortResult<mpsc::Receiver<Control>> {
        let (sender, receiver) = mpsc::channel(CONTROL_CAPACITY);
        self.state().controls.entry(worker.to_owned()).or_default().push(sender);
        Ok(receiver)
    }

    async fn tell(&self, worker: &str, control: &Control) -> PortResult<bool> {
        Ok(self.state().tell(worker, control))
    }

    async fn announce_worker(&self, presence: &WorkerPresence) -> PortResult<()> {
        let mut state = self.state();
        for model in &presence.models {
            state.models.insert(model.name.clone(), ServedModel { active: 0, ..model.clone() });
        }
        let entry = (presence.clone(), Instant::now() + PRESENCE_PERIOD);
        state.workers.insert(presence.id.clone(), entry);
        Ok(())
    }

    async fn announce_coordinator(&self, id: &str) -> PortResult<()> {
        self.state().coordinators.insert(id.to_owned(), Instant::now() + PRESENCE_PERIOD);
        Ok(())
    }

    async fn retire(&self, id: &str) -> PortResult<()> {
        let mut state = self.state();
        state.workers.remove(id);
        state.coordinators.remove(id);
        Ok(())
    }

    async fn workers(&self) -> PortResult<Vec<WorkerPresence>> {
        let now = Instant::now();
        let state = self.state();
        let there = state.workers.values().filter(|(_, expires)| *expires > now);
        Ok(there.map(|(presence, _)| presence.clone()).collect())
    }

    async fn known_models(&self) -> PortResult<Vec<ServedModel>> {
        Ok(self.state().models.values().cloned().collect())
    }

    async fn worker_liveness(&self, id: &str) -> PortResult<Liveness> {
        let state = self.state();
        let listens =
            state.controls.get(id).is_some_and(|receivers| receivers.iter().any(|r| !r.is_closed()));
        let fresh = state.workers.get(id).is_some_and(|(_, expires)| *expires > Instant::now());
        Ok(if listens && fresh { Liveness::Alive } else { Liveness::Gone })
    }

    async fn coordinator_liveness(&self, id: &str) -> PortResult<Liveness> {
        let fresh = self.state().coordinators.get(id).is_some_and(|expires| *expires > Instant::now());
        Ok(if fresh { Liveness::Alive } else { Liveness::Gone })
    }

    async fn ready(&self) -> PortResult<()> {
        Ok(())
    }
}
