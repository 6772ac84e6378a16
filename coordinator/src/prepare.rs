//! Completes a job before it is published: everything that must not differ between attempts (id, model, seed, deadline)
//! and the defaults of the route it came by are filled in here, once; whoever runs it finds a job without gaps.

use std::time::{Duration, Instant};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use stoker_shared::config;
use stoker_shared::envelope::Envelope;
use stoker_shared::job::{self, CachePolicy, Job, Lane, canonical_json};
use stoker_shared::outcome::{JobError, code};
use stoker_shared::ports::Message;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::admission::Caller;
use crate::inbox::deadline_passed;
use crate::routing::Model;

/// The farthest deadline, from acceptance: logs, cancellations and rows are kept as long.
const FARTHEST_DEADLINE: Duration = Duration::from_secs(30 * 86_400);

/// A checked job, and what its way in says about it.
pub struct Intent {
    /// What is asked for.
    pub job: Job,
    /// By whom.
    pub caller: Caller,
    /// What absent options mean on this route.
    pub defaults: Defaults,
    /// When it came.
    pub accepted: Instant,
    /// W3C trace context, as it came.
    pub traceparent: Option<String>,
}

/// What absent options mean.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    /// Temperature.
    pub temperature: f64,
    /// `maxTokens`; `None`: what the context has left.
    pub max_tokens: Option<u64>,
}

impl Defaults {
    /// Of `/api` and RabbitMQ.
    pub fn guide(limits: &job::Limits) -> Self {
        Self { temperature: job::DEFAULT_TEMPERATURE, max_tokens: Some(limits.default_max_tokens) }
    }

    /// Of `/v1`: 16 tokens after a prompt, what the context has left in a chat.
    pub fn openai(chat: bool) -> Self {
        Self { temperature: 1.0, max_tokens: if chat { None } else { Some(16) } }
    }
}

/// How the job will travel.
pub enum Travel<'a> {
    /// A client is connected to this coordinator and waits for the tokens.
    Connected {
        /// This coordinator.
        coordinator: &'a str,
        /// Its token channel.
        channel: &'a str,
    },
    /// Nobody is connected: under this id, if the submitter chose one.
    Queued {
        /// The submitter's.
        id: Option<String>,
        /// It came through `llm.requests`.
        front_door: bool,
    },
}

/// A job that can be published.
pub struct Prepared {
    /// The complete job.
    pub job: Job,
    /// What goes beside it.
    pub envelope: Envelope,
    /// Who serves it.
    pub model: Arc<Model>,
    /// What equal requests have in common; `None`: there can be none.
    pub identity: Option<String>,
    /// What may be done with answers.
    pub cache: CachePolicy,
    /// When it must be done.
    pub deadline: Instant,
    traceparent: String,
}

