//! Jobs: what a submitter asks for, as JSON, over HTTP or RabbitMQ.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::outcome::{JobError, code};
use crate::response_format::ResponseFormat;

/// Who is in a hurry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// Someone waits for the tokens.
    #[default]
    Interactive,
    /// Nobody does.
    Batch,
}

impl Lane {
    /// Both, the urgent one first.
    pub const ALL: [Lane; 2] = [Lane::Interactive, Lane::Batch];

    /// As written on the wire and in queue names.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Batch => "batch",
        }
    }
}

/// Whether an answer may come from the cache, and go into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePolicy {
    /// From it and into it. The default for deterministic jobs (temperature 0, or a given seed).
    Use,
    /// Into it only.
    Refresh,
    /// Neither.
    Off,
}

/// A chat message. Fields beyond these two are kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, …
    pub role: String,
    /// Text, or OpenAI's list of parts (of which only text is understood).
    pub content: Content,
    /// Whatever else came with it.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A message's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Plain.
    Text(String),
    /// `{"type": "text", "text": …}`.
    Parts(Vec<ContentPart>),
    /// OpenAI sends null with tool calls.
    Null(()),
}

/// A part of a message's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContentPart {
    /// `text`; others are refused.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text.
    #[serde(default)]
    pub text: String,
}

impl Content {
    /// The text of it, parts put together.
    pub fn text(&self) -> String {
        match self {
            Self::Text(t) => t.clone(),
            Self::Parts(parts) => parts.iter().map(|p| p.text.as_str()).collect(),
            Self::Null(()) => String::new(),
        }
    }
}

/// How to generate. Absent fields get their defaults from whoever accepts the job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Options {
    /// The guide puts the model here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// At most so many new tokens; absent in a job on a work queue: what the context has left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u64>,
    /// 0 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Above 0, up to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// 0: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    /// Equal seeds give equal texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// One string or up to 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
    /// -2 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    /// -2 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f64>,
    /// What form the text must have: see [`ResponseFormat`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_format: Option<Value>,
    /// Whatever else came with them, e.g. the guide's `stream`.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Stop strings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Stop {
    /// All of them.
    pub fn strings(&self) -> Vec<String> {
        match self {
            Self::One(s) => vec![s.clone()],
            Self::Many(all) => all.clone(),
        }
    }
}

/// A job. Field names are the guide's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Job {
    /// Version of the format; absent: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub v: Option<u32>,
    /// 1 to 128 bytes; absent: the message's id, else one of ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Absent or `auto`: the routing strategy decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Either this
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// or this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<ChatMessage>>,
    /// How to generate.
    #[serde(default)]
    pub options: Options,
    /// Who is in a hurry.
    #[serde(default)]
    pub lane: Lane,
    /// Absent: `use` if deterministic, else `off`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<CachePolicy>,
    /// Redis channel for the tokens; must start with `llm.tokens.`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_to: Option<String>,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
    /// The submitter's label; not an authority.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    /// Handed back as given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Map<String, Value>>,
    /// Unknown fields; handed back under `metadata.request`.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Bounds that an operator sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Largest `maxTokens` that `/api` and RabbitMQ may ask for.
    pub max_tokens: u64,
    /// `maxTokens` where they don't ask.
    pub default_max_tokens: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_tokens: 1000, default_max_tokens: 100 }
    }
}

/// Temperature of `/api` and RabbitMQ jobs that don't ask for one (OpenAI's routes: 1).
pub const DEFAULT_TEMPERATURE: f64 = 0.7;
/// Longest id, bytes.
pub const MAX_ID_BYTES: usize = 128;
/// Longest model name, bytes, once encoded into a routing key.
pub const MAX_MODEL_BYTES: usize = 200;
/// Most stop strings.
pub const MAX_STOPS: usize = 4;
/// Longest stop string, bytes.
pub const MAX_STOP_BYTES: usize = 256;
/// What a token channel's name starts with.
const TOKEN_CHANNEL_PREFIX: &str = "llm.tokens.";

/// The token channel of a job that names none, by its id, or of a coordinator's clients, by the coordinator's.
pub fn token_channel(id: &str) -> String {
    format!("{TOKEN_CHANNEL_PREFIX}{id}")
}

/// An id as one segment of a URL's path, percent-encoded (RFC 3986).
pub fn path_segment(id: &str) -> String {
    let mut segment = String::with_capacity(id.len());
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            segment.push(char::from(byte));
        } else {
            segment.push_str(&format!("%{byte:02X}"));
        }
    }
    segment
}

