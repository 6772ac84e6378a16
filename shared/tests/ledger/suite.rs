//! What every ledger must do. The same functions run on SQLite and on Postgres.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use stoker_shared::ports::{
    Accepted, CacheRow, Claim, Claimed, Committed, DeadLetter, Ending, JobState, Ledger, NewJob, Retention,
    StoredJob,
};
use uuid::Uuid;

use crate::samples::{DAY_S, new_answer, new_claim, new_ending, new_job};

pub use crate::hostile::*;

pub type Shared = Arc<dyn Ledger>;

async fn commit_one(ledger: &Shared, ending: Ending) -> Committed {
    ledger.commit(vec![ending]).await.unwrap().remove(0)
}

pub async fn request_count(ledger: &Shared) -> u64 {
    ledger.usage("acme", None, DAY_S).await.unwrap().request_count
}

/// Asks again until the answer is yes. Databases expire things by whole seconds.
async fn eventually<F: AsyncFnMut() -> bool>(mut ask: F) {
    for _ in 0..600 {
        if ask().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it did not happen within 30 s");
}

pub async fn an_accepted_job_waits_with_its_body(ledger: Shared) {
    let job = new_job(Uuid::now_v7(), "hash");
    assert_eq!(ledger.find(job.key).await.unwrap(), None);
    assert_eq!(ledger.accept(&job).await.unwrap(), Accepted::New);
    let row = ledger.find(job.key).await.unwrap().unwrap();
    assert_eq!(row.key, job.key);
    assert_eq!((row.tenant.as_str(), row.job_id, row.body_hash.as_str()), ("acme", job.job_id, "hash"));
    assert_eq!(row.body, Some(job.body));
    assert_eq!((row.state, row.epoch, row.owner, row.interruptions), (JobState::Waiting, 0, None, 0));
    assert_eq!(row.outcome, None);
}

pub async fn an_id_belongs_to_its_first_body(ledger: Shared) {
    let job = new_job(Uuid::now_v7(), "hash");
    ledger.accept(&job).await.unwrap();
    match ledger.accept(&job).await.unwrap() {
        Accepted::Same(row) => assert_eq!(row.state, JobState::Waiting),
        other => panic!("{other:?}"),
    }
    assert_eq!(ledger.accept(&new_job(job.key, "another")).await.unwrap(), Accepted::Taken);
    commit_one(&ledger, new_ending(job.key, 2)).await;
    match ledger.accept(&job).await.unwrap() {
        Accepted::Same(row) => assert_eq!(row.outcome, Some(new_ending(job.key, 2).outcome)),
        other => panic!("{other:?}"),
    }
}

pub async fn of_many_acceptances_one_is_new(ledger: Shared) {
    let job = new_job(Uuid::now_v7(), "hash");
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let (ledger, job) = (ledger.clone(), job.clone());
            tokio::spawn(async move { ledger.accept(&job).await.unwrap() })
        })
        .collect();
    let mut new = 0;
    for task in tasks {
        match task.await.unwrap() {
            Accepted::New => new += 1,
            Accepted::Same(_) => {}
            Accepted::Taken => panic!("it has the same body"),
        }
    }
    assert_eq!(new, 1);
}

pub async fn unconfirmed_jobs_are_given_until_they_are_published(ledger: Shared) {
    let jobs: Vec<_> = (0..5).map(|_| new_job(Uuid::now_v7(), "hash")).collect();
    for job in &jobs {
        ledger.accept(job).await.unwrap();
    }
    assert!(
        ledger.unpublished(3_600_000, None, 100).await.unwrap().is_empty(),
        "they are younger than an hour"
    );
    let all = ledger.unpublished(0, None, 100).await.unwrap();
    assert_eq!(all.iter().map(|u| u.key).collect::<Vec<_>>(), jobs.iter().map(|j| j.key).collect::<Vec<_>>());
    assert_eq!(all[0].body, jobs[0].body);
    assert_eq!(all[0].headers, jobs[0].headers);
    let keys = |page: Vec<StoredJob>| page.iter().map(|job| job.key).collect::<Vec<_>>();
    let first = keys(ledger.unpublished(0, None, 2).await.unwrap());
    assert_eq!(first, [jobs[0].key, jobs[1].key]);
    assert_eq!(keys(ledger.unpublished(0, Some(first[1]), 2).await.unwrap()), [jobs[2].key, jobs[3].key]);

    ledger.published(jobs[0].key).await.unwrap();
    // A worker may have it before the confirm is noted: it is not to be published again.
    assert_eq!(ledger.claim(&new_claim(jobs[1].key, Some(0), 2, "w-1")).await.unwrap(), Claimed::Won);
    commit_one(&ledger, new_ending(jobs[2].key, 2)).await;
    assert_eq!(keys(ledger.unpublished(0, None, 100).await.unwrap()), [jobs[3].key, jobs[4].key]);
    // A coordinator that means to end a job may die before it has.
    let claim = Claim { delivered: false, ..new_claim(jobs[3].key, Some(0), 2, "c-1") };
    assert_eq!(ledger.claim(&claim).await.unwrap(), Claimed::Won);
    assert_eq!(keys(ledger.unpublished(0, None, 100).await.unwrap()), [jobs[3].key, jobs[4].key]);
}

