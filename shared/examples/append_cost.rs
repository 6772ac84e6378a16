//! What a step costs on the bus: `cargo run --release -p stoker-shared --example append_cost [redis URL]`.
//!
//! Prints, for steps of several sizes, the round trip of [`Bus::append`] and the time until the subscriber has the
//! frames (one step at a time), Redis's own time per record, and how many records a second go through with several
//! workers at once. Use a Redis that nobody else uses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoker_shared::config::Services;
use stoker_shared::frame::Frame;
use stoker_shared::ports::{Append, Appended, Bus, LogHeader, Notice, Opening};
use stoker_shared::redis::RedisBus;
use tokio::task::JoinSet;
use uuid::Uuid;

#[tokio::main]
async fn main() {
    let mut services =
        Services { prefix: format!("cost{}.", Uuid::new_v4().simple()), ..Services::default() };
    if let Some(url) = std::env::args().nth(1) {
        services.redis_url = url;
    }
    println!("jobs/step  append p50  p99 µs  heard p50  p99 µs  Redis µs/record");
    for jobs in [1, 16, 64] {
        one_at_a_time(&services, jobs, 3000).await;
    }
    println!("workers × jobs/step  records/s");
    for (workers, jobs) in [(1, 16), (4, 16), (4, 64), (16, 16)] {
        together(&services, workers, jobs, Duration::from_secs(3)).await;
    }
}

async fn one_at_a_time(services: &Services, jobs: usize, steps: u32) {
    let worker = RedisBus::connect(services).await.expect("the URL is right");
    let coordinator = RedisBus::connect(services).await.expect("the URL is right");
    let mut heard = coordinator.subscribe("llm.tokens.c").await.expect("Redis is there");
    let keys = open(&worker, jobs).await;
    let (mut appends, mut arrivals) = (Vec::new(), Vec::new());
    for n in 0..steps {
        if n == steps / 10 {
            redis(services, &["CONFIG", "RESETSTAT"]).await;
            appends.clear();
            arrivals.clear();
        }
        let step = step(&keys, n);
        let start = Instant::now();
        let append = async {
            let report = worker.append(&step).await.expect("Redis is there");
            assert!(report.jobs.iter().all(|job| *job == Appended::Accepted));
            appends.push(start.elapsed());
        };
        let arrival = async {
            match heard.recv().await {
                Some(Notice::Frames(frames)) => assert_eq!(frames.len(), jobs),
                other => panic!("{other:?}"),
            }
            arrivals.push(start.elapsed());
        };
        tokio::join!(append, arrival);
    }
    let stats = redis(services, &["INFO", "commandstats"]).await;
    let usec =
        stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:")?.split("usec_per_call=").nth(1));
    let usec: f64 = usec.and_then(|rest| rest.split(',').next()?.parse().ok()).unwrap_or(f64::NAN);
    let ([a50, a99], [h50, h99]) = (percentiles(appends), percentiles(arrivals));
    println!("{jobs:9} {a50:11} {a99:7} {h50:10} {h99:7} {:16.2}", usec / jobs as f64);
}

async fn together(services: &Services, workers: usize, jobs: usize, time: Duration) {
    let mut running = JoinSet::new();
    for _ in 0..workers {
        let bus = Arc::new(RedisBus::connect(services).await.expect("the URL is right"));
        running.spawn(async move {
            let keys = open(&bus, jobs).await;
            let start = Instant::now();
            let mut steps = 0;
            while start.elapsed() < time {
                bus.append(&step(&keys, steps)).await.expect("Redis is there");
                steps += 1;
            }
            steps as usize * jobs
        });
    }
    let records: usize = running.join_all().await.into_iter().sum();
    println!("{workers:7} × {jobs:9} {:10.0}", records as f64 / time.as_secs_f64());
}

async fn open(bus: &RedisBus, jobs: usize) -> Vec<Uuid> {
    let keys: Vec<Uuid> = (0..jobs).map(|_| Uuid::new_v4()).collect();
    let header = LogHeader {
        epoch: 1,
        worker: format!("w-{}", Uuid::new_v4()),
        seed: 1,
        revision: "r".into(),
        channel: String::new(),
    };
    let opening = |key: &Uuid| Opening { key: *key, header: header.clone(), ttl: Duration::from_secs(20) };
    bus.open(&keys.iter().map(opening).collect::<Vec<_>>()).await.expect("Redis is there");
    keys
}

fn step(keys: &[Uuid], n: u32) -> Vec<Append> {
    let append = |key: &Uuid| {
        let frame = Frame {
            v: 1,
            id: key.to_string(),
            epoch: 1,
            seq: n,
            at: 6 * n as usize,
            text: " token".into(),
            tokens: 1,
            ids: vec![12345],
            ..Frame::default()
        };
        let record = Bytes::from(serde_json::to_vec(&frame).expect("a frame is JSON"));
        Append { key: *key, epoch: 1, channel: "llm.tokens.c".into(), record, opening: None }
    };
    keys.iter().map(append).collect()
}

async fn redis(services: &Services, words: &[&str]) -> String {
    let client = redis::Client::open(services.redis_url.as_str()).expect("the URL is right");
    let mut connection = client.get_multiplexed_async_connection().await.expect("Redis is there");
    redis::cmd(words[0]).arg(&words[1..]).query_async(&mut connection).await.expect("it is a command")
}

/// The median and the 99th percentile, µs.
fn percentiles(mut times: Vec<Duration>) -> [u128; 2] {
    times.sort();
    [50, 99].map(|p| times[times.len() * p / 100].as_micros())
}