/// Completes a job. A model without a name stands for one that is chosen later.
///
/// # Errors
/// `deadline_exceeded` or `invalid_request` for a deadline that has passed or is too far away; `invalid_request` for more
/// tokens than the model's context holds.
pub fn prepare(
    intent: Intent,
    model: Arc<Model>,
    travel: Travel<'_>,
    settings: &config::Coordinator,
) -> Result<Prepared, JobError> {
    let Intent { mut job, caller, defaults, traceparent, .. } = intent;
    if let Some(asked) = job.options.max_tokens
        && model.context > 0
        && asked > u64::from(model.context)
    {
        let message =
            format!("maxTokens must be at most the model's context, {}; it is {asked}", model.context);
        return Err(JobError::field(code::INVALID_REQUEST, "options.maxTokens", message));
    }
    let now = OffsetDateTime::now_utc();
    let remaining = remaining(&job, now, settings)?;
    let minted = Uuid::now_v7();
    let (key, id) = match &travel {
        Travel::Queued { id: Some(id), .. } => {
            (stoker_shared::envelope::key_of(&caller.tenant, id), id.clone())
        }
        _ => (minted, minted.to_string()),
    };
    let body_hash = match travel {
        Travel::Connected { .. } => String::new(),
        Travel::Queued { .. } => job.body_hash(),
    };
    let deterministic = job.is_deterministic(defaults.temperature);
    let cache = job.cache.unwrap_or(if deterministic { CachePolicy::Use } else { CachePolicy::Off });
    let cache = if settings.caching { cache } else { CachePolicy::Off };
    let may_join = deterministic && job.cache.is_none_or(|c| c == CachePolicy::Use);

    job.v = Some(stoker_shared::frame::VERSION);
    job.model = Some(model.name.to_string()).filter(|name| !name.is_empty());
    job.options.model = None;
    job.options.max_tokens = job.options.max_tokens.or(defaults.max_tokens);
    job.options.temperature.get_or_insert(defaults.temperature);
    job.user_id = caller.user.or(job.user_id);
    let keep = may_join || cache != CachePolicy::Off;
    let identity = model.revision.as_deref().filter(|_| keep).map(|r| identity(&job, r, &caller.tenant));
    job.options.seed.get_or_insert_with(|| seed_of(key));
    job.deadline = Some(rfc3339(now + remaining));
    let (once, coordinator) = match &travel {
        Travel::Connected { coordinator, .. } => (true, Some((*coordinator).to_owned())),
        Travel::Queued { .. } => (false, None),
    };
    job.stream_to = match &travel {
        Travel::Connected { channel, .. } => Some((*channel).to_owned()),
        Travel::Queued { .. } => job.stream_to.or_else(|| Some(job::token_channel(&id))),
    };
    job.id = Some(id);
    let envelope = Envelope {
        key,
        tenant: caller.tenant.to_string(),
        once,
        front_door: matches!(travel, Travel::Queued { front_door: true, .. }),
        body_hash,
        accepted_ms: u64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or_default(),
        cache_key: identity.clone().filter(|_| cache != CachePolicy::Off),
        revision: model.revision.clone(),
        coordinator,
    };
    Ok(Prepared {
        envelope,
        model,
        cache: if identity.is_some() { cache } else { CachePolicy::Off },
        identity: identity.filter(|_| may_join).map(|identity| format!("{}:{identity}", job.lane.as_str())),
        deadline: Instant::now() + remaining,
        traceparent: traceparent.unwrap_or_else(|| made_traceparent(key)),
        job,
    })
}

impl Prepared {
    /// The message for the work queue.
    pub fn message(&self) -> Result<Message, JobError> {
        let body = serde_json::to_vec(&self.job)
            .map_err(|e| JobError::new(code::INTERNAL, format!("the job can't be written down: {e}")))?;
        let mut headers = self.envelope.to_headers();
        headers.insert("traceparent".into(), self.traceparent.clone());
        let id = self.job.id.clone().unwrap_or_default();
        Ok(Message { id, body: Bytes::from(body), headers, ..Message::default() })
    }
}

/// Time until the deadline: the job's own, else its lane's.
///
/// # Errors
/// `deadline_exceeded` if it has passed, `invalid_request` if it is too far away.
pub fn remaining(
    job: &Job,
    now: OffsetDateTime,
    settings: &config::Coordinator,
) -> Result<Duration, JobError> {
    let Some(asked) = job.deadline_at() else {
        return Ok(Duration::from_secs(match job.lane {
            Lane::Interactive => settings.interactive_deadline_s,
            Lane::Batch => settings.batch_deadline_s,
        }));
    };
    let left = Duration::try_from(asked - now).ok().filter(|left| !left.is_zero());
    match left {
        None => Err(JobError { param: Some("deadline".into()), ..deadline_passed() }),
        Some(left) if left > FARTHEST_DEADLINE => {
            let message = "deadline must be at most 30 days ahead";
            Err(JobError::field(code::INVALID_REQUEST, "deadline", message))
        }
        Some(left) => Ok(left),
    }
}

/// What makes two requests the same: hex SHA-256 of model, weights, prompt, every option, and whose they are. The seed
/// counts only where it matters; in a response format the order of keys counts too, because properties come in a schema's.
fn identity(job: &Job, revision: &str, tenant: &str) -> String {
    let mut options = job.options.clone();
    if options.temperature == Some(0.0) {
        options.seed = None;
    }
    options.extra.remove("stream");
    let value = serde_json::json!([
        job.model.as_deref(),
        revision,
        tenant,
        job.prompt.as_deref(),
        &job.messages,
        &options,
        options.response_format.as_ref().map(ToString::to_string),
    ]);
    hex::encode(Sha256::digest(canonical_json(&value)))
}

