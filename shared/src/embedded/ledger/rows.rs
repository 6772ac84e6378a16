//! Rows of the embedded ledger: reading and writing them, and its clock.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, params};
use uuid::Uuid;

use crate::ports::{CacheRow, Claim, DeadLetter, JobRow, JobState, StoredJob, UsageSummary};

/// Unix milliseconds.
pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| int(d.as_millis() as u64))
}

/// The time so many seconds from now, Unix milliseconds.
pub fn after(seconds: u64) -> i64 {
    now_ms().saturating_add(int(seconds.saturating_mul(1000)))
}

/// The time so many milliseconds ago, Unix milliseconds.
pub fn before(ms: u64) -> i64 {
    now_ms().saturating_sub(int(ms))
}

/// SQLite's integers are signed; none of ours comes near the border.
pub fn int(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// A job's row.
pub fn find(db: &Connection, key: Uuid) -> rusqlite::Result<Option<JobRow>> {
    db.prepare_cached(
        "SELECT job_key, tenant, job_id, body_hash, body, state, epoch, owner, attempts, outcome, headers
         FROM llm_jobs WHERE job_key = ?1",
    )?
    .query_row([key.to_string()], |row| {
        Ok(JobRow {
            key: uuid(row, 0)?,
            tenant: row.get(1)?,
            job_id: row.get(2)?,
            body_hash: row.get(3)?,
            body: bytes(row, 4)?,
            state: match row.get_ref(5)?.as_str()? {
                "waiting" => JobState::Waiting,
                "done" => JobState::Done,
                _ => JobState::Running,
            },
            epoch: row.get::<_, i64>(6)?.unsigned_abs(),
            owner: row.get(7)?,
            interruptions: row.get(8)?,
            outcome: bytes(row, 9)?,
            headers: json(row, 10)?,
        })
    })
    .optional()
}

/// Writes a claim's row, running, unless there is one; whether it was written.
pub fn insert_running(db: &Connection, claim: &Claim, owner: Option<&str>) -> rusqlite::Result<bool> {
    let inserted = db
        .prepare_cached(
            "INSERT INTO llm_jobs (job_key, tenant, job_id, body_hash, state, epoch, owner, attempts, accepted_at,
                published, expires_at)
             VALUES (?1, ?2, ?3, ?4, 'running', ?5, ?6, ?7, ?8, 1, ?9) ON CONFLICT DO NOTHING",
        )?
        .execute(params![
            claim.key.to_string(),
            claim.tenant,
            claim.job_id,
            claim.body_hash,
            int(claim.epoch),
            owner,
            claim.interruptions,
            now_ms(),
            after(claim.expires_in_s),
        ])?;
    Ok(inserted == 1)
}

/// Writes a dead letter.
pub fn insert_dead(db: &Connection, letter: &DeadLetter) -> rusqlite::Result<()> {
    db.prepare_cached(
        "INSERT INTO dead_letters (job_key, job_id, tenant, body, code, reason, attempts, worker, created_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
    )?
    .execute(params![
        letter.key.map(|key| key.to_string()),
        letter.job_id,
        letter.tenant,
        letter.body.as_ref(),
        letter.code,
        letter.reason,
        letter.attempts,
        letter.worker,
        now_ms(),
    ])?;
    Ok(())
}

/// `job_key, job_id, tenant, body, code, reason, attempts, worker`.
pub fn dead(row: &Row<'_>) -> rusqlite::Result<DeadLetter> {
    Ok(DeadLetter {
        key: row.get_ref(0)?.as_str_or_null()?.and_then(|key| key.parse().ok()),
        job_id: row.get(1)?,
        tenant: row.get(2)?,
        body: bytes(row, 3)?.unwrap_or_default(),
        code: row.get(4)?,
        reason: row.get(5)?,
        attempts: row.get(6)?,
        worker: row.get(7)?,
    })
}

/// `job_key, body, headers`.
pub fn stored(row: &Row<'_>) -> rusqlite::Result<StoredJob> {
    Ok(StoredJob { key: uuid(row, 0)?, body: bytes(row, 1)?.unwrap_or_default(), headers: json(row, 2)? })
}

/// `cache_key, prompt_hash, response, model, metadata, expires_at`.
pub fn cache(row: &Row<'_>) -> rusqlite::Result<CacheRow> {
    let expires_at: Option<i64> = row.get(5)?;
    Ok(CacheRow {
        cache_key: row.get(0)?,
        prompt_hash: row.get(1)?,
        response: row.get(2)?,
        model: row.get::<_, Option<String>>(3)?.unwrap_or_default(),
        metadata: json(row, 4)?,
        expires_in_s: expires_at.map_or(0, |at| ((at - now_ms()).max(0) as u64).div_ceil(1000)),
    })
}

/// `count, tokens, prompt tokens, mean time`; the models are left for the caller.
pub fn usage(row: &Row<'_>) -> rusqlite::Result<UsageSummary> {
    Ok(UsageSummary {
        request_count: row.get::<_, i64>(0)?.unsigned_abs(),
        total_tokens: row.get::<_, i64>(1)?.unsigned_abs(),
        prompt_tokens: row.get::<_, i64>(2)?.unsigned_abs(),
        avg_execution_time: row.get(3)?,
        models_used: Vec::new(),
    })
}

fn bytes(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<Bytes>> {
    Ok(row.get::<_, Option<Vec<u8>>>(column)?.map(Bytes::from))
}

fn uuid(row: &Row<'_>, column: usize) -> rusqlite::Result<Uuid> {
    let text = row.get_ref(column)?.as_str()?;
    text.parse().map_err(|e| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(e)))
}

fn json(row: &Row<'_>, column: usize) -> rusqlite::Result<serde_json::Value> {
    match row.get_ref(column)?.as_str_or_null()? {
        None => Ok(serde_json::Value::Null),
        Some(text) => serde_json::from_str(text)
            .map_err(|e| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(e))),
    }
}
