//! The first run's question: asked over HTTP like any client's, answered token by token.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use serde_json::{Value, json};

use crate::http;

/// Asks through the OpenAI-compatible interface at `url`, and prints the answer as it comes.
pub async fn ask(url: &str, question: &str) -> Result<()> {
    // This process is not behind anybody's proxy.
    let client = http::build(http::client_builder().no_proxy())?;
    println!("\n> {question}\n");
    let started = Instant::now();
    let answer = client
        .post(format!("{url}/v1/chat/completions"))
        .json(&json!({
            "model": "auto", "stream": true, "temperature": 0, "max_tokens": 200, "cache": "off",
            "stream_options": {"include_usage": true},
            "messages": [{"role": "user", "content": question}],
        }))
        .send()
        .await
        .with_context(|| format!("cannot reach {url}"))?;
    if !answer.status().is_success() {
        bail!("{url} answered {}: {}", answer.status(), answer.text().await.unwrap_or_default());
    }
    let mut first = None;
    let mut usage = Value::Null;
    let mut events = Events::default();
    let mut body = answer.bytes_stream();
    while let Some(chunk) = body.next().await {
        for event in events.push(&chunk.context("the answer broke off")?) {
            if let Some(error) = event.get("error") {
                bail!("the answer ended with an error: {}", error["message"].as_str().unwrap_or("unknown"));
            }
            if let Some(text) = event["choices"][0]["delta"]["content"].as_str().filter(|t| !t.is_empty()) {
                first.get_or_insert_with(|| started.elapsed());
                print!("{text}");
                std::io::stdout().flush()?;
            }
            if event["usage"].is_object() {
                usage = event["usage"].clone();
            }
        }
    }
    let tokens = usage["completion_tokens"].as_u64().unwrap_or(0);
    println!(
        "\n\n({tokens} tokens in {:.2} s, the first after {:.0} ms)",
        started.elapsed().as_secs_f64(),
        first.unwrap_or_default().as_secs_f64() * 1e3
    );
    Ok(())
}

/// Tells a new user what to type.
pub fn say_how_to_call(url: &str) {
    println!(
        r#"
The fleet serves on {url} until Ctrl-C. Try, in another terminal:

  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \
    -d '{{"messages":[{{"role":"user","content":"Tell me a story about a lighthouse."}}],"max_tokens":120,"stream":true}}'

  curl {url}/api/generate -H 'content-type: application/json' \
    -d '{{"prompt":"The sea is","options":{{"maxTokens":20}}}}'

  curl {url}/v1/models
"#
    );
}

/// Puts server-sent events together from chunks of any size; gives the JSON of their data.
#[derive(Default)]
pub struct Events {
    rest: Vec<u8>,
}

impl Events {
    /// Takes in a chunk; gives the events that it completes. `[DONE]` and comments are left out.
    pub fn push(&mut self, chunk: &[u8]) -> Vec<Value> {
        self.rest.extend_from_slice(chunk);
        let mut events = Vec::new();
        while let Some(end) = self.rest.windows(2).position(|w| w == b"\n\n") {
            let event: Vec<u8> = self.rest.drain(..end + 2).collect();
            for line in String::from_utf8_lossy(&event).lines() {
                if let Some(data) = line.strip_prefix("data: ")
                    && let Ok(value) = serde_json::from_str(data)
                {
                    events.push(value);
                }
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_put_together_whatever_the_chunks() {
        let stream = b": wait\n\ndata: {\"a\":1}\n\ndata: {\"a\":\"\xc3\xa9\"}\n\ndata: [DONE]\n\n";
        for size in 1..stream.len() {
            let mut events = Events::default();
            let all: Vec<Value> = stream.chunks(size).flat_map(|c| events.push(c)).collect();
            assert_eq!(all, [json!({"a": 1}), json!({"a": "é"})], "chunks of {size}");
        }
    }
}
