//! What other programs see of the bus in Redis, and what they may do to it.

use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};
use stoker_shared::ports::{Bus, WorkerPresence};
use stoker_shared::redis::RedisBus;
use tokio::time::timeout;

use crate::fixture::{Job, PATIENCE, delete_names, next_frames, open, plain_connection};
use crate::services::configured;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_subscriber_reads_arrays_of_frames() {
    let services = configured();
    let bus = RedisBus::connect(&services).await.unwrap();
    let client = redis::Client::open(services.redis_url.as_str()).unwrap();
    let mut plain = client.get_async_pubsub().await.unwrap();
    plain.subscribe(services.name("llm.tokens.mine")).await.unwrap();
    let jobs = [Job::on("llm.tokens.mine"), Job::on("llm.tokens.mine")];
    for job in &jobs {
        open(&bus, job, 1).await;
    }
    let report = bus.append(&[jobs[0].append(1, 0), jobs[1].append(1, 0)]).await.unwrap();
    assert!(report.unheard.is_empty());
    let message = timeout(PATIENCE, plain.on_message().next()).await.unwrap().unwrap();
    let message: Value = serde_json::from_slice(message.get_payload_bytes()).unwrap();
    let frame = |job: &Job| json!({"v": 1, "id": job.key, "epoch": 1, "seq": 0, "at": 0, "text": "t0", "tokens": 1, "ids": [0]});
    assert_eq!(message, json!([frame(&jobs[0]), frame(&jobs[1])]));
    delete_names(&services).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_have_the_agreed_names_and_lives() {
    let services = configured();
    let bus = RedisBus::connect(&services).await.unwrap();
    let job = Job::new();
    open(&bus, &job, 1).await;
    bus.cancel(job.key, Duration::from_secs(100)).await.unwrap();
    bus.announce_worker(&WorkerPresence { id: "w-1".into(), ..Default::default() }).await.unwrap();
    bus.announce_coordinator("c-1").await.unwrap();
    let mut plain = plain_connection(&services).await;
    for (name, most) in [
        (format!("llm.job.{}", job.key), 600_000),
        (format!("llm.cancel.{}", job.key), 100_000),
        ("llm.worker.w-1".into(), 3000),
        ("llm.coordinator.c-1".into(), 3000),
    ] {
        let life: i64 = redis::cmd("PTTL").arg(services.name(&name)).query_async(&mut plain).await.unwrap();
        assert!((1..=most).contains(&life), "{name}: {life}");
    }
    // A step costs no more than its records: the log's life is not touched.
    let before: i64 = expires_at(&mut plain, &services.name(&format!("llm.job.{}", job.key))).await;
    bus.append(&[job.append(1, 0)]).await.unwrap();
    let after = expires_at(&mut plain, &services.name(&format!("llm.job.{}", job.key))).await;
    assert_eq!(before, after);
    delete_names(&services).await;
}

async fn expires_at(plain: &mut redis::aio::MultiplexedConnection, key: &str) -> i64 {
    redis::cmd("PEXPIRETIME").arg(key).query_async(plain).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_publish_can_do_no_harm() {
    let services = configured();
    let bus = RedisBus::connect(&services).await.unwrap();
    let mut heard = bus.subscribe("llm.tokens.mine").await.unwrap();
    let mut control = bus.control("w-1").await.unwrap();
    let job = Job::on("llm.tokens.mine");
    let good = serde_json::to_string(&job.frame(1, 0)).unwrap();
    let mut plain = plain_connection(&services).await;
    let garbage: [&[u8]; 7] = [b"", b"hello", b"{}", b"\xff\xfe", b"[1,", b"null", b"[[[[[[["];
    for payload in garbage {
        for channel in ["llm.tokens.mine", "llm.control", "llm.control.w-1"] {
            let mut publish = redis::cmd("PUBLISH");
            publish.arg(services.name(channel)).arg(payload);
            let heard: u64 = publish.query_async(&mut plain).await.unwrap();
            assert_eq!(heard, 1, "it is still there");
        }
    }
    let mixed = format!(r#"[{{"v":3}}, {good}, 7, "x"]"#);
    let () = redis::cmd("PUBLISH")
        .arg(services.name("llm.tokens.mine"))
        .arg(mixed)
        .query_async(&mut plain)
        .await
        .unwrap();
    assert_eq!(next_frames(&mut heard).await, [job.frame(1, 0)]);
    assert!(control.try_recv().is_err());
    delete_names(&services).await;
}
