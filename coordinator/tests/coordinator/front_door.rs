//! Jobs that other services put on `llm.requests`, and what becomes of messages that no worker can end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use stoker_shared::envelope::{Envelope, key_of};
use stoker_shared::job::{Job, Lane};
use stoker_shared::outcome::Outcome;
use stoker_shared::ports::{
    Destination, JobState, Liveness, LogHeader, Message, Notice, Opening, Ports, ServedModel, Source,
    WorkerPresence,
};

use crate::faults::{Confirms, FaultyBus};
use crate::fleet::{Fleet, MODEL, config, eventually, faulty_ports, in_seconds, ports, take};
use crate::worker::{TestWorker, echo};

async fn put(ports: &Ports, body: impl Into<Bytes>) {
    let message = Message { body: body.into(), ..Message::default() };
    ports.queue.publish(&Destination::FrontDoor, message).await.unwrap();
}

fn outcome(message: &Message) -> Outcome {
    serde_json::from_slice(&message.body).unwrap()
}

#[tokio::test]
async fn a_job_passes_through_and_its_outcome_comes_back() {
    let (fleet, worker) = Fleet::echoing().await;
    let mut tokens = fleet.ports.bus.subscribe("llm.tokens.k3x9").await.unwrap();
    let body = json!({
        "id": "k3x9", "prompt": "a b", "options": { "maxTokens": 3 }, "timestamp": "now", "flavour": "sweet",
    });
    let message = Message {
        body: body.to_string().into(),
        correlation_id: Some("c-7".into()),
        reply_to: Some("amq.rabbitmq.reply-to.xyz".into()),
        headers: BTreeMap::from([("traceparent".to_owned(), "00-aa-bb-01".to_owned())]),
        ..Message::default()
    };
    fleet.ports.queue.publish(&Destination::FrontDoor, message).await.unwrap();
    let response = take(&fleet.ports, &Source::Responses).await;
    let outcome = outcome(&response);
    assert_eq!((outcome.id.as_str(), outcome.text.as_str(), outcome.success), ("k3x9", " a b a", true));

    let seen = worker.seen.lock().unwrap()[0].clone();
    let envelope = Envelope::from_headers(&seen.headers).unwrap();
    assert_eq!((envelope.key, envelope.once, envelope.front_door), (key_of("default", "k3x9"), false, true));
    assert_eq!(seen.correlation_id.as_deref(), Some("c-7"));
    assert_eq!(seen.reply_to.as_deref(), Some("amq.rabbitmq.reply-to.xyz"));
    assert_eq!(seen.headers["traceparent"], "00-aa-bb-01");
    let job: Job = serde_json::from_slice(&seen.body).unwrap();
    assert_eq!((job.options.max_tokens, job.options.temperature), (Some(3), Some(0.7)));
    assert_eq!(job.extra["flavour"], "sweet");
    assert!(matches!(tokens.recv().await.unwrap(), Notice::Frames(frames) if frames[0].id == "k3x9"));
    assert_eq!(fleet.ports.queue.depth(&Source::FrontDoor).await.unwrap(), Some(0));
}

#[tokio::test]
async fn what_is_not_a_job_is_a_dead_letter_that_names_the_field() {
    let (fleet, worker) = Fleet::echoing().await;
    for (body, code, name, id) in [
        (
            &b"{\"id\":\"x1\",\"prompt\":\"a\",\"options\":{\"temperature\":3}}"[..],
            "invalid_request",
            "temperature",
            Some("x1"),
        ),
        (
            b"{\"id\":\"x2\",\"prompt\":\"a\",\"options\":{\"maxTokens\":1000000000}}",
            "invalid_request",
            "maxTokens",
            Some("x2"),
        ),
        (b"{\"id\":\"x3\",\"prompt\":\"\"}", "invalid_request", "prompt", Some("x3")),
        (b"{\"id\":\"x4\",\"prompt\":\"a\",\"model\":\"none\"}", "model_not_found", "none", Some("x4")),
        (
            b"{\"id\":\"x5\",\"prompt\":\"a\",\"deadline\":\"2001-01-01T00:00:00Z\"}",
            "deadline_exceeded",
            "deadline",
            Some("x5"),
        ),
        (b"not json", "invalid_request", "JSON", None),
        (b"{\"prompt\":\"\xff\"}", "invalid_request", "UTF-8", None),
        (b"[]", "invalid_request", "", None),
    ] {
        put(&fleet.ports, body).await;
        let letter = take(&fleet.ports, &Source::Errors).await;
        assert_eq!(letter.body, body);
        assert_eq!(letter.headers["x-stoker-code"], code);
        assert!(letter.headers["x-stoker-reason"].contains(name), "{:?}", letter.headers);
        assert_eq!(letter.headers["x-stoker-attempts"], "0");
        assert_eq!(letter.headers["x-stoker-job"], id.unwrap_or_default());
        let record = fleet.ports.ledger.dead_letters(1).await.unwrap().remove(0);
        assert_eq!((record.code.as_str(), record.job_id.as_deref(), &record.body[..]), (code, id, body));
        if let Some(id) = id {
            let outcome = outcome(&take(&fleet.ports, &Source::Responses).await);
            assert_eq!((outcome.id.as_str(), outcome.success), (id, false));
            assert_eq!(outcome.error.unwrap().code, code);
        }
    }
    assert_eq!(fleet.ports.queue.depth(&Source::Responses).await.unwrap(), Some(0));
    assert_eq!(worker.started(), 0);
}