pub async fn jobs_whose_rows_expire_soon_are_given_until_they_are_done(ledger: Shared) {
    let expiring = |in_s: u64| NewJob { expires_in_s: in_s, ..new_job(Uuid::now_v7(), "hash") };
    let (late, early, far) = (expiring(90), expiring(60), expiring(3600));
    for job in [&late, &early, &far] {
        ledger.accept(job).await.unwrap();
        ledger.published(job.key).await.unwrap();
    }
    ledger.claim(&new_claim(late.key, Some(0), 2, "w-1")).await.unwrap();
    let given = ledger.expiring(100, 10).await.unwrap();
    assert_eq!(given.iter().map(|job| job.key).collect::<Vec<_>>(), [early.key, late.key]);
    assert_eq!((&given[0].body, &given[0].headers), (&early.body, &early.headers));
    commit_one(&ledger, new_ending(early.key, 2)).await;
    assert_eq!(ledger.expiring(100, 1).await.unwrap()[0].key, late.key);
}

pub async fn of_racing_claims_exactly_one_wins(ledger: Shared) {
    let key = Uuid::now_v7();
    for round in 0..4_u64 {
        let expected = (round > 0).then_some(round + 1);
        let tasks: Vec<_> = (0..24)
            .map(|i| {
                let (ledger, claim) =
                    (ledger.clone(), new_claim(key, expected, round + 2, &format!("w-{i}")));
                tokio::spawn(async move { (claim.worker.clone(), ledger.claim(&claim).await.unwrap()) })
            })
            .collect();
        let (mut winners, mut seen) = (Vec::new(), HashSet::new());
        for task in tasks {
            match task.await.unwrap() {
                (worker, Claimed::Won) => winners.push(worker),
                (_, Claimed::Lost(row)) => {
                    assert_eq!((row.epoch, row.state), (round + 2, JobState::Running));
                    seen.insert(row.owner.unwrap());
                }
                (_, Claimed::Gone) => panic!("there is a row"),
            }
        }
        assert_eq!(winners.len(), 1, "round {round}");
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), winners, "the losers see the winner");
        let row = ledger.find(key).await.unwrap().unwrap();
        assert_eq!((row.owner, row.interruptions), (Some(winners.remove(0)), round as u32));
    }
}

pub async fn a_claim_must_know_the_row(ledger: Shared) {
    let key = Uuid::now_v7();
    assert_eq!(ledger.claim(&new_claim(key, Some(2), 3, "w-1")).await.unwrap(), Claimed::Gone);
    assert_eq!(ledger.find(key).await.unwrap(), None);
    assert_eq!(ledger.claim(&new_claim(key, None, 2, "w-1")).await.unwrap(), Claimed::Won);
    assert_eq!(ledger.claim(&new_claim(key, None, 2, "w-1")).await.unwrap(), Claimed::Won, "a repetition");
    assert!(matches!(ledger.claim(&new_claim(key, None, 2, "w-2")).await.unwrap(), Claimed::Lost(_)));
    assert!(matches!(ledger.claim(&new_claim(key, Some(1), 3, "w-2")).await.unwrap(), Claimed::Lost(_)));
    assert!(matches!(ledger.claim(&new_claim(key, Some(2), 2, "w-2")).await.unwrap(), Claimed::Lost(_)));
    assert_eq!(ledger.claim(&new_claim(key, Some(2), 3, "w-2")).await.unwrap(), Claimed::Won);
    assert!(matches!(ledger.claim(&new_claim(key, None, 2, "w-1")).await.unwrap(), Claimed::Lost(_)));

    let ending = new_ending(key, 3);
    assert_eq!(commit_one(&ledger, ending.clone()).await, Committed::Done);
    for claim in [new_claim(key, Some(3), 4, "w-2"), new_claim(key, Some(2), 3, "w-2")] {
        match ledger.claim(&claim).await.unwrap() {
            Claimed::Lost(row) => {
                assert_eq!((row.state, row.outcome), (JobState::Done, Some(ending.outcome.clone())))
            }
            other => panic!("{other:?}"),
        }
    }
}