/// Longest message of an error about a field, characters: a parser may quote all of what it found.
const LONGEST_MESSAGE: usize = 500;

/// Parses JSON into `T`, with an error that names the field at fault.
pub fn parse_json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, JobError> {
    if let Err(e) = std::str::from_utf8(body) {
        return Err(JobError::new(
            code::INVALID_REQUEST,
            format!("the body is not UTF-8 (byte {})", e.valid_up_to()),
        ));
    }
    let mut de = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut de).map_err(|e| {
        let path = e.path().to_string();
        let is_data = e.inner().is_data();
        let said: String = e.into_inner().to_string().chars().take(LONGEST_MESSAGE).collect();
        if is_data && path != "." {
            JobError::field(code::INVALID_REQUEST, path.clone(), format!("{path}: {said}"))
        } else if is_data {
            JobError::new(code::INVALID_REQUEST, format!("the body does not fit: {said}"))
        } else {
            JobError::new(code::INVALID_REQUEST, format!("the body is not valid JSON: {said}"))
        }
    })?;
    de.end().map_err(|e| JobError::new(code::INVALID_REQUEST, format!("the body is not valid JSON: {e}")))?;
    Ok(value)
}

impl Job {
    /// Reads a job and checks it; an error names the field.
    pub fn parse(body: &[u8], limits: &Limits) -> Result<Self, JobError> {
        let job: Self = parse_json(body)?;
        job.check()?;
        job.check_max_tokens(limits.max_tokens)?;
        Ok(job)
    }

    /// Checks everything but the operator's limit on `maxTokens`.
    pub fn check(&self) -> Result<(), JobError> {
        let fail = |param: &str, message: String| Err(JobError::field(code::INVALID_REQUEST, param, message));
        if let Some(v) = self.v
            && v == 0
        {
            return fail("v", "v must be 1 or more".into());
        }
        if let Some(id) = &self.id
            && (id.is_empty() || id.len() > MAX_ID_BYTES)
        {
            return fail("id", format!("id must have 1 to {MAX_ID_BYTES} bytes; it has {}", id.len()));
        }
        if let Some(model) = self.model_name()
            && (model.is_empty() || encode_model(model).len() > MAX_MODEL_BYTES)
        {
            return fail("model", format!("model must be a name of 1 to {MAX_MODEL_BYTES} bytes"));
        }
        match (&self.prompt, &self.messages) {
            (None, None) => return fail("prompt", "prompt is required (or messages)".into()),
            (Some(_), Some(_)) => return fail("messages", "give prompt or messages, not both".into()),
            (Some(p), None) if p.is_empty() => return fail("prompt", "prompt is empty".into()),
            (None, Some(m)) => check_messages(m)?,
            _ => {}
        }
        if let Some(channel) = &self.stream_to
            && (!channel.starts_with(TOKEN_CHANNEL_PREFIX) || channel.len() > 512)
        {
            return fail("streamTo", format!("streamTo must start with {TOKEN_CHANNEL_PREFIX}"));
        }
        if let Some(deadline) = &self.deadline
            && OffsetDateTime::parse(deadline, &Rfc3339).is_err()
        {
            return fail("deadline", "deadline must be an RFC 3339 time, e.g. 2026-01-31T12:00:00Z".into());
        }
        self.options.check()
    }

    /// Refuses `maxTokens` above an operator's limit.
    pub fn check_max_tokens(&self, limit: u64) -> Result<(), JobError> {
        match self.options.max_tokens {
            Some(n) if n > limit => Err(JobError::field(
                code::INVALID_REQUEST,
                "options.maxTokens",
                format!("maxTokens must be 1 to {limit}; it is {n}"),
            )),
            _ => Ok(()),
        }
    }

    /// The model asked for; `None`: the routing strategy decides.
    pub fn model_name(&self) -> Option<&str> {
        self.model.as_deref().or(self.options.model.as_deref()).filter(|m| *m != "auto")
    }

    /// Whether the same body gives the same text.
    pub fn is_deterministic(&self, default_temperature: f64) -> bool {
        self.options.temperature.unwrap_or(default_temperature) == 0.0 || self.options.seed.is_some()
    }

    /// The deadline; `None` if absent or unreadable.
    pub fn deadline_at(&self) -> Option<OffsetDateTime> {
        OffsetDateTime::parse(self.deadline.as_deref()?, &Rfc3339).ok()
    }

    /// Hex SHA-256 of what the submitter means: canonical JSON without `id` and `timestamp`, so that a service that
    /// publishes a job again, with a new time stamp, means the same job.
    pub fn body_hash(&self) -> String {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        if let Some(object) = value.as_object_mut() {
            object.remove("id");
            object.remove("timestamp");
        }
        hex::encode(Sha256::digest(canonical_json(&value)))
    }

