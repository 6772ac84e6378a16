//! What a job lives through when workers die, hand over, are cut off, or are taken for dead.

mod common;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::reader::Reader;
use common::*;
use stoker_shared::frame::Frame;
use stoker_shared::job::Lane;
use stoker_shared::outcome::{FinishReason, JobError, Outcome, Usage, code};
use stoker_shared::ports::*;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

fn header(epoch: u64, worker: &str) -> LogHeader {
    LogHeader { epoch, worker: worker.into(), seed: 7, revision: "echo-1".into(), channel: String::new() }
}

fn opening(key: Uuid, epoch: u64, worker: &str) -> Opening {
    Opening { key, header: header(epoch, worker), ttl: PATIENCE }
}

/// A worker wrote this frame, and died; the job's message is back.
async fn write_and_die(fleet: &Fleet, order: &Order, frame: &Frame) {
    let (key, epoch) = (order.key(), frame.epoch);
    fleet.bus.open(&[opening(key, epoch, "w-dead")]).await.unwrap();
    let record = serde_json::to_vec(frame).unwrap().into();
    let append = Append { key, epoch, channel: order.channel().into(), record, opening: None };
    fleet.bus.append(&[append]).await.unwrap();
    fleet.publish_redelivered(order).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_workers_jobs_go_on_at_the_next_token() {
    let fleet = Fleet::new().await;
    let first = fleet.worker(5).await;
    let orders = [
        Order::once("one two three four five six seven", 80),
        Order::front_door("f", "eins zwei drei vier", 80),
    ];
    let mut readers = Vec::new();
    for order in &orders {
        readers.push(fleet.ask(order).await);
    }
    for (order, reader) in orders.iter().zip(&mut readers) {
        reader.tokens(order.key(), 10).await;
    }
    let second = fleet.worker(5).await;
    first.abort().await;
    for (order, reader) in orders.iter().zip(&mut readers) {
        let (text, last) = reader.end(order.key()).await;
        assert_eq!(text, order.text());
        assert!(last.seq > 10, "it did not begin again");
        let (_, outcome) = fleet.outcome(order.key()).await;
        assert_eq!(outcome.text, text);
        assert_eq!(outcome.usage.completion_tokens, 80);
        assert_eq!(outcome.metadata["attempts"], 2);
        assert_eq!(outcome.metadata["worker"], second.id());
        assert_eq!(fleet.row(order.key()).await.unwrap().interruptions, 1);
    }
    assert_eq!(fleet.bills().await, 2);
    fleet.all_acknowledged(vec![second]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_connection_was_cut_adopts_its_own_jobs() {
    let fleet = Fleet::new().await;
    let (worker, wire) = fleet.worker_on_a_wire(5).await;
    let order = Order::once("one two three", 60);
    let mut reader = fleet.ask(&order).await;
    reader.tokens(order.key(), 5).await;
    wire.cut(true);
    let (text, last) = reader.end(order.key()).await;
    assert_eq!((text, last.epoch), (order.text(), 1));
    let (_, outcome) = fleet.outcome(order.key()).await;
    assert_eq!(outcome.metadata["attempts"], 1);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_held_while_its_owner_lives() {
    let fleet = Fleet::new().await;
    let (owner, wire) = fleet.worker_on_a_wire(20).await;
    let orders = [Order::once("one two three", 100), Order::front_door("held", "eins zwei", 100)];
    let mut readers = Vec::new();
    for order in &orders {
        readers.push(fleet.ask(order).await);
    }
    for (order, reader) in orders.iter().zip(&mut readers) {
        reader.tokens(order.key(), 3).await;
    }
    let (other, other_wire) = fleet.worker_on_a_wire(0).await;
    // It goes on without its deliveries, which the other one gets.
    wire.cut(false);
    for (order, reader) in orders.iter().zip(&mut readers) {
        let (text, _) = reader.end(order.key()).await;
        assert_eq!(text, order.text());
        let (_, outcome) = fleet.outcome(order.key()).await;
        assert_eq!(outcome.metadata["worker"], owner.id());
        assert_eq!(outcome.metadata["attempts"], 1);
    }
    assert_eq!(fleet.bills().await, 2);
    other_wire.acknowledged(2).await;
    fleet.all_acknowledged(vec![other]).await;
    drop(owner);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_writer_stops_without_a_word() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(5).await;
    let order = Order::once("one two three", 100_000);
    let mut reader = fleet.ask(&order).await;
    reader.tokens(order.key(), 5).await;

    // Somebody who took it for dead.
    let control = fleet.impersonate("w-other").await;
    let won = fleet.ledger.claim(&order.claim(None, 2, "w-other", 1)).await.unwrap();
    assert_eq!(won, Claimed::Won);
    let opened = fleet.bus.open(&[opening(order.key(), 2, "w-other")]).await.unwrap();
    let Opened::Started { frames, .. } = &opened[0] else { panic!("{opened:?}") };
    let said: usize = frames.iter().map(|f| f.text.len()).sum();
    let stopped = async || fleet.bus.workers().await.unwrap().iter().all(|w| w.active == 0);
    eventually("the engine is told to stop", stopped).await;
    let log = fleet.bus.read_log(order.key()).await.unwrap().unwrap();
    assert_eq!(log.frames.iter().map(|f| f.text.len()).sum::<usize>(), said);
    assert_eq!(fleet.row(order.key()).await.unwrap().state, JobState::Running);

    // The other one dies as well: now it is this one's turn again.
    drop(control);
    let held = async || fleet.row(order.key()).await.unwrap().epoch == 3;
    eventually("it is claimed again", held).await;
    fleet.bus.cancel(order.key(), PATIENCE).await.unwrap();
    let (text, last) = reader.end(order.key()).await;
    assert!(order.text().starts_with(&text));
    assert_eq!(last.epoch, 3);
    assert_eq!(fleet.row(order.key()).await.unwrap().interruptions, 2);
    assert_eq!(fleet.bills().await, 1);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_ends_a_job_too_late_drops_it() {
    let fleet = Fleet::new().await;
    let (worker, wire) = fleet.worker_on_a_wire(0).await;
    let order = Order::once("one two three", 3);
    let mut reader = Reader::new(fleet.bus.clone(), order.channel()).await;
    fleet.ledger.down.store(true, SeqCst);
    fleet.publish(&order).await;
    reader.end(order.key()).await;
    // Somebody takes over and commits what the log says, between this one's last frame and its commit.
    let _control = fleet.impersonate("w-other").await;
    fleet.ledger.inner.claim(&order.claim(None, 2, "w-other", 1)).await.unwrap();
    fleet.ledger.down.store(false, SeqCst);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(fleet.row(order.key()).await.unwrap().state, JobState::Running);
    assert_eq!(fleet.bills().await, 0);
    let ending = Ending {
        key: order.key(),
        tenant: TENANT.into(),
        job_id: order.id().into(),
        body_hash: String::new(),
        epoch: 2,
        outcome: b"{}".to_vec().into(),
        request: RequestRow::default(),
        cache: None,
        dead: None,
        expires_in_s: 60,
    };
    assert_eq!(fleet.ledger.commit(vec![ending]).await.unwrap(), [Committed::Done]);
    // It looks again within a second, finds what the other one committed, and lets the delivery go.
    wire.acknowledged(1).await;
    assert_eq!(fleet.row(order.key()).await.unwrap().outcome.unwrap(), b"{}".as_slice());
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_three_deaths_a_job_is_given_up() {
    let fleet = Fleet::new().await;
    let mut responses = fleet.consume(Source::Responses).await;
    let mut errors = fleet.consume(Source::Errors).await;
    let order = Order::front_door("poison", "one two three", 100_000);
    let mut reader = fleet.ask(&order).await;
    for death in 1..=3 {
        let worker = fleet.worker(5).await;
        let had = reader.now(order.key()).tokens;
        let assembly = reader.tokens(order.key(), had + 5).await;
        assert!(assembly.last.is_none(), "given up after {death} attempts");
        worker.abort().await;
    }
    let worker = fleet.worker(5).await;
    let (text, last) = reader.end(order.key()).await;
    assert!(order.text().starts_with(&text) && last.tokens == 0);
    assert_eq!(last.error.unwrap().code, code::POISON);
    let (bytes, outcome) = fleet.outcome(order.key()).await;
    assert_eq!((outcome.text, outcome.finish_reason), (text, FinishReason::Error));
    assert_eq!(outcome.metadata["attempts"], 3);
    assert_eq!(next(&mut responses).await.body, bytes);
    let letter = next(&mut errors).await;
    assert_eq!(letter.headers["x-stoker-code"], code::POISON);
    assert_eq!(letter.headers["x-stoker-attempts"], "3");
    assert_eq!(letter.body, order.message().body);
    let letters = fleet.ledger.dead_letters(10).await.unwrap();
    assert_eq!((letters.len(), letters[0].attempts, letters[0].key), (1, 3, Some(order.key())));
    assert_eq!(fleet.bills().await, 1);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn suspects_run_one_at_a_time_and_those_that_wait_are_innocent() {
    let fleet = Fleet::new().await;
    let mut reader = Reader::new(fleet.bus.clone(), "llm.tokens.suspects").await;
    let orders = ["s1", "s2", "s3"].map(|id| {
        let mut order = Order::front_door(id, "one two three", 50);
        order.job.stream_to = Some("llm.tokens.suspects".into());
        order
    });
    for order in &orders {
        // Its second attempt has just died.
        fleet.ledger.claim(&order.claim(None, 2, "w-dead", 1)).await.unwrap();
        fleet.publish(order).await;
    }
    let worker = fleet.worker(5).await;
    let running = async || {
        let now: Vec<_> = orders.iter().map(|o| reader.now(o.key())).collect();
        assert!(now.iter().filter(|a| a.tokens > 0 && a.last.is_none()).count() <= 1, "{now:?}");
        now.iter().any(|a| a.tokens > 3)
    };
    eventually("one runs", running).await;
    // It kills its worker: it alone is to blame.
    worker.abort().await;
    let mut deaths = Vec::new();
    for order in &orders {
        deaths.push(fleet.row(order.key()).await.unwrap().interruptions);
    }
    deaths.sort();
    assert_eq!(deaths, [1, 1, 2]);

    let worker = fleet.worker(5).await;
    let mut ends = Vec::new();
    for order in &orders {
        let (text, last) = reader.end(order.key()).await;
        match last.finish_reason {
            Some(FinishReason::Length) => assert_eq!(text, order.text()),
            _ => assert_eq!(last.error.unwrap().code, code::POISON),
        }
        ends.push(last.finish_reason.unwrap());
    }
    assert_eq!(ends.iter().filter(|r| **r == FinishReason::Error).count(), 1);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspect_that_only_has_to_be_ended_waits_for_nobody() {
    let fleet = Fleet::new().await;
    let [running, poison, cancelled, mut expired] =
        ["s1", "s2", "s3", "s4"].map(|id| Order::front_door(id, "one two three", 1_000_000));
    let a_second_ago = OffsetDateTime::now_utc() - Duration::from_secs(1);
    expired.job.deadline = Some(a_second_ago.format(&Rfc3339).unwrap());
    for (order, deaths) in [(&running, 1), (&poison, 2), (&cancelled, 1), (&expired, 1)] {
        fleet.ledger.claim(&order.claim(None, 2, "w-dead", deaths)).await.unwrap();
    }
    let worker = fleet.worker(5).await;
    let mut reader = fleet.ask(&running).await;
    reader.tokens(running.key(), 3).await;

    for (order, expected) in
        [(&poison, code::POISON), (&cancelled, code::CANCELLED), (&expired, code::DEADLINE)]
    {
        fleet.publish(order).await;
        if expected == code::CANCELLED {
            fleet.bus.cancel(order.key(), PATIENCE).await.unwrap();
        }
        let (_, outcome) = fleet.outcome(order.key()).await;
        assert_eq!((outcome.error.unwrap().code.as_str(), outcome.tokens), (expected, 0));
    }
    assert!(reader.now(running.key()).last.is_none());
    fleet.bus.cancel(running.key(), PATIENCE).await.unwrap();
    fleet.outcome(running.key()).await;
    assert_eq!(fleet.bills().await, 4);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_was_whole_is_only_committed() {
    let fleet = Fleet::new().await;
    let order = Order::once("one two", 2);
    // A worker wrote the last frame, and died. What it generated tells that nothing is generated again.
    let usage = Usage { prompt_tokens: 2, completion_tokens: 2, cached_prompt_tokens: 1 };
    let last = Frame {
        v: 1,
        id: order.id().into(),
        epoch: 1,
        text: "une deux".into(),
        tokens: 2,
        ids: vec![4, 5],
        finish_reason: Some(FinishReason::Stop),
        usage: Some(usage),
        ..Frame::default()
    };
    write_and_die(&fleet, &order, &last).await;
    let worker = fleet.worker(0).await;
    let (_, outcome) = fleet.outcome(order.key()).await;
    assert_eq!((outcome.text.as_str(), outcome.finish_reason), ("une deux", FinishReason::Stop));
    assert_eq!((outcome.usage, outcome.success), (usage, true));
    assert_eq!(outcome.metadata["attempts"], 2);
    assert_eq!(fleet.bus.read_log(order.key()).await.unwrap().unwrap().frames, [last]);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_jobs_end_that_nobody_committed_is_buried_all_the_same() {
    let fleet = Fleet::new().await;
    let mut errors = fleet.consume(Source::Errors).await;
    let order = Order::front_door("poison", "one two", 2);
    // A worker gave it up after three deaths, wrote that down, and died.
    fleet.ledger.claim(&order.claim(None, 2, "w-dead", 3)).await.unwrap();
    let last = Frame {
        v: 1,
        id: order.id().into(),
        epoch: 2,
        finish_reason: Some(FinishReason::Error),
        error: Some(JobError::new(code::POISON, "3 workers died")),
        ..Frame::default()
    };
    write_and_die(&fleet, &order, &last).await;
    let worker = fleet.worker(0).await;
    let (_, outcome) = fleet.outcome(order.key()).await;
    assert_eq!(outcome.error.unwrap().message, "3 workers died");
    assert_eq!(next(&mut errors).await.headers["x-stoker-code"], code::POISON);
    assert_eq!(fleet.ledger.dead_letters(10).await.unwrap().len(), 1);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_could_not_end_a_job_is_no_workers_death() {
    let fleet = Fleet::new().await;
    let order = Order::front_door("f", "one two three", 3);
    fleet.ledger.claim(&order.claim(None, 2, "c-1", 0)).await.unwrap();
    fleet.publish(&order).await;
    let worker = fleet.worker(0).await;
    let (_, outcome) = fleet.outcome(order.key()).await;
    assert_eq!((outcome.text, &outcome.metadata["attempts"]), (order.text(), &1.into()));
    assert_eq!(fleet.row(order.key()).await.unwrap().interruptions, 0);
    fleet.all_acknowledged(vec![worker]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_done_when_a_worker_drains_is_handed_over() {
    let fleet = Fleet::new().await;
    let mut config = config();
    config.worker.drain_s = 0;
    let first = fleet.worker_with(fleet.ports(), 5, 8, config).await;
    let mut orders = vec![Order::once("one two three", 600), Order::front_door("f", "eins zwei", 600)];
    // One that looks as if a stop string were coming when it is stopped: nothing of it may be said twice.
    let mut stopping = Order::once("one two three", 600);
    let looming = stopping.text()[..200].to_owned() + "X";
    stopping.job.options.stop = Some(stoker_shared::job::Stop::One(looming));
    orders.push(stopping);
    let mut readers = Vec::new();
    for order in &orders {
        readers.push(fleet.ask(order).await);
    }
    for (order, reader) in orders.iter().zip(&mut readers) {
        reader.tokens(order.key(), 10).await;
    }
    first.drain().await;
    for order in &orders {
        let row = fleet.row(order.key()).await.expect("a row says that it was handed over");
        assert_eq!((&row.owner, row.interruptions, row.state), (&None, 0, JobState::Running), "{row:?}");
    }
    let second = fleet.worker(1).await;
    for (order, reader) in orders.iter().zip(&mut readers) {
        let (text, _) = reader.end(order.key()).await;
        assert_eq!(text, order.text());
        let (_, outcome) = fleet.outcome(order.key()).await;
        assert_eq!((outcome.text, &outcome.metadata["attempts"]), (text, &1.into()));
        assert_eq!(outcome.usage.completion_tokens, 600);
        assert_eq!(fleet.row(order.key()).await.unwrap().interruptions, 0);
    }
    assert_eq!(fleet.bills().await, 3);
    fleet.all_acknowledged(vec![second]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_was_not_answered_is_released_at_a_drain() {
    let fleet = Fleet::new().await;
    fleet.ledger.deaf.store(true, SeqCst);
    let first = fleet.worker(0).await;
    let order = Order::front_door("f", "one two", 3);
    fleet.publish(&order).await;
    eventually("it is claimed", async || fleet.row(order.key()).await.is_some()).await;
    first.drain().await;
    let row = fleet.row(order.key()).await.unwrap();
    assert_eq!((row.state, row.owner, row.interruptions), (JobState::Running, None, 0));
    fleet.ledger.deaf.store(false, SeqCst);
    let second = fleet.worker(0).await;
    assert_eq!(fleet.outcome(order.key()).await.1.metadata["attempts"], 1);
    fleet.all_acknowledged(vec![second]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_worker_finishes_what_it_can_and_takes_no_more() {
    let fleet = Fleet::new().await;
    let worker = fleet.worker(5).await;
    let order = Order::once("one two three", 60);
    let mut reader = fleet.ask(&order).await;
    reader.tokens(order.key(), 3).await;
    let draining = tokio::spawn(worker.drain());
    let told = async || fleet.bus.workers().await.unwrap().iter().any(|w| w.draining);
    eventually("it says that it is draining", told).await;
    let late = Order::once("too late", 2);
    fleet.publish(&late).await;
    draining.await.unwrap();
    assert_eq!(reader.now(order.key()).text, order.text());
    assert_eq!(fleet.row(order.key()).await.unwrap().state, JobState::Done);
    let from = Source::Work { model: MODEL.into(), lane: Lane::Interactive };
    assert_eq!(fleet.queue.depth(&from).await.unwrap(), Some(1));
    assert_eq!(fleet.row(late.key()).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_worker_buries_nothing_that_comes_again() {
    const MESSAGES: usize = 200;
    let fleet = Fleet::new().await;
    let mut errors = fleet.consume(Source::Errors).await;
    let worker = fleet.worker(0).await;
    let to = Destination::Work { model: MODEL.into(), lane: Lane::Interactive };
    for _ in 0..MESSAGES {
        let junk = Message { body: b"junk".as_slice().into(), ..Message::default() };
        fleet.queue.publish(&to, junk).await.unwrap();
    }
    next(&mut errors).await;
    worker.drain().await;
    let buried = fleet.ledger.dead_letters(MESSAGES as u32).await.unwrap().len();
    assert_eq!(buried + fleet.left_in_queues().await as usize, MESSAGES, "{buried} buried");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_survives_the_worker_that_did_not_publish_it() {
    let fleet = Fleet::new().await;
    let mut responses = fleet.consume(Source::Responses).await;
    let (worker, wire) = fleet.worker_on_a_wire(3).await;
    let order = Order::front_door("f", "one two three", 20);
    let mut reader = fleet.ask(&order).await;
    reader.tokens(order.key(), 2).await;
    wire.cut(false);
    let (bytes, _) = fleet.outcome(order.key()).await;
    worker.abort().await;
    let (second, wire) = fleet.worker_on_a_wire(0).await;
    wire.acknowledged(1).await;
    // One copy of each at least, and all the same.
    let copy: Outcome = serde_json::from_slice(&next(&mut responses).await.body).unwrap();
    assert_eq!(serde_json::to_vec(&copy).unwrap(), bytes);
    fleet.all_acknowledged(vec![second]).await;
}
