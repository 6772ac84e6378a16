//! Jobs on a worker that nothing befalls: texts, outcomes, rows, answers, ends of all kinds, bad messages.

mod common;

use std::time::Duration;

use common::reader::Reader;
use common::*;
use serde_json::json;
use stoker_engine::{EchoOptions, LoadOptions};
use stoker_shared::job::{Lane, Stop};
use stoker_shared::outcome::{FinishReason, Outcome, code};
use stoker_shared::ports::{Bus, Destination, JobState, Ledger, Message, Queue, Source};
use stoker_worker::{Error, Model, Worker};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_streamed_billed_and_acknowledged() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(0).await;
    let order = Order::once("one two three", 32);
    let mut reader = fleet.ask(&order).await;

    let (text, last) = reader.end(order.key()).await;
    assert_eq!(text, order.text());
    assert_eq!((last.epoch, last.key, last.id.as_str()), (1, None, order.id()));
    assert_eq!(last.finish_reason, Some(FinishReason::Length));
    assert_eq!(last.usage.unwrap().completion_tokens, 32);

    let (_, outcome) = fleet.outcome(order.key()).await;
    assert!(outcome.success);
    assert_eq!(outcome.text, order.text());
    assert_eq!((outcome.usage.prompt_tokens, outcome.usage.completion_tokens, outcome.tokens), (3, 32, 32));
    assert_eq!(outcome.metadata["worker"], worker.id());
    assert_eq!(outcome.metadata["attempts"], 1);
    assert_eq!(outcome.metadata["cached"], false);
    for time in ["executionTime", "queueTime", "timeToFirstToken"] {
        assert!(outcome.metadata[time].is_u64(), "{time}");
    }
    assert_eq!(fleet.bills().await, 1);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_front_door_gets_its_outcome_on_both_ways() {
    let fleet = Fleet::new().await;
    let mut responses = fleet.consume(Source::Responses).await;
    let worker = fleet.worker(0).await;
    let mut order = Order::front_door("job-7", "alpha beta", 5);
    order.job.user_id = Some("ann".into());
    order.job.extra = extras();
    order.job.metadata = json!({ "trace": 5 }).as_object().cloned();
    order.envelope.body_hash = order.job.body_hash();
    order.reply_to = Some("answers".into());
    order.envelope.cache_key = Some("ck".into());
    order.envelope.revision = Some("echo-1".into());
    let mut reader = fleet.ask(&order).await;

    let (text, last) = reader.end(order.key()).await;
    assert_eq!(text, order.text());
    assert_eq!((last.key, last.epoch), (Some(order.key()), 2));
    let message = next(&mut responses).await;
    assert_eq!((message.id.as_str(), message.correlation_id.as_deref()), ("job-7", Some("c-job-7")));
    let (bytes, outcome) = fleet.outcome(order.key()).await;
    assert_eq!(message.body, bytes);
    assert_eq!(outcome.user_id.as_deref(), Some("ann"));
    assert_eq!(outcome.metadata["trace"], 5);
    assert_eq!(outcome.metadata["request"]["colour"], "red");

    let kept = fleet.ledger.cached("ck").await.unwrap().expect("the answer is kept");
    assert_eq!(
        (kept.response.as_str(), kept.metadata["finishReason"].as_str()),
        (text.as_str(), Some("length"))
    );
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_other_weights_is_not_kept() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(0).await;
    let mut order = Order::once("a", 1);
    order.envelope.cache_key = Some("ck".into());
    order.envelope.revision = Some("another".into());
    fleet.publish(&order).await;
    fleet.outcome(order.key()).await;
    assert_eq!(fleet.ledger.cached("ck").await.unwrap(), None);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_jobs_at_once_are_not_mixed_up() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(0).await;
    let mut reader = Reader::new(fleet.bus.clone(), "llm.tokens.c-1").await;
    let mut orders = Vec::new();
    for i in 0..300 {
        let prompt = format!("job {i} says hé w{}", i * 7);
        let mut order = match i % 3 {
            0 => Order::front_door(&format!("j{i}"), &prompt, 1 + i % 40),
            _ => Order::once(&prompt, 1 + i % 40),
        };
        order.lane = if i % 5 == 0 { Lane::Batch } else { Lane::Interactive };
        order.job.stream_to = Some("llm.tokens.c-1".into());
        fleet.publish(&order).await;
        orders.push(order);
    }
    for order in &orders {
        assert_eq!(reader.end(order.key()).await.0, order.text());
        assert_eq!(fleet.outcome(order.key()).await.1.text, order.text());
    }
    assert_eq!(fleet.bills().await, 300);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_comes_again_is_answered_with_the_same_bytes() {
    let fleet = Fleet::new().await;
    let mut responses = fleet.consume(Source::Responses).await;
    let worker = fleet.worker(0).await;
    let order = Order::front_door("again", "x y", 4);
    fleet.publish(&order).await;
    let first = next(&mut responses).await;
    fleet.publish(&order).await;
    let second = next(&mut responses).await;
    assert_eq!(first, second);
    assert_eq!(fleet.bills().await, 1);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_comes_twice_at_once_runs_once() {
    let fleet = Fleet::new().await;
    let mut responses = fleet.consume(Source::Responses).await;
    let worker = fleet.worker(2).await;
    let order = Order::front_door("twice", "x y z", 30);
    fleet.publish(&order).await;
    fleet.publish(&order).await;
    let (bytes, outcome) = fleet.outcome(order.key()).await;
    assert_eq!(outcome.text, order.text());
    assert_eq!(next(&mut responses).await.body, bytes);
    assert_eq!(fleet.bills().await, 1);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_accepted_job_starts_from_its_row() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(0).await;
    let mut order = Order::front_door("async", "x y", 4);
    order.envelope.front_door = false;
    let job = stoker_shared::ports::NewJob {
        key: order.key(),
        tenant: TENANT.into(),
        job_id: order.id().into(),
        body_hash: order.envelope.body_hash.clone(),
        body: order.message().body,
        headers: json!({}),
        expires_in_s: 60,
    };
    fleet.ledger.accept(&job).await.unwrap();
    fleet.publish(&order).await;
    assert_eq!(fleet.outcome(order.key()).await.1.text, order.text());
    assert_eq!(fleet.row(order.key()).await.unwrap().epoch, 2);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_belongs_to_one_body() {
    let fleet = Fleet::new().await;
    let mut responses = fleet.consume(Source::Responses).await;
    let mut errors = fleet.consume(Source::Errors).await;
    let worker = fleet.worker(3).await;
    let order = Order::front_door("mine", "x y", 30);
    let thief = Order::front_door("mine", "something else", 3);
    // While it runs here, and when it is done.
    for _ in 0..2 {
        fleet.publish(&order).await;
        fleet.publish(&thief).await;
        let refused = async |message: Message| {
            let outcome: Outcome = serde_json::from_slice(&message.body).unwrap();
            (outcome.success, outcome.error.map(|e| (e.code, e.param)))
        };
        let (a, b) = (refused(next(&mut responses).await).await, refused(next(&mut responses).await).await);
        let taken = (false, Some((code::ID_TAKEN.to_owned(), Some("id".to_owned()))));
        assert!([&a, &b].contains(&&taken) && [&a, &b].contains(&&(true, None)), "{a:?} {b:?}");
        let letter = next(&mut errors).await;
        assert_eq!(letter.headers["x-stoker-code"], code::ID_TAKEN);
        assert_eq!(letter.body, thief.message().body);
    }
    assert_eq!(fleet.outcome(order.key()).await.1.text, order.text());
    assert_eq!(fleet.ledger.dead_letters(10).await.unwrap().len(), 2);
    assert_eq!(fleet.bills().await, 1);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_before_it_starts_and_while_it_runs() {
    let fleet = Fleet::new().await;
    let before = Order::once("a b", 1_000_000);
    let mut reader = Reader::new(fleet.bus.clone(), before.channel()).await;
    fleet.bus.cancel(before.key(), PATIENCE).await.unwrap();
    fleet.publish(&before).await;
    let worker = fleet.worker(3).await;
    let (text, last) = reader.end(before.key()).await;
    // The engine starts while the cancellation is being read: a few tokens at most.
    assert!(before.text().starts_with(&text) && last.usage.unwrap().completion_tokens < 100, "{text}");
    assert_eq!(last.finish_reason, Some(FinishReason::Cancelled));

    let during = Order::once("a b", 1_000_000);
    let mut reader = fleet.ask(&during).await;
    reader.tokens(during.key(), 5).await;
    fleet.bus.cancel(during.key(), PATIENCE).await.unwrap();
    let (text, last) = reader.end(during.key()).await;
    assert!(during.text().starts_with(&text));
    assert_eq!(last.finish_reason, Some(FinishReason::Cancelled));

    for order in [&before, &during] {
        let (_, outcome) = fleet.outcome(order.key()).await;
        assert!(!outcome.success);
        assert_eq!(outcome.error.unwrap().code, code::CANCELLED);
    }
    assert_eq!(fleet.bills().await, 2);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_job_at_intake_and_while_it_runs() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(3).await;
    for ms in [-1000, 150] {
        let mut order = Order::once("a b", 1_000_000);
        let deadline = OffsetDateTime::now_utc() + time::Duration::milliseconds(ms);
        order.job.deadline = Some(deadline.format(&Rfc3339).unwrap());
        let mut reader = fleet.ask(&order).await;
        let (text, last) = reader.end(order.key()).await;
        assert!(order.text().starts_with(&text));
        assert_eq!(last.finish_reason, Some(FinishReason::Deadline));
        let (_, outcome) = fleet.outcome(order.key()).await;
        assert_eq!(outcome.error.unwrap().code, code::DEADLINE);
        assert_eq!(outcome.text, text);
    }
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_and_faults_of_requests() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(0).await;
    let mut order = Order::once("one two three", 9);
    order.job.options.stop = Some(Stop::One("o th".into()));
    fleet.publish(&order).await;
    let (_, outcome) = fleet.outcome(order.key()).await;
    assert_eq!((outcome.text.as_str(), outcome.finish_reason), ("one tw", FinishReason::Stop));

    let empty = Order::once(" ", 9);
    fleet.publish(&empty).await;
    let (_, outcome) = fleet.outcome(empty.key()).await;
    assert_eq!(outcome.finish_reason, FinishReason::Error);
    assert_eq!(outcome.error.unwrap().code, code::INVALID_REQUEST);

    let long = Order::once(&"x ".repeat(1 << 20), 9);
    fleet.publish(&long).await;
    let (_, outcome) = fleet.outcome(long.key()).await;
    assert_eq!(outcome.error.unwrap().code, code::CONTEXT_LENGTH);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_no_jobs_are_buried_and_answered() {
    let fleet = Fleet::new().await;
    let mut responses = fleet.consume(Source::Responses).await;
    let mut errors = fleet.consume(Source::Errors).await;
    let worker = fleet.worker(0).await;
    let to = Destination::Work { model: MODEL.into(), lane: Lane::Interactive };
    let message = |body: &[u8]| Message { body: body.to_vec().into(), ..Message::default() };

    // Without headers of ours, with a fault and without.
    for (body, param) in [
        (br#"{"id":"x1","prompt":"a","options":{"temperature":3}}"#.as_slice(), Some("options.temperature")),
        (br#"{"id":"x1","prompt":"a"}"#, None),
    ] {
        fleet.queue.publish(&to, message(body)).await.unwrap();
        let letter = next(&mut errors).await;
        assert_eq!((letter.headers["x-stoker-job"].as_str(), &letter.body[..]), ("x1", body));
        let outcome: Outcome = serde_json::from_slice(&next(&mut responses).await.body).unwrap();
        assert_eq!((outcome.id.as_str(), outcome.success), ("x1", false));
        let error = outcome.error.unwrap();
        assert_eq!((error.code.as_str(), error.param.as_deref()), (code::INVALID_REQUEST, param));
    }
    // Nobody to answer.
    fleet.queue.publish(&to, message(b"\xff")).await.unwrap();
    assert!(next(&mut errors).await.headers["x-stoker-reason"].contains("UTF-8"));
    assert_eq!(fleet.ledger.dead_letters(10).await.unwrap().len(), 3);

    // A coordinator accepted it: it ends as a job does.
    let order = Order::front_door("broken", "a", 1);
    let broken = Message { body: b"{}".to_vec().into(), ..order.message() };
    let mut reader = Reader::new(fleet.bus.clone(), order.channel()).await;
    fleet.queue.publish(&to, broken).await.unwrap();
    let (_, last) = reader.end(order.key()).await;
    assert_eq!(last.error.unwrap().param.as_deref(), Some("prompt"));
    assert_eq!(next(&mut errors).await.headers["x-stoker-job"], "broken");
    let (bytes, outcome) = fleet.outcome(order.key()).await;
    assert_eq!(outcome.id, "broken");
    assert_eq!(next(&mut responses).await.body, bytes);
    assert_eq!(fleet.bills().await, 1);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_a_coordinator_that_is_gone_are_cancelled() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(10).await;
    let mut order = Order::once("a b", 1_000_000);
    order.envelope.coordinator = Some("c-gone".into());
    fleet.publish(&order).await;
    let mut asynchronous = Order::once("a b", 700);
    asynchronous.job.stream_to = order.job.stream_to.clone();
    fleet.publish(&asynchronous).await;
    assert_eq!(fleet.outcome(order.key()).await.1.finish_reason, FinishReason::Cancelled);
    assert_eq!(fleet.outcome(asynchronous.key()).await.1.finish_reason, FinishReason::Length);
    fleet.all_acknowledged(vec![worker]).await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn no_job_is_taken_before_all_models_are_loaded() {
    let fleet = Fleet::new().await;
    let order = Order::once("one two three", 3);
    fleet.publish(&order).await;
    // Who reads a pipe waits until somebody writes to it: for so long the second model is being loaded.
    let pipe = std::env::temp_dir().join(format!("stoker-pipe-{}", uuid::Uuid::new_v4()));
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let echo = EchoOptions { name: MODEL.into(), tokens: 8, delay: Duration::ZERO, slots: 8 };
    let models = vec![Model::Echo(echo), Model::Burn(LoadOptions::new(&pipe))];
    let starting = tokio::spawn(Worker::start(config(), fleet.ports(), models, None));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(fleet.bus.workers().await.unwrap(), []);

    let _writer = std::fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let started = tokio::time::timeout(PATIENCE, starting).await.unwrap().unwrap();
    std::fs::remove_file(&pipe).unwrap();
    assert!(matches!(started, Err(Error::Load(_))));
    let mut consumer = fleet.consume(Source::Work { model: MODEL.into(), lane: Lane::Interactive }).await;
    let delivery = consumer.deliveries.recv().await.unwrap();
    assert!(!delivery.redelivered, "somebody had it");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_of_one_name_are_refused() {
    let fleet = Fleet::new().await;
    let echo = || Model::Echo(EchoOptions { name: MODEL.into(), tokens: 8, delay: Duration::ZERO, slots: 8 });
    let started = Worker::start(config(), fleet.ports(), vec![echo(), echo()], None).await;
    assert!(matches!(started, Err(Error::SameName(name)) if name == MODEL));
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_presence() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(5).await;
    let get = async |path: &str| {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(worker.addr()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    assert!(get("/healthz/live").await.starts_with("HTTP/1.1 200"));
    assert!(get("/healthz/ready").await.starts_with("HTTP/1.1 200"));
    fleet.ledger.down.store(true, std::sync::atomic::Ordering::SeqCst);
    let unready = get("/healthz/ready").await;
    assert!(unready.starts_with("HTTP/1.1 503") && unready.contains("Postgres"), "{unready}");
    assert!(get("/healthz/live").await.starts_with("HTTP/1.1 200"));
    fleet.ledger.down.store(false, std::sync::atomic::Ordering::SeqCst);

    let order = Order::once("a b", 100_000);
    fleet.publish(&order).await;
    let is_seen = async || {
        let workers = fleet.bus.workers().await.unwrap();
        workers.iter().any(|w| w.active == 1 && w.tokens_per_second > 0.0 && w.models[0].name == MODEL)
    };
    eventually("the job shows in the worker's presence", is_seen).await;
    fleet.bus.cancel(order.key(), PATIENCE).await.unwrap();
    fleet.outcome(order.key()).await;

    let told = async { worker.wait().await.unwrap() };
    fleet.bus.tell(worker.id(), &stoker_shared::ports::Control::Drain).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), told).await.expect("it hears that it is to drain");
    worker.drain().await;
    assert!(fleet.bus.workers().await.unwrap().is_empty());
    assert_eq!(fleet.row(order.key()).await.unwrap().state, JobState::Done);
}
