//! Jobs, claims and endings that are like most, for tests to change.

use bytes::Bytes;
use serde_json::json;
use stoker_shared::ports::{CacheRow, Claim, Ending, NewJob, RequestRow};
use uuid::Uuid;

pub const DAY_S: u64 = 86_400;

pub fn new_job(key: Uuid, hash: &str) -> NewJob {
    NewJob {
        key,
        tenant: "acme".into(),
        job_id: format!("job-{key}"),
        body_hash: hash.into(),
        body: Bytes::from_static(b"{\"prompt\":\"hi\"}"),
        headers: json!({"x-stoker-key": key.to_string(), "odd": "a\u{0}b"}),
        expires_in_s: DAY_S,
    }
}

pub fn new_claim(key: Uuid, expected: Option<u64>, epoch: u64, worker: &str) -> Claim {
    Claim {
        key,
        tenant: "acme".into(),
        job_id: format!("job-{key}"),
        body_hash: "hash".into(),
        expected,
        epoch,
        worker: worker.into(),
        interruptions: epoch.saturating_sub(2) as u32,
        delivered: true,
        expires_in_s: DAY_S,
    }
}

pub fn new_ending(key: Uuid, epoch: u64) -> Ending {
    Ending {
        key,
        tenant: "acme".into(),
        job_id: format!("job-{key}"),
        body_hash: "hash".into(),
        epoch,
        outcome: Bytes::from(format!("{{\"id\":\"{key}\",\"epoch\":{epoch}}}")),
        request: RequestRow {
            user_id: Some("ann".into()),
            prompt: "Say hello".into(),
            response: "Hello".into(),
            model: "smol".into(),
            tokens: 5,
            execution_time_ms: 40,
            metadata: json!({"worker": "w-1", "nested": {"list": [1, 2.5, null]}}),
            prompt_tokens: 3,
            finish_reason: "stop".into(),
            worker: "w-1".into(),
            attempts: 1,
            queued_ms_ago: Some(60),
            started_ms_ago: Some(45),
            first_token_ms_ago: Some(30),
            ..RequestRow::default()
        },
        cache: None,
        dead: None,
        expires_in_s: DAY_S,
    }
}

pub fn new_answer(cache_key: &str, text: &str) -> CacheRow {
    CacheRow {
        cache_key: cache_key.into(),
        prompt_hash: "ab".repeat(32),
        response: text.into(),
        model: "smol".into(),
        metadata: json!({"finishReason": "stop", "usage": {"promptTokens": 3, "completionTokens": 5}}),
        expires_in_s: 0,
    }
}
