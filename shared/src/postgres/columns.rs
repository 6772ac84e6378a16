//! Endings as columns: each statement of a commit takes arrays, one element a job, so that its cost hardly depends on
//! how many there are.

use std::borrow::Cow;
use std::collections::BTreeMap;

use uuid::Uuid;

use super::rows::Params;
use super::values::{
    HASH_CHARS, MODEL_CHARS, USER_ID_CHARS, count, epoch, fits, json, ms, seconds, short, text,
};
use crate::ports::{CacheRow, Ending};

/// Sets jobs to done, unless they are or a newer epoch stands there; gives the keys of those that became done.
pub const INSERT_JOBS: &str = "
    INSERT INTO llm_jobs AS job (job_key, tenant, job_id, body_hash, state, epoch, outcome, published_at, expires_at)
    SELECT key, tenant, id, hash, 'done', epoch, outcome, now(), now() + make_interval(secs => expires)
    FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::int8[], $6::bytea[], $7::float8[])
        AS e (key, tenant, id, hash, epoch, outcome, expires)
    ON CONFLICT (job_key) DO UPDATE SET state = 'done', epoch = excluded.epoch, outcome = excluded.outcome,
        body = NULL, headers = NULL, owner = NULL, expires_at = excluded.expires_at
    WHERE job.state <> 'done' AND job.epoch <= excluded.epoch
    RETURNING job_key";

/// [`INSERT_JOBS`]'s parameters.
#[derive(Default)]
pub struct JobColumns<'a> {
    key: Vec<Uuid>,
    tenant: Vec<Cow<'a, str>>,
    job_id: Vec<Cow<'a, str>>,
    body_hash: Vec<Cow<'a, str>>,
    epoch: Vec<i64>,
    outcome: Vec<&'a [u8]>,
    expires: Vec<f64>,
}

impl<'a> JobColumns<'a> {
    /// Of these endings.
    pub fn new(endings: &[&'a Ending]) -> Self {
        let mut c = Self::default();
        for e in endings {
            c.key.push(e.key);
            c.tenant.push(text(&e.tenant));
            c.job_id.push(text(&e.job_id));
            c.body_hash.push(text(&e.body_hash));
            c.epoch.push(epoch(e.epoch));
            c.outcome.push(&e.outcome);
            c.expires.push(seconds(e.expires_in_s));
        }
        c
    }

    /// As parameters.
    pub fn params(&self) -> Params<'_> {
        vec![
            &self.key,
            &self.tenant,
            &self.job_id,
            &self.body_hash,
            &self.epoch,
            &self.outcome,
            &self.expires,
        ]
    }
}

/// Writes the bills.
pub const INSERT_REQUESTS: &str = "
    INSERT INTO llm_requests (job_key, job_id, tenant, user_id, prompt, response, model, tokens, execution_time,
        metadata, api_key_id, prompt_tokens, cached, finish_reason, error_code, worker, attempts, queued_at, started_at,
        first_token_at, finished_at)
    SELECT key, id, tenant, user_id, prompt, response, model, tokens, execution_time, metadata::jsonb, api_key_id,
        prompt_tokens, cached, finish_reason, error_code, worker, attempts, now() - make_interval(secs => queued),
        now() - make_interval(secs => started), now() - make_interval(secs => first_token), now()
    FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::int4[],
        $9::int4[], $10::text[], $11::text[], $12::int4[], $13::bool[], $14::text[], $15::text[], $16::text[],
        $17::int4[], $18::float8[], $19::float8[], $20::float8[])
        AS r (key, id, tenant, user_id, prompt, response, model, tokens, execution_time, metadata, api_key_id,
            prompt_tokens, cached, finish_reason, error_code, worker, attempts, queued, started, first_token)
    ON CONFLICT (job_key) DO NOTHING";

/// [`INSERT_REQUESTS`]'s parameters.
#[derive(Default)]
pub struct RequestColumns<'a> {
    key: Vec<Uuid>,
    job_id: Vec<Cow<'a, str>>,
    tenant: Vec<Cow<'a, str>>,
    user_id: Vec<Option<Cow<'a, str>>>,
    prompt: Vec<Cow<'a, str>>,
    response: Vec<Cow<'a, str>>,
    model: Vec<Cow<'a, str>>,
    tokens: Vec<i32>,
    execution_time: Vec<i32>,
    metadata: Vec<String>,
    api_key_id: Vec<Option<Cow<'a, str>>>,
    prompt_tokens: Vec<i32>,
    cached: Vec<bool>,
    finish_reason: Vec<Cow<'a, str>>,
    error_code: Vec<Option<Cow<'a, str>>>,
    worker: Vec<Cow<'a, str>>,
    attempts: Vec<i32>,
    queued: Vec<Option<f64>>,
    started: Vec<Option<f64>>,
    first_token: Vec<Option<f64>>,
}

