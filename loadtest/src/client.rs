//! One streaming request, timed.

use std::time::{Duration, Instant};

use clap::ValueEnum;
use futures::StreamExt;
use serde_json::{Value, json};

/// The interface to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Route {
    /// `POST /v1/chat/completions`.
    Chat,
    /// `POST /v1/completions`.
    Completions,
    /// `POST /api/stream`.
    Guide,
}

/// What to ask for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Interface.
    pub route: Route,
    /// Model.
    pub model: String,
    /// Tokens asked for.
    pub max_tokens: u64,
    /// Prompt.
    pub prompt: String,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    /// The job's id, where the interface gives one.
    pub id: Option<String>,
    /// The text.
    pub text: String,
    /// Completion tokens, where the interface counts them; else pieces.
    pub tokens: u64,
    /// From sending to the first piece of text.
    pub first: Duration,
    /// From sending to the end.
    pub total: Duration,
}

impl Ask {
    fn path(&self) -> &'static str {
        match self.route {
            Route::Chat => "/v1/chat/completions",
            Route::Completions => "/v1/completions",
            Route::Guide => "/api/stream",
        }
    }

    fn body(&self) -> Value {
        let Self { model, max_tokens, prompt, .. } = self;
        match self.route {
            Route::Chat => json!({
                "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens,
                "temperature": 0, "stream": true, "stream_options": {"include_usage": true}, "cache": "off",
            }),
            Route::Completions => json!({
                "model": model, "prompt": prompt, "max_tokens": max_tokens,
                "temperature": 0, "stream": true, "stream_options": {"include_usage": true}, "cache": "off",
            }),
            Route::Guide => json!({
                "model": model, "prompt": prompt, "options": {"maxTokens": max_tokens, "temperature": 0}, "cache": "off",
            }),
        }
    }

    /// Sends it and reads the stream to its end; an error says what went wrong.
    pub async fn send(&self, client: &reqwest::Client, url: &str) -> Result<Answer, String> {
        let started = Instant::now();
        let response = client
            .post(format!("{url}{}", self.path()))
            .json(&self.body())
            .send()
            .await
            .map_err(|e| format!("cannot send: {}", root(&e)))?;
        let status = response.status();
        if !status.is_success() {
            return Err(format!("{status}: {}", response.text().await.unwrap_or_default()));
        }
        let mut stream = Stream { started, answer: None, done: false, rest: Vec::new() };
        let mut body = response.bytes_stream();
        while let Some(chunk) = body.next().await {
            stream.take(&chunk.map_err(|e| format!("the stream broke off: {}", root(&e)))?)?;
        }
        stream.end()
    }
}

/// The innermost cause, which says most.
fn root(e: &dyn std::error::Error) -> String {
    let mut cause = e;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

struct Stream {
    started: Instant,
    answer: Option<Answer>,
    done: bool,
    rest: Vec<u8>,
}

impl Stream {
    fn take(&mut self, chunk: &[u8]) -> Result<(), String> {
        self.rest.extend_from_slice(chunk);
        let mut from = 0;
        while let Some(end) = find(&self.rest[from..], b"\n\n") {
            let event = self.rest[from..from + end].to_vec();
            from += end + 2;
            self.event(&event)?;
        }
        self.rest.drain(..from);
        Ok(())
    }

    fn event(&mut self, event: &[u8]) -> Result<(), String> {
        let Some(data) = event.strip_prefix(b"data: ") else { return Ok(()) };
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        if self.done {
            return Err("an event came after [DONE]".into());
        }
        let v: Value = serde_json::from_slice(data).map_err(|e| format!("an event is not JSON: {e}"))?;
        if !v["error"].is_null() {
            return Err(format!("the stream ended with an error: {}", v["error"]));
        }
        let choice = &v["choices"][0];
        let text =
            [&v["token"], &choice["delta"]["content"], &choice["text"]].into_iter().find_map(Value::as_str);
        if let Some(text) = text.filter(|t| !t.is_empty()) {
            let started = self.started;
            let answer = self.answer.get_or_insert_with(|| Answer {
                id: v["id"].as_str().map(str::to_owned),
                text: String::new(),
                tokens: 0,
                first: started.elapsed(),
                total: Duration::ZERO,
            });
            answer.text.push_str(text);
            answer.tokens += 1;
        }
        if let (Some(n), Some(answer)) = (v["usage"]["completion_tokens"].as_u64(), &mut self.answer) {
            answer.tokens = n;
        }
        Ok(())
    }

    fn end(self) -> Result<Answer, String> {
        if !self.done {
            return Err("the stream ended without [DONE]".into());
        }
        let mut answer = self.answer.ok_or("the stream had no text in it")?;
        answer.total = self.started.elapsed();
        Ok(answer)
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}
