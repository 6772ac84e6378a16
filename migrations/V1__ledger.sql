-- The ledger's tables. Safe where a service's PostgreSQLIntegration class has already created llm_requests and
-- llm_cache, and that class works unchanged on tables that were created here: its own columns keep their names, order
-- and meanings, and what is added is nullable or has a default.
--
-- Times are TIMESTAMPTZ, which is UTC however it is displayed. The class declares TIMESTAMP without a zone, where a
-- value means whatever the zone of the session was that wrote it: two clients in different zones then disagree on
-- "the last 24 hours" and on when an answer expires. With TIMESTAMPTZ all of the class's statements mean the same in
-- every zone, and it can't tell the difference: it never names the type and never reads these columns back.

CREATE TABLE IF NOT EXISTS llm_requests (
    id SERIAL PRIMARY KEY,
    user_id VARCHAR(255),
    prompt TEXT NOT NULL,
    response TEXT,
    model VARCHAR(100),
    tokens INTEGER,
    execution_time INTEGER,
    created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
    metadata JSONB
);

ALTER TABLE llm_requests
    ADD COLUMN IF NOT EXISTS job_key UUID,
    ADD COLUMN IF NOT EXISTS job_id TEXT,
    ADD COLUMN IF NOT EXISTS tenant TEXT,
    ADD COLUMN IF NOT EXISTS api_key_id TEXT,
    ADD COLUMN IF NOT EXISTS prompt_tokens INTEGER,
    ADD COLUMN IF NOT EXISTS cached BOOLEAN NOT NULL DEFAULT FALSE,
    ADD COLUMN IF NOT EXISTS finish_reason TEXT,
    ADD COLUMN IF NOT EXISTS error_code TEXT,
    ADD COLUMN IF NOT EXISTS worker TEXT,
    ADD COLUMN IF NOT EXISTS attempts INTEGER,
    ADD COLUMN IF NOT EXISTS queued_at TIMESTAMPTZ,
    ADD COLUMN IF NOT EXISTS started_at TIMESTAMPTZ,
    ADD COLUMN IF NOT EXISTS first_token_at TIMESTAMPTZ,
    ADD COLUMN IF NOT EXISTS finished_at TIMESTAMPTZ;

CREATE TABLE IF NOT EXISTS llm_cache (
    id SERIAL PRIMARY KEY,
    cache_key VARCHAR(255) UNIQUE NOT NULL,
    prompt_hash VARCHAR(255) NOT NULL,
    response TEXT NOT NULL,
    model VARCHAR(100),
    created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
    expires_at TIMESTAMPTZ,
    hit_count INTEGER DEFAULT 0,
    metadata JSONB
);

-- Tables that the class made first: its times are read in the zone of this session, the same default zone that its own
-- sessions have. In a database whose zone is UTC this rewrites nothing. Where something depends on a column (a view),
-- its type stays: everything still works as long as all sessions have the database's zone, as these do.
DO $$
DECLARE
    naive RECORD;
BEGIN
    FOR naive IN
        SELECT c.relname, a.attname
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
        WHERE a.attrelid IN ('llm_requests'::regclass, 'llm_cache'::regclass)
          AND a.attname IN ('created_at', 'expires_at')
          AND a.atttypid = 'timestamp'::regtype
    LOOP
        BEGIN
            EXECUTE format('ALTER TABLE %I ALTER COLUMN %I TYPE TIMESTAMPTZ', naive.relname, naive.attname);
        EXCEPTION WHEN feature_not_supported OR dependent_objects_still_exist THEN
            RAISE WARNING '%.% stays a TIMESTAMP without zone: %', naive.relname, naive.attname, SQLERRM;
        END;
    END LOOP;
END $$;

-- The second line of defence against two bills for one job; rows of other programs have no job key.
CREATE UNIQUE INDEX IF NOT EXISTS llm_requests_job_key ON llm_requests (job_key);
-- The class creates these two by name only if they are missing. Rows come in order of time, so a BRIN index finds a
-- period with a thousandth of a B-tree's size and cost.
CREATE INDEX IF NOT EXISTS idx_llm_requests_user_id ON llm_requests (user_id, created_at);
CREATE INDEX IF NOT EXISTS idx_llm_requests_created_at ON llm_requests USING brin (created_at);
CREATE INDEX IF NOT EXISTS idx_llm_cache_expires ON llm_cache (expires_at);

CREATE TABLE llm_jobs (
    job_key UUID PRIMARY KEY,
    tenant TEXT NOT NULL,
    job_id TEXT NOT NULL,
    body_hash TEXT NOT NULL,
    -- The work message, to publish it again; cleared when the job ends.
    body BYTEA,
    -- JSON and not JSONB: kept as it was written, NUL included.
    headers JSON,
    -- waiting, running, done
    state TEXT NOT NULL,
    -- Newest claimed epoch; 0 while waiting.
    epoch BIGINT NOT NULL,
    -- Worker that holds the epoch; null: nobody.
    owner TEXT,
    -- Attempts that a worker's death ended.
    attempts INTEGER NOT NULL DEFAULT 0,
    outcome BYTEA,
    accepted_at TIMESTAMPTZ NOT NULL DEFAULT CURRENT_TIMESTAMP,
    -- The queue has confirmed it.
    published_at TIMESTAMPTZ,
    expires_at TIMESTAMPTZ NOT NULL
);
CREATE INDEX llm_jobs_unpublished ON llm_jobs (accepted_at) WHERE state = 'waiting' AND published_at IS NULL;
CREATE INDEX llm_jobs_expiry ON llm_jobs (expires_at) WHERE state = 'done';

CREATE TABLE api_keys (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    name TEXT NOT NULL,
    -- Of the key, which is shown once and never stored.
    hash BYTEA NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    limits JSONB NOT NULL DEFAULT '{}',
    budget JSONB,
    created_at TIMESTAMPTZ NOT NULL DEFAULT CURRENT_TIMESTAMP,
    revoked_at TIMESTAMPTZ
);

CREATE TABLE dead_letters (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_key UUID,
    job_id TEXT,
    tenant TEXT NOT NULL,
    -- As it came: not every one is text.
    body BYTEA NOT NULL,
    code TEXT NOT NULL,
    reason TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    worker TEXT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT CURRENT_TIMESTAMP
);
