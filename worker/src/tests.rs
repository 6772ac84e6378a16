//! What can only be seen from inside: an engine that dies, and an attempt that has lasted too long.

use std::time::Duration;

use stoker_engine::EchoOptions;
use stoker_shared::config::Config;
use stoker_shared::embedded;
use stoker_shared::envelope::Envelope;
use stoker_shared::job::{Job, Lane};
use stoker_shared::outcome::Outcome;
use stoker_shared::ports::{Destination, JobState, Message, Ports};
use uuid::Uuid;

use crate::{Error, Model, Worker, handover, outbox};

const PATIENCE: Duration = Duration::from_secs(60);

async fn start(ports: &Ports) -> Worker {
    let mut config = Config::default();
    config.http.host = "127.0.0.1".into();
    config.http.port = Some(0);
    let options = EchoOptions { name: "echo".into(), tokens: 1, delay: Duration::from_millis(2), slots: 4 };
    Worker::start(config, ports.clone(), vec![Model::Echo(options)], None).await.unwrap()
}

async fn ports() -> Ports {
    let ports = embedded::ports(None).unwrap();
    ports.ledger.migrate().await.unwrap();
    ports.queue.declare_work("echo").await.unwrap();
    ports
}

/// Publishes a job that gives "a b a b …" back.
async fn publish(ports: &Ports, tokens: u64) -> Uuid {
    let key = Uuid::now_v7();
    let mut job = Job { id: Some(key.to_string()), prompt: Some("a b".into()), ..Job::default() };
    job.options.max_tokens = Some(tokens);
    let envelope = Envelope {
        key,
        tenant: "acme".into(),
        once: true,
        front_door: false,
        body_hash: String::new(),
        accepted_ms: 0,
        cache_key: None,
        revision: None,
        coordinator: None,
    };
    let message = Message {
        id: key.to_string(),
        body: serde_json::to_vec(&job).unwrap().into(),
        headers: envelope.to_headers(),
        ..Message::default()
    };
    let to = Destination::Work { model: "echo".into(), lane: Lane::Interactive };
    ports.queue.publish(&to, message).await.unwrap();
    key
}

async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("in time: {what}"));
}

async fn has_tokens(ports: &Ports, key: Uuid) -> bool {
    ports.bus.read_log(key).await.unwrap().is_some_and(|log| log.frames.iter().any(|f| f.tokens > 0))
}

async fn outcome(ports: &Ports, key: Uuid) -> Outcome {
    let done = async || ports.ledger.find(key).await.unwrap().is_some_and(|r| r.state == JobState::Done);
    eventually("the job is final", done).await;
    let row = ports.ledger.find(key).await.unwrap().unwrap();
    serde_json::from_slice(&row.outcome.unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_engine_died_stops_and_says_so() {
    let ports = ports().await;
    let worker = start(&ports).await;
    let key = publish(&ports, 500).await;
    eventually("it runs", async || has_tokens(&ports, key).await).await;
    // An engine's thread drops its sink when it ends, whatever the cause.
    drop(outbox::sink(&worker.shared));
    let stopped = tokio::time::timeout(PATIENCE, worker.wait()).await.unwrap();
    assert!(matches!(stopped, Err(Error::EngineDied)));
    // Another one goes on, although this process lingers.
    let other = start(&ports).await;
    let outcome = outcome(&ports, key).await;
    assert_eq!((outcome.tokens, &outcome.metadata["worker"]), (500, &other.id().into()));
    assert_eq!(outcome.metadata["attempts"], 2);
    tokio::time::timeout(Duration::from_secs(15), worker.drain())
        .await
        .expect("there is nothing to wait for");
    other.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_lasted_too_long_is_handed_over_even_to_its_own_worker() {
    let ports = ports().await;
    let worker = start(&ports).await;
    let key = publish(&ports, 500).await;
    for epoch in 1..=3 {
        let runs = async || match ports.bus.read_log(key).await.unwrap() {
            Some(log) => log.header.epoch >= epoch && log.frames.iter().any(|f| f.epoch == log.header.epoch),
            None => false,
        };
        eventually("it runs", runs).await;
        handover::begin(&worker.shared, |_| true);
    }
    let outcome = outcome(&ports, key).await;
    assert_eq!((outcome.tokens, outcome.text), (500, vec!["a b"; 250].join(" ")));
    assert_eq!(outcome.metadata["attempts"], 1);
    let row = ports.ledger.find(key).await.unwrap().unwrap();
    assert!(row.epoch >= 3 && row.interruptions == 0, "{row:?}");
    worker.drain().await;
}
