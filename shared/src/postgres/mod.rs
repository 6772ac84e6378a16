//! The ledger on Postgres.
//!
//! Every call but [`Ledger::commit`] is one statement, written so that it may run twice: a connection that turns out to
//! be broken costs a second try, not an error. All waits are limited, so that a database that hangs is as good as one
//! that is down. Times are the database's own. There is no TLS: use a private network, or a TLS proxy on this machine.

mod columns;
mod commit;
mod connection;
mod migrate;
mod rows;
mod values;

use async_trait::async_trait;
use tokio_postgres::Config;
use tokio_postgres::types::{Json, ToSql};
use uuid::Uuid;

use crate::config::Services;
use crate::ports::{
    Accepted, CacheRow, Claim, Claimed, Committed, DeadLetter, Ending, JobRow, Ledger, NewJob, PortResult,
    Retention, StoredJob, UsageSummary,
};
use connection::{BATCH_LIMIT, Connections, configuration, unavailable};
use values::{count, epoch, ms, seconds, text};

/// Rows that one statement of a purge deletes, and how many such statements a purge runs at most.
const PURGE_ROWS: u64 = 1000;
const PURGE_ROUNDS: usize = 100;

/// The ledger on a Postgres server.
pub struct PostgresLedger {
    config: Config,
    connections: Connections,
}

impl PostgresLedger {
    /// Prepares connections to `services.postgres_url`; they are made when they are needed, so the server need not be
    /// there yet.
    ///
    /// # Errors
    /// If the URL is not understood.
    pub async fn connect(services: &Services) -> PortResult<Self> {
        let config = configuration(&services.postgres_url)?;
        Ok(Self { connections: Connections::new(config.clone())?, config })
    }

    /// `sql` deletes at most `$1` rows, and gives their number.
    async fn purge_table(&self, sql: &str, more: &[&(dyn ToSql + Sync)]) -> PortResult<u64> {
        let limit = PURGE_ROWS as i64;
        let mut params: Vec<&(dyn ToSql + Sync)> = vec![&limit];
        params.extend(more);
        let mut total = 0;
        for _ in 0..PURGE_ROUNDS {
            let rows = self.connections.query_within(BATCH_LIMIT, sql, &params).await?;
            let deleted = rows.first().map_or(0, |row| row.get::<_, i64>(0).unsigned_abs());
            total += deleted;
            if deleted < PURGE_ROWS {
                break;
            }
        }
        Ok(total)
    }
}

#[async_trait]
impl Ledger for PostgresLedger {
    async fn migrate(&self) -> PortResult<()> {
        migrate::migrate(&self.config).await
    }

    async fn accept(&self, job: &NewJob) -> PortResult<Accepted> {
        let body_hash = text(&job.body_hash);
        let new = self
            .connections
            .query(
                "INSERT INTO llm_jobs (job_key, tenant, job_id, body_hash, body, headers, state, epoch, expires_at)
                 VALUES ($1, $2, $3, $4, $5, $6, 'waiting', 0, now() + make_interval(secs => $7))
                 ON CONFLICT (job_key) DO NOTHING RETURNING 1",
                &[
                    &job.key,
                    &text(&job.tenant),
                    &text(&job.job_id),
                    &body_hash,
                    &job.body.as_ref(),
                    &Json(&job.headers),
                    &seconds(job.expires_in_s),
                ],
            )
            .await?;
        if !new.is_empty() {
            return Ok(Accepted::New);
        }
        match self.find(job.key).await? {
            Some(row) if row.body_hash == body_hash => Ok(Accepted::Same(Box::new(row))),
            Some(_) => Ok(Accepted::Taken),
            None => Err(unavailable("the job's row was purged while it was being read")),
        }
    }

    async fn published(&self, key: Uuid) -> PortResult<()> {
        // Need not be on disk at once: at worst the job is published again, and its claim fails.
        self.connections
            .query(
                "WITH fast AS (SELECT set_config('synchronous_commit', 'off', true))
                 UPDATE llm_jobs SET published_at = now() FROM fast WHERE job_key = $1 AND published_at IS NULL",
                &[&key],
            )
            .await?;
        Ok(())
    }