impl<'a> RequestColumns<'a> {
    /// Of these endings.
    pub fn new(endings: &[&'a Ending]) -> Self {
        let mut c = Self::default();
        for e in endings {
            let r = &e.request;
            c.key.push(e.key);
            c.job_id.push(text(&e.job_id));
            c.tenant.push(text(&e.tenant));
            c.user_id.push(r.user_id.as_deref().map(|u| short(u, USER_ID_CHARS)));
            c.prompt.push(text(&r.prompt));
            c.response.push(text(&r.response));
            c.model.push(short(&r.model, MODEL_CHARS));
            c.tokens.push(count(r.tokens));
            c.execution_time.push(count(r.execution_time_ms));
            c.metadata.push(json(&r.metadata));
            c.api_key_id.push(r.api_key_id.as_deref().map(text));
            c.prompt_tokens.push(count(r.prompt_tokens));
            c.cached.push(r.cached);
            c.finish_reason.push(text(&r.finish_reason));
            c.error_code.push(r.error_code.as_deref().map(text));
            c.worker.push(text(&r.worker));
            c.attempts.push(count(r.attempts));
            c.queued.push(r.queued_ms_ago.map(ms));
            c.started.push(r.started_ms_ago.map(ms));
            c.first_token.push(r.first_token_ms_ago.map(ms));
        }
        c
    }

    /// As parameters.
    pub fn params(&self) -> Params<'_> {
        vec![
            &self.key,
            &self.job_id,
            &self.tenant,
            &self.user_id,
            &self.prompt,
            &self.response,
            &self.model,
            &self.tokens,
            &self.execution_time,
            &self.metadata,
            &self.api_key_id,
            &self.prompt_tokens,
            &self.cached,
            &self.finish_reason,
            &self.error_code,
            &self.worker,
            &self.attempts,
            &self.queued,
            &self.started,
            &self.first_token,
        ]
    }
}

/// Keeps answers.
pub const INSERT_CACHE: &str = "
    INSERT INTO llm_cache (cache_key, prompt_hash, response, model, metadata, expires_at)
    SELECT key, hash, response, model, metadata::jsonb, now() + make_interval(secs => expires)
    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::float8[])
        AS a (key, hash, response, model, metadata, expires)
    ON CONFLICT (cache_key) DO UPDATE SET prompt_hash = excluded.prompt_hash, response = excluded.response,
        model = excluded.model, metadata = excluded.metadata, expires_at = excluded.expires_at, created_at = now()";

/// [`INSERT_CACHE`]'s parameters: one row a cache key, ordered by it.
#[derive(Default)]
pub struct CacheColumns<'a> {
    key: Vec<&'a str>,
    hash: Vec<&'a str>,
    response: Vec<&'a str>,
    model: Vec<&'a str>,
    metadata: Vec<String>,
    expires: Vec<Option<f64>>,
}

impl<'a> CacheColumns<'a> {
    /// Of these endings. An answer that would not read back as it is (NUL, over-long) is left out: a changed answer
    /// would be a wrong one, and a missing one only costs computing it again.
    pub fn new(endings: &[&'a Ending]) -> Self {
        let answers: BTreeMap<&str, &CacheRow> = endings
            .iter()
            .filter_map(|e| e.cache.as_ref())
            .filter(|a| fits(&a.cache_key, HASH_CHARS) && fits(&a.prompt_hash, HASH_CHARS))
            .filter(|a| fits(&a.model, MODEL_CHARS) && fits(&a.response, usize::MAX))
            .map(|a| (a.cache_key.as_str(), a))
            .collect();
        let mut c = Self::default();
        for (key, a) in answers {
            c.key.push(key);
            c.hash.push(&a.prompt_hash);
            c.response.push(&a.response);
            c.model.push(&a.model);
            c.metadata.push(json(&a.metadata));
            c.expires.push((a.expires_in_s > 0).then(|| seconds(a.expires_in_s)));
        }
        c
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.key.is_empty()
    }

    /// As parameters.
    pub fn params(&self) -> Params<'_> {
        vec![&self.key, &self.hash, &self.response, &self.model, &self.metadata, &self.expires]
    }
}
