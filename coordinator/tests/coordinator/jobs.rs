//! Asynchronous jobs.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use stoker_shared::envelope::key_of;
use stoker_shared::job::Lane;
use stoker_shared::ports::{
    Append, Claim, JobState, LogHeader, Opening, ServedModel, Source, WorkerPresence,
};
use tokio::sync::Notify;

use crate::faults::{Confirms, FaultyQueue};
use crate::fleet::{Fleet, MODEL, config, eventually, faulty_ports, in_seconds, json, ports};
use crate::worker::{Script, TestWorker, echo};

async fn done(fleet: &Fleet, id: &str) -> Value {
    let path = format!("/v1/jobs/{id}");
    eventually("the job is done", || async { fleet.get(&path).await.1["status"] == "done" }).await;
    fleet.get(&path).await.1
}

#[tokio::test]
async fn a_job_is_accepted_run_and_shown() {
    let (fleet, worker) = Fleet::echoing().await;
    let body = json!({ "prompt": "a b", "options": { "maxTokens": 3 }, "userId": "ann" });
    let response = fleet.post("/v1/jobs", body).await;
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let (status, reply) = json(response).await;
    assert_eq!(status, 202, "{reply}");
    let id = reply["id"].as_str().unwrap();
    assert_eq!(location, format!("/v1/jobs/{id}"));
    let shown = done(&fleet, id).await;
    assert_eq!((&shown["id"], &shown["text"], &shown["tokens"]), (&json!(id), &json!(" a b a"), &json!(3)));
    assert_eq!((&shown["success"], &shown["userId"]), (&json!(true), &json!("ann")));
    let message = worker.seen.lock().unwrap()[0].clone();
    assert!(!message.headers.contains_key("x-stoker-once"), "a sweeper may publish it again");
    assert_eq!(fleet.get("/v1/jobs/none").await.0, 404);
}

#[tokio::test]
async fn an_idempotency_key_means_one_job() {
    let (fleet, worker) = Fleet::echoing().await;
    let submit = |body: Value| {
        let request = fleet.http.post(format!("{}/v1/jobs", fleet.url)).header("Idempotency-Key", "order 7");
        request.json(&body).send()
    };
    let body = json!({ "prompt": "a", "options": { "maxTokens": 2 } });
    for _ in 0..3 {
        let response = submit(body.clone()).await.unwrap();
        assert_eq!(response.headers()["location"], "/v1/jobs/order%207");
        let (status, reply) = json(response).await;
        assert_eq!((status, &reply["id"]), (202, &json!("order 7")), "{reply}");
    }
    assert_eq!(done(&fleet, "order%207").await["text"], " a a");
    let (status, reply) = json(submit(json!({ "prompt": "b" })).await.unwrap()).await;
    assert_eq!((status, &reply["error"]["code"]), (409, &json!("id_taken")));
    let (status, reply) = json(submit(json!({ "prompt": "a", "id": "other" })).await.unwrap()).await;
    assert_eq!((status, &reply["error"]["param"]), (400, &json!("id")));
    assert_eq!(worker.started(), 1);
}

#[tokio::test]
async fn wrong_jobs_are_refused_by_name() {
    let (fleet, _worker) = Fleet::echoing().await;
    for (body, status, code, param) in [
        (
            json!({ "prompt": "a", "options": { "temperature": 3 } }),
            400,
            "invalid_request",
            "options.temperature",
        ),
        (
            json!({ "prompt": "a", "options": { "maxTokens": 0 } }),
            400,
            "invalid_request",
            "options.maxTokens",
        ),
        (json!({ "prompt": "a", "deadline": "tomorrow" }), 400, "invalid_request", "deadline"),
        (json!({ "prompt": "a", "deadline": "2199-01-01T00:00:00Z" }), 400, "invalid_request", "deadline"),
        (json!({ "prompt": "a", "deadline": "2001-01-01T00:00:00Z" }), 504, "deadline_exceeded", "deadline"),
        (json!({ "prompt": "a", "streamTo": "other" }), 400, "invalid_request", "streamTo"),
        (json!({ "prompt": "a", "model": "none" }), 404, "model_not_found", "model"),
        (json!({}), 400, "invalid_request", "prompt"),
    ] {
        let (got, reply) = json(fleet.post("/v1/jobs", body.clone()).await).await;
        let error = &reply["error"];
        assert_eq!(
            (got, &error["code"], &error["param"]),
            (status, &json!(code), &json!(param)),
            "{body}: {reply}"
        );
    }
}