pub async fn a_released_job_has_no_owner(ledger: Shared) {
    let key = Uuid::now_v7();
    let mine = new_claim(key, None, 2, "w-1");
    ledger.claim(&mine).await.unwrap();
    ledger.release(&new_claim(key, None, 2, "w-2")).await.unwrap();
    ledger.release(&new_claim(key, None, 1, "w-1")).await.unwrap();
    assert_eq!(
        ledger.find(key).await.unwrap().unwrap().owner.as_deref(),
        Some("w-1"),
        "not theirs to release"
    );
    ledger.release(&mine).await.unwrap();
    let row = ledger.find(key).await.unwrap().unwrap();
    assert_eq!((row.owner, row.epoch, row.state), (None, 2, JobState::Running));
    assert_eq!(ledger.claim(&new_claim(key, Some(2), 3, "w-2")).await.unwrap(), Claimed::Won);
    ledger.release(&mine).await.unwrap();
    assert_eq!(ledger.find(key).await.unwrap().unwrap().owner.as_deref(), Some("w-2"));

    // A first delivery starts without a row; handing over writes it.
    let fresh = new_claim(Uuid::now_v7(), None, 1, "w-1");
    ledger.release(&fresh).await.unwrap();
    let row = ledger.find(fresh.key).await.unwrap().unwrap();
    assert_eq!((row.owner, row.epoch, row.state), (None, 1, JobState::Running));
    assert_eq!(ledger.claim(&new_claim(fresh.key, Some(1), 2, "w-2")).await.unwrap(), Claimed::Won);

    commit_one(&ledger, new_ending(key, 3)).await;
    ledger.release(&new_claim(key, None, 3, "w-2")).await.unwrap();
    assert_eq!(ledger.find(key).await.unwrap().unwrap().state, JobState::Done);
}

pub async fn an_end_is_final_and_repeats_byte_for_byte(ledger: Shared) {
    let key = Uuid::now_v7();
    let mut ending = new_ending(key, 1);
    ending.outcome = Bytes::from_static(b"{ \"odd\" :\t\"\\u0000\xff\xfe\" }");
    assert_eq!(commit_one(&ledger, ending.clone()).await, Committed::Done);
    for epoch in [1, 2, 7] {
        assert_eq!(
            commit_one(&ledger, new_ending(key, epoch)).await,
            Committed::Already(ending.outcome.clone())
        );
    }
    let row = ledger.find(key).await.unwrap().unwrap();
    assert_eq!((row.state, row.outcome, row.body), (JobState::Done, Some(ending.outcome), None));
    assert_eq!(request_count(&ledger).await, 1);
}

pub async fn the_body_is_cleared_at_the_end(ledger: Shared) {
    let job = new_job(Uuid::now_v7(), "hash");
    ledger.accept(&job).await.unwrap();
    ledger.claim(&new_claim(job.key, Some(0), 2, "w-1")).await.unwrap();
    assert_eq!(ledger.find(job.key).await.unwrap().unwrap().body, Some(job.body));
    assert_eq!(commit_one(&ledger, new_ending(job.key, 2)).await, Committed::Done);
    let row = ledger.find(job.key).await.unwrap().unwrap();
    assert_eq!((row.state, row.body, row.owner), (JobState::Done, None, None));
}

pub async fn an_older_attempt_is_superseded(ledger: Shared) {
    let key = Uuid::now_v7();
    ledger.claim(&new_claim(key, None, 2, "w-1")).await.unwrap();
    ledger.claim(&new_claim(key, Some(2), 3, "w-2")).await.unwrap();
    let mut late = new_ending(key, 2);
    late.cache = Some(new_answer("late", "never seen"));
    assert_eq!(commit_one(&ledger, late).await, Committed::Superseded);
    assert_eq!(request_count(&ledger).await, 0);
    assert_eq!(ledger.cached("late").await.unwrap(), None);
    assert_eq!(ledger.find(key).await.unwrap().unwrap().state, JobState::Running);
    assert_eq!(commit_one(&ledger, new_ending(key, 3)).await, Committed::Done);
}

