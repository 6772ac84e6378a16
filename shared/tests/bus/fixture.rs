//! An adapter under test, with names of its own on the shared Redis, which are deleted afterwards.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use stoker_shared::config::Services;
use stoker_shared::embedded::EmbeddedBus;
use stoker_shared::frame::Frame;
use stoker_shared::ports::{Append, Bus, LogHeader, Notice, Opened, Opening};
use stoker_shared::redis::RedisBus;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::services::configured;

/// How long anything may take that is bound to happen.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An adapter under test, as two processes see it.
pub struct Fixture {
    pub bus: Arc<dyn Bus>,
    pub other: Arc<dyn Bus>,
    services: Option<Services>,
}

impl Fixture {
    pub fn embedded() -> Self {
        let bus = Arc::new(EmbeddedBus::new());
        Self { bus: bus.clone(), other: bus, services: None }
    }

    pub async fn redis() -> Self {
        let services = configured();
        let bus = Arc::new(RedisBus::connect(&services).await.unwrap());
        let other = Arc::new(RedisBus::connect(&services).await.unwrap());
        Self { bus, other, services: Some(services) }
    }

    /// Runs a test, and cleans up even if it fails.
    pub async fn run<F: Future<Output = ()>>(self, test: impl FnOnce(Arc<Self>) -> F) {
        let this = Arc::new(self);
        let outcome = AssertUnwindSafe(test(this.clone())).catch_unwind().await;
        if let Some(services) = &this.services {
            delete_names(services).await;
        }
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    }
}

/// A plain connection of the test's own.
pub async fn plain_connection(services: &Services) -> redis::aio::MultiplexedConnection {
    let client = redis::Client::open(services.redis_url.as_str()).unwrap();
    client.get_multiplexed_async_connection().await.unwrap()
}

pub async fn delete_names(services: &Services) {
    let mut connection = plain_connection(services).await;
    let mut cursor = 0;
    loop {
        let pattern = format!("{}*", services.prefix);
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(1000);
        let (next, keys): (u64, Vec<String>) = scan.query_async(&mut connection).await.unwrap();
        if !keys.is_empty() {
            let () = redis::cmd("DEL").arg(keys).query_async(&mut connection).await.unwrap();
        }
        if next == 0 {
            return;
        }
        cursor = next;
    }
}

/// A job of a test.
#[derive(Clone)]
pub struct Job {
    pub key: Uuid,
    pub channel: String,
}

impl Job {
    pub fn new() -> Self {
        Self { key: Uuid::new_v4(), channel: format!("llm.tokens.{}", Uuid::new_v4()) }
    }

    pub fn on(channel: &str) -> Self {
        Self { key: Uuid::new_v4(), channel: channel.into() }
    }

    pub fn header(&self, epoch: u64, worker: &str) -> LogHeader {
        LogHeader {
            epoch,
            worker: worker.into(),
            seed: u64::MAX,
            revision: "r|1 \"x\"".into(),
            channel: "t".into(),
        }
    }

    pub fn opening(&self, epoch: u64) -> Opening {
        Opening {
            key: self.key,
            header: self.header(epoch, &format!("w-{epoch}")),
            ttl: Duration::from_secs(600),
        }
    }

    /// The frame of one token, `t<n>`.
    pub fn frame(&self, epoch: u64, n: u32) -> Frame {
        Frame {
            v: 1,
            id: self.key.to_string(),
            epoch,
            seq: n,
            at: n as usize * 2,
            text: format!("t{n}"),
            tokens: 1,
            ids: vec![n],
            ..Frame::default()
        }
    }

    pub fn append(&self, epoch: u64, n: u32) -> Append {
        self.append_frame(&self.frame(epoch, n))
    }

    pub fn append_frame(&self, frame: &Frame) -> Append {
        let record = Bytes::from(serde_json::to_vec(frame).unwrap());
        Append { key: self.key, epoch: frame.epoch, channel: self.channel.clone(), record, opening: None }
    }
}

/// Opens one log; its records so far and whether the job is cancelled.
pub async fn open(bus: &dyn Bus, job: &Job, epoch: u64) -> (Vec<Frame>, bool) {
    match open_as(bus, &job.opening(epoch)).await {
        Opened::Started { frames, cancelled } => (frames, cancelled),
        superseded => panic!("{superseded:?}"),
    }
}

pub async fn open_as(bus: &dyn Bus, opening: &Opening) -> Opened {
    let mut opened = bus.open(std::slice::from_ref(opening)).await.unwrap();
    assert_eq!(opened.len(), 1);
    opened.remove(0)
}

/// The next thing that a channel brings.
pub async fn next<T>(receiver: &mut mpsc::Receiver<T>) -> T {
    timeout(PATIENCE, receiver.recv()).await.expect("nothing comes").expect("the channel has ended")
}

/// The next message; it is no interruption.
pub async fn next_frames(receiver: &mut mpsc::Receiver<Notice>) -> Vec<Frame> {
    match next(receiver).await {
        Notice::Frames(frames) => frames,
        Notice::Interrupted => panic!("interrupted"),
    }
}

/// Waits until something holds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, holds: impl Fn() -> F) {
    let end = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < end, "in vain: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}
