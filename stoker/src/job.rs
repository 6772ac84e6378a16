//! `stoker job`: asynchronous jobs, through a coordinator's HTTP interface; dead letters, from the ledger.

use std::io::Write;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use futures::StreamExt;
use serde_json::{Value, json};
use stoker_shared::config::Config;
use stoker_shared::job::path_segment;

use crate::ask::Events;
use crate::{dead, http};

/// What can be done with jobs.
#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// Submit a job; prints its id.
    Submit {
        /// The prompt.
        prompt: String,
        /// Model (default: the coordinator decides).
        #[arg(long)]
        model: Option<String>,
        /// At most so many tokens (default: 16, as after any prompt under /v1).
        #[arg(long)]
        max_tokens: Option<u64>,
        /// 0 to 2.
        #[arg(long)]
        temperature: Option<f64>,
        /// `interactive` or `batch`.
        #[arg(long)]
        lane: Option<String>,
        #[command(flatten)]
        at: At,
    },
    /// Where a job stands, and how it ended.
    Show {
        /// Id.
        id: String,
        #[command(flatten)]
        at: At,
    },
    /// A job's text, from its beginning, as it comes.
    Watch {
        /// Id.
        id: String,
        #[command(flatten)]
        at: At,
    },
    /// Cancel a job; prints how it stands then: `cancelling` if it runs, `done` if it has ended.
    Cancel {
        /// Id.
        id: String,
        #[command(flatten)]
        at: At,
    },
    /// Messages and jobs that were given up, the newest first.
    Dead {
        /// At most so many.
        #[arg(long, default_value_t = 20)]
        limit: u32,
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
}

/// Where the coordinator is.
#[derive(Debug, Args)]
pub struct At {
    /// A coordinator's address.
    #[arg(long, env = "STOKER_URL", default_value = "http://localhost:8080")]
    url: String,
    /// For programs.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub async fn run(command: JobCommand, config: &Config) -> Result<()> {
    match command {
        JobCommand::Submit { prompt, model, max_tokens, temperature, lane, at } => {
            let mut body = json!({"prompt": prompt, "options": {}});
            insert(&mut body, "model", model.map(Value::from));
            insert(&mut body, "lane", lane.map(Value::from));
            insert(&mut body["options"], "maxTokens", max_tokens.map(Value::from));
            insert(&mut body["options"], "temperature", temperature.map(Value::from));
            let answer = call(&at, reqwest::Method::POST, "/v1/jobs", Some(&body)).await?;
            print_or(&at, &answer, answer["id"].as_str().unwrap_or_default());
            Ok(())
        }
        JobCommand::Show { id, at } => {
            let answer = call(&at, reqwest::Method::GET, &path_of(&id)?, None).await?;
            print_or(&at, &answer, &describe(&answer));
            Ok(())
        }
        JobCommand::Cancel { id, at } => {
            let answer = call(&at, reqwest::Method::DELETE, &path_of(&id)?, None).await?;
            print_or(&at, &answer, answer["status"].as_str().unwrap_or_default());
            Ok(())
        }
        JobCommand::Watch { id, at } => watch(&at, &id).await,
        JobCommand::Dead { limit, json } => dead::list(config, limit, json).await,
    }
}

/// A job's path. Its id is one segment of it, whatever it consists of.
fn path_of(id: &str) -> Result<String> {
    if matches!(id, "." | "..") {
        // However they are written, clients resolve them before they send a request.
        bail!("no address can name a job with the id {id:?}");
    }
    Ok(format!("/v1/jobs/{}", path_segment(id)))
}

fn insert(object: &mut Value, name: &str, value: Option<Value>) {
    if let Some(value) = value {
        object[name] = value;
    }
}

fn print_or(at: &At, answer: &Value, text: &str) {
    if at.json {
        println!("{answer}");
    } else {
        println!("{text}");
    }
}

fn describe(job: &Value) -> String {
    let mut lines = Vec::new();
    for (name, label) in [("id", "id"), ("status", "status"), ("state", "status"), ("model", "model")] {
        if let Some(v) = job[name].as_str() {
            lines.push(format!("{label}: {v}"));
        }
    }
    let outcome = if job["outcome"].is_object() { &job["outcome"] } else { job };
    if let Some(message) = outcome["error"]["message"].as_str() {
        lines.push(format!("error: {message}"));
    }
    if let Some(text) = outcome["text"].as_str() {
        lines.push(format!("\n{text}"));
    }
    lines.join("\n")
}

async fn call(at: &At, method: reqwest::Method, path: &str, body: Option<&Value>) -> Result<Value> {
    let client = http::client()?;
    let mut request = client.request(method, format!("{}{path}", at.url.trim_end_matches('/')));
    if let Some(body) = body {
        request = request.json(body);
    }
    let answer = request.send().await.with_context(|| format!("cannot reach {}", at.url))?;
    let status = answer.status();
    let value: Value = answer.json().await.unwrap_or(Value::Null);
    if !status.is_success() {
        bail!("{status}: {}", value["error"]["message"].as_str().unwrap_or("no explanation was given"));
    }
    Ok(value)
}

async fn watch(at: &At, id: &str) -> Result<()> {
    let client = http::client()?;
    let url = format!("{}{}/stream", at.url.trim_end_matches('/'), path_of(id)?);
    let answer = client.get(&url).send().await.with_context(|| format!("cannot reach {}", at.url))?;
    if !answer.status().is_success() {
        bail!("{}: {}", answer.status(), answer.text().await.unwrap_or_default());
    }
    let mut events = Events::default();
    let mut body = answer.bytes_stream();
    while let Some(chunk) = body.next().await {
        for event in events.push(&chunk.context("the stream broke off")?) {
            if at.json {
                println!("{event}");
            } else if let Some(text) = event["text"].as_str() {
                print!("{text}");
                std::io::stdout().flush()?;
            }
            if let Some(message) = event["error"]["message"].as_str() {
                bail!("{message}");
            }
        }
    }
    if !at.json {
        println!();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The path of a request, as it is sent.
    fn sent(id: &str) -> String {
        let url = format!("http://localhost:8080{}", path_of(id).expect("an id that can be sent"));
        let url: reqwest::Url = url.parse().expect("a URL");
        assert_eq!((url.query(), url.fragment()), (None, None));
        url.path().to_owned()
    }

    #[test]
    fn an_id_is_one_segment_of_the_path() {
        assert_eq!(sent("order-17.b_~"), "/v1/jobs/order-17.b_~");
        assert_eq!(sent("order#17"), "/v1/jobs/order%2317");
        assert_eq!(sent("a/../b?c=%2F d\n"), "/v1/jobs/a%2F..%2Fb%3Fc%3D%252F%20d%0A");
        assert_eq!(sent("é"), "/v1/jobs/%C3%A9");
        assert_eq!(sent("%2e%2e"), "/v1/jobs/%252e%252e");
    }

    #[test]
    fn ids_that_no_address_can_carry_are_refused() {
        for id in [".", ".."] {
            assert!(path_of(id).is_err(), "{id}");
        }
    }
}
