//! The embedded ledger: one SQLite file (or memory), so that accepted jobs, usage and cached answers survive a restart
//! of `stoker up`.

mod commit;
mod rows;
mod schema;
mod thread;

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, params};
use uuid::Uuid;

use crate::ports::{
    Accepted, CacheRow, Claim, Claimed, Committed, DeadLetter, Ending, JobRow, Ledger, NewJob, PortResult,
    Retention, StoredJob, UsageSummary,
};
use rows::{after, before, int, now_ms};
use thread::{Database, port_error, unavailable};

/// How long to wait for another process that is just giving the file back.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
/// Rows that one purge deletes from a table at most; the next purge goes on.
const PURGE_ROWS: i64 = 10_000;

/// The ledger in a SQLite file or in memory.
pub struct SqliteLedger {
    db: Database,
}

impl SqliteLedger {
    /// Opens or creates the file, with its directory, and brings its tables up to date; `None`: in memory. Blocks for
    /// the time that takes.
    ///
    /// # Errors
    /// If the file can't be opened, is no database, or belongs to another running process.
    pub fn open(file: Option<&Path>) -> PortResult<Self> {
        let Some(file) = file else {
            return Self::start(Connection::open_in_memory().map_err(port_error)?, ());
        };
        if let Some(directory) = file.parent() {
            std::fs::create_dir_all(directory)
                .map_err(|e| unavailable(format!("{}: {e}", directory.display())))?;
        }
        let lock = lock(file)?;
        let connection =
            Connection::open(file).map_err(|e| unavailable(format!("{}: {e}", file.display())))?;
        Self::start(connection, lock)
    }

    fn start(mut connection: Connection, kept: impl Send + 'static) -> PortResult<Self> {
        schema::prepare(&mut connection).map_err(port_error)?;
        Ok(Self { db: Database::start(connection, kept)? })
    }
}

/// Takes the file for this process: two fleets on one file would both start every job that is not done.
fn lock(file: &Path) -> PortResult<File> {
    let mut name = file.as_os_str().to_owned();
    name.push(".lock");
    let name = PathBuf::from(name);
    let explain = |e: std::io::Error| unavailable(format!("{}: {e}", name.display()));
    let lock = File::options().create(true).truncate(false).write(true).open(&name).map_err(explain)?;
    let start = Instant::now();
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(unavailable(format!("{} is in use by another process", file.display())));
            }
            Err(TryLockError::Error(e)) => return Err(explain(e)),
        }
    }
}

#[async_trait]
impl Ledger for SqliteLedger {
    /// The tables are brought up to date when the file is opened; nothing is left to do.
    async fn migrate(&self) -> PortResult<()> {
        Ok(())
    }

