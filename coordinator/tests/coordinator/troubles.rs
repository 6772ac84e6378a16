//! Services that are slow, full or down: a clear answer, and never a hang.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::faults::{Confirms, FaultyBus, FaultyQueue};
use crate::fleet::{Fleet, MODEL, config, events, eventually, faulty_ports, json, ports};
use crate::worker::{Script, TestWorker, echo};

fn chat(stream: bool) -> Value {
    json!({
        "model": MODEL, "messages": [{ "role": "user", "content": "a b" }], "max_tokens": 3, "stream": stream,
    })
}

async fn faulty(
    author: impl Fn(&stoker_shared::job::Job) -> Script + Send + Sync + 'static,
) -> (Fleet, TestWorker, Arc<FaultyQueue>) {
    let (ports, queue) = faulty_ports().await;
    let worker = TestWorker::start(&ports, MODEL, Arc::new(author)).await;
    (Fleet::on(ports, config()).await, worker, queue)
}

#[tokio::test]
async fn the_first_token_does_not_wait_for_the_confirm() {
    let (fleet, _worker, queue) = faulty(echo).await;
    queue.set(Confirms::Late);
    let answer = timeout(Duration::from_secs(20), async {
        events(fleet.post("/v1/chat/completions", chat(true)).await).await
    });
    let answer = answer.await.expect("the confirm has not come yet");
    assert!(answer.iter().any(|e| e.contains(" a")) && answer.last().unwrap() == "[DONE]");
    queue.set(Confirms::Prompt);
}

#[tokio::test]
async fn a_confirm_that_never_comes_cancels_the_job_unless_it_runs() {
    let (fleet, worker, queue) =
        faulty(|job| Script { pause: Duration::from_millis(400), ..echo(job) }).await;
    queue.set(Confirms::Lost);
    for stream in [true, false] {
        let response = fleet.post("/v1/chat/completions", chat(stream)).await;
        assert!(response.headers().contains_key("retry-after"));
        let (status, reply) = json(response).await;
        assert_eq!((status, &reply["error"]["code"]), (503, &json!("service_unavailable")), "{reply}");
    }
    eventually("both are cancelled", || async { worker.cancelled.lock().unwrap().len() == 2 }).await;
    assert_eq!(worker.started(), 0);
}

#[tokio::test]
async fn a_confirm_that_is_lost_under_a_running_job_changes_nothing() {
    let (fleet, worker, queue) =
        faulty(|job| Script { pause: Duration::from_millis(150), ..echo(job) }).await;
    queue.set(Confirms::TakenAndLost);
    let answer = events(fleet.post("/v1/chat/completions", chat(true)).await).await;
    assert_eq!(answer.last().unwrap(), "[DONE]");
    assert!(worker.cancelled.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_broker_that_is_down_means_503_and_back_means_back() {
    let (fleet, _worker, queue) = faulty(echo).await;
    queue.set(Confirms::Down);
    for path in ["/api/generate", "/api/stream"] {
        let response = fleet.post(path, json!({ "prompt": "a" })).await;
        assert!(response.headers().contains_key("retry-after"));
        let (status, reply) = json(response).await;
        assert_eq!((status, &reply["code"]), (503, &json!("service_unavailable")), "{reply}");
    }
    queue.set(Confirms::Prompt);
    assert_eq!(fleet.post("/api/generate", json!({ "prompt": "a" })).await.status(), 200);
}

#[tokio::test]
async fn a_full_queue_means_503() {
    let mut ports = ports().await;
    ports.queue = Arc::new(stoker_shared::embedded::EmbeddedQueue::with_limit(1));
    let mut config = config();
    config.coordinator.models = vec![MODEL.into()];
    let fleet = Arc::new(Fleet::on(ports, config).await);
    let waiting = {
        let fleet = fleet.clone();
        tokio::spawn(async move { fleet.post("/v1/chat/completions", chat(false)).await })
    };
    let work = stoker_shared::ports::Source::Work { model: MODEL.into(), lane: Default::default() };
    eventually("one waits", || async { fleet.ports.queue.depth(&work).await.unwrap() == Some(1) }).await;
    let response = fleet.post("/v1/chat/completions", chat(true)).await;
    assert!(response.headers().contains_key("retry-after"));
    let (status, reply) = json(response).await;
    assert_eq!((status, &reply["error"]["code"]), (503, &json!("queue_full")));
    waiting.abort();
}

#[tokio::test]
async fn a_bus_that_is_down_at_start_is_waited_for() {
    let mut ports = ports().await;
    let worker = TestWorker::start(&ports, MODEL, Arc::new(echo)).await;
    let bus = FaultyBus::new(ports.bus.clone());
    bus.set_down(true);
    ports.bus = bus.clone();
    let fleet = Fleet::on(ports, config()).await;
    let (status, reply) = json(fleet.post("/v1/chat/completions", chat(false)).await).await;
    assert_eq!((status, &reply["error"]["code"]), (503, &json!("service_unavailable")));
    assert_eq!(fleet.get("/healthz/ready").await.0, 503);
    assert_eq!(fleet.get("/health").await.1["status"], "degraded");
    bus.set_down(false);
    eventually("it serves", || async {
        fleet.post("/v1/chat/completions", chat(false)).await.status() == 200
    })
    .await;
    assert!(worker.started() >= 1);
}

#[tokio::test]
async fn a_bus_that_goes_down_means_503_after_a_moment() {
    let mut ports = ports().await;
    let _worker = TestWorker::start(&ports, MODEL, Arc::new(echo)).await;
    let bus = FaultyBus::new(ports.bus.clone());
    ports.bus = bus.clone();
    let fleet = Fleet::on(ports, config()).await;
    bus.set_down(true);
    eventually("the registry knows that it knows nothing", || async {
        fleet.get("/health").await.1["router"] == false
    })
    .await;
    let (status, _) = json(fleet.post("/v1/chat/completions", chat(true)).await).await;
    assert_eq!(status, 503);
    bus.set_down(false);
    eventually("it serves", || async {
        fleet.post("/v1/chat/completions", chat(false)).await.status() == 200
    })
    .await;
}
