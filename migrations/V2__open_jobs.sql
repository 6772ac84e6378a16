-- Jobs that are not done are looked for in two ways: those that the queue never confirmed, by key, page by page (one whose
-- start was claimed by a coordinator that died is among them), and those whose time is up, by expiry. The index that did the
-- first by time stays for processes of the version before, which may run beside; to drop it would lock everybody out meanwhile.
CREATE INDEX llm_jobs_open ON llm_jobs (job_key) WHERE state <> 'done' AND published_at IS NULL;
CREATE INDEX llm_jobs_overdue ON llm_jobs (expires_at) WHERE state <> 'done' AND body IS NOT NULL;