pub async fn concurrent_commits_of_a_key_end_it_once(ledger: Shared) {
    let keys: Vec<_> = (0..40).map(|_| Uuid::now_v7()).collect();
    let tasks: Vec<_> = (1..=8_u64)
        .map(|epoch| {
            let (ledger, mut keys) = (ledger.clone(), keys.clone());
            // Each batch meets the keys in another order.
            keys.rotate_left(epoch as usize * 5 % 40);
            if epoch % 2 == 0 {
                keys.reverse();
            }
            tokio::spawn(async move {
                let batch = keys.iter().map(|key| {
                    let mut ending = new_ending(*key, epoch);
                    ending.cache = Some(new_answer(&format!("shared-{}", key.as_u128() % 7), "the same"));
                    ending
                });
                let answers = ledger.commit(batch.collect()).await.unwrap();
                keys.into_iter().zip(answers).collect::<Vec<_>>()
            })
        })
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.unwrap());
    }
    for key in keys {
        let stored = ledger.find(key).await.unwrap().unwrap().outcome.unwrap();
        let answers: Vec<_> = all.iter().filter(|(k, _)| *k == key).map(|(_, answer)| answer).collect();
        assert_eq!(answers.len(), 8);
        assert_eq!(answers.iter().filter(|a| ***a == Committed::Done).count(), 1);
        let repeats = answers.iter().filter(|a| ***a == Committed::Already(stored.clone())).count();
        assert_eq!(repeats, 7, "{answers:?}");
    }
    assert_eq!(request_count(&ledger).await, 40);
}

pub async fn a_key_may_come_twice_in_a_batch(ledger: Shared) {
    let (a, b) = (Uuid::now_v7(), Uuid::now_v7());
    ledger.claim(&new_claim(b, None, 5, "w-1")).await.unwrap();
    let batch = vec![
        new_ending(a, 1),
        new_ending(b, 4),
        new_ending(a, 2),
        new_ending(b, 5),
        new_ending(a, 1),
        new_ending(b, 4),
    ];
    let (first_a, only_b) = (batch[0].outcome.clone(), batch[3].outcome.clone());
    assert_eq!(
        ledger.commit(batch).await.unwrap(),
        [
            Committed::Done,
            Committed::Superseded,
            Committed::Already(first_a.clone()),
            Committed::Done,
            Committed::Already(first_a),
            Committed::Already(only_b),
        ]
    );
    assert_eq!(request_count(&ledger).await, 2);
    assert!(ledger.commit(Vec::new()).await.unwrap().is_empty());
}

pub async fn a_cached_answer_is_found_until_it_expires(ledger: Shared) {
    let mut forever = new_ending(Uuid::now_v7(), 1);
    forever.cache = Some(new_answer("forever", "Hello"));
    let mut brief = new_ending(Uuid::now_v7(), 1);
    brief.cache = Some(CacheRow { expires_in_s: 1, ..new_answer("brief", "Bye") });
    let mut hour = new_ending(Uuid::now_v7(), 1);
    hour.cache = Some(CacheRow { expires_in_s: 3600, ..new_answer("hour", "Hi") });
    let kept = forever.cache.clone();
    ledger.commit(vec![forever, brief, hour]).await.unwrap();

    assert_eq!(ledger.cached("forever").await.unwrap(), kept);
    let left = ledger.cached("hour").await.unwrap().unwrap().expires_in_s;
    assert!((3000..=3600).contains(&left), "{left}");
    assert_eq!(ledger.cached("unknown").await.unwrap(), None);
    eventually(async || ledger.cached("brief").await.unwrap().is_none()).await;
    assert_eq!(ledger.purge(Retention::default()).await.unwrap(), 1);
    assert_eq!(ledger.purge(Retention::default()).await.unwrap(), 0);

    let mut again = new_ending(Uuid::now_v7(), 1);
    again.cache = Some(new_answer("forever", "Hello again"));
    commit_one(&ledger, again).await;
    assert_eq!(ledger.cached("forever").await.unwrap().unwrap().response, "Hello again");
}

pub async fn ended_jobs_are_purged_when_they_expire(ledger: Shared) {
    let (ended, waiting, kept) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    let mut job = new_job(waiting, "hash");
    job.expires_in_s = 0;
    ledger.accept(&job).await.unwrap();
    let batch = (0..50).map(|i| {
        let mut ending = new_ending(if i == 0 { ended } else { Uuid::now_v7() }, 1);
        ending.expires_in_s = 0;
        ending
    });
    ledger.commit(batch.collect()).await.unwrap();
    commit_one(&ledger, new_ending(kept, 1)).await;
    assert_eq!(ledger.purge(Retention::default()).await.unwrap(), 50);
    assert_eq!(ledger.find(ended).await.unwrap(), None);
    assert!(ledger.find(waiting).await.unwrap().is_some(), "it is not done: it is still owed");
    assert!(ledger.find(kept).await.unwrap().is_some());
    // Its bill stays, and stays the only one.
    assert_eq!(commit_one(&ledger, new_ending(ended, 1)).await, Committed::Done);
    assert_eq!(request_count(&ledger).await, 51);
}

