//! A coordinator on embedded ports, and how to talk to it.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Client, Response};
use serde_json::Value;
use stoker_coordinator::Coordinator;
use stoker_shared::config::Config;
use stoker_shared::job::Job;
use stoker_shared::ports::{Ports, Source};

use crate::faults::FaultyQueue;
use crate::ground::Ground;
use crate::worker::{Script, TestWorker, echo};

/// The model that test workers serve.
pub const MODEL: &str = "test/echo";

/// All models that tests speak of.
#[allow(dead_code, reason = "only the suite on real services has queues to delete")]
pub const MODELS: [&str; 4] = [MODEL, "gone", "nobody", "doomed"];

/// A coordinator and the ports that it runs on.
pub struct Fleet {
    pub coordinator: Coordinator,
    pub ports: TestPorts,
    pub url: String,
    pub http: Client,
}

/// Ports, and what must be cleaned up when nobody needs them any more.
#[derive(Clone)]
pub struct TestPorts {
    ports: Ports,
    _ground: Arc<Ground>,
}

impl Deref for TestPorts {
    type Target = Ports;

    fn deref(&self) -> &Ports {
        &self.ports
    }
}

impl DerefMut for TestPorts {
    fn deref_mut(&mut self) -> &mut Ports {
        &mut self.ports
    }
}

/// Ports that no other test uses, once they are ready.
pub async fn ports() -> TestPorts {
    let (ground, ports) = Ground::open().await;
    eventually("the services are ready", || async {
        ports.queue.ready().await.is_ok()
            && ports.bus.ready().await.is_ok()
            && ports.ledger.migrate().await.is_ok()
            && ports.ledger.ready().await.is_ok()
    })
    .await;
    TestPorts { ports, _ground: Arc::new(ground) }
}

/// The same, with a broker that fails on demand.
pub async fn faulty_ports() -> (TestPorts, Arc<FaultyQueue>) {
    let mut ports = ports().await;
    let queue = FaultyQueue::new(ports.queue.clone());
    ports.queue = queue.clone();
    (ports, queue)
}

/// A configuration for a test: any free port.
pub fn config() -> Config {
    let mut config = Config::default();
    config.http.host = "127.0.0.1".into();
    config.http.port = Some(0);
    config
}

impl Fleet {
    /// A coordinator on these ports.
    pub async fn on(ports: TestPorts, config: Config) -> Self {
        let coordinator = Coordinator::start(config, Ports::clone(&ports), None).await.unwrap();
        let url = format!("http://{}", coordinator.addr());
        // The client wants to know one even where it speaks plain HTTP. The first test of the process installs it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { coordinator, ports, url, http: Client::new() }
    }

    /// A coordinator and a worker that echoes.
    pub async fn echoing() -> (Self, TestWorker) {
        Self::scripted(echo).await
    }

    /// A coordinator and a worker with a script.
    pub async fn scripted(author: impl Fn(&Job) -> Script + Send + Sync + 'static) -> (Self, TestWorker) {
        let ports = ports().await;
        let worker = TestWorker::start(&ports, MODEL, Arc::new(author)).await;
        (Self::on(ports, config()).await, worker)
    }

    /// Posts JSON.
    pub async fn post(&self, path: &str, body: Value) -> Response {
        self.http.post(format!("{}{path}", self.url)).json(&body).send().await.unwrap()
    }

    /// Posts anything.
    pub async fn post_raw(&self, path: &str, body: impl Into<reqwest::Body>) -> Response {
        self.http.post(format!("{}{path}", self.url)).body(body).send().await.unwrap()
    }

    /// Gets JSON; the status too.
    pub async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.http.get(format!("{}{path}", self.url)).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }
}

/// Status and JSON of a response.
pub async fn json(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
}

/// The data of all events of a stream.
pub async fn events(response: Response) -> Vec<String> {
    let text = response.text().await.unwrap();
    assert!(text.ends_with("\n\n"), "events are whole: {text:?}");
    text.split("\n\n")
        .filter_map(|event| event.lines().find_map(|l| l.strip_prefix("data: ")))
        .map(str::to_owned)
        .collect()
}

/// A deadline.
pub fn in_seconds(seconds: u64) -> String {
    let at = time::OffsetDateTime::now_utc() + Duration::from_secs(seconds);
    at.format(&time::format_description::well_known::Rfc3339).unwrap()
}

/// Waits until something holds; fails after a generous while.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    for _ in 0..1500 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("never: {what}");
}

/// The next message of a queue, settled.
pub async fn take(ports: &Ports, source: &Source) -> stoker_shared::ports::Message {
    let mut consumer = ports.queue.consume(source, 1).await.unwrap();
    let next = tokio::time::timeout(Duration::from_secs(30), consumer.deliveries.recv()).await;
    let delivery = next.unwrap_or_else(|_| panic!("nothing in {source:?}")).unwrap();
    delivery.receipt.ack().await.unwrap();
    delivery.message
}
