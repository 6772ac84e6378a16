//! What the worker's tests share: a fleet without coordinators on embedded ports, with faults on demand.

#![allow(dead_code)] // Each test program uses a part of it.

pub mod faults;
pub mod reader;

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use stoker_engine::EchoOptions;
use stoker_shared::config::Config;
use stoker_shared::embedded::{EmbeddedBus, EmbeddedQueue, SqliteLedger};
use stoker_shared::envelope::{Envelope, key_of};
use stoker_shared::job::{Job, Lane};
use stoker_shared::outcome::Outcome;
use stoker_shared::ports::{
    Bus, Claim, Consumer, Control, Destination, JobRow, JobState, Ledger, Message, Ports, Queue, Source,
    WorkerPresence,
};
use stoker_worker::{Model, Worker};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc;
use uuid::Uuid;

use faults::{CutQueue, FaultyBus, FaultyLedger};
use reader::Reader;

pub const MODEL: &str = "echo";
pub const TENANT: &str = "acme";
/// For what must happen soon; generous, because the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Ports with faults on demand.
pub struct Fleet {
    pub queue: Arc<EmbeddedQueue>,
    pub bus: Arc<FaultyBus>,
    pub ledger: Arc<FaultyLedger>,
}

impl Fleet {
    pub async fn new() -> Self {
        let queue = Arc::new(EmbeddedQueue::new());
        queue.declare_work(MODEL).await.unwrap();
        let ledger = SqliteLedger::open(None).unwrap();
        ledger.migrate().await.unwrap();
        Self {
            queue,
            bus: Arc::new(FaultyBus::new(EmbeddedBus::new())),
            ledger: Arc::new(FaultyLedger::new(ledger)),
        }
    }

    pub fn ports(&self) -> Ports {
        Ports { queue: self.queue.clone(), bus: self.bus.clone(), ledger: self.ledger.clone() }
    }

    /// A worker with 8 slots that has announced itself.
    pub async fn worker(&self, delay_ms: u64) -> Worker {
        self.worker_with(self.ports(), delay_ms, 8, config()).await
    }

    /// A worker whose connection to the queue can be cut.
    pub async fn worker_on_a_wire(&self, delay_ms: u64) -> (Worker, Arc<CutQueue>) {
        let queue = Arc::new(CutQueue::new(self.queue.clone(), self.ledger.clone()));
        let ports = Ports { queue: queue.clone(), ..self.ports() };
        (self.worker_with(ports, delay_ms, 8, config()).await, queue)
    }

    pub async fn worker_with(&self, ports: Ports, delay_ms: u64, slots: u32, config: Config) -> Worker {
        let delay = Duration::from_millis(delay_ms);
        let options = EchoOptions { name: MODEL.into(), tokens: 8, delay, slots };
        let worker = Worker::start(config, ports, vec![Model::Echo(options)], None).await.unwrap();
        let announced =
            async || self.ports().bus.workers().await.unwrap().iter().any(|w| w.id == worker.id());
        eventually("the worker announces itself", announced).await;
        worker
    }

    pub async fn publish(&self, order: &Order) {
        let to = Destination::Work { model: MODEL.into(), lane: order.lane };
        self.queue.publish(&to, order.message()).await.unwrap();
    }

    /// Publishes it, and reads what is said of it from the beginning.
    pub async fn ask(&self, order: &Order) -> Reader {
        let reader = Reader::new(self.bus.clone(), order.channel()).await;
        self.publish(order).await;
        reader
    }

    /// Makes another worker look alive; until the receiver is dropped.
    pub async fn impersonate(&self, worker: &str) -> mpsc::Receiver<Control> {
        let control = self.bus.control(worker).await.unwrap();
        let presence = WorkerPresence { id: worker.into(), ..WorkerPresence::default() };
        self.bus.announce_worker(&presence).await.unwrap();
        control
    }

    /// Publishes it as a message that somebody has had before; no worker may be there yet.
    pub async fn publish_redelivered(&self, order: &Order) {
        self.publish(order).await;
        let from = Source::Work { model: MODEL.into(), lane: order.lane };
        let mut consumer = self.queue.consume(&from, 1).await.unwrap();
        consumer.deliveries.recv().await.unwrap();
        drop(consumer);
        let ready = async || self.queue.depth(&from).await.unwrap() == Some(1);
        eventually("the message is back", ready).await;
    }

    pub async fn row(&self, key: Uuid) -> Option<JobRow> {
        self.ledger.inner.find(key).await.unwrap()
    }

    /// Waits until a job is final; its outcome's bytes and what they say.
    pub async fn outcome(&self, key: Uuid) -> (Vec<u8>, Outcome) {
        let done = async || self.row(key).await.is_some_and(|row| row.state == JobState::Done);
        eventually("the job is final", done).await;
        let bytes = self.row(key).await.unwrap().outcome.unwrap().to_vec();
        let outcome = serde_json::from_slice(&bytes).unwrap();
        (bytes, outcome)
    }

