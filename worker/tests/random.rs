//! Many jobs, three workers, and every fault in a random order: what the protocol promises holds all the same.

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use bytes::Bytes;
use common::faults::CutQueue;
use common::reader::Reader;
use common::*;
use stoker_shared::job::Lane;
use stoker_shared::outcome::code;
use stoker_shared::ports::*;
use stoker_worker::Worker;

const JOBS: u32 = 200;
const WORKERS: usize = 3;
const FAULTS: u32 = 60;
const CHANNEL: &str = "llm.tokens.c-random";

/// Random numbers that can be had again (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides
    }
}

fn order(i: u32, dice: &mut Dice) -> Order {
    let words: Vec<_> = (0..1 + dice.roll(9)).map(|w| format!("j{i}w{w}")).collect();
    let tokens = 1 + dice.roll(120) as u32;
    let mut order = match dice.roll(2) {
        0 => Order::once(&words.join(" "), tokens),
        _ => Order::front_door(&format!("j{i}"), &words.join(" "), tokens),
    };
    order.job.stream_to = Some(CHANNEL.into());
    if dice.roll(4) == 0 {
        order.lane = Lane::Batch;
    }
    order
}

/// One random fault.
async fn strike(fleet: &Fleet, dice: &mut Dice, workers: &mut [(Worker, Arc<CutQueue>)], orders: &[Order]) {
    let victim = dice.roll(workers.len());
    let job = &orders[dice.roll(orders.len())];
    match dice.roll(11) {
        0 | 1 => {
            let replacement = fleet.worker_on_a_wire(1).await;
            std::mem::replace(&mut workers[victim], replacement).0.abort().await;
        }
        2 => {
            let replacement = fleet.worker_on_a_wire(1).await;
            std::mem::replace(&mut workers[victim], replacement).0.drain().await;
        }
        3 | 4 => workers[victim].1.cut(true),
        5 => fleet.bus.cancel(job.key(), PATIENCE).await.unwrap(),
        6 if job.envelope.front_door => fleet.publish(job).await,
        7 => fleet.bus.expire_logs(&[job.key()], Duration::ZERO).await.unwrap(),
        8 => {
            fleet.bus.deaf.store(dice.roll(2) == 0, SeqCst);
            fleet.bus.down.store(true, SeqCst);
            tokio::time::sleep(Duration::from_millis(dice.roll(150) as u64)).await;
            fleet.bus.down.store(false, SeqCst);
        }
        9 => {
            fleet.ledger.down.store(true, SeqCst);
            tokio::time::sleep(Duration::from_millis(dice.roll(150) as u64)).await;
            fleet.ledger.down.store(false, SeqCst);
        }
        10 => {
            // Others take its jobs while it still runs them.
            let id = workers[victim].0.id().to_owned();
            fleet.bus.slandered.lock().unwrap().insert(id.clone());
            workers[victim].1.cut(true);
            tokio::time::sleep(Duration::from_millis(dice.roll(150) as u64)).await;
            fleet.bus.slandered.lock().unwrap().remove(&id);
        }
        _ => {}
    }
}

async fn run(seed: u64) {
    let mut dice = Dice(seed);
    let fleet = Fleet::new().await;
    let mut responses = fleet.consume(Source::Responses).await;
    let mut reader = Reader::new(fleet.bus.clone(), CHANNEL).await;
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        workers.push(fleet.worker_on_a_wire(1).await);
    }
    let mut wires: Vec<Arc<CutQueue>> = Vec::new();
    let orders: Vec<_> = (0..JOBS).map(|i| order(i, &mut dice)).collect();
    let mut published = 0;
    for fault in 0..FAULTS {
        let until = (JOBS * (fault + 1) / FAULTS) as usize;
        for order in &orders[published..until] {
            fleet.publish(order).await;
        }
        published = until;
        tokio::time::sleep(Duration::from_millis(dice.roll(30) as u64)).await;
        wires.extend(workers.iter().map(|(_, wire)| wire.clone()));
        strike(&fleet, &mut dice, &mut workers, &orders[..published]).await;
    }

    let mut outcomes: HashMap<String, Vec<u8>> = HashMap::new();
    let mut taken_over = 0;
    for order in &orders {
        let (bytes, outcome) = fleet.outcome(order.key()).await;
        let whole = order.text();
        assert!(whole.starts_with(&outcome.text), "seed {seed}: {outcome:?}");
        match &outcome.error {
            None => assert_eq!(outcome.text, whole, "seed {seed}"),
            Some(e) => {
                assert!([code::CANCELLED, code::POISON].contains(&e.code.as_str()), "seed {seed}: {e:?}")
            }
        }
        let (text, last) = reader.end(order.key()).await;
        assert_eq!(text, outcome.text, "seed {seed}");
        assert_eq!(last.finish_reason, Some(outcome.finish_reason));
        assert_eq!(last.usage, Some(outcome.usage));
        outcomes.insert(order.id().to_owned(), bytes);
        taken_over += u32::from(outcome.metadata["attempts"].as_u64().unwrap() > 1);
    }
    println!("{taken_over} jobs were taken over");
    assert!(taken_over > 0, "seed {seed}: the faults hit nothing");
    assert_eq!(fleet.bills().await, u64::from(JOBS), "seed {seed}: one bill a job");
    for (worker, _) in workers {
        worker.drain().await;
    }
    // What they held when they ended is final: the next one has only to acknowledge it.
    let left = fleet.left_in_queues().await;
    let (worker, wire) = fleet.worker_on_a_wire(1).await;
    wire.acknowledged(left).await;
    wires.push(wire);
    fleet.all_acknowledged(vec![worker]).await;
    let early: u32 = wires.iter().map(|w| w.too_early.load(SeqCst)).sum();
    assert_eq!(early, 0, "seed {seed}: acknowledged before it was final");

    let mut answered: HashMap<String, Bytes> = HashMap::new();
    while let Ok(delivery) = responses.deliveries.try_recv() {
        assert_eq!(delivery.message.body, outcomes[&delivery.message.id], "seed {seed}: copies differ");
        answered.insert(delivery.message.id, delivery.message.body);
    }
    let asked = orders.iter().filter(|o| o.envelope.front_door).count();
    assert_eq!(answered.len(), asked, "seed {seed}: every front-door job is answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_promised_holds_whatever_happens() {
    let seed = match std::env::var("STOKER_TEST_SEED") {
        Ok(seed) => seed.parse().expect("STOKER_TEST_SEED is a number"),
        Err(_) => u64::from(std::process::id()) << 20 | 1,
    };
    println!("STOKER_TEST_SEED={seed}");
    run(seed).await;
}
