//! The end of a job in the embedded ledger.

use rusqlite::{Connection, params};

use super::rows::{after, before, find, insert_dead, int, now_ms};
use crate::ports::{CacheRow, Committed, Ending, JobState, RequestRow};

/// Makes one ending final, within the caller's transaction.
pub fn commit(db: &Connection, ending: &Ending) -> rusqlite::Result<Committed> {
    if !finish(db, ending)? {
        let row = find(db, ending.key)?.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
        return Ok(match row.state {
            JobState::Done => Committed::Already(row.outcome.unwrap_or_default()),
            _ => Committed::Superseded,
        });
    }
    if let Err(e) = rows(db, ending, &ending.request) {
        // SQLite refuses nothing but texts of about a gigabyte; the job ends all the same.
        tracing::error!(job = %ending.job_id, error = %e, "the ledger can't hold a job's rows; storing minimal ones");
        bill(db, ending, &ending.request.minimal())?;
    }
    Ok(Committed::Done)
}

/// Sets the job to done, unless it is already or a newer epoch stands there; whether it did.
fn finish(db: &Connection, ending: &Ending) -> rusqlite::Result<bool> {
    let changed = db
        .prepare_cached(
            "INSERT INTO llm_jobs (job_key, tenant, job_id, body_hash, state, epoch, outcome, accepted_at, published,
                expires_at)
             VALUES (?1, ?2, ?3, ?4, 'done', ?5, ?6, ?7, 1, ?8)
             ON CONFLICT (job_key) DO UPDATE SET state = 'done', epoch = excluded.epoch, outcome = excluded.outcome,
                body = NULL, headers = NULL, owner = NULL, stranded = 0, expires_at = excluded.expires_at
             WHERE llm_jobs.state <> 'done' AND llm_jobs.epoch <= excluded.epoch",
        )?
        .execute(params![
            ending.key.to_string(),
            ending.tenant,
            ending.job_id,
            ending.body_hash,
            int(ending.epoch),
            ending.outcome.as_ref(),
            now_ms(),
            after(ending.expires_in_s),
        ])?;
    Ok(changed == 1)
}

fn rows(db: &Connection, ending: &Ending, request: &RequestRow) -> rusqlite::Result<()> {
    bill(db, ending, request)?;
    if let Some(answer) = &ending.cache {
        keep(db, answer)?;
    }
    if let Some(letter) = &ending.dead {
        insert_dead(db, letter)?;
    }
    Ok(())
}

fn bill(db: &Connection, ending: &Ending, r: &RequestRow) -> rusqlite::Result<()> {
    db.prepare_cached(
        "INSERT INTO llm_requests (job_key, job_id, tenant, user_id, prompt, response, model, tokens, execution_time,
            metadata, api_key_id, prompt_tokens, cached, finish_reason, error_code, worker, attempts, queued_at,
            started_at, first_token_at, finished_at, created_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?21)
         ON CONFLICT (job_key) DO NOTHING",
    )?
    .execute(params![
        ending.key.to_string(),
        ending.job_id,
        ending.tenant,
        r.user_id,
        r.prompt,
        r.response,
        r.model,
        r.tokens,
        r.execution_time_ms,
        r.metadata.to_string(),
        r.api_key_id,
        r.prompt_tokens,
        r.cached,
        r.finish_reason,
        r.error_code,
        r.worker,
        r.attempts,
        r.queued_ms_ago.map(before),
        r.started_ms_ago.map(before),
        r.first_token_ms_ago.map(before),
        now_ms(),
    ])?;
    Ok(())
}

fn keep(db: &Connection, answer: &CacheRow) -> rusqlite::Result<()> {
    db.prepare_cached(
        "INSERT INTO llm_cache (cache_key, prompt_hash, response, model, metadata, created_at, expires_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
         ON CONFLICT (cache_key) DO UPDATE SET prompt_hash = excluded.prompt_hash, response = excluded.response,
            model = excluded.model, metadata = excluded.metadata, created_at = excluded.created_at,
            expires_at = excluded.expires_at",
    )?
    .execute(params![
        answer.cache_key,
        answer.prompt_hash,
        answer.response,
        answer.model,
        answer.metadata.to_string(),
        now_ms(),
        (answer.expires_in_s > 0).then(|| after(answer.expires_in_s)),
    ])?;
    Ok(())
}
