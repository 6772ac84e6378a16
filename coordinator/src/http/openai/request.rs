//! OpenAI's request bodies, as jobs. What they ask for and the fleet can't do is refused by name, not ignored.

use serde::Deserialize;
use serde_json::{Map, Value};
use stoker_shared::job::{CachePolicy, ChatMessage, Job, Lane, Options, Stop, parse_json};
use stoker_shared::outcome::{JobError, code};

/// The fields of both routes; each looks at its own.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Body {
    messages: Option<Vec<ChatMessage>>,
    prompt: Option<Prompt>,
    model: Option<String>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<u32>,
    min_p: Option<f64>,
    n: Option<u64>,
    stop: Option<Stop>,
    seed: Option<i64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    response_format: Option<Value>,
    user: Option<String>,
    lane: Option<Lane>,
    cache: Option<CachePolicy>,
    metadata: Option<Map<String, Value>>,
    logprobs: Option<Value>,
    top_logprobs: Option<u64>,
    logit_bias: Option<Map<String, Value>>,
    tools: Option<Vec<Value>>,
    functions: Option<Vec<Value>>,
    modalities: Option<Vec<String>>,
    echo: Option<bool>,
    suffix: Option<String>,
    best_of: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    List(Vec<Value>),
}

/// A request, understood.
#[derive(Debug)]
pub struct Asked {
    /// What is asked for.
    pub job: Job,
    /// As server-sent events.
    pub stream: bool,
    /// With a last chunk that has the usage.
    pub include_usage: bool,
    /// Its limit was given by the newer name.
    pub newer: bool,
}

/// Reads the body of `/v1/chat/completions`.
pub fn chat(body: &[u8]) -> Result<Asked, JobError> {
    let mut body = read(body)?;
    let Some(messages) = body.messages.take() else {
        return refused("messages", "messages is required");
    };
    refuse_unsupported(&body)?;
    asked(body, Job { messages: Some(messages), ..Job::default() })
}

/// Reads the body of `/v1/completions`.
pub fn completion(body: &[u8]) -> Result<Asked, JobError> {
    let mut body = read(body)?;
    let prompt = match body.prompt.take() {
        None => return refused("prompt", "prompt is required"),
        Some(Prompt::Text(text)) => text,
        Some(Prompt::List(mut list)) => match (list.pop(), list.is_empty()) {
            (Some(Value::String(text)), true) => text,
            _ => return refused("prompt", "prompt must be a string, or an array of one string"),
        },
    };
    refuse_unsupported(&body)?;
    asked(body, Job { prompt: Some(prompt), ..Job::default() })
}

/// Reads the fields. Rust would also take an array for an object, its values in the fields' order.
fn read(body: &[u8]) -> Result<Body, JobError> {
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(JobError::new(code::INVALID_REQUEST, "the body must be a JSON object, not an array"));
    }
    parse_json(body)
}

/// Refuses what would change the answer and can't be done.
fn refuse_unsupported(body: &Body) -> Result<(), JobError> {
    let some = |list: &Option<Vec<Value>>| list.as_ref().is_some_and(|l| !l.is_empty());
    for (wrong, param, message) in [
        (body.n.is_some_and(|n| n != 1), "n", "n must be 1"),
        (body.best_of.is_some_and(|n| n != 1), "best_of", "best_of must be 1"),
        (
            body.logprobs.as_ref().is_some_and(|l| !matches!(l, Value::Bool(false))),
            "logprobs",
            "logprobs are not supported",
        ),
        (body.top_logprobs.is_some_and(|n| n > 0), "top_logprobs", "top_logprobs is not supported"),
        (
            body.logit_bias.as_ref().is_some_and(|b| !b.is_empty()),
            "logit_bias",
            "logit_bias is not supported",
        ),
        (some(&body.tools), "tools", "tools are not supported"),
        (some(&body.functions), "functions", "functions are not supported"),
        (
            body.modalities.as_ref().is_some_and(|m| m != &["text"]),
            "modalities",
            "modalities: only text comes out",
        ),
        (body.echo == Some(true), "echo", "echo is not supported"),
        (body.suffix.as_ref().is_some_and(|s| !s.is_empty()), "suffix", "suffix is not supported"),
    ] {
        if wrong {
            return refused(param, message);
        }
    }
    Ok(())
}

fn asked(common: Body, job: Job) -> Result<Asked, JobError> {
    let newer = common.max_completion_tokens.is_some();
    let job = Job {
        model: common.model,
        options: Options {
            max_tokens: common.max_completion_tokens.or(common.max_tokens),
            temperature: common.temperature,
            top_p: common.top_p,
            top_k: common.top_k,
            min_p: common.min_p,
            seed: common.seed,
            stop: common.stop,
            presence_penalty: common.presence_penalty,
            frequency_penalty: common.frequency_penalty,
            response_format: common.response_format,
            ..Options::default()
        },
        lane: common.lane.unwrap_or_default(),
        cache: common.cache,
        user_id: common.user,
        metadata: common.metadata,
        ..job
    };
    job.check().map_err(|e| in_their_words(e, newer))?;
    let include_usage = common.stream_options.and_then(|o| o.include_usage).unwrap_or(false);
    Ok(Asked { job, stream: common.stream.unwrap_or(false), include_usage, newer })
}