#[tokio::test]
async fn replies_to_the_fleets_own_queues_are_refused() {
    let (fleet, worker) = Fleet::echoing().await;
    let message = Message {
        id: "m1".into(),
        body: json!({ "prompt": "a" }).to_string().into(),
        reply_to: Some("llm.requests".into()),
        ..Message::default()
    };
    fleet.ports.queue.publish(&Destination::FrontDoor, message).await.unwrap();
    let letter = take(&fleet.ports, &Source::Errors).await;
    assert!(letter.headers["x-stoker-reason"].contains("reply_to"));
    assert_eq!(outcome(&take(&fleet.ports, &Source::Responses).await).id, "m1");
    assert_eq!(worker.started(), 0);
}

#[tokio::test]
async fn a_fleet_without_models_waits_and_does_not_bury() {
    let ports = ports().await;
    let fleet = Fleet::on(ports.clone(), config()).await;
    put(
        &ports,
        json!({ "id": "early", "prompt": "a", "model": MODEL, "options": { "maxTokens": 1 } }).to_string(),
    )
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(ports.ledger.dead_letters(1).await.unwrap().is_empty());
    let _worker = TestWorker::start(&ports, MODEL, Arc::new(echo)).await;
    assert_eq!(outcome(&take(&fleet.ports, &Source::Responses).await).id, "early");
}

