//! A fleet of real processes on real services, for tests: names, database and ports of its own, and nothing left behind.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::{Value, json};
use stoker_shared::config::Services;

#[path = "../../../shared/tests/common/services.rs"]
pub mod services;

use services::Database;

/// A running fleet; dropped, its processes are killed.
pub struct Fleet {
    services: Services,
    database: Database,
    folder: PathBuf,
    processes: Vec<Child>,
}

/// A process of the fleet, by its place in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(usize);

impl Fleet {
    /// No process yet; the database is made.
    pub async fn new(services: Services) -> Self {
        let database = Database::create_on(&services.postgres_url).await;
        let folder = std::env::temp_dir().join(&database.name);
        std::fs::create_dir_all(&folder).expect("a folder for logs");
        Self { services, database, folder, processes: Vec::new() }
    }

    /// Starts `stoker ARGS` and gives its HTTP port.
    pub fn start(&mut self, args: &[&str]) -> (Process, u16) {
        self.start_with(args, &[])
    }

    /// The same with more variables set.
    pub fn start_with(&mut self, args: &[&str], variables: &[(&str, &str)]) -> (Process, u16) {
        let port = free_port();
        let log = self.folder.join(format!("{}-{}.log", self.processes.len(), args[0]));
        let err = File::create(&log).expect("a log file");
        let child = Command::new(env!("CARGO_BIN_EXE_stoker"))
            .args(args)
            .env("AMQP_URL", &self.services.amqp_url)
            .env("REDIS_URL", &self.services.redis_url)
            .env("POSTGRES_URL", &self.database.url)
            .env("STOKER_SERVICES_PREFIX", &self.services.prefix)
            .env("STOKER_LOG", "info")
            .env("PORT", port.to_string())
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(err)
            .spawn()
            .expect("the stoker binary runs");
        self.processes.push(child);
        (Process(self.processes.len() - 1), port)
    }

    /// A coordinator that is ready; its address.
    pub async fn coordinator(&mut self) -> String {
        let (process, port) = self.start(&["coordinator"]);
        self.ready(process, port).await;
        format!("http://127.0.0.1:{port}")
    }

    /// A worker that is ready.
    pub async fn worker(&mut self, args: &[&str]) -> Process {
        let mut all = vec!["worker"];
        all.extend(args);
        let (process, port) = self.start(&all);
        self.ready(process, port).await;
        process
    }

    async fn ready(&mut self, process: Process, port: u16) {
        let url = format!("http://127.0.0.1:{port}/healthz/ready");
        let client = client();
        let ready = eventually(Duration::from_secs(60), async || {
            client.get(&url).send().await.is_ok_and(|r| r.status().is_success())
        });
        assert!(ready.await, "{process:?} did not get ready:\n{}", self.logs());
    }

    /// Kills a process with SIGKILL: no destructor, no goodbye.
    pub fn kill(&mut self, process: Process) {
        let child = &mut self.processes[process.0];
        child.kill().expect("it runs");
        child.wait().expect("it ends");
    }

    /// Freezes a process (SIGSTOP).
    pub fn pause(&self, process: Process) {
        signal("-STOP", &self.processes[process.0]);
    }

    /// Sends SIGTERM and waits for the end; whether it ended well.
    pub async fn terminate(&mut self, process: Process) -> bool {
        let child = &mut self.processes[process.0];
        signal("-TERM", child);
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().expect("it is our child") {
                return status.success();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }

    /// Whether a process still runs.
    pub fn alive(&mut self, process: Process) -> bool {
        self.processes[process.0].try_wait().expect("it is our child").is_none()
    }

    /// All log files, for a failed assertion.
    pub fn logs(&self) -> String {
        let mut all = String::new();
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let tail: Vec<_> = text.lines().rev().take(40).collect();
            all.push_str(&format!("--- {}\n", entry.path().display()));
            for line in tail.into_iter().rev() {
                all.push_str(line);
                all.push('\n');
            }
        }
        all
    }

    /// One row of one query on the fleet's database, as JSON.
    pub async fn row(&self, sql: &str) -> Value {
        let client = self.database.client().await;
        let row = client.query_one(&format!("SELECT row_to_json(q)::text FROM ({sql}) q"), &[]).await;
        let text: String = row.unwrap_or_else(|e| panic!("{sql}: {e}")).get(0);
        serde_json::from_str(&text).expect("Postgres gives JSON")
    }

    /// Waits until a query's row is as expected.
    pub async fn row_becomes(&self, sql: &str, expected: Value) {
        let mut last = Value::Null;
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            last = self.row(sql).await;
            if last == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{sql} gives {last}, expected {expected}\n{}", self.logs());
    }