/// Events of a stream: id and data.
fn parsed(text: &str) -> Vec<(usize, Value)> {
    let mut all = Vec::new();
    for event in text.split("\n\n") {
        let id = event.lines().find_map(|l| l.strip_prefix("id: ")).and_then(|id| id.parse().ok());
        let data =
            event.lines().find_map(|l| l.strip_prefix("data: ")).and_then(|d| serde_json::from_str(d).ok());
        all.extend(id.zip(data));
    }
    all
}

fn text_of(events: &[(usize, Value)]) -> String {
    events.iter().filter_map(|(_, data)| data["text"].as_str()).collect()
}

#[tokio::test]
async fn any_coordinator_can_attach_from_any_byte_on() {
    let gate = Arc::new(Notify::new());
    let held = gate.clone();
    let (fleet, _worker) = Fleet::scripted(move |job| Script { gate: Some(held.clone()), ..echo(job) }).await;
    let other = Fleet::on(fleet.ports.clone(), config()).await;
    let body = json!({ "prompt": "é b", "options": { "maxTokens": 4 } });
    let (_, reply) = json(fleet.post("/v1/jobs", body).await).await;
    let path = format!("{}/v1/jobs/{}/stream", other.url, reply["id"].as_str().unwrap());
    eventually("the text has begun", || async {
        let key = reply["id"].as_str().unwrap().parse().unwrap();
        fleet.ports.bus.read_log(key).await.unwrap().is_some_and(|log| log.frames.len() == 4)
    })
    .await;

    let mut running = other.http.get(&path).send().await.unwrap();
    assert_eq!(running.headers()["content-type"], "text/event-stream");
    let mut heard = String::new();
    while text_of(&parsed(&heard)) != " é b é b" {
        heard.push_str(std::str::from_utf8(&running.chunk().await.unwrap().unwrap()).unwrap());
    }
    let resumed = other.http.get(&path).header("Last-Event-ID", "3").send().await.unwrap();
    gate.notify_waiters();
    let rest = parsed(&resumed.text().await.unwrap());
    assert_eq!(text_of(&rest), " b é b");
    let (at, end) = rest.last().unwrap();
    assert_eq!(
        (*at, &end["finishReason"], &end["usage"]["completionTokens"]),
        (10, &json!("length"), &json!(4))
    );
    while let Some(chunk) = running.chunk().await.unwrap() {
        heard.push_str(std::str::from_utf8(&chunk).unwrap());
    }
    assert!(heard.ends_with("data: [DONE]\n\n"), "{heard}");

    done(&fleet, reply["id"].as_str().unwrap()).await;
    let afterwards = other.http.get(&path).header("Last-Event-ID", "8").send().await.unwrap();
    assert_eq!(text_of(&parsed(&afterwards.text().await.unwrap())), " b");
    let wrong = other.http.get(&path).header("Last-Event-ID", "x").send().await.unwrap();
    assert_eq!(wrong.status(), 400);
}

#[tokio::test]
async fn a_front_door_job_is_followed_on_the_channel_that_it_chose() {
    let (fleet, worker) = Fleet::echoing().await;
    let (bus, key) = (&fleet.ports.bus, key_of("default", "order-17"));
    fleet
        .ports
        .ledger
        .claim(&Claim {
            key,
            job_id: "order-17".into(),
            expected: None,
            ..claim(&key.to_string(), &worker.id)
        })
        .await
        .unwrap();
    let channel = "llm.tokens.room-5".to_owned();
    let header = LogHeader {
        epoch: 2,
        worker: worker.id.clone(),
        seed: 0,
        revision: String::new(),
        channel: channel.clone(),
    };
    bus.open(&[Opening { key, header, ttl: Duration::from_secs(60) }]).await.unwrap();
    let path = format!("{}/v1/jobs/order-17/stream", fleet.url);
    let mut stream = fleet.http.get(path).send().await.unwrap();
    eventually("somebody listens", || async {
        let frame = json!({ "v": 1, "id": "order-17", "key": key, "epoch": 2, "seq": 0, "at": 0, "text": "a", "tokens": 1 });
        let record = frame.to_string().into();
        let append = Append { key, epoch: 2, channel: channel.clone(), record, opening: None };
        bus.append(&[append]).await.unwrap().unheard.is_empty()
    })
    .await;
    let chunk = stream.chunk().await.unwrap().unwrap();
    assert!(std::str::from_utf8(&chunk).unwrap().contains("{\"text\":\"a\"}"), "{chunk:?}");
}