    async fn accept(&self, job: &NewJob) -> PortResult<Accepted> {
        let job = job.clone();
        self.db
            .run(move |db| {
                let inserted = db
                    .prepare_cached(
                        "INSERT INTO llm_jobs (job_key, tenant, job_id, body_hash, body, headers, state, epoch,
                            accepted_at, expires_at)
                         VALUES (?1, ?2, ?3, ?4, ?5, ?6, 'waiting', 0, ?7, ?8) ON CONFLICT DO NOTHING",
                    )?
                    .execute(params![
                        job.key.to_string(),
                        job.tenant,
                        job.job_id,
                        job.body_hash,
                        job.body.as_ref(),
                        job.headers.to_string(),
                        now_ms(),
                        after(job.expires_in_s),
                    ])?;
                if inserted == 1 {
                    return Ok(Accepted::New);
                }
                let row = rows::find(db, job.key)?.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
                Ok(if row.body_hash == job.body_hash { Accepted::Same(Box::new(row)) } else { Accepted::Taken })
            })
            .await
    }

    async fn published(&self, key: Uuid) -> PortResult<()> {
        self.db
            .run(move |db| {
                db.prepare_cached("UPDATE llm_jobs SET published = 1, stranded = 0 WHERE job_key = ?1")?
                    .execute([key.to_string()])
            })
            .await?;
        Ok(())
    }

    async fn unpublished(
        &self,
        older_than_ms: u64,
        after: Option<Uuid>,
        limit: u32,
    ) -> PortResult<Vec<StoredJob>> {
        let after_key = after.unwrap_or_default().to_string();
        self.db
            .run(move |db| {
                db.prepare_cached(
                    "SELECT job_key, body, headers FROM llm_jobs
                     WHERE state <> 'done' AND body IS NOT NULL AND job_key > ?2
                       AND (stranded = 1 OR (published = 0 AND accepted_at <= ?1))
                     ORDER BY job_key LIMIT ?3",
                )?
                .query_map(params![before(older_than_ms), after_key, limit], rows::stored)?
                .collect()
            })
            .await
    }

    async fn expiring(&self, within_s: u64, limit: u32) -> PortResult<Vec<StoredJob>> {
        self.db
            .run(move |db| {
                db.prepare_cached(
                    "SELECT job_key, body, headers FROM llm_jobs
                     WHERE state <> 'done' AND body IS NOT NULL AND expires_at <= ?1
                     ORDER BY expires_at LIMIT ?2",
                )?
                .query_map(params![after(within_s), limit], rows::stored)?
                .collect()
            })
            .await
    }

    async fn find(&self, key: Uuid) -> PortResult<Option<JobRow>> {
        self.db.run(move |db| rows::find(db, key)).await
    }

    async fn claim(&self, claim: &Claim) -> PortResult<Claimed> {
        let claim = claim.clone();
        self.db
            .run(move |db| {
                let won = match claim.expected {
                    None => rows::insert_running(db, &claim, Some(&claim.worker))?,
                    Some(expected) => {
                        db.prepare_cached(
                            "UPDATE llm_jobs SET state = 'running', epoch = ?3, owner = ?4, attempts = ?5,
                                published = published OR ?6
                             WHERE job_key = ?1 AND state <> 'done' AND epoch = ?2 AND epoch < ?3",
                        )?
                        .execute(params![
                            claim.key.to_string(),
                            int(expected),
                            int(claim.epoch),
                            claim.worker,
                            claim.interruptions,
                            claim.delivered,
                        ])? == 1
                    }
                };
                if won {
                    return Ok(Claimed::Won);
                }
                Ok(match rows::find(db, claim.key)? {
                    Some(row) if claim.is_held_in(&row) => Claimed::Won,
                    Some(row) => Claimed::Lost(Box::new(row)),
                    None => Claimed::Gone,
                })
            })
            .await
    }

    async fn release(&self, claim: &Claim) -> PortResult<()> {
        let claim = claim.clone();
        self.db
            .run(move |db| {
                if !rows::insert_running(db, &claim, None)? {
                    db.prepare_cached(
                        "UPDATE llm_jobs SET owner = NULL
                         WHERE job_key = ?1 AND state = 'running' AND epoch = ?2 AND owner = ?3",
                    )?
                    .execute(params![
                        claim.key.to_string(),
                        int(claim.epoch),
                        claim.worker
                    ])?;
                }
                Ok(())
            })
            .await
    }

    async fn commit(&self, endings: Vec<Ending>) -> PortResult<Vec<Committed>> {
        self.db.run(move |db| endings.iter().map(|ending| commit::commit(db, ending)).collect()).await
    }

    async fn cached(&self, cache_key: &str) -> PortResult<Option<CacheRow>> {
        let cache_key = cache_key.to_owned();
        self.db
            .run(move |db| {
                db.prepare_cached(
                    "UPDATE llm_cache SET hit_count = hit_count + 1
                     WHERE cache_key = ?1 AND (expires_at IS NULL OR expires_at > ?2)
                     RETURNING cache_key, prompt_hash, response, model, metadata, expires_at",
                )?
                .query_row(params![cache_key, now_ms()], rows::cache)
                .optional()
            })
            .await
    }

    async fn bury(&self, letter: &DeadLetter) -> PortResult<()> {
        let letter = letter.clone();
        self.db.run(move |db| rows::insert_dead(db, &letter)).await
    }

    async fn dead_letters(&self, limit: u32) -> PortResult<Vec<DeadLetter>> {
        self.db
            .run(move |db| {
                db.prepare_cached(
                    "SELECT job_key, job_id, tenant, body, code, reason, attempts, worker FROM dead_letters
                     ORDER BY id DESC LIMIT ?1",
                )?
                .query_map([limit], rows::dead)?
                .collect()
            })
            .await
    }

    async fn usage(&self, tenant: &str, user_id: Option<&str>, seconds: u64) -> PortResult<UsageSummary> {
        let (tenant, user_id) = (tenant.to_owned(), user_id.map(str::to_owned));
        self.db
            .run(move |db| {
                let period = params![tenant, user_id, before(seconds.saturating_mul(1000))];
                let mut summary = db
                    .prepare_cached(
                        "SELECT count(*), coalesce(sum(tokens), 0), coalesce(sum(prompt_tokens), 0),
                            coalesce(avg(execution_time), 0.0)
                         FROM llm_requests
                         WHERE tenant = ?1 AND (?2 IS NULL OR user_id = ?2) AND created_at > ?3",
                    )?
                    .query_row(period, rows::usage)?;
                summary.models_used = db
                    .prepare_cached(
                        "SELECT DISTINCT model FROM llm_requests
                         WHERE tenant = ?1 AND (?2 IS NULL OR user_id = ?2) AND created_at > ?3
                           AND model IS NOT NULL
                         ORDER BY model",
                    )?
                    .query_map(period, |row| row.get(0))?
                    .collect::<rusqlite::Result<_>>()?;
                Ok(summary)
            })
            .await
    }

    async fn purge(&self, retention: Retention) -> PortResult<u64> {
        self.db
            .run(move |db| {
                let mut total = db.execute(
                    "DELETE FROM llm_jobs WHERE rowid IN (SELECT rowid FROM llm_jobs
                     WHERE state = 'done' AND expires_at <= ?1 ORDER BY expires_at LIMIT ?2)",
                    params![now_ms(), PURGE_ROWS],
                )?;
                total += db.execute(
                    "DELETE FROM llm_cache WHERE rowid IN (SELECT rowid FROM llm_cache
                     WHERE expires_at <= ?1 ORDER BY expires_at LIMIT ?2)",
                    params![now_ms(), PURGE_ROWS],
                )?;
                // Ids rise with time, so the oldest are found without an index of times.
                for (table, kept_s) in
                    [("dead_letters", retention.dead_letters_s), ("llm_requests", retention.requests_s)]
                {
                    if kept_s > 0 {
                        total += db.execute(
                            &format!(
                                "DELETE FROM {table} WHERE id IN (SELECT id FROM
                                    (SELECT id, created_at FROM {table} ORDER BY id LIMIT ?2)
                                 WHERE created_at <= ?1)"
                            ),
                            params![before(kept_s.saturating_mul(1000)), PURGE_ROWS],
                        )?;
                    }
                }
                Ok(total as u64)
            })
            .await
    }

    async fn ready(&self) -> PortResult<()> {
        self.db.run(|db| db.query_row("SELECT 1", [], |_| Ok(()))).await
    }
}