    /// Ends the processes and removes what the fleet had on the services.
    pub async fn end(mut self) {
        self.kill_all();
        let _ = self.remove_queues().await;
        let _ = std::fs::remove_dir_all(&self.folder);
    }

    fn kill_all(&mut self) {
        for child in &mut self.processes {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    async fn remove_queues(&self) -> lapin::Result<()> {
        let connection = lapin::Connection::connect(&self.services.amqp_url, Default::default()).await?;
        let names = ["requests", "responses", "metrics", "errors", "dead"].map(str::to_owned);
        let lanes = ["interactive", "batch"];
        let models = ["echo", "SmolLM2-135M-Instruct"];
        let work = models.iter().flat_map(|m| lanes.iter().map(move |l| format!("work.{m}.{l}")));
        let channel = connection.create_channel().await?;
        for name in names.into_iter().chain(work) {
            channel
                .queue_delete(format!("{}{name}", self.services.prefix).into(), Default::default())
                .await?;
        }
        channel
            .exchange_delete(format!("{}exchange", self.services.prefix).into(), Default::default())
            .await?;
        connection.close(0, "done".into()).await
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.kill_all();
    }
}

fn signal(name: &str, child: &Child) {
    let sent = Command::new("kill").args([name, &child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

/// An HTTP client.
pub fn client() -> reqwest::Client {
    // An error means that the provider is installed already.
    drop(rustls::crypto::ring::default_provider().install_default());
    reqwest::Client::builder().build().expect("an HTTP client")
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it is bound").port()
}

/// Polls until `check` holds; whether it did in time.
pub async fn eventually(limit: Duration, mut check: impl AsyncFnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if check().await {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    false
}

/// The echo engine's text.
pub fn echo(prompt: &str, tokens: usize) -> String {
    let words: Vec<_> = prompt.split_whitespace().collect();
    (0..tokens).map(|i| words[i % words.len()]).collect::<Vec<_>>().join(" ")
}

/// A completion that is being streamed.
pub struct Streaming {
    body: std::pin::Pin<Box<dyn futures::Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>,
    rest: String,
    /// The job's id.
    pub id: String,
    /// The text so far.
    pub text: String,
    /// `[DONE]` came.
    pub done: bool,
    /// The last event's error.
    pub error: Value,
}

impl Streaming {
    /// Asks for a streamed chat completion.
    pub async fn chat(url: &str, model: &str, prompt: &str, max_tokens: usize) -> Self {
        Self::formed(url, model, prompt, max_tokens, json!({"type": "text"})).await
    }

    /// The same, for a text that must have a form.
    pub async fn formed(url: &str, model: &str, prompt: &str, max_tokens: usize, form: Value) -> Self {
        let body = json!({"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
                          "max_tokens": max_tokens, "stream": true, "cache": "off", "response_format": form});
        let response =
            client().post(format!("{url}/v1/chat/completions")).json(&body).send().await.expect("an answer");
        assert!(response.status().is_success(), "{}: {:?}", response.status(), response.text().await);
        Self {
            body: Box::pin(response.bytes_stream()),
            rest: String::new(),
            id: String::new(),
            text: String::new(),
            done: false,
            error: Value::Null,
        }
    }

    /// Reads until the text has so many bytes, or the end.
    pub async fn read(&mut self, bytes: usize) {
        while self.text.len() < bytes && !self.done {
            let next = tokio::time::timeout(Duration::from_secs(60), self.body.next()).await;
            let Some(chunk) = next.expect("the stream stands still for a minute") else { return };
            self.rest
                .push_str(std::str::from_utf8(&chunk.expect("the stream holds")).expect("events are whole"));
            while let Some(end) = self.rest.find("\n\n") {
                let event: String = self.rest.drain(..end + 2).collect();
                self.event(event.trim_end());
            }
        }
    }

    /// Reads to the end.
    pub async fn finish(&mut self) {
        self.read(usize::MAX).await;
    }

    fn event(&mut self, event: &str) {
        let Some(data) = event.strip_prefix("data: ") else { return };
        if data == "[DONE]" {
            self.done = true;
            return;
        }
        let v: Value = serde_json::from_str(data).expect("an event is JSON");
        if !v["error"].is_null() {
            self.error = v["error"].clone();
        }
        if let Some(id) = v["id"].as_str() {
            self.id = id.trim_start_matches("chatcmpl-").to_owned();
        }
        if let Some(text) = v["choices"][0]["delta"]["content"].as_str() {
            self.text.push_str(text);
        }
    }
}