#[tokio::test]
async fn leaving_an_attached_stream_cancels_nothing() {
    let (fleet, worker) =
        Fleet::scripted(|job| Script { pause: Duration::from_millis(50), ..echo(job) }).await;
    let (_, reply) =
        json(fleet.post("/v1/jobs", json!({ "prompt": "a", "options": { "maxTokens": 12 } })).await).await;
    let id = reply["id"].as_str().unwrap();
    let mut stream = fleet.http.get(format!("{}/v1/jobs/{id}/stream", fleet.url)).send().await.unwrap();
    stream.chunk().await.unwrap();
    drop(stream);
    assert_eq!(done(&fleet, id).await["tokens"], 12);
    assert!(worker.cancelled.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_running_job_is_cancelled_by_its_worker_and_a_waiting_one_at_once() {
    let (fleet, worker) =
        Fleet::scripted(|job| Script { pause: Duration::from_millis(20), ..echo(job) }).await;
    let delete = |id: String| fleet.http.delete(format!("{}/v1/jobs/{id}", fleet.url)).send();
    let (_, reply) =
        json(fleet.post("/v1/jobs", json!({ "prompt": "a", "options": { "maxTokens": 4000 } })).await).await;
    let id = reply["id"].as_str().unwrap().to_owned();
    eventually("it runs", || async { worker.started() == 1 }).await;
    // The test worker claims nothing, so the ledger still says waiting; a real one would have said running.
    fleet.ports.ledger.claim(&claim(&id, &worker.id)).await.unwrap();
    let (status, reply) = json(delete(id.clone()).await.unwrap()).await;
    assert_eq!((status, &reply["status"]), (202, &json!("cancelling")), "{reply}");
    eventually("the worker hears of it", || async { worker.cancelled.lock().unwrap().len() == 1 }).await;

    fleet.ports.queue.declare_work("nobody").await.unwrap();
    fleet.ports.bus.announce_worker(&gone()).await.unwrap();
    let body = json!({ "prompt": "a", "model": "nobody" });
    let (status, reply) = json(fleet.post("/v1/jobs", body).await).await;
    assert_eq!(status, 202, "what is known waits: {reply}");
    let id = reply["id"].as_str().unwrap().to_owned();
    let (status, reply) = json(delete(id.clone()).await.unwrap()).await;
    assert_eq!((status, &reply["status"]), (200, &json!("done")));
    let shown = done(&fleet, &id).await;
    assert_eq!((&shown["success"], &shown["finishReason"]), (&json!(false), &json!("cancelled")));
    let stream = fleet.http.get(format!("{}/v1/jobs/{id}/stream", fleet.url)).send().await.unwrap();
    let events = parsed(&stream.text().await.unwrap());
    assert_eq!(events[0].1["error"]["code"], "cancelled");
    assert_eq!(delete("none".into()).await.unwrap().status(), 404);
}

/// A worker that is about to leave, with the model `nobody`.
fn gone() -> WorkerPresence {
    WorkerPresence {
        id: "w-gone".into(),
        draining: true,
        models: vec![ServedModel { name: "nobody".into(), ..ServedModel::default() }],
        ..WorkerPresence::default()
    }
}

fn claim(id: &str, worker: &str) -> Claim {
    Claim {
        key: id.parse().unwrap(),
        tenant: "default".into(),
        job_id: id.into(),
        body_hash: String::new(),
        expected: Some(0),
        epoch: 2,
        worker: worker.into(),
        interruptions: 0,
        delivered: true,
        expires_in_s: 60,
    }
}

/// A fleet whose broker is down, and the id of a job that it accepted all the same.
async fn accepted_without_a_broker() -> (Fleet, TestWorker, Arc<FaultyQueue>, String) {
    let (ports, queue) = faulty_ports().await;
    let worker = TestWorker::start(&ports, MODEL, Arc::new(echo)).await;
    let fleet = Fleet::on(ports, config()).await;
    queue.set(Confirms::Down);
    let (status, reply) = json(fleet.post("/v1/jobs", json!({ "prompt": "a" })).await).await;
    assert_eq!((status, &reply["status"]), (202, &json!("waiting")), "the ledger has it: {reply}");
    assert_eq!(worker.started(), 0);
    (fleet, worker, queue, reply["id"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn what_the_broker_never_got_is_published_again() {
    let (fleet, worker, queue, id) = accepted_without_a_broker().await;
    queue.set(Confirms::Prompt);
    assert_eq!(done(&fleet, &id).await["success"], true);
    assert_eq!(worker.started(), 1);
}

#[tokio::test]
async fn what_waits_for_a_full_queue_holds_up_no_other_job() {
    let (ports, queue) = faulty_ports().await;
    let mut config = config();
    config.coordinator.models = vec!["doomed".into()];
    let worker = TestWorker::start(&ports, MODEL, Arc::new(echo)).await;
    let fleet = Fleet::on(ports, config).await;
    queue.refuse("doomed");
    for _ in 0..60 {
        let body = json!({ "prompt": "a", "model": "doomed" });
        assert_eq!(fleet.post("/v1/jobs", body).await.status(), 202);
    }
    queue.set(Confirms::Down);
    assert_eq!(fleet.post("/v1/jobs", json!({ "prompt": "a", "model": MODEL })).await.status(), 202);
    queue.set(Confirms::Prompt);
    eventually("the other job runs", || async { worker.started() == 1 }).await;
}

#[tokio::test]
async fn what_a_coordinator_claimed_and_died_of_is_published_too() {
    let (fleet, worker, queue, id) = accepted_without_a_broker().await;
    let claim = Claim { delivered: false, ..claim(&id, "c-dead") };
    fleet.ports.ledger.claim(&claim).await.unwrap();
    queue.set(Confirms::Prompt);
    eventually("a worker gets it", || async { worker.started() == 1 }).await;
}

#[tokio::test]
async fn a_job_that_nobody_comes_for_ends_at_its_deadline() {
    let (fleet, _worker) = Fleet::echoing().await;
    // A queue is all that is left of a model that workers served once.
    fleet.ports.queue.declare_work("gone").await.unwrap();
    let deadline = in_seconds(3);
    let body = json!({ "id": "late", "prompt": "a", "model": "gone", "deadline": deadline });
    let (status, reply) = json(fleet.post("/v1/jobs", body.clone()).await).await;
    assert_eq!((status, &reply["status"]), (202, &json!("waiting")), "{reply}");
    let shown = done(&fleet, "late").await;
    assert_eq!((&shown["success"], &shown["finishReason"]), (&json!(false), &json!("deadline")));
    let (status, reply) = json(fleet.post("/v1/jobs", body).await).await;
    assert_eq!((status, &reply["status"]), (202, &json!("done")), "it was accepted once: {reply}");
    let other = json!({ "id": "late", "prompt": "b", "model": "gone", "deadline": deadline });
    assert_eq!(fleet.post("/v1/jobs", other).await.status(), 504);
}

#[tokio::test]
async fn a_job_for_any_model_is_not_given_to_one_that_is_gone() {
    let fleet = Fleet::on(ports().await, config()).await;
    fleet.ports.bus.announce_worker(&gone()).await.unwrap();
    let (status, reply) = json(fleet.post("/v1/jobs", json!({ "prompt": "a" })).await).await;
    assert_eq!((status, &reply["error"]["code"]), (503, &json!("model_unavailable")), "{reply}");
}

#[tokio::test]
async fn a_deterministic_job_is_answered_from_the_cache() {
    let (fleet, worker) = Fleet::echoing().await;
    let body = json!({ "prompt": "a b", "options": { "temperature": 0, "maxTokens": 2 } });
    let (_, first) = json(fleet.post("/v1/jobs", body.clone()).await).await;
    let first = done(&fleet, first["id"].as_str().unwrap()).await;
    let (status, second) = json(fleet.post("/v1/jobs", body).await).await;
    assert_eq!((status, &second["status"]), (202, &json!("done")));
    let second = done(&fleet, second["id"].as_str().unwrap()).await;
    assert_eq!((&second["text"], &second["usage"]), (&first["text"], &first["usage"]));
    assert_eq!(second["metadata"]["cached"], true);
    assert_eq!(worker.started(), 1);
    let row =
        fleet.ports.ledger.find(second["id"].as_str().unwrap().parse().unwrap()).await.unwrap().unwrap();
    assert_eq!(row.state, JobState::Done);
    let source = Source::Work { model: MODEL.into(), lane: Lane::Interactive };
    assert_eq!(fleet.ports.queue.depth(&source).await.unwrap(), Some(0));
}