    async fn unpublished(
        &self,
        older_than_ms: u64,
        after: Option<Uuid>,
        limit: u32,
    ) -> PortResult<Vec<StoredJob>> {
        let rows = self
            .connections
            .query_within(
                BATCH_LIMIT,
                "SELECT job_key, body, headers FROM llm_jobs
                 WHERE state <> 'done' AND published_at IS NULL AND body IS NOT NULL AND job_key > $2
                   AND accepted_at <= now() - make_interval(secs => $1)
                 ORDER BY job_key LIMIT $3",
                &[&ms(older_than_ms), &after.unwrap_or_default(), &i64::from(limit)],
            )
            .await?;
        rows.iter().map(rows::stored).collect()
    }

    async fn expiring(&self, within_s: u64, limit: u32) -> PortResult<Vec<StoredJob>> {
        let rows = self
            .connections
            .query_within(
                BATCH_LIMIT,
                "SELECT job_key, body, headers FROM llm_jobs
                 WHERE state <> 'done' AND body IS NOT NULL AND expires_at <= now() + make_interval(secs => $1)
                 ORDER BY expires_at LIMIT $2",
                &[&seconds(within_s), &i64::from(limit)],
            )
            .await?;
        rows.iter().map(rows::stored).collect()
    }

    async fn find(&self, key: Uuid) -> PortResult<Option<JobRow>> {
        let rows = self
            .connections
            .query(
                "SELECT job_key, tenant, job_id, body_hash, body, state, epoch, owner, attempts, outcome, headers
                 FROM llm_jobs WHERE job_key = $1",
                &[&key],
            )
            .await?;
        rows.first().map(rows::job).transpose()
    }

