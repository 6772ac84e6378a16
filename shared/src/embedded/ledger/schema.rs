//! The embedded ledger's tables: the same as on Postgres, with times as Unix milliseconds and keys as text.

use rusqlite::Connection;

/// Each entry brings the schema one version further; `user_version` counts those that were applied.
const VERSIONS: [&str; 2] = [
    "
    CREATE TABLE llm_jobs (
        job_key TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        job_id TEXT NOT NULL,
        body_hash TEXT NOT NULL,
        body BLOB,
        headers TEXT,
        state TEXT NOT NULL,
        epoch INTEGER NOT NULL,
        owner TEXT,
        attempts INTEGER NOT NULL DEFAULT 0,
        outcome BLOB,
        accepted_at INTEGER NOT NULL,
        published INTEGER NOT NULL DEFAULT 0,
        -- Not done when the file was opened: whatever queue it was in is gone.
        stranded INTEGER NOT NULL DEFAULT 0,
        expires_at INTEGER NOT NULL
    );
    CREATE INDEX llm_jobs_open ON llm_jobs (accepted_at) WHERE state <> 'done';
    CREATE INDEX llm_jobs_expiry ON llm_jobs (expires_at) WHERE state = 'done';

    CREATE TABLE llm_requests (
        id INTEGER PRIMARY KEY,
        job_key TEXT UNIQUE,
        job_id TEXT,
        tenant TEXT,
        user_id TEXT,
        prompt TEXT NOT NULL,
        response TEXT,
        model TEXT,
        tokens INTEGER,
        execution_time INTEGER,
        metadata TEXT,
        api_key_id TEXT,
        prompt_tokens INTEGER,
        cached INTEGER NOT NULL DEFAULT 0,
        finish_reason TEXT,
        error_code TEXT,
        worker TEXT,
        attempts INTEGER,
        queued_at INTEGER,
        started_at INTEGER,
        first_token_at INTEGER,
        finished_at INTEGER,
        created_at INTEGER NOT NULL
    );
    CREATE INDEX llm_requests_usage ON llm_requests (tenant, created_at);

    CREATE TABLE llm_cache (
        cache_key TEXT PRIMARY KEY,
        prompt_hash TEXT NOT NULL,
        response TEXT NOT NULL,
        model TEXT,
        metadata TEXT,
        created_at INTEGER NOT NULL,
        expires_at INTEGER,
        hit_count INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX llm_cache_expiry ON llm_cache (expires_at);

    CREATE TABLE dead_letters (
        id INTEGER PRIMARY KEY,
        job_key TEXT,
        job_id TEXT,
        tenant TEXT NOT NULL,
        body BLOB NOT NULL,
        code TEXT NOT NULL,
        reason TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        worker TEXT NOT NULL,
        created_at INTEGER NOT NULL
    );
",
    "
    -- Open jobs are looked for by key, page by page, and by expiry.
    DROP INDEX llm_jobs_open;
    CREATE INDEX llm_jobs_open ON llm_jobs (job_key) WHERE state <> 'done';
    CREATE INDEX llm_jobs_overdue ON llm_jobs (expires_at) WHERE state <> 'done';
",
];

/// Sets the connection up, brings the schema up to date, and marks the jobs that an earlier process left behind.
pub fn prepare(db: &mut Connection) -> rusqlite::Result<()> {
    db.busy_timeout(std::time::Duration::from_secs(5))?;
    // Answers "memory" for a database in memory, so the answer is not checked.
    db.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
    // An accepted job must outlive a power cut: sync at each commit (commits are grouped, see the thread).
    db.execute_batch("PRAGMA synchronous = FULL")?;
    db.set_prepared_statement_cache_capacity(64);
    let transaction = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let version: usize =
        transaction.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0))?.try_into().unwrap_or(0);
    for sql in VERSIONS.iter().skip(version) {
        transaction.execute_batch(sql)?;
    }
    if version < VERSIONS.len() {
        transaction.pragma_update(None, "user_version", VERSIONS.len() as i64)?;
    }
    // Their owners lived in that process.
    transaction.execute("UPDATE llm_jobs SET stranded = 1, owner = NULL WHERE state <> 'done'", [])?;
    transaction.commit()
}
