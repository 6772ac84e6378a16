//! The suite's part on values that a database may not be able to hold.

use bytes::Bytes;
use serde_json::json;
use stoker_shared::ports::{Accepted, Claimed, Committed, DeadLetter, Ending};
use uuid::Uuid;

use crate::samples::{new_answer, new_claim, new_ending, new_job};
use crate::suite::{Shared, request_count};

pub async fn hostile_values_do_not_block_an_end(ledger: Shared) {
    let long = format!("{}é🦀é", "x".repeat(98));
    let mut endings = Vec::new();
    let mut add = |change: &dyn Fn(&mut Ending)| {
        let mut ending = new_ending(Uuid::now_v7(), 1);
        ending.cache = Some(new_answer(&format!("hostile-{}", endings.len()), "text"));
        change(&mut ending);
        endings.push(ending);
    };
    add(&|e| {
        e.request.prompt = "a\0b".into();
        e.request.response = "\0".into();
        e.request.model = "m\0".into();
        e.request.user_id = Some("\0\0".into());
        e.request.finish_reason = "st\0op".into();
        e.request.error_code = Some("\0".into());
        e.request.worker = "w\0".into();
        e.request.api_key_id = Some("k\0".into());
        e.request.metadata = json!({"k\u{0}": ["v\u{0}", {"\u{0}": "\u{0}"}], "literal": "\\u0000"});
        e.job_id = "id\0".into();
        e.body_hash = "\0".into();
    });
    add(&|e| e.request.model = long.clone());
    add(&|e| e.request.user_id = Some("🦀".repeat(300)));
    add(&|e| e.request.response = "é".repeat(5 << 20));
    add(&|e| {
        let cache = e.cache.as_mut().unwrap();
        cache.response = "with\0NUL".into();
    });
    add(&|e| {
        let cache = e.cache.as_mut().unwrap();
        cache.cache_key = "k".repeat(300);
        cache.model = long.clone();
        cache.prompt_hash = "h".repeat(300);
    });
    add(&|e| {
        e.request.tokens = u32::MAX;
        e.request.execution_time_ms = u32::MAX;
        e.request.prompt_tokens = u32::MAX;
        e.request.attempts = u32::MAX;
        e.request.queued_ms_ago = Some(u64::MAX);
        e.expires_in_s = u64::MAX;
        e.cache.as_mut().unwrap().expires_in_s = u64::MAX;
    });
    add(&|e| {
        e.dead = Some(DeadLetter {
            key: Some(e.key),
            job_id: Some("\0".into()),
            tenant: "ac\0me".into(),
            body: Bytes::from_static(b"\xff\0\xfe"),
            code: "poison\0".into(),
            reason: "it killed\0 three workers".into(),
            attempts: u32::MAX,
            worker: "\0".into(),
        });
    });
    let caches: Vec<_> = endings.iter().map(|e| e.cache.clone().unwrap()).collect();
    let keys: Vec<_> = endings.iter().map(|e| (e.key, e.outcome.clone())).collect();
    assert_eq!(ledger.commit(endings).await.unwrap(), vec![Committed::Done; keys.len()]);
    assert_eq!(request_count(&ledger).await, keys.len() as u64);
    for (key, outcome) in keys {
        assert_eq!(ledger.find(key).await.unwrap().unwrap().outcome, Some(outcome));
    }
    // A cached answer is the whole truth or absent: one that lost a character would be another answer.
    for expected in caches {
        if let Some(found) = ledger.cached(&expected.cache_key).await.unwrap() {
            assert_eq!(found.response, expected.response);
            assert_eq!(found.model, expected.model);
        }
    }
    let letter = ledger.dead_letters(1).await.unwrap().remove(0);
    assert_eq!(letter.body, Bytes::from_static(b"\xff\0\xfe"));
}

pub async fn hostile_values_are_accepted_and_claimed(ledger: Shared) {
    let mut job = new_job(Uuid::now_v7(), "hash");
    job.job_id = "a\0b".into();
    job.tenant = "t\0".into();
    job.body = Bytes::from(vec![0; 10 << 20]);
    assert_eq!(ledger.accept(&job).await.unwrap(), Accepted::New);
    assert!(matches!(ledger.accept(&job).await.unwrap(), Accepted::Same(_)));
    assert_eq!(ledger.find(job.key).await.unwrap().unwrap().body, Some(job.body.clone()));
    assert_eq!(ledger.unpublished(0, None, 1).await.unwrap()[0].body, job.body);
    let mut claim = new_claim(Uuid::now_v7(), None, 2, "w\0");
    claim.job_id = "\0".into();
    claim.tenant = "t\0".into();
    claim.expires_in_s = u64::MAX;
    assert_eq!(ledger.claim(&claim).await.unwrap(), Claimed::Won);
    ledger.release(&claim).await.unwrap();
    assert_eq!(ledger.find(claim.key).await.unwrap().unwrap().owner, None);
    assert_eq!(ledger.cached("a\0b").await.unwrap(), None);
    assert_eq!(ledger.usage("t\0", Some("\0"), u64::MAX).await.unwrap().request_count, 0);
}
