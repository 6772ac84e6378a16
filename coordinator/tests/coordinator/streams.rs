//! Streams on good and bad days: disconnecting clients, gaps, silence, slow readers, whole events.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use crate::faults::FaultyBus;
use crate::fleet::{Fleet, MODEL, config, events, eventually, json, ports};
use crate::worker::{Script, TestWorker, echo};
use stoker_shared::job::Job;

fn chat(content: &str, tokens: u64) -> Value {
    json!({
        "model": MODEL, "messages": [{ "role": "user", "content": content }], "max_tokens": tokens, "stream": true,
    })
}

fn text(events: &[String]) -> String {
    let chunks = events.iter().filter_map(|e| serde_json::from_str::<Value>(e).ok());
    chunks.filter_map(|c| c["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect()
}

async fn faulty(
    author: impl Fn(&Job) -> Script + Send + Sync + 'static,
) -> (Fleet, TestWorker, Arc<FaultyBus>) {
    let mut ports = ports().await;
    let worker = TestWorker::start(&ports, MODEL, Arc::new(author)).await;
    let bus = FaultyBus::new(ports.bus.clone());
    ports.bus = bus.clone();
    (Fleet::on(ports, config()).await, worker, bus)
}

#[tokio::test]
async fn a_closed_connection_cancels_its_job() {
    let (fleet, worker) =
        Fleet::scripted(|job| Script { pause: Duration::from_millis(30), ..echo(job) }).await;
    let mut stream = fleet.post("/v1/chat/completions", chat("a", 3000)).await;
    stream.chunk().await.unwrap();
    drop(stream);
    eventually("cancelled while it streamed", || async { worker.cancelled.lock().unwrap().len() == 1 }).await;
    // One that waits for a whole answer, and goes before it has heard anything.
    let body = json!({ "prompt": "a", "options": { "maxTokens": 1000 } });
    let request = fleet.post("/api/generate", body);
    tokio::time::timeout(Duration::from_millis(500), request).await.expect_err("it takes 30 s");
    eventually("cancelled while it waited", || async { worker.cancelled.lock().unwrap().len() == 2 }).await;
    eventually("nothing is left behind", || async {
        fleet.get("/api/metrics").await.1["metrics"]["waiting"] == 0
    })
    .await;
}

#[tokio::test]
async fn a_gap_is_filled_from_the_log() {
    let (fleet, _worker, bus) = faulty(|job| Script { pause: Duration::from_millis(20), ..echo(job) }).await;
    bus.lose([0, 3, 4]);
    let answer = events(fleet.post("/v1/chat/completions", chat("a b c", 8)).await).await;
    assert_eq!(text(&answer), " a b c a b c a b");
    assert_eq!(answer.last().unwrap(), "[DONE]");
}

#[tokio::test]
async fn a_lost_end_is_found_after_a_silent_second() {
    let (fleet, _worker, bus) = faulty(echo).await;
    // The last frame, and the one before it: nothing comes after them that would show the gap.
    bus.lose([4, 5]);
    let answer = events(fleet.post("/v1/chat/completions", chat("a b", 5)).await).await;
    assert_eq!(text(&answer), " a b a b a");
    let before = bus.reads.load(Ordering::SeqCst);
    bus.lose(0..10);
    let mut body = chat("a b", 5);
    body["stream"] = false.into();
    let (status, reply) = json(fleet.post("/v1/chat/completions", body).await).await;
    assert_eq!((status, &reply["choices"][0]["message"]["content"]), (200, &json!(" a b a b a")));
    assert!(bus.reads.load(Ordering::SeqCst) > before);
}

#[tokio::test]
async fn a_slow_reader_of_a_long_text_misses_nothing_and_holds_nobody_up() {
    let piece = |n: usize| format!("{n:05} {}", "é".repeat(2000));
    let whole: String = (0..1500).map(piece).collect();
    let (fleet, _worker, bus) = faulty(move |job| match job.options.max_tokens {
        Some(1500) => Script { pieces: (0..1500).map(piece).collect(), ..Script::default() },
        _ => echo(job),
    })
    .await;
    let body = chat("long", 1500).to_string();
    // What the kernel would hold for it is small, too.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut slow = socket.connect(fleet.coordinator.addr()).await.unwrap();
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    slow.write_all(head.as_bytes()).await.unwrap();
    slow.write_all(body.as_bytes()).await.unwrap();
    // Its job ends long before it has read anything; others are served meanwhile.
    eventually("the long job is over", || async {
        let usage = fleet.ports.ledger.usage("default", None, 3600).await.unwrap();
        usage.request_count >= 1
    })
    .await;
    for _ in 0..5 {
        assert_eq!(text(&events(fleet.post("/v1/chat/completions", chat("a", 2)).await).await), " a a");
    }
    let mut raw = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    while !raw.ends_with(b"0\r\n\r\n") {
        let n = slow.read(&mut buffer).await.unwrap();
        assert!(n > 0, "the connection is kept");
        raw.extend_from_slice(&buffer[..n]);
    }
    let events: Vec<String> = chunks(&raw)
        .iter()
        .flat_map(|chunk| {
            let chunk = std::str::from_utf8(chunk).expect("whole characters");
            assert!(chunk.starts_with("data: ") && chunk.ends_with("\n\n"), "whole events: {chunk:?}");
            chunk
                .split("\n\n")
                .filter_map(|e| e.strip_prefix("data: "))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    assert!(bus.reads.load(Ordering::SeqCst) > 0, "it was served from the log");
    assert_eq!(text(&events).len(), whole.len());
    assert!(text(&events) == whole);
    assert_eq!(events.last().unwrap(), "[DONE]");
}

/// The chunks of a chunked body, as they were written.
fn chunks(response: &[u8]) -> Vec<Vec<u8>> {
    let start = response.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    let mut rest = &response[start..];
    let mut all = Vec::new();
    loop {
        let line = rest.windows(2).position(|w| w == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
        if size == 0 {
            return all;
        }
        all.push(rest[line + 2..line + 2 + size].to_vec());
        rest = &rest[line + 4 + size..];
    }
}

#[tokio::test]
async fn a_job_that_waits_is_kept_alive_by_comments_and_ends_at_its_deadline() {
    let mut config = config();
    config.coordinator.interactive_deadline_s = 13;
    let ports = ports().await;
    let worker =
        TestWorker::start(&ports, MODEL, Arc::new(|_| Script { mute: true, ..Script::default() })).await;
    let fleet = Fleet::on(ports, config).await;
    let mut whole = chat("a", 5);
    whole["stream"] = false.into();
    let (streamed, (status, whole)) = tokio::join!(
        async { fleet.post("/v1/chat/completions", chat("b", 5)).await.text().await.unwrap() },
        async {
            let response = fleet.post("/v1/chat/completions", whole).await;
            assert_eq!(response.headers()["x-should-retry"], "false");
            json(response).await
        },
    );
    assert_eq!((status, &whole["error"]["code"]), (504, &json!("deadline_exceeded")));
    assert!(streamed.starts_with(": "), "{streamed}");
    assert!(streamed.contains("deadline_exceeded") && streamed.ends_with("\n\n"), "{streamed}");
    eventually("both are cancelled", || async { worker.cancelled.lock().unwrap().len() == 2 }).await;
}

#[tokio::test]
async fn many_streams_at_once_are_not_mixed_up() {
    let (fleet, _worker) = Fleet::echoing().await;
    let fleet = Arc::new(fleet);
    let clients: Vec<_> = (0..64)
        .map(|n| {
            let fleet = fleet.clone();
            tokio::spawn(async move {
                let answer =
                    events(fleet.post("/v1/chat/completions", chat(&format!("n{n}"), 32)).await).await;
                assert_eq!(text(&answer), format!(" n{n}").repeat(32));
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
}
