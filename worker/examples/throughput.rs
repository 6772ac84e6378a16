//! How many jobs a second a worker carries, apart from inference: the echo engine at zero delay.
//!
//! `cargo run --release -p stoker-worker --example throughput -- [jobs] [tokens] [outstanding] [slots]`
//! measures on embedded ports. This program is coordinator and client too: it publishes, and reads the token channel.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use stoker_engine::EchoOptions;
use stoker_shared::config::Config;
use stoker_shared::embedded;
use stoker_shared::envelope::Envelope;
use stoker_shared::job::{Job, Lane};
use stoker_shared::ports::{Destination, Message, Notice, Ports};
use stoker_worker::{Model, Worker};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::Semaphore;
use uuid::Uuid;

const MODEL: &str = "echo";

type AnyError = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: u32| args.get(i).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (jobs, tokens, outstanding, slots) =
        (number(0, 20_000), number(1, 32), number(2, 256), number(3, 128));
    let mut config = Config::default();
    config.http.port = Some(0);
    let ports = embedded::ports(None)?;
    ports.ledger.migrate().await?;
    ports.queue.declare_work(MODEL).await?;
    let options = EchoOptions { name: MODEL.into(), tokens, delay: Duration::ZERO, slots };
    let worker = Worker::start(config, ports.clone(), vec![Model::Echo(options)], None).await?;

    let channel = format!("llm.tokens.c-{}", Uuid::now_v7());
    let started = Instant::now();
    let cpu = cpu_time();
    let firsts = run(&ports, &channel, jobs, tokens, outstanding).await?;
    let streamed = started.elapsed();
    worker.drain().await;
    let (all, cpu) = (started.elapsed(), cpu_time() - cpu);

    let mut firsts = firsts;
    firsts.sort();
    let percentile = |p: usize| firsts[(firsts.len() - 1) * p / 100];
    println!(
        "{jobs} jobs of {tokens} tokens: {:.0} jobs/s streamed, {:.0} jobs/s final; {:.0} µs of processor a job (all roles); \
         first token p50 {:?} p99 {:?}",
        f64::from(jobs) / streamed.as_secs_f64(),
        f64::from(jobs) / all.as_secs_f64(),
        cpu.as_secs_f64() * 1e6 / f64::from(jobs),
        percentile(50),
        percentile(99),
    );
    Ok(())
}

/// Runs the jobs, so many at a time; how long each waited for its first token.
async fn run(
    ports: &Ports,
    channel: &str,
    jobs: u32,
    tokens: u32,
    outstanding: u32,
) -> Result<Vec<Duration>, AnyError> {
    let mut notices = ports.bus.subscribe(channel).await?;
    let places = Arc::new(Semaphore::new(outstanding as usize));
    let published: Arc<Vec<AtomicU64>> = Arc::new((0..jobs).map(|_| AtomicU64::new(0)).collect());
    let began = Instant::now();
    let reader = tokio::spawn({
        let (places, published) = (places.clone(), published.clone());
        async move {
            let mut firsts = Vec::with_capacity(jobs as usize);
            let mut ended = 0;
            while ended < jobs {
                match notices.recv().await.expect("the bus lives") {
                    Notice::Interrupted => println!("the reader fell behind"),
                    Notice::Frames(frames) => {
                        for frame in frames {
                            if frame.seq == 0 {
                                let index = frame.job_key().expect("it has a key").as_u128() as u32;
                                let since = Duration::from_nanos(published[index as usize].load(Relaxed));
                                firsts.push(began.elapsed().saturating_sub(since));
                            }
                            if frame.is_last() {
                                ended += 1;
                                places.add_permits(1);
                            }
                        }
                    }
                }
            }
            firsts
        }
    });
    let publishers = (0..outstanding.min(64)).map(|p| {
        let (places, published, ports) = (places.clone(), published.clone(), ports.clone());
        let channel = channel.to_owned();
        tokio::spawn(async move {
            let mut index = p;
            while index < jobs {
                places.acquire().await.expect("never closed").forget();
                published[index as usize].store(began.elapsed().as_nanos() as u64, Relaxed);
                let to = Destination::Work { model: MODEL.into(), lane: Lane::Interactive };
                ports.queue.publish(&to, message(index, tokens, &channel)).await.expect("published");
                index += outstanding.min(64);
            }
        })
    });
    futures::future::try_join_all(publishers).await?;
    Ok(reader.await?)
}

fn message(index: u32, tokens: u32, channel: &str) -> Message {
    let now = OffsetDateTime::now_utc();
    let key = Uuid::from_u128((Uuid::new_v4().as_u128() & !u128::from(u32::MAX)) | u128::from(index));
    let mut job = Job {
        id: Some(key.to_string()),
        model: Some(MODEL.into()),
        prompt: Some("The quick brown fox jumps over the lazy dog".into()),
        stream_to: Some(channel.into()),
        deadline: (now + Duration::from_secs(600)).format(&Rfc3339).ok(),
        ..Job::default()
    };
    job.options.max_tokens = Some(tokens.into());
    job.options.temperature = Some(0.0);
    job.options.seed = Some(1);
    let envelope = Envelope {
        key,
        tenant: "throughput".into(),
        once: true,
        front_door: false,
        body_hash: String::new(),
        accepted_ms: (now.unix_timestamp_nanos() / 1_000_000) as u64,
        cache_key: None,
        revision: None,
        coordinator: None,
    };
    Message {
        id: key.to_string(),
        body: serde_json::to_vec(&job).unwrap_or_default().into(),
        headers: envelope.to_headers(),
        ..Message::default()
    }
}

/// Processor time of this process so far.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().filter_map(|i| fields.get(*i)?.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
}