pub async fn bills_and_dead_letters_are_kept_as_long_as_is_asked(ledger: Shared) {
    ledger.bury(&new_letter(0)).await.unwrap();
    ledger.bury(&new_letter(1)).await.unwrap();
    let old = new_ending(Uuid::now_v7(), 1);
    commit_one(&ledger, old.clone()).await;
    // The last of them is a second old now, by the database's clock.
    eventually(async || ledger.usage("acme", None, 1).await.unwrap().request_count == 0).await;
    let purge = async |requests_s, dead_letters_s| {
        ledger.purge(Retention { requests_s, dead_letters_s }).await.unwrap()
    };
    assert_eq!(purge(0, 0).await, 0, "0 is for ever");
    assert_eq!(purge(3600, 3600).await, 0);
    assert_eq!(purge(u64::MAX, u64::MAX).await, 0);

    assert_eq!(purge(0, 1).await, 2);
    assert_eq!(ledger.dead_letters(10).await.unwrap(), []);
    assert_eq!(request_count(&ledger).await, 1);
    assert_eq!(purge(1, 3600).await, 1);
    assert_eq!(request_count(&ledger).await, 0);
    // The job itself has an expiry of its own.
    assert_eq!(commit_one(&ledger, old.clone()).await, Committed::Already(old.outcome));
}

fn new_letter(n: u32) -> DeadLetter {
    DeadLetter {
        key: (n > 0).then(Uuid::now_v7),
        job_id: (n > 0).then(|| format!("job-{n}")),
        tenant: "acme".into(),
        body: Bytes::from(format!("body {n}")),
        code: "invalid_request".into(),
        reason: format!("reason {n}"),
        attempts: n,
        worker: String::new(),
    }
}

pub async fn dead_letters_come_newest_first(ledger: Shared) {
    let (first, second, third) = (new_letter(0), new_letter(1), new_letter(2));
    ledger.bury(&first).await.unwrap();
    ledger.bury(&second).await.unwrap();
    let mut ending = new_ending(Uuid::now_v7(), 3);
    ending.dead = Some(third.clone());
    commit_one(&ledger, ending.clone()).await;
    commit_one(&ledger, ending).await;
    assert_eq!(ledger.dead_letters(10).await.unwrap(), [third.clone(), second, first]);
    assert_eq!(ledger.dead_letters(1).await.unwrap(), [third]);
}

pub async fn usage_counts_a_tenants_period(ledger: Shared) {
    assert_eq!(ledger.usage("acme", None, DAY_S).await.unwrap(), Default::default());
    let mut batch: Vec<_> = (0..4).map(|_| new_ending(Uuid::now_v7(), 1)).collect();
    batch[0].request.user_id = Some("bob".into());
    batch[0].request.model = "large".into();
    batch[0].request.execution_time_ms = 100;
    batch[1].request.user_id = None;
    batch[3].tenant = "other".into();
    ledger.commit(batch).await.unwrap();
    let all = ledger.usage("acme", None, DAY_S).await.unwrap();
    assert_eq!((all.request_count, all.total_tokens, all.prompt_tokens), (3, 15, 9));
    assert!((all.avg_execution_time - 60.0).abs() < 1e-6, "{}", all.avg_execution_time);
    assert_eq!(all.models_used, ["large", "smol"]);
    let bob = ledger.usage("acme", Some("bob"), DAY_S).await.unwrap();
    assert_eq!((bob.request_count, bob.models_used.as_slice()), (1, ["large".to_string()].as_slice()));
    assert_eq!(ledger.usage("acme", Some("eve"), DAY_S).await.unwrap().request_count, 0);
    assert_eq!(ledger.usage("acme", None, u64::MAX).await.unwrap().request_count, 3);
    eventually(async || ledger.usage("acme", None, 1).await.unwrap().request_count == 0).await;
}

pub async fn it_is_ready_and_migrating_again_changes_nothing(ledger: Shared) {
    let job = new_job(Uuid::now_v7(), "hash");
    ledger.accept(&job).await.unwrap();
    ledger.migrate().await.unwrap();
    ledger.ready().await.unwrap();
    assert!(ledger.find(job.key).await.unwrap().is_some());
}
