//! Whole fleets of real processes on the real services: what a client sees when processes die under it.

mod common;

use std::fs::File;
use std::process::Command;
use std::time::{Duration, Instant};

use common::services::configured;
use common::{Fleet, Streaming, client, echo, eventually};
use serde_json::json;

const SLOW: &[&str] = &["--engine", "echo", "--echo-delay-ms", "20"];

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_goes_unnoticed_but_for_a_pause() {
    let mut fleet = Fleet::new(configured()).await;
    let url = fleet.coordinator().await;
    let first = fleet.worker(SLOW).await;
    let prompt = "one two three four five six seven";
    let mut stream = Streaming::chat(&url, "echo", prompt, 200).await;
    stream.read(100).await;
    fleet.worker(SLOW).await;
    let at_death = stream.text.len();
    fleet.kill(first);
    stream.finish().await;
    assert!(at_death < stream.text.len(), "the kill came in the middle");
    assert!(stream.done, "{}\n{}", stream.error, fleet.logs());
    assert_eq!(stream.text, echo(prompt, 200));
    let sql = format!(
        "SELECT count(*) AS rows, max(attempts) AS attempts FROM llm_requests WHERE job_id = '{}'",
        stream.id
    );
    fleet.row_becomes(&sql, json!({"rows": 1, "attempts": 2})).await;
    fleet.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_goes_on_where_the_killed_worker_stopped() {
    let mut fleet = Fleet::new(configured()).await;
    let url = fleet.coordinator().await;
    let model = "SmolLM2-135M-Instruct";
    let first = fleet.worker(&["--threads", "1"]).await;
    let prompt = "Write a long story about a lighthouse keeper.";
    let mut whole = Streaming::chat(&url, model, prompt, 150).await;
    whole.finish().await;
    let mut stream = Streaming::chat(&url, model, prompt, 150).await;
    stream.read(40).await;
    // Stopped, it can't finish before its successor is up.
    fleet.pause(first);
    fleet.worker(&["--threads", "1"]).await;
    fleet.kill(first);
    stream.finish().await;
    assert!(stream.done, "{}\n{}", stream.error, fleet.logs());
    assert_eq!(stream.text, whole.text);
    fleet.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_is_kept_by_the_successor_too() {
    let mut fleet = Fleet::new(configured()).await;
    let url = fleet.coordinator().await;
    let model = "SmolLM2-135M-Instruct";
    let first = fleet.worker(&["--threads", "1"]).await;
    let word = json!({"type": "string", "maxLength": 12});
    let words = json!({"type": "array", "items": word, "minItems": 12, "maxItems": 12});
    let form = |schema| json!({"type": "json_schema", "json_schema": {"name": "words", "schema": schema}});
    let ask = || Streaming::formed(&url, model, "Name twelve animals.", 400, form(words.clone()));
    let mut whole = ask().await;
    whole.finish().await;
    let animals: Vec<String> = serde_json::from_str(&whole.text).expect("it fits the schema");
    assert_eq!(animals.len(), 12);
    let mut stream = ask().await;
    stream.read(whole.text.len() / 3).await;
    // Stopped, it can't finish before its successor is up.
    fleet.pause(first);
    fleet.worker(&["--threads", "1"]).await;
    fleet.kill(first);
    stream.finish().await;
    assert_eq!(stream.text, whole.text, "{}\n{}", stream.error, fleet.logs());

    let senseless = form(json!({"type": "array", "uniqueItems": true}));
    let mut body = json!({"model": model, "messages": [{"role": "user", "content": "Hi"}]});
    body["response_format"] = senseless.clone();
    let refused =
        client().post(format!("{url}/v1/chat/completions")).json(&body).send().await.expect("an answer");
    assert_eq!(refused.status(), 400);
    let error = refused.json::<serde_json::Value>().await.expect("JSON")["error"].clone();
    assert_eq!(
        (&error["type"], &error["code"]),
        (&json!("invalid_request_error"), &json!("invalid_request"))
    );
    assert!(error["message"].as_str().is_some_and(|m| m.contains("uniqueItems")), "{error}");

    let job = json!({"model": model, "prompt": "Hi", "options": {"responseFormat": senseless}});
    let accepted = client().post(format!("{url}/v1/jobs")).json(&job).send().await.expect("an answer");
    let id =
        accepted.json::<serde_json::Value>().await.expect("JSON")["id"].as_str().expect("an id").to_owned();
    let sql = format!("SELECT error_code AS code FROM llm_requests WHERE job_id = '{id}'");
    let ended = eventually(Duration::from_secs(30), async || {
        let count = format!("SELECT count(*) AS rows FROM llm_requests WHERE job_id = '{id}'");
        fleet.row(&count).await == json!({"rows": 1})
    });
    assert!(ended.await, "{}", fleet.logs());
    assert_eq!(fleet.row(&sql).await, json!({"code": "invalid_request"}));
    fleet.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_told_to_stop_hands_over() {
    let mut fleet = Fleet::new(configured()).await;
    let url = fleet.coordinator().await;
    let first = fleet.worker(&["--engine", "echo", "--echo-delay-ms", "50"]).await;
    let prompt = "alpha beta gamma";
    let mut stream = Streaming::chat(&url, "echo", prompt, 1000).await;
    stream.read(50).await;
    let second = fleet.worker(&["--engine", "echo", "--echo-delay-ms", "1"]).await;
    assert!(fleet.terminate(first).await, "{}", fleet.logs());
    stream.finish().await;
    assert_eq!(stream.text, echo(prompt, 1000), "{}", fleet.logs());
    assert!(fleet.alive(second));
    fleet.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_cancels_its_job() {
    let mut fleet = Fleet::new(configured()).await;
    let url = fleet.coordinator().await;
    fleet.worker(SLOW).await;
    let mut stream = Streaming::chat(&url, "echo", "going away", 1000).await;
    stream.read(30).await;
    let id = stream.id.clone();
    drop(stream);
    let sql = format!(
        "SELECT count(*) AS rows, max(finish_reason) AS reason FROM llm_requests WHERE job_id = '{id}'"
    );
    fleet.row_becomes(&sql, json!({"rows": 1, "reason": "cancelled"})).await;
    fleet.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_job_is_lost_while_workers_are_killed_under_load() {
    const CLIENTS: usize = 16;
    const JOBS: usize = 12;
    let mut fleet = Fleet::new(configured()).await;
    let urls = [fleet.coordinator().await, fleet.coordinator().await];
    let args = &["--engine", "echo", "--echo-delay-ms", "3"];
    let mut workers = Vec::new();
    for _ in 0..3 {
        workers.push(fleet.worker(args).await);
    }
    let clients: Vec<_> = (0..CLIENTS)
        .map(|c| {
            let url = urls[c % 2].clone();
            tokio::spawn(async move {
                for j in 0..JOBS {
                    let prompt = format!("{c}a{j} {c}b{j} {c}c{j} {c}d{j}");
                    let mut stream = Streaming::chat(&url, "echo", &prompt, 100).await;
                    stream.finish().await;
                    assert!(stream.done, "{}", stream.error);
                    assert_eq!(stream.text, echo(&prompt, 100));
                }
            })
        })
        .collect();
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(1200)).await;
        let victim = workers.remove(0);
        fleet.kill(victim);
        workers.push(fleet.worker(args).await);
    }
    for client in clients {
        if let Err(e) = client.await {
            panic!("{e}\n{}", fleet.logs());
        }
    }
    let sql = "SELECT count(*) AS rows, count(DISTINCT job_key) AS jobs, count(*) FILTER (WHERE error_code IS NOT NULL) AS failed FROM llm_requests";
    fleet.row_becomes(sql, json!({"rows": CLIENTS * JOBS, "jobs": CLIENTS * JOBS, "failed": 0})).await;
    fleet.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asynchronous_job_outlives_everybody() {
    let mut fleet = Fleet::new(configured()).await;
    let url = fleet.coordinator().await;
    let worker = fleet.worker(SLOW).await;
    let body = json!({"model": "echo", "prompt": "come what may", "options": {"maxTokens": 100}});
    let accepted = client().post(format!("{url}/v1/jobs")).json(&body).send().await.expect("an answer");
    assert_eq!(accepted.status(), 202);
    let id =
        accepted.json::<serde_json::Value>().await.expect("JSON")["id"].as_str().expect("an id").to_owned();
    tokio::time::sleep(Duration::from_millis(500)).await;
    fleet.kill(worker);
    let other = fleet.coordinator().await;
    fleet.worker(SLOW).await;
    let mut text = String::new();
    let done = eventually(Duration::from_secs(30), async || {
        let job = client().get(format!("{other}/v1/jobs/{id}")).send().await.expect("an answer");
        let job: serde_json::Value = job.json().await.expect("JSON");
        let outcome = if job["outcome"].is_object() { job["outcome"].clone() } else { job };
        text = outcome["text"].as_str().unwrap_or_default().to_owned();
        outcome["success"] == true
    });
    assert!(done.await, "{}", fleet.logs());
    assert_eq!(text, echo("come what may", 100));
    fleet.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_still_fetches_its_model_says_so_and_stops_when_told() {
    let mut fleet = Fleet::new(configured()).await;
    let data = std::env::temp_dir().join(format!("stoker-test-{}", uuid::Uuid::new_v4().simple()));
    let models = data.join("models");
    std::fs::create_dir_all(&models).expect("a folder for models");
    // As if another process were at it: the worker waits.
    let lock = File::create(models.join(".SmolLM2-135M-Instruct.Q4_1.gguf.lock")).expect("a lock file");
    lock.lock().expect("nobody else has it");
    let folder = data.to_str().expect("a folder with a plain name");
    let (worker, port) = fleet.start_with(&["worker"], &[("STOKER_DATA_DIR", folder)]);
    let probe =
        async |name: &str| client().get(format!("http://127.0.0.1:{port}/healthz/{name}")).send().await;
    let lives =
        eventually(Duration::from_secs(30), async || probe("live").await.is_ok_and(|r| r.status() == 200));
    assert!(lives.await, "{}", fleet.logs());
    let ready = probe("ready").await.expect("an answer");
    assert_eq!(ready.status(), 503);
    // A service may not be connected yet, either.
    assert!(ready.text().await.expect("a text").contains("no model is loaded yet"));
    let told = Instant::now();
    assert!(fleet.terminate(worker).await, "{}", fleet.logs());
    assert!(told.elapsed() < Duration::from_secs(10), "{:?}", told.elapsed());
    drop(lock);
    let _ = std::fs::remove_dir_all(&data);
    fleet.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_by_command_reaches_the_job_that_was_named() {
    let mut fleet = Fleet::new(configured()).await;
    let url = fleet.coordinator().await;
    fleet.worker(SLOW).await;
    for id in ["order", "order#17"] {
        let body = json!({"id": id, "model": "echo", "prompt": id, "options": {"maxTokens": 200}});
        let accepted = client().post(format!("{url}/v1/jobs")).json(&body).send().await.expect("an answer");
        assert_eq!(accepted.status(), 202);
    }
    let cancel = || {
        let command = Command::new(env!("CARGO_BIN_EXE_stoker"))
            .args(["job", "cancel", "order#17", "--url", &url])
            .output()
            .expect("the stoker binary runs");
        String::from_utf8_lossy(&command.stdout).trim().to_owned()
    };
    let running = eventually(Duration::from_secs(30), async || {
        let sql = "SELECT count(*) AS rows FROM llm_jobs WHERE state = 'running'";
        fleet.row(sql).await == json!({"rows": 2})
    });
    assert!(running.await, "{}", fleet.logs());
    assert_eq!(cancel(), "cancelling");
    let sql =
        "SELECT string_agg(job_id || ': ' || finish_reason, ', ' ORDER BY job_id) AS ends FROM llm_requests";
    fleet.row_becomes(sql, json!({"ends": "order: length, order#17: cancelled"})).await;
    assert_eq!(cancel(), "done");
    fleet.end().await;
}
