//! Rows as Postgres gives and takes them.

use std::borrow::Cow;

use bytes::Bytes;
use serde_json::Value;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, ToSql};
use uuid::Uuid;

use super::connection::refused;
use super::values::{count, text};
use crate::ports::{CacheRow, DeadLetter, JobRow, JobState, PortResult, StoredJob, UsageSummary};

/// A statement's parameters.
pub type Params<'a> = Vec<&'a (dyn ToSql + Sync)>;

fn get<'a, T: FromSql<'a>>(row: &'a Row, column: usize) -> PortResult<T> {
    row.try_get(column).map_err(refused)
}

fn bytes(row: &Row, column: usize) -> PortResult<Option<Bytes>> {
    Ok(get::<Option<Vec<u8>>>(row, column)?.map(Bytes::from))
}

/// `job_key, tenant, job_id, body_hash, body, state, epoch, owner, attempts, outcome, headers`.
pub fn job(row: &Row) -> PortResult<JobRow> {
    Ok(JobRow {
        key: get(row, 0)?,
        tenant: get(row, 1)?,
        job_id: get(row, 2)?,
        body_hash: get(row, 3)?,
        body: bytes(row, 4)?,
        state: state(get(row, 5)?),
        epoch: get::<i64>(row, 6)?.unsigned_abs(),
        owner: get(row, 7)?,
        interruptions: get::<i32>(row, 8)?.unsigned_abs(),
        outcome: bytes(row, 9)?,
        headers: get::<Option<Value>>(row, 10)?.unwrap_or_default(),
    })
}

/// A job's state. One that this version doesn't know belongs to a job that is not done.
pub fn state(word: &str) -> JobState {
    match word {
        "waiting" => JobState::Waiting,
        "done" => JobState::Done,
        _ => JobState::Running,
    }
}

/// `job_key, body, headers`.
pub fn stored(row: &Row) -> PortResult<StoredJob> {
    Ok(StoredJob {
        key: get(row, 0)?,
        body: bytes(row, 1)?.unwrap_or_default(),
        headers: get::<Option<Value>>(row, 2)?.unwrap_or_default(),
    })
}

/// `cache_key, prompt_hash, response, model, metadata, seconds left`.
pub fn cache(row: &Row) -> PortResult<CacheRow> {
    Ok(CacheRow {
        cache_key: get(row, 0)?,
        prompt_hash: get(row, 1)?,
        response: get(row, 2)?,
        model: get::<Option<String>>(row, 3)?.unwrap_or_default(),
        metadata: get::<Option<Value>>(row, 4)?.unwrap_or_default(),
        expires_in_s: get::<Option<f64>>(row, 5)?.map_or(0, |left| left.ceil() as u64),
    })
}

/// `job_key, job_id, tenant, body, code, reason, attempts, worker`.
pub fn dead(row: &Row) -> PortResult<DeadLetter> {
    Ok(DeadLetter {
        key: get(row, 0)?,
        job_id: get(row, 1)?,
        tenant: get(row, 2)?,
        body: bytes(row, 3)?.unwrap_or_default(),
        code: get(row, 4)?,
        reason: get(row, 5)?,
        attempts: get::<i32>(row, 6)?.unsigned_abs(),
        worker: get(row, 7)?,
    })
}

/// `count, tokens, prompt tokens, mean time, models`.
pub fn usage(row: &Row) -> PortResult<UsageSummary> {
    Ok(UsageSummary {
        request_count: get::<i64>(row, 0)?.unsigned_abs(),
        total_tokens: get::<i64>(row, 1)?.unsigned_abs(),
        prompt_tokens: get::<i64>(row, 2)?.unsigned_abs(),
        avg_execution_time: get(row, 3)?,
        models_used: get(row, 4)?,
    })
}

/// Writes dead letters; its parameters are [`DeadColumns`].
pub const INSERT_DEAD: &str = "
    INSERT INTO dead_letters (job_key, job_id, tenant, body, code, reason, attempts, worker)
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::text[], $6::text[], $7::int4[],
        $8::text[])";

/// Dead letters, column by column.
#[derive(Default)]
pub struct DeadColumns<'a> {
    key: Vec<Option<Uuid>>,
    job_id: Vec<Option<Cow<'a, str>>>,
    tenant: Vec<Cow<'a, str>>,
    body: Vec<&'a [u8]>,
    code: Vec<Cow<'a, str>>,
    reason: Vec<Cow<'a, str>>,
    attempts: Vec<i32>,
    worker: Vec<Cow<'a, str>>,
}

impl<'a> DeadColumns<'a> {
    /// Of these letters.
    pub fn new(letters: &[&'a DeadLetter]) -> Self {
        let mut c = Self::default();
        for letter in letters {
            c.key.push(letter.key);
            c.job_id.push(letter.job_id.as_deref().map(text));
            c.tenant.push(text(&letter.tenant));
            c.body.push(&letter.body);
            c.code.push(text(&letter.code));
            c.reason.push(text(&letter.reason));
            c.attempts.push(count(letter.attempts));
            c.worker.push(text(&letter.worker));
        }
        c
    }

    /// As parameters.
    pub fn params(&self) -> Params<'_> {
        vec![
            &self.key,
            &self.job_id,
            &self.tenant,
            &self.body,
            &self.code,
            &self.reason,
            &self.attempts,
            &self.worker,
        ]
    }
}