    /// What an outcome hands back of what the submitter gave: its metadata, and under `request` what nobody here knows.
    pub fn own_metadata(&self) -> Map<String, Value> {
        let mut metadata = self.metadata.clone().unwrap_or_default();
        let mut unknown = self.extra.clone();
        if !self.options.extra.is_empty() {
            unknown.insert("options".into(), Value::Object(self.options.extra.clone()));
        }
        if !unknown.is_empty() {
            metadata.insert("request".into(), Value::Object(unknown));
        }
        metadata
    }

    /// The prompt as one text, for rows that people read: chat messages as canonical JSON.
    pub fn prompt_text(&self) -> String {
        match (&self.prompt, &self.messages) {
            (Some(p), _) => p.clone(),
            (None, Some(m)) => canonical_json(&serde_json::to_value(m).unwrap_or_default()),
            (None, None) => String::new(),
        }
    }

    /// Hex SHA-256 of [`Job::prompt_text`], by which the guide's class finds cached answers.
    pub fn prompt_hash(&self) -> String {
        hex::encode(Sha256::digest(self.prompt_text()))
    }
}

fn check_messages(messages: &[ChatMessage]) -> Result<(), JobError> {
    if messages.is_empty() {
        return Err(JobError::field(code::INVALID_REQUEST, "messages", "messages is empty"));
    }
    for (i, m) in messages.iter().enumerate() {
        if m.role.is_empty() {
            let param = format!("messages[{i}].role");
            return Err(JobError::field(code::INVALID_REQUEST, param.clone(), format!("{param} is empty")));
        }
        for field in ["tool_calls", "function_call", "audio"] {
            let value = m.extra.get(field).unwrap_or(&Value::Null);
            if !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()) {
                let param = format!("messages[{i}].{field}");
                let message = format!("{param} is not supported: leave it out, or write it into the content");
                return Err(JobError::field(code::INVALID_REQUEST, param, message));
            }
        }
        if let Content::Parts(parts) = &m.content
            && let Some(j) = parts.iter().position(|p| p.kind != "text")
        {
            let param = format!("messages[{i}].content[{j}].type");
            let message = format!("{param} is {:?}; only \"text\" is understood", parts[j].kind);
            return Err(JobError::field(code::INVALID_REQUEST, param, message));
        }
    }
    if messages.iter().all(|m| m.content.text().is_empty()) {
        let message = "messages have no text: every content is empty";
        return Err(JobError::field(code::INVALID_REQUEST, "messages", message));
    }
    Ok(())
}

impl Options {
    fn check(&self) -> Result<(), JobError> {
        fn range(name: &str, value: Option<f64>, low: f64, high: f64, open: bool) -> Result<(), JobError> {
            match value {
                Some(x) if !(low..=high).contains(&x) || (open && x == low) => Err(JobError::field(
                    code::INVALID_REQUEST,
                    format!("options.{name}"),
                    format!(
                        "{name} must be {} {low} and at most {high}; it is {x}",
                        if open { "above" } else { "at least" }
                    ),
                )),
                _ => Ok(()),
            }
        }
        range("temperature", self.temperature, 0.0, 2.0, false)?;
        range("topP", self.top_p, 0.0, 1.0, true)?;
        range("minP", self.min_p, 0.0, 1.0, false)?;
        range("presencePenalty", self.presence_penalty, -2.0, 2.0, false)?;
        range("frequencyPenalty", self.frequency_penalty, -2.0, 2.0, false)?;
        if self.max_tokens == Some(0) {
            return Err(JobError::field(
                code::INVALID_REQUEST,
                "options.maxTokens",
                "maxTokens must be at least 1; it is 0",
            ));
        }
        if let Some(stop) = &self.stop {
            let all = stop.strings();
            if all.len() > MAX_STOPS || all.iter().any(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
                return Err(JobError::field(
                    code::INVALID_REQUEST,
                    "options.stop",
                    format!("stop must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes"),
                ));
            }
        }
        self.response_format.as_ref().map_or(Ok(()), |format| ResponseFormat::parse(format).map(drop))
    }
}