/// The seed of a job that gives none: a function of its key, so that a message that comes twice means the same text.
fn seed_of(key: Uuid) -> i64 {
    let (high, low) = key.as_u64_pair();
    i64::try_from((high ^ low) >> 1).unwrap_or_default()
}

/// A trace that begins here.
fn made_traceparent(key: Uuid) -> String {
    format!("00-{}-{:016x}-01", key.simple(), rand::random::<u64>() | 1)
}

/// A time as the contract writes it.
pub fn rfc3339(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(body: &str, tenant: &str) -> Prepared {
        let intent = Intent {
            job: serde_json::from_str(body).unwrap(),
            caller: Caller { tenant: tenant.into(), api_key_id: None, user: None },
            defaults: Defaults::openai(true),
            accepted: Instant::now(),
            traceparent: None,
        };
        let model = Model { name: "m".into(), revision: Some("r1".into()), ..Model::default() };
        let travel = Travel::Connected { coordinator: "c-1", channel: "llm.tokens.c-1" };
        prepare(intent, Arc::new(model), travel, &config::Coordinator::default()).unwrap()
    }

    #[test]
    fn a_prepared_job_has_no_gaps() {
        let p = prepared(r#"{"prompt":"a"}"#, "t");
        let job = &p.job;
        assert!(job.id.is_some() && job.deadline_at().is_some() && job.options.seed.is_some());
        assert_eq!(job.options.temperature, Some(1.0));
        assert_eq!(job.stream_to.as_deref(), Some("llm.tokens.c-1"));
        assert_eq!((p.identity, p.cache), (None, CachePolicy::Off), "a random text is nobody else's");
        let back: Job =
            serde_json::from_slice(&prepared(r#"{"prompt":"a"}"#, "t").message().unwrap().body).unwrap();
        back.check().unwrap();
    }

    #[test]
    fn equal_means_equal_in_everything_that_shapes_the_text() {
        let base = prepared(r#"{"prompt":"a","options":{"temperature":0}}"#, "t").identity;
        assert!(base.is_some());
        let same = prepared(r#"{"options":{"seed":7,"temperature":0.0},"userId":"u","prompt":"a"}"#, "t");
        assert_eq!(same.identity, base, "greedy text does not depend on the seed");
        for (body, tenant) in [
            (r#"{"prompt":"b","options":{"temperature":0}}"#, "t"),
            (r#"{"prompt":"a","options":{"temperature":0}}"#, "other"),
            (r#"{"prompt":"a","options":{"temperature":0,"maxTokens":5}}"#, "t"),
            (r#"{"prompt":"a","options":{"temperature":0,"stop":"x"}}"#, "t"),
            (r#"{"prompt":"a","options":{"temperature":0,"responseFormat":{"type":"json_object"}}}"#, "t"),
            (r#"{"prompt":"a","options":{"temperature":0.5,"seed":1}}"#, "t"),
            (r#"{"prompt":"a","options":{"temperature":0},"lane":"batch"}"#, "t"),
            (r#"{"messages":[{"role":"user","content":"a"}],"options":{"temperature":0}}"#, "t"),
        ] {
            let other = prepared(body, tenant).identity;
            assert!(other.is_some() && other != base, "{body}");
        }
        assert_eq!(
            prepared(r#"{"prompt":"a","options":{"temperature":0},"cache":"off"}"#, "t").identity,
            None
        );
        let with_properties = |properties: &str| {
            let format = format!(
                r#"{{"type":"json_schema","json_schema":{{"schema":{{"properties":{{{properties}}}}}}}}}"#
            );
            let body = format!(r#"{{"prompt":"a","options":{{"temperature":0,"responseFormat":{format}}}}}"#);
            prepared(&body, "t").identity
        };
        assert_eq!(with_properties(r#""x":{},"y":{}"#), with_properties(r#""x":{},"y":{}"#));
        assert_ne!(with_properties(r#""x":{},"y":{}"#), with_properties(r#""x":{},"y":true"#));
        assert_ne!(with_properties(r#""x":{},"y":{}"#), with_properties(r#""y":{},"x":{}"#));
    }
}