#[tokio::test]
async fn an_unknown_model_is_not_judged_while_nobody_can_say_who_is_there() {
    let mut ports = ports().await;
    let worker = TestWorker::start(&ports, MODEL, Arc::new(echo)).await;
    let bus = FaultyBus::new(ports.bus.clone());
    bus.set_down(true);
    ports.bus = bus.clone();
    let fleet = Fleet::on(ports, config()).await;
    put(&fleet.ports, json!({ "id": "j1", "prompt": "a", "model": MODEL }).to_string()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(fleet.ports.ledger.dead_letters(1).await.unwrap().is_empty());
    bus.set_down(false);
    assert_eq!(outcome(&take(&fleet.ports, &Source::Responses).await).id, "j1");
    assert_eq!(worker.started(), 1);
}

#[tokio::test]
async fn a_full_work_queue_holds_the_front_door_and_loses_nothing() {
    let mut ports = ports().await;
    ports.queue = Arc::new(stoker_shared::embedded::EmbeddedQueue::with_limit(2));
    let mut config = config();
    config.coordinator.models = vec![MODEL.into()];
    let fleet = Fleet::on(ports.clone(), config).await;
    for n in 0..8 {
        let body: Bytes =
            json!({ "id": format!("n{n}"), "prompt": "a", "options": { "maxTokens": 1 } }).to_string().into();
        eventually("there is room at the front door", || {
            let message = Message { body: body.clone(), ..Message::default() };
            let ports = &ports;
            async move { ports.queue.publish(&Destination::FrontDoor, message).await.is_ok() }
        })
        .await;
    }
    let work = Source::Work { model: MODEL.into(), lane: Lane::Interactive };
    eventually("the front door is drained and the work queue full", || async {
        let depth = async |source| ports.queue.depth(source).await.unwrap();
        (depth(&Source::FrontDoor).await, depth(&work).await) == (Some(0), Some(2))
    })
    .await;
    let worker = TestWorker::start(&ports, MODEL, Arc::new(echo)).await;
    eventually("all have run", || async { worker.started() == 8 }).await;
    drop(fleet);
}

#[tokio::test]
async fn a_job_that_nobody_comes_for_is_answered_at_its_deadline() {
    let (ports, queue) = faulty_ports().await;
    let _worker = TestWorker::start(&ports, MODEL, Arc::new(echo)).await;
    let fleet = Fleet::on(ports, config()).await;
    // The bus has forgotten the model, the broker has not.
    fleet.ports.queue.declare_work("gone").await.unwrap();
    let body = json!({ "id": "g1", "prompt": "a", "model": "gone", "deadline": in_seconds(3) });
    put(&fleet.ports, body.to_string()).await;
    let row = async || fleet.ports.ledger.find(key_of("default", "g1")).await.unwrap();
    eventually("it is in the ledger", || async { row().await.is_some() }).await;
    // Whoever asks the same for an outcome of its own is put beside it in the queue.
    let message =
        Message { body: body.to_string().into(), correlation_id: Some("c".into()), ..Message::default() };
    fleet.ports.queue.publish(&Destination::FrontDoor, message).await.unwrap();
    let work = Source::Work { model: "gone".into(), lane: Lane::Interactive };
    eventually("both are in the queue", || async {
        fleet.ports.queue.depth(&work).await.unwrap() == Some(2)
    })
    .await;
    queue.set(Confirms::Alarm);
    eventually("it is over", || async { row().await.unwrap().state == JobState::Done }).await;
    assert_eq!(fleet.ports.queue.depth(&Source::Responses).await.unwrap(), Some(0));
    queue.set(Confirms::Prompt);
    let outcome = outcome(&take(&fleet.ports, &Source::Responses).await);
    assert_eq!((outcome.id.as_str(), outcome.error.unwrap().code.as_str()), ("g1", "deadline_exceeded"));
}

#[tokio::test]
async fn a_job_for_any_model_gets_one_when_there_is_one() {
    let ports = ports().await;
    let fleet = Fleet::on(ports.clone(), config()).await;
    let model = ServedModel { name: "gone".into(), ..ServedModel::default() };
    let leaving =
        WorkerPresence { id: "w-1".into(), draining: true, models: vec![model], ..WorkerPresence::default() };
    ports.bus.announce_worker(&leaving).await.unwrap();
    put(&ports, json!({ "id": "any", "prompt": "a", "options": { "maxTokens": 1 } }).to_string()).await;
    let row = async || ports.ledger.find(key_of("default", "any")).await.unwrap();
    eventually("it is in the ledger", || async { row().await.is_some() }).await;
    let _worker = TestWorker::start(&ports, MODEL, Arc::new(echo)).await;
    let outcome = outcome(&take(&fleet.ports, &Source::Responses).await);
    assert_eq!((outcome.id.as_str(), outcome.model.as_str(), outcome.success), ("any", MODEL, true));
}

#[tokio::test]
async fn a_message_that_comes_again_after_its_deadline_gets_the_answer_that_it_had() {
    let (fleet, worker) = Fleet::echoing().await;
    let body =
        json!({ "id": "twice", "prompt": "a", "deadline": in_seconds(4), "options": { "maxTokens": 2 } });
    put(&fleet.ports, body.to_string()).await;
    let first = take(&fleet.ports, &Source::Responses).await;
    assert!(outcome(&first).success);
    tokio::time::sleep(Duration::from_secs(5)).await;
    put(&fleet.ports, body.to_string()).await;
    let second = take(&fleet.ports, &Source::Responses).await;
    assert_eq!(second.body, first.body);
    assert!(fleet.ports.ledger.dead_letters(1).await.unwrap().is_empty());
    assert_eq!(worker.started(), 1);
}

#[tokio::test]
async fn one_models_full_queue_holds_up_nobody_else() {
    let (ports, queue) = faulty_ports().await;
    let worker = TestWorker::start(&ports, MODEL, Arc::new(echo)).await;
    let _other = TestWorker::start(&ports, "doomed", Arc::new(echo)).await;
    let fleet = Fleet::on(ports, config()).await;
    queue.refuse("doomed");
    let put = async |id: &str, prompt: &str, model: &str| {
        put(&fleet.ports, json!({ "id": id, "prompt": prompt, "model": model }).to_string()).await
    };
    // More than the front door handles side by side; and then all of them again.
    for id in ["one", "two"] {
        for n in 0..600 {
            put(&format!("d{n}"), "a", "doomed").await;
        }
        put(id, "a", MODEL).await;
        assert_eq!(outcome(&take(&fleet.ports, &Source::Responses).await).id, id);
    }
    assert_eq!(worker.started(), 2);
    put("d0", "b", "doomed").await;
    assert_eq!(take(&fleet.ports, &Source::Errors).await.headers["x-stoker-code"], "id_taken");
    let row = fleet.ports.ledger.find(key_of("default", "d599")).await.unwrap().unwrap();
    assert_eq!(row.state, JobState::Waiting);
}

#[tokio::test]
async fn a_long_value_of_a_wrong_type_is_not_quoted_in_full() {
    let (fleet, _worker) = Fleet::echoing().await;
    put(&fleet.ports, json!({ "id": "long", "messages": "x".repeat(300_000) }).to_string()).await;
    let letter = take(&fleet.ports, &Source::Errors).await;
    let reason = &letter.headers["x-stoker-reason"];
    assert!(reason.starts_with("messages: invalid type: string") && reason.len() < 1000, "{}", reason.len());
}

#[tokio::test]
async fn what_the_broker_gave_up_becomes_a_proper_failure() {
    let (fleet, _worker) = Fleet::echoing().await;
    let ports = &fleet.ports;
    let work = Source::Work { model: "doomed".into(), lane: Lane::Interactive };
    ports.queue.declare_work("doomed").await.unwrap();
    let envelope = Envelope {
        key: key_of("default", "d1"),
        tenant: "default".into(),
        once: false,
        front_door: true,
        body_hash: "h".into(),
        accepted_ms: 1,
        cache_key: None,
        revision: None,
        coordinator: None,
    };
    let job = json!({ "id": "d1", "model": "doomed", "prompt": "a", "streamTo": "llm.tokens.d1", "options": { "seed": 1 } });
    let mut headers = envelope.to_headers();
    headers.insert("traceparent".into(), "00-aa-bb-01".into());
    let message = Message { id: "d1".into(), body: job.to_string().into(), headers, ..Message::default() };
    let to = Destination::Work { model: "doomed".into(), lane: Lane::Interactive };
    ports.queue.publish(&to, message.clone()).await.unwrap();
    // A worker said something before it died.
    let header = LogHeader {
        epoch: 1,
        worker: "w-dead".into(),
        seed: 1,
        revision: String::new(),
        channel: "llm.tokens.d1".into(),
    };
    ports.bus.open(&[Opening { key: envelope.key, header, ttl: Duration::from_secs(60) }]).await.unwrap();
    let frame = json!({ "v": 1, "id": "d1", "key": envelope.key, "epoch": 1, "seq": 0, "at": 0, "text": "half", "tokens": 1 });
    let append = stoker_shared::ports::Append {
        key: envelope.key,
        epoch: 1,
        channel: "llm.tokens.d1".into(),
        record: frame.to_string().into(),
        opening: None,
    };
    ports.bus.append(&[append]).await.unwrap();
    assert_ne!(ports.bus.worker_liveness("w-dead").await.unwrap(), Liveness::Alive);

    let mut tokens = ports.bus.subscribe("llm.tokens.d1").await.unwrap();
    let mut consumer = ports.queue.consume(&work, 1).await.unwrap();
    consumer.deliveries.recv().await.unwrap().receipt.nack(false).await.unwrap();

    let Notice::Frames(frames) =
        tokio::time::timeout(Duration::from_secs(30), tokens.recv()).await.unwrap().unwrap()
    else {
        panic!("the subscription is whole")
    };
    assert_eq!((frames[0].at, frames[0].error.as_ref().unwrap().code.as_str()), (4, "undeliverable"));
    assert!(frames[0].epoch >= 2);
    let outcome = outcome(&take(ports, &Source::Responses).await);
    assert_eq!((outcome.id.as_str(), outcome.success, outcome.text.as_str()), ("d1", false, "half"));
    let letter = take(ports, &Source::Errors).await;
    assert_eq!(
        (&letter.headers["x-stoker-code"], &letter.headers["x-stoker-job"]),
        (&"undeliverable".into(), &"d1".into())
    );
    let row = ports.ledger.find(envelope.key).await.unwrap().unwrap();
    assert_eq!(row.state, JobState::Done);
    let record: Value = serde_json::from_slice(&ports.ledger.dead_letters(1).await.unwrap()[0].body).unwrap();
    assert_eq!(record["id"], "d1");
}