    async fn claim(&self, claim: &Claim) -> PortResult<Claimed> {
        let won = match claim.expected {
            None => {
                self.connections
                    .query(
                        "INSERT INTO llm_jobs (job_key, tenant, job_id, body_hash, state, epoch, owner, attempts,
                            published_at, expires_at)
                         VALUES ($1, $2, $3, $4, 'running', $5, $6, $7, now(), now() + make_interval(secs => $8))
                         ON CONFLICT (job_key) DO NOTHING RETURNING 1",
                        &[
                            &claim.key,
                            &text(&claim.tenant),
                            &text(&claim.job_id),
                            &text(&claim.body_hash),
                            &epoch(claim.epoch),
                            &text(&claim.worker),
                            &count(claim.interruptions),
                            &seconds(claim.expires_in_s),
                        ],
                    )
                    .await?
            }
            Some(expected) => {
                self.connections
                    .query(
                        "UPDATE llm_jobs SET state = 'running', epoch = $3, owner = $4, attempts = $5,
                            published_at = CASE WHEN $6 THEN coalesce(published_at, now()) ELSE published_at END
                         WHERE job_key = $1 AND epoch = $2 AND epoch < $3 AND state <> 'done' RETURNING 1",
                        &[
                            &claim.key,
                            &epoch(expected),
                            &epoch(claim.epoch),
                            &text(&claim.worker),
                            &count(claim.interruptions),
                            &claim.delivered,
                        ],
                    )
                    .await?
            }
        };
        if !won.is_empty() {
            return Ok(Claimed::Won);
        }
        Ok(match self.find(claim.key).await? {
            Some(row) if claim.is_held_in(&row) => Claimed::Won,
            Some(row) => Claimed::Lost(Box::new(row)),
            None => Claimed::Gone,
        })
    }

    async fn release(&self, claim: &Claim) -> PortResult<()> {
        self.connections
            .query(
                "INSERT INTO llm_jobs (job_key, tenant, job_id, body_hash, state, epoch, attempts, published_at,
                    expires_at)
                 VALUES ($1, $2, $3, $4, 'running', $5, $6, now(), now() + make_interval(secs => $7))
                 ON CONFLICT (job_key) DO UPDATE SET owner = NULL
                 WHERE llm_jobs.state = 'running' AND llm_jobs.epoch = excluded.epoch AND llm_jobs.owner = $8",
                &[
                    &claim.key,
                    &text(&claim.tenant),
                    &text(&claim.job_id),
                    &text(&claim.body_hash),
                    &epoch(claim.epoch),
                    &count(claim.interruptions),
                    &seconds(claim.expires_in_s),
                    &text(&claim.worker),
                ],
            )
            .await?;
        Ok(())
    }

    async fn commit(&self, endings: Vec<Ending>) -> PortResult<Vec<Committed>> {
        commit::commit(&self.connections, &endings).await
    }

    async fn cached(&self, cache_key: &str) -> PortResult<Option<CacheRow>> {
        if !values::fits(cache_key, values::HASH_CHARS) {
            return Ok(None);
        }
        // A lost hit count hurts nobody, a request that waits for a disk does.
        let rows = self
            .connections
            .query(
                "WITH fast AS (SELECT set_config('synchronous_commit', 'off', true))
                 UPDATE llm_cache SET hit_count = coalesce(hit_count, 0) + 1 FROM fast
                 WHERE cache_key = $1 AND (expires_at IS NULL OR expires_at > now())
                 RETURNING cache_key, prompt_hash, response, model, metadata,
                    extract(epoch FROM expires_at - now())::float8",
                &[&cache_key],
            )
            .await?;
        rows.first().map(rows::cache).transpose()
    }

    async fn bury(&self, letter: &DeadLetter) -> PortResult<()> {
        let letters = [letter];
        self.connections.query(rows::INSERT_DEAD, &rows::DeadColumns::new(&letters).params()).await?;
        Ok(())
    }

    async fn dead_letters(&self, limit: u32) -> PortResult<Vec<DeadLetter>> {
        let rows = self
            .connections
            .query_within(
                BATCH_LIMIT,
                "SELECT job_key, job_id, tenant, body, code, reason, attempts, worker FROM dead_letters
                 ORDER BY id DESC LIMIT $1",
                &[&i64::from(limit)],
            )
            .await?;
        rows.iter().map(rows::dead).collect()
    }

    async fn usage(&self, tenant: &str, user_id: Option<&str>, period_s: u64) -> PortResult<UsageSummary> {
        let rows = self
            .connections
            .query_within(
                BATCH_LIMIT,
                "SELECT count(*), coalesce(sum(tokens), 0)::int8, coalesce(sum(prompt_tokens), 0)::int8,
                    coalesce(avg(execution_time), 0)::float8,
                    coalesce(array_agg(DISTINCT model::text ORDER BY model::text) FILTER (WHERE model IS NOT NULL),
                        '{}')
                 FROM llm_requests
                 WHERE tenant = $1 AND ($2::text IS NULL OR user_id = $2)
                   AND created_at > now() - make_interval(secs => $3)",
                &[&text(tenant), &user_id.map(|u| values::short(u, values::USER_ID_CHARS)), &seconds(period_s)],
            )
            .await?;
        rows.first().map_or(Ok(UsageSummary::default()), rows::usage)
    }

    async fn purge(&self, retention: Retention) -> PortResult<u64> {
        let mut total = self
            .purge_table(
                "WITH gone AS (DELETE FROM llm_jobs WHERE job_key IN (SELECT job_key FROM llm_jobs
                    WHERE state = 'done' AND expires_at <= now() ORDER BY expires_at LIMIT $1
                    FOR UPDATE SKIP LOCKED) RETURNING 1)
                 SELECT count(*) FROM gone",
                &[],
            )
            .await?;
        total += self
            .purge_table(
                "WITH gone AS (DELETE FROM llm_cache WHERE id IN (SELECT id FROM llm_cache
                    WHERE expires_at <= now() ORDER BY expires_at LIMIT $1
                    FOR UPDATE SKIP LOCKED) RETURNING 1)
                 SELECT count(*) FROM gone",
                &[],
            )
            .await?;
        if retention.dead_letters_s > 0 {
            // Ids rise with time, so the oldest are found without an index of times.
            total += self
                .purge_table(
                    "WITH gone AS (DELETE FROM dead_letters WHERE id IN (SELECT id FROM
                        (SELECT id, created_at FROM dead_letters ORDER BY id LIMIT $1) oldest
                        WHERE created_at <= now() - make_interval(secs => $2)) RETURNING 1)
                     SELECT count(*) FROM gone",
                    &[&seconds(retention.dead_letters_s)],
                )
                .await?;
        }
        if retention.requests_s > 0 {
            total += self
                .purge_table(
                    "WITH gone AS (DELETE FROM llm_requests WHERE id IN (SELECT id FROM llm_requests
                        WHERE created_at <= now() - make_interval(secs => $2) LIMIT $1
                        FOR UPDATE SKIP LOCKED) RETURNING 1)
                     SELECT count(*) FROM gone",
                    &[&seconds(retention.requests_s)],
                )
                .await?;
        }
        Ok(total)
    }

    async fn ready(&self) -> PortResult<()> {
        // A database without our tables takes no jobs.
        self.connections.query("SELECT 1 FROM llm_jobs LIMIT 0", &[]).await?;
        Ok(())
    }
}
