//! The suite on SQLite in memory, and what only a file can show.

use std::path::PathBuf;
use std::sync::Arc;

use stoker_shared::embedded::SqliteLedger;
use stoker_shared::ports::{Claimed, Committed, JobState, Ledger};
use uuid::Uuid;

use crate::samples::{new_answer, new_claim, new_ending, new_job};
use crate::suite;

crate::suite_tests!(|| async { (Arc::new(SqliteLedger::open(None).unwrap()), ()) });

/// A directory that goes away with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        Self(std::env::temp_dir().join(format!("stoker-ledger-{}", Uuid::new_v4())))
    }

    fn open(&self) -> SqliteLedger {
        SqliteLedger::open(Some(&self.0.join("not/there/yet/ledger.db"))).unwrap()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[tokio::test]
async fn everything_survives_a_restart() {
    let directory = Directory::new();
    let (confirmed, running, done) =
        (new_job(Uuid::now_v7(), "a"), new_job(Uuid::now_v7(), "b"), new_job(Uuid::now_v7(), "c"));
    {
        let ledger = directory.open();
        for job in [&confirmed, &running, &done] {
            ledger.accept(job).await.unwrap();
            ledger.published(job.key).await.unwrap();
        }
        ledger.claim(&new_claim(running.key, Some(0), 2, "w-1")).await.unwrap();
        let mut ending = new_ending(done.key, 2);
        ending.cache = Some(new_answer("k", "Hello"));
        ledger.commit(vec![ending]).await.unwrap();
        assert!(ledger.unpublished(0, None, 10).await.unwrap().is_empty());
    }
    let ledger = directory.open();
    // The queue that held them is gone, so both are given again, however young they are.
    let again = ledger.unpublished(3_600_000, None, 10).await.unwrap();
    assert_eq!(again.iter().map(|u| u.key).collect::<Vec<_>>(), [confirmed.key, running.key]);
    assert_eq!((&again[1].body, &again[1].headers), (&running.body, &running.headers));
    ledger.published(confirmed.key).await.unwrap();
    ledger.published(running.key).await.unwrap();
    assert!(ledger.unpublished(0, None, 10).await.unwrap().is_empty());

    let row = ledger.find(running.key).await.unwrap().unwrap();
    assert_eq!((row.state, row.epoch, row.owner), (JobState::Running, 2, None));
    assert_eq!(ledger.claim(&new_claim(running.key, Some(2), 3, "w-2")).await.unwrap(), Claimed::Won);
    let first = new_ending(done.key, 2).outcome;
    assert_eq!(ledger.commit(vec![new_ending(done.key, 9)]).await.unwrap(), [Committed::Already(first)]);
    assert_eq!(ledger.usage("acme", None, 3600).await.unwrap().request_count, 1);
    assert_eq!(ledger.cached("k").await.unwrap().unwrap().response, "Hello");
}

#[tokio::test]
async fn a_file_belongs_to_one_process() {
    let directory = Directory::new();
    let first = directory.open();
    let file = directory.0.join("not/there/yet/ledger.db");
    let error = SqliteLedger::open(Some(&file)).err().expect("it is in use").to_string();
    assert!(error.contains("in use") && error.contains("ledger.db"), "{error}");
    drop(first);
    SqliteLedger::open(Some(&file)).unwrap();
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused() {
    let directory = Directory::new();
    std::fs::create_dir_all(&directory.0).unwrap();
    let file = directory.0.join("ledger.db");
    std::fs::write(&file, "this is no database, however long it is ".repeat(50)).unwrap();
    assert!(SqliteLedger::open(Some(&file)).is_err());
    assert!(std::fs::read_to_string(&file).unwrap().starts_with("this is no database"));
}