/// JSON with the keys of every object in order and no white space: equal values give equal bytes.
pub fn canonical_json(value: &Value) -> String {
    fn write(value: &Value, out: &mut String) {
        match value {
            Value::Object(map) => {
                let mut keys: Vec<_> = map.keys().collect();
                keys.sort();
                out.push('{');
                for (i, k) in keys.into_iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    out.push_str(&Value::String(k.clone()).to_string());
                    out.push(':');
                    write(&map[k], out);
                }
                out.push('}');
            }
            Value::Array(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    write(item, out);
                }
                out.push(']');
            }
            leaf => out.push_str(&leaf.to_string()),
        }
    }
    let mut out = String::new();
    write(value, &mut out);
    out
}

/// A model's name as one word of a routing key: `.`, `*`, `#`, `%` and bytes outside printable ASCII as `%XX`.
pub fn encode_model(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for b in name.bytes() {
        if b.is_ascii_graphic() && !matches!(b, b'.' | b'*' | b'#' | b'%') {
            out.push(b as char);
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &str) -> JobError {
        Job::parse(body.as_bytes(), &Limits::default()).expect_err(body)
    }

    #[test]
    fn errors_name_the_field() {
        for (body, param) in [
            (r#"{}"#, "prompt"),
            (r#"{"prompt":""}"#, "prompt"),
            (r#"{"prompt":7}"#, "prompt"),
            (r#"{"prompt":"a","messages":[]}"#, "messages"),
            (r#"{"messages":[]}"#, "messages"),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#,
                "messages[0].content[0].type",
            ),
            (r#"{"prompt":"a","options":{"temperature":3}}"#, "options.temperature"),
            (r#"{"prompt":"a","options":{"temperature":"hot"}}"#, "options.temperature"),
            (r#"{"prompt":"a","options":{"topP":0}}"#, "options.topP"),
            (r#"{"prompt":"a","options":{"maxTokens":0}}"#, "options.maxTokens"),
            (r#"{"prompt":"a","options":{"maxTokens":1000000000}}"#, "options.maxTokens"),
            (r#"{"prompt":"a","options":{"maxTokens":-1}}"#, "options.maxTokens"),
            (r#"{"prompt":"a","options":{"stop":["a","b","c","d","e"]}}"#, "options.stop"),
            (
                r#"{"prompt":"a","options":{"responseFormat":{"type":"json_schema"}}}"#,
                "options.responseFormat.json_schema",
            ),
            (r#"{"messages":[{"role":"user","content":""}]}"#, "messages"),
            (r#"{"prompt":"a","lane":"fast"}"#, "lane"),
            (r#"{"prompt":"a","streamTo":"secrets"}"#, "streamTo"),
            (r#"{"prompt":"a","deadline":"soon"}"#, "deadline"),
            (r#"{"prompt":"a","id":""}"#, "id"),
            (r#"{"prompt":"a","metadata":[]}"#, "metadata"),
        ] {
            let e = refused(body);
            assert_eq!(e.param.as_deref(), Some(param), "{body}: {e}");
            assert_eq!(e.code, code::INVALID_REQUEST);
        }
        assert_eq!(refused("{").param, None);
        assert_eq!(refused(r#"{"prompt":"a"} x"#).param, None);
        assert!(Job::parse(b"\xff{}", &Limits::default()).unwrap_err().message.contains("UTF-8"));
    }

    #[test]
    fn unknown_fields_are_kept() {
        let body = r#"{"prompt":"a","colour":"red","options":{"maxTokens":5,"stream":true}}"#;
        let job = Job::parse(body.as_bytes(), &Limits::default()).unwrap();
        assert_eq!(job.extra["colour"], "red");
        assert_eq!(job.options.extra["stream"], true);
        let back: Job = serde_json::from_slice(&serde_json::to_vec(&job).unwrap()).unwrap();
        assert_eq!(job, back);
    }

    #[test]
    fn the_hash_covers_what_is_meant() {
        let hash = |body: &str| Job::parse(body.as_bytes(), &Limits::default()).unwrap().body_hash();
        let a = hash(r#"{"id":"1","timestamp":"x","prompt":"a","options":{"maxTokens":5,"temperature":0}}"#);
        assert_eq!(
            a,
            hash(r#"{"id":"2","timestamp":"y","options":{"temperature":0,"maxTokens":5},"prompt":"a"}"#)
        );
        assert_ne!(a, hash(r#"{"prompt":"b","options":{"maxTokens":5,"temperature":0}}"#));
    }

    #[test]
    fn no_two_models_share_a_routing_word() {
        assert_eq!(encode_model("SmolLM2-135M"), "SmolLM2-135M");
        assert_eq!(encode_model("a.b/c#*%é"), "a%2Eb/c%23%2A%25%C3%A9");
        assert_ne!(encode_model("a%2E"), encode_model("a."));
    }
}
