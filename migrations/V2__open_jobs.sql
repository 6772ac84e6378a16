-- Jobs that are not done are looked for in two ways: those that the queue never confirmed, by key, page by page (one whose
-- start was claimed by a coordinator that died is among them), and those whose time is up, by expiry.
DROP INDEX llm_jobs_unpublished;
CREATE INDEX llm_jobs_unpublished ON llm_jobs (job_key) WHERE state <> 'done' AND published_at IS NULL;
CREATE INDEX llm_jobs_overdue ON llm_jobs (expires_at) WHERE state <> 'done' AND body IS NOT NULL;
