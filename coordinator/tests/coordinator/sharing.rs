//! Requests that mean the same: from the cache, or by one job for all; each with a row of its own.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::fleet::{Fleet, MODEL, events, eventually, in_seconds, json};
use crate::worker::{Script, echo};

fn greedy(content: &str, user: &str) -> Value {
    json!({
        "model": MODEL, "messages": [{ "role": "user", "content": content }],
        "temperature": 0, "max_tokens": 3, "user": user,
    })
}

/// The text of a whole reply or of a stream's chunks.
fn text_of(events: &[String]) -> String {
    let objects = events.iter().filter_map(|e| serde_json::from_str::<Value>(e).ok());
    let content = |o: Value| {
        let choice = &o["choices"][0];
        let content = choice["delta"]["content"].as_str().or(choice["message"]["content"].as_str());
        content.map(str::to_owned)
    };
    objects.filter_map(content).collect()
}

async fn rows(fleet: &Fleet, user: &str) -> (u64, u64) {
    let usage = fleet.ports.ledger.usage("default", Some(user), 3600).await.unwrap();
    (usage.request_count, usage.total_tokens)
}

#[tokio::test]
async fn a_kept_answer_costs_no_worker_and_still_has_a_row() {
    let (fleet, worker) = Fleet::echoing().await;
    let (_, first) = json(fleet.post("/v1/chat/completions", greedy("a b", "ann")).await).await;
    eventually("the first row", || async { rows(&fleet, "ann").await == (1, 3) }).await;
    let (_, second) = json(fleet.post("/v1/chat/completions", greedy("a b", "ben")).await).await;
    assert_eq!((&second["choices"], &second["usage"]), (&first["choices"], &first["usage"]));
    assert_ne!(second["id"], first["id"]);
    let mut streamed = greedy("a b", "cid");
    streamed["stream"] = true.into();
    let events = events(fleet.post("/v1/chat/completions", streamed).await).await;
    assert_eq!(text_of(&events), " a b a");
    for user in ["ben", "cid"] {
        eventually("a row of its own", || async { rows(&fleet, user).await == (1, 3) }).await;
    }
    assert_eq!(worker.started(), 1);
    for (change, value) in [
        ("cache", json!("refresh")),
        ("cache", json!("off")),
        ("seed", json!(1)),
        ("top_k", json!(2)),
        ("response_format", json!({ "type": "regex", "regex": "[ab ]*" })),
        ("response_format", json!({ "type": "regex", "regex": "[ab ]+" })),
    ] {
        let mut body = greedy("a b", "dan");
        body[change] = value;
        if change == "seed" {
            body["temperature"] = 1.into();
        }
        assert_eq!(fleet.post("/v1/chat/completions", body).await.status(), 200);
    }
    assert_eq!(worker.started(), 7, "each of these is another request");
}

#[tokio::test]
async fn equal_requests_in_flight_run_once() {
    let gate = Arc::new(Notify::new());
    let held = gate.clone();
    let (fleet, worker) = Fleet::scripted(move |job| Script { gate: Some(held.clone()), ..echo(job) }).await;
    let fleet = Arc::new(fleet);
    let ask = |user: &'static str, stream: bool| {
        let fleet = fleet.clone();
        let mut body = greedy("x y", user);
        body["stream"] = stream.into();
        tokio::spawn(async move {
            let response = fleet.post("/v1/chat/completions", body).await;
            let events = if stream { events(response).await } else { vec![response.text().await.unwrap()] };
            text_of(&events)
        })
    };
    let leader = ask("ann", true);
    eventually("the first runs", || async { worker.started() == 1 }).await;
    let joined = [ask("ben", true), ask("cid", false)];
    // Joining leaves no trace that could be waited for.
    tokio::time::sleep(Duration::from_millis(300)).await;
    gate.notify_waiters();
    for answer in joined.into_iter().chain([leader]) {
        assert_eq!(answer.await.unwrap(), " x y x");
    }
    assert_eq!(worker.started(), 1);
    for user in ["ann", "ben", "cid"] {
        eventually("each has a row", || async { rows(&fleet, user).await == (1, 3) }).await;
    }
}

#[tokio::test]
async fn nobody_waits_beyond_its_deadline_for_a_job_that_it_joined() {
    let gate = Arc::new(Notify::new());
    let held = gate.clone();
    let (fleet, worker) = Fleet::scripted(move |job| Script { gate: Some(held.clone()), ..echo(job) }).await;
    let body = json!({ "prompt": "x y", "options": { "temperature": 0 } });
    let first = fleet.post("/api/generate", body.clone());
    let second = async {
        eventually("the first runs", || async { worker.started() == 1 }).await;
        let mut hurried = body.clone();
        hurried["deadline"] = in_seconds(3).into();
        let response = fleet.post("/api/generate", hurried).await;
        gate.notify_waiters();
        response.status()
    };
    let both = async { tokio::join!(first, second) };
    let (first, second) = tokio::time::timeout(Duration::from_secs(30), both).await.unwrap();
    assert_eq!((first.status().as_u16(), second.as_u16()), (200, 504));
}

#[tokio::test]
async fn the_last_of_those_who_joined_cancels_and_nobody_before() {
    let (fleet, worker) =
        Fleet::scripted(|job| Script { pause: Duration::from_millis(40), ..echo(job) }).await;
    let mut body = greedy("x y", "ann");
    body["max_tokens"] = 2000.into();
    body["stream"] = true.into();
    let mut first = fleet.post("/v1/chat/completions", body.clone()).await;
    let mut second = fleet.post("/v1/chat/completions", body).await;
    first.chunk().await.unwrap();
    drop(first);
    for _ in 0..10 {
        assert!(second.chunk().await.unwrap().is_some(), "the job goes on for the one who is left");
    }
    assert!(worker.cancelled.lock().unwrap().is_empty());
    drop(second);
    eventually("the job is cancelled", || async { worker.cancelled.lock().unwrap().len() == 1 }).await;
    assert_eq!(worker.started(), 1);
}

#[tokio::test]
async fn rows_are_not_lost_at_a_clean_end() {
    let (fleet, _worker) = Fleet::echoing().await;
    for user in ["ann", "ben"] {
        assert_eq!(fleet.post("/v1/chat/completions", greedy("a", user)).await.status(), 200);
        eventually("the answer is kept", || async {
            fleet.ports.ledger.usage("default", None, 3600).await.unwrap().request_count >= 1
        })
        .await;
    }
    fleet.coordinator.shutdown().await;
    let usage = fleet.ports.ledger.usage("default", Some("ben"), 3600).await.unwrap();
    assert_eq!(usage.request_count, 1);
}