    /// Waits until no work queue holds anything, delivered or not.
    pub async fn all_acknowledged(&self, workers: Vec<Worker>) {
        for worker in workers {
            worker.drain().await;
        }
        assert_eq!(self.left_in_queues().await, 0, "a delivery was not acknowledged");
    }

    /// Messages on the work queues; what a consumer that is gone left behind, too.
    pub async fn left_in_queues(&self) -> u32 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut left = 0;
        for lane in Lane::ALL {
            let from = Source::Work { model: MODEL.into(), lane };
            left += self.queue.depth(&from).await.unwrap().unwrap() as u32;
        }
        left
    }

    /// Rows in `llm_requests`.
    pub async fn bills(&self) -> u64 {
        self.ledger.inner.usage(TENANT, None, 3600).await.unwrap().request_count
    }

    pub async fn consume(&self, from: Source) -> Consumer {
        self.queue.consume(&from, 1000).await.unwrap()
    }
}

/// Takes the next message and acknowledges it.
pub async fn next(consumer: &mut Consumer) -> Message {
    let next = tokio::time::timeout(PATIENCE, consumer.deliveries.recv()).await;
    let delivery = next.expect("a message comes in time").expect("the consumer lives");
    delivery.receipt.ack().await.unwrap();
    delivery.message
}

/// Waits until something is so.
pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("in time: {what}"));
}

/// A worker's configuration for tests.
pub fn config() -> Config {
    let mut config = Config::default();
    config.http.host = "127.0.0.1".into();
    config.http.port = Some(0);
    config
}

/// A job to publish.
#[derive(Clone)]
pub struct Order {
    pub envelope: Envelope,
    pub job: Job,
    pub lane: Lane,
    pub reply_to: Option<String>,
}

impl Order {
    /// As a connected HTTP client's: marked once, under an id that was minted.
    pub fn once(prompt: &str, tokens: u32) -> Self {
        let key = Uuid::now_v7();
        Self::with_key(key, &key.to_string(), prompt, tokens, true)
    }

    /// As from the front door, under an id that its submitter chose.
    pub fn front_door(id: &str, prompt: &str, tokens: u32) -> Self {
        let mut order = Self::with_key(key_of(TENANT, id), id, prompt, tokens, false);
        order.envelope.front_door = true;
        order
    }

    fn with_key(key: Uuid, id: &str, prompt: &str, tokens: u32, once: bool) -> Self {
        let in_ten_minutes = OffsetDateTime::now_utc() + Duration::from_secs(600);
        let mut job = Job {
            id: Some(id.into()),
            model: Some(MODEL.into()),
            prompt: Some(prompt.into()),
            stream_to: Some(format!("llm.tokens.{id}")),
            deadline: Some(in_ten_minutes.format(&Rfc3339).unwrap()),
            ..Job::default()
        };
        job.options.max_tokens = Some(tokens.into());
        job.options.seed = Some(7);
        let envelope = Envelope {
            key,
            tenant: TENANT.into(),
            once,
            front_door: false,
            body_hash: if once { String::new() } else { job.body_hash() },
            accepted_ms: (OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000) as u64,
            cache_key: None,
            revision: None,
            coordinator: None,
        };
        Self { envelope, job, lane: Lane::Interactive, reply_to: None }
    }

    pub fn key(&self) -> Uuid {
        self.envelope.key
    }

    pub fn id(&self) -> &str {
        self.job.id.as_deref().unwrap()
    }

    pub fn channel(&self) -> &str {
        self.job.stream_to.as_deref().unwrap()
    }

    pub fn message(&self) -> Message {
        Message {
            id: self.id().into(),
            body: serde_json::to_vec(&self.job).unwrap().into(),
            correlation_id: self.reply_to.as_ref().map(|_| format!("c-{}", self.id())),
            reply_to: self.reply_to.clone(),
            headers: self.envelope.to_headers(),
            ..Message::default()
        }
    }

    /// A claim on the job by some worker.
    pub fn claim(&self, expected: Option<u64>, epoch: u64, worker: &str, interruptions: u32) -> Claim {
        Claim {
            key: self.key(),
            tenant: TENANT.into(),
            job_id: self.id().into(),
            body_hash: self.envelope.body_hash.clone(),
            expected,
            epoch,
            worker: worker.into(),
            interruptions,
            delivered: true,
            expires_in_s: 600,
        }
    }

    /// What the echo engine makes of it.
    pub fn text(&self) -> String {
        let words: Vec<_> = self.job.prompt.as_deref().unwrap().split_whitespace().collect();
        let tokens = self.job.options.max_tokens.unwrap() as usize;
        (0..tokens).map(|i| words[i % words.len()]).collect::<Vec<_>>().join(" ")
    }
}

/// Fields that a submitter may add.
pub fn extras() -> serde_json::Map<String, serde_json::Value> {
    json!({ "colour": "red" }).as_object().unwrap().clone()
}
