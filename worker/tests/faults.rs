//! What befalls the services: the bus forgets or is away, the ledger is away, the queue takes nothing.

mod common;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::reader::Reader;
use common::*;
use stoker_shared::job::Lane;
use stoker_shared::outcome::{FinishReason, code};
use stoker_shared::ports::*;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

#[tokio::test(flavor = "multi_thread")]
async fn a_bus_that_lost_its_logs_gets_them_again() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(5).await;
    let order = Order::once("one two three four", 60);
    let mut reader = fleet.ask(&order).await;
    reader.tokens(order.key(), 10).await;
    fleet.bus.expire_logs(&[order.key()], Duration::ZERO).await.unwrap();
    let (text, _) = reader.end(order.key()).await;
    assert_eq!(text, order.text());
    let log = fleet.bus.read_log(order.key()).await.unwrap().unwrap();
    assert_eq!(log.frames.iter().map(|f| f.text.as_str()).collect::<String>(), order.text());
    fleet.outcome(order.key()).await;
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bus_is_away_for_a_while() {
    // Steps that are not taken, and steps that are taken although the answer is lost.
    for deaf in [false, true] {
        let fleet = Fleet::new().await;
        fleet.bus.deaf.store(deaf, SeqCst);
        let worker = fleet.worker(3).await;
        let orders =
            [Order::once("one two three four", 100), Order::once("a b", 3), Order::once("late one", 3)];
        let mut readers = Vec::new();
        for order in &orders {
            readers.push(Reader::new(fleet.bus.clone(), order.channel()).await);
        }
        fleet.publish(&orders[0]).await;
        readers[0].tokens(orders[0].key(), 10).await;
        fleet.publish(&orders[1]).await;
        fleet.bus.down.store(true, SeqCst);
        // It lasts until the engine has generated all of it.
        fleet.publish(&orders[2]).await;
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert!(fleet.row(orders[0].key()).await.is_none(), "nothing ends before its last frame is said");
        fleet.bus.down.store(false, SeqCst);
        for (order, reader) in orders.iter().zip(&mut readers) {
            assert_eq!(reader.end(order.key()).await.0, order.text());
            let (_, outcome) = fleet.outcome(order.key()).await;
            assert_eq!((outcome.text, outcome.finish_reason), (order.text(), FinishReason::Length));
        }
        assert_eq!(fleet.bills().await, 3);
        fleet.all_acknowledged(vec![worker]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_is_away_for_a_while() {
    let fleet = Fleet::new().await;
    let mut responses = fleet.consume(Source::Responses).await;
    let worker = fleet.worker(0).await;
    let mut reader = Reader::new(fleet.bus.clone(), "llm.tokens.c-1").await;
    let streamed = |mut order: Order| {
        order.job.stream_to = Some("llm.tokens.c-1".into());
        order
    };
    fleet.ledger.down.store(true, SeqCst);
    let orders: Vec<_> = (0..20).map(|i| streamed(Order::once(&format!("job {i}"), 10))).collect();
    for order in &orders {
        fleet.publish(order).await;
    }
    let mut front_door = Order::front_door("f", "one two", 3);
    front_door.lane = Lane::Batch;
    fleet.publish(&streamed(front_door.clone())).await;
    // As many as there are slots end, for their readers too; then intake stops.
    for order in &orders[..8] {
        assert_eq!(reader.end(order.key()).await.0, order.text());
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let from = Source::Work { model: MODEL.into(), lane: Lane::Interactive };
    assert_eq!(fleet.queue.depth(&from).await.unwrap(), Some(12));
    assert_eq!(fleet.bills().await, 0);

    fleet.ledger.down.store(false, SeqCst);
    for order in &orders {
        assert_eq!(reader.end(order.key()).await.0, order.text());
        assert_eq!(fleet.outcome(order.key()).await.1.text, order.text());
    }
    assert_eq!(next(&mut responses).await.body, fleet.outcome(front_door.key()).await.0);
    assert_eq!(fleet.bills().await, 21);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn running_streams_go_on_while_the_ledger_is_away() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(5).await;
    let order = Order::once("one two three", 60);
    let mut reader = fleet.ask(&order).await;
    reader.tokens(order.key(), 3).await;
    fleet.ledger.down.store(true, SeqCst);
    assert_eq!(reader.end(order.key()).await.0, order.text());
    fleet.ledger.down.store(false, SeqCst);
    fleet.outcome(order.key()).await;
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_after_the_bus_forgot_everything_begins_again_and_says_the_same() {
    let fleet = Fleet::new().await;
    let first = fleet.worker(5).await;
    let order = Order::once("one two three four", 60);
    let mut reader = fleet.ask(&order).await;
    reader.tokens(order.key(), 10).await;
    first.abort().await;
    fleet.bus.expire_logs(&[order.key()], Duration::ZERO).await.unwrap();
    let second = fleet.worker(5).await;
    assert_eq!(reader.end(order.key()).await.0, order.text());
    assert_eq!(fleet.outcome(order.key()).await.1.text, order.text());
    assert_eq!(fleet.bills().await, 1);
    fleet.all_acknowledged(vec![second]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overtaken_attempt_stays_silent_although_the_bus_forgot_who_overtook_it() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(5).await;
    let order = Order::once("one two three", 100_000);
    let mut reader = fleet.ask(&order).await;
    reader.tokens(order.key(), 5).await;
    // Another worker that lives claims it; before this one hears of it, the log is gone.
    let _control = fleet.impersonate("w-other").await;
    assert_eq!(fleet.ledger.claim(&order.claim(None, 2, "w-other", 1)).await.unwrap(), Claimed::Won);
    fleet.bus.expire_logs(&[order.key()], Duration::ZERO).await.unwrap();
    let stopped = async || fleet.bus.workers().await.unwrap().iter().all(|w| w.active == 0);
    eventually("the engine is told to stop", stopped).await;
    assert_eq!(fleet.bus.read_log(order.key()).await.unwrap(), None);
    worker.abort().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_was_overtaken_before_its_log_was_open_stays_silent() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(5).await;
    fleet.bus.down.store(true, SeqCst);
    let orders = [Order::once("one two three", 100_000), Order::front_door("f", "one two three", 100_000)];
    for order in &orders {
        fleet.publish(order).await;
    }
    eventually("it is claimed", async || fleet.row(orders[1].key()).await.is_some()).await;
    // Others, who live, have taken them over when the bus is there again; it knows nothing of that.
    let _control = fleet.impersonate("w-other").await;
    for (order, epoch) in orders.iter().zip([None, Some(2)]) {
        let claim = order.claim(epoch, 3, "w-other", 1);
        assert_eq!(fleet.ledger.claim(&claim).await.unwrap(), Claimed::Won);
    }
    tokio::time::sleep(Duration::from_millis(1100)).await;
    fleet.bus.down.store(false, SeqCst);
    // Pauses between attempts are two seconds at most.
    let presence = WorkerPresence { id: "w-other".into(), ..WorkerPresence::default() };
    for _ in 0..3 {
        fleet.bus.announce_worker(&presence).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    for order in &orders {
        assert!(fleet.bus.read_log(order.key()).await.unwrap().is_none(), "it spoke");
    }
    worker.abort().await;
}

/// Its engine gets a job with a response format on a thread of its own; here all of these are busy.
#[test]
fn a_job_ends_although_its_engine_is_not_done_with_what_comes_first() {
    let runtime = tokio::runtime::Builder::new_multi_thread().max_blocking_threads(1).enable_all().build();
    let runtime = runtime.unwrap();
    runtime.block_on(async {
        let fleet = Fleet::new().await;
        let worker = fleet.worker(0).await;
        let (release, held) = std::sync::mpsc::channel::<()>();
        let busy = tokio::task::spawn_blocking(move || held.recv());
        let order = |id| {
            let mut order = Order::front_door(id, "one two three", 100_000);
            order.job.options.response_format = Some(serde_json::json!({ "type": "text" }));
            order
        };
        let (cancelled, mut late) = (order("cancelled"), order("late"));
        let soon = OffsetDateTime::now_utc() + Duration::from_secs(1);
        late.job.deadline = Some(soon.format(&Rfc3339).unwrap());
        fleet.publish(&cancelled).await;
        fleet.publish(&late).await;
        eventually("it has begun", async || fleet.bus.read_log(cancelled.key()).await.unwrap().is_some())
            .await;
        fleet.bus.cancel(cancelled.key(), PATIENCE).await.unwrap();
        for (order, expected) in [(&cancelled, code::CANCELLED), (&late, code::DEADLINE)] {
            let (_, outcome) = fleet.outcome(order.key()).await;
            assert_eq!((outcome.error.unwrap().code.as_str(), outcome.tokens), (expected, 0));
        }
        release.send(()).unwrap();
        busy.await.unwrap().unwrap();
        let idle = async || fleet.bus.workers().await.unwrap().iter().all(|w| w.active == 0);
        eventually("the engine does not run them afterwards", idle).await;
        fleet.all_acknowledged(vec![worker]).await;
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_log_the_bus_may_have_forgotten_is_held_until_it_would_be_back() {
    let fleet = Fleet::new().await;
    fleet.bus.young.store(true, SeqCst);
    let order = Order::once("one two three", 30);
    fleet.publish_redelivered(&order).await;
    // One that would have a row if somebody had started it.
    let mut front_door = Order::front_door("f", "one two", 3);
    front_door.lane = Lane::Batch;
    fleet.publish_redelivered(&front_door).await;
    let mut reader = Reader::new(fleet.bus.clone(), order.channel()).await;
    let worker = fleet.worker(0).await;
    assert_eq!(fleet.outcome(front_door.key()).await.1.text, front_door.text());
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(fleet.row(order.key()).await, None);
    fleet.bus.young.store(false, SeqCst);
    assert_eq!(reader.end(order.key()).await.0, order.text());
    fleet.outcome(order.key()).await;
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_wait_until_the_queue_takes_them() {
    let fleet = Fleet::new().await;
    let mut responses = fleet.consume(Source::Responses).await;
    let mut errors = fleet.consume(Source::Errors).await;
    let (worker, wire) = fleet.worker_on_a_wire(0).await;
    wire.blocked.store(true, SeqCst);
    let order = Order::front_door("f", "one two", 3);
    fleet.publish(&order).await;
    let to = Destination::Work { model: MODEL.into(), lane: Lane::Interactive };
    let junk = Message { body: b"junk".as_slice().into(), ..Message::default() };
    fleet.queue.publish(&to, junk).await.unwrap();
    let (bytes, _) = fleet.outcome(order.key()).await;
    // An outage, not a hiccup.
    eventually("both are tried again and again", async || wire.refused.load(SeqCst) >= 16).await;
    assert_eq!(wire.acknowledged.load(SeqCst), 0);
    wire.blocked.store(false, SeqCst);
    assert_eq!(next(&mut responses).await.body, bytes);
    assert_eq!(next(&mut errors).await.body, b"junk".as_slice());
    wire.acknowledged(2).await;
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_the_queue_never_took_are_left_to_the_next_worker() {
    let fleet = Fleet::new().await;
    let mut responses = fleet.consume(Source::Responses).await;
    let (worker, wire) = fleet.worker_on_a_wire(0).await;
    wire.blocked.store(true, SeqCst);
    let order = Order::front_door("f", "one two", 3);
    fleet.publish(&order).await;
    let (bytes, _) = fleet.outcome(order.key()).await;
    tokio::time::timeout(PATIENCE, worker.drain()).await.expect("a drain ends in time");
    assert_eq!(wire.acknowledged.load(SeqCst), 0);
    let (second, wire) = fleet.worker_on_a_wire(0).await;
    wire.acknowledged(1).await;
    assert_eq!(next(&mut responses).await.body, bytes);
    fleet.all_acknowledged(vec![second]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_given_up_once_its_delivery_is_with_another() {
    let fleet = Fleet::new().await;
    let (worker, wire) = fleet.worker_on_a_wire(0).await;
    wire.blocked.store(true, SeqCst);
    let order = Order::front_door("f", "one two", 3);
    fleet.publish(&order).await;
    fleet.outcome(order.key()).await;
    wire.cut(false);
    let from = Source::Work { model: MODEL.into(), lane: Lane::Interactive };
    eventually("it is back", async || fleet.queue.depth(&from).await.unwrap() == Some(1)).await;
    // One may be under way; the longest pause between two is two seconds.
    let tries = wire.refused.load(SeqCst);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(wire.refused.load(SeqCst) <= tries + 1);
    worker.abort().await;
}