fn refused<T>(param: &str, message: &str) -> Result<T, JobError> {
    Err(JobError::field(code::INVALID_REQUEST, param, message))
}

/// An error about a job's field, with the name that the field has in OpenAI's bodies.
pub fn in_their_words(mut error: JobError, max_completion_tokens: bool) -> JobError {
    let Some(ours) = error.param.as_deref().and_then(|p| p.strip_prefix("options.")) else { return error };
    let (ours, inside) = ours.split_at(ours.find('.').unwrap_or(ours.len()));
    let theirs = match ours {
        "maxTokens" if max_completion_tokens => "max_completion_tokens",
        "maxTokens" => "max_tokens",
        "topP" => "top_p",
        "topK" => "top_k",
        "minP" => "min_p",
        "presencePenalty" => "presence_penalty",
        "frequencyPenalty" => "frequency_penalty",
        "responseFormat" => "response_format",
        same => same,
    };
    error.message = error.message.replace(ours, theirs);
    error.param = Some(format!("{theirs}{inside}"));
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_be_done_is_refused_by_name() {
        for (body, param) in [
            (r#"{"messages":[{"role":"user","content":"a"}],"n":2}"#, "n"),
            (r#"{"messages":[{"role":"user","content":"a"}],"logprobs":true}"#, "logprobs"),
            (r#"{"messages":[{"role":"user","content":"a"}],"tools":[{}]}"#, "tools"),
            (r#"{"messages":[{"role":"user","content":"a"}],"temperature":3}"#, "temperature"),
            (r#"{"messages":[{"role":"user","content":"a"}],"temperature":"hot"}"#, "temperature"),
            (r#"{"messages":[{"role":"user","content":"a"}],"top_p":0}"#, "top_p"),
            (r#"{"messages":[{"role":"user","content":"a"}],"max_tokens":0}"#, "max_tokens"),
            (
                r#"{"messages":[{"role":"user","content":"a"}],"max_completion_tokens":0}"#,
                "max_completion_tokens",
            ),
            (
                r#"{"messages":[{"role":"user","content":"a"}],"response_format":{"type":"xml"}}"#,
                "response_format.type",
            ),
            (
                r#"{"messages":[{"role":"user","content":"a"}],
                    "response_format":{"type":"json_schema","json_schema":{"name":"n","schema":7}}}"#,
                "response_format.json_schema.schema",
            ),
            (r#"{"messages":[{"role":"user","content":7}]}"#, "messages[0].content"),
            (r#"{"messages":[]}"#, "messages"),
            (
                r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":null,"tool_calls":[{}]}]}"#,
                "messages[1].tool_calls",
            ),
        ] {
            let error = chat(body.as_bytes()).expect_err(body);
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
            assert!(error.message.contains(param.split(['[', '.']).next().unwrap()), "{body}: {error}");
        }
        for body in [r#"{"prompt":["a","b"]}"#, r#"{"prompt":[1,2]}"#, r#"{"prompt":[]}"#, r#"{"prompt":""}"#]
        {
            assert_eq!(
                completion(body.as_bytes()).expect_err(body).param.as_deref(),
                Some("prompt"),
                "{body}"
            );
        }
    }

    #[test]
    fn what_can_be_done_becomes_a_job() {
        let body = r#"{"model":"m","messages":[{"role":"system","content":"s"},
            {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}],
            "stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":5,"seed":3,"stop":"x",
            "user":"u","top_k":4,"min_p":0.1,"lane":"batch","cache":"off","metadata":{"a":"b"},"logprobs":false,
            "n":1,"parallel_tool_calls":true,"temperature":null,"response_format":{"type":"json_object"}}"#;
        let Asked { job, stream, include_usage, .. } = chat(body.as_bytes()).unwrap();
        assert!(stream && include_usage);
        assert_eq!(job.messages.as_ref().unwrap()[1].content.text(), "ab");
        assert_eq!(
            (job.options.max_tokens, job.options.seed, job.options.temperature),
            (Some(5), Some(3), None)
        );
        assert_eq!(
            (job.lane, job.cache, job.user_id.as_deref()),
            (Lane::Batch, Some(CachePolicy::Off), Some("u"))
        );
        assert_eq!(job.options.response_format, Some(serde_json::json!({ "type": "json_object" })));
        assert_eq!(completion(br#"{"prompt":["a"]}"#).unwrap().job.prompt.as_deref(), Some("a"));
    }
}
