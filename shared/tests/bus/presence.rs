//! Cancellation, control channels, and who is there.

use std::sync::Arc;
use std::time::Duration;

use stoker_shared::ports::{Control, Liveness, ServedModel, WorkerPresence};
use tokio::time::sleep;
use uuid::Uuid;

use crate::fixture::{Fixture, Job, eventually, next, open};

const LONG: Duration = Duration::from_secs(60);

fn worker(id: &str, models: &[&str]) -> WorkerPresence {
    let model =
        |name: &&str| ServedModel { name: name.to_string(), context: 8192, active: 3, ..Default::default() };
    WorkerPresence {
        id: id.into(),
        models: models.iter().map(model).collect(),
        tokens_per_second: 12.5,
        ..WorkerPresence::default()
    }
}

pub async fn a_cancellation_waits_for_the_job(f: Arc<Fixture>) {
    let (before, after) = (Job::new(), Job::new());
    f.other.cancel(before.key, LONG).await.unwrap();
    assert_eq!(open(&*f.bus, &before, 1).await, (vec![], true));
    assert_eq!(open(&*f.bus, &after, 1).await, (vec![], false));
    assert!(!f.bus.is_cancelled(after.key).await.unwrap());
    f.other.cancel(after.key, LONG).await.unwrap();
    assert!(f.bus.is_cancelled(after.key).await.unwrap());
    // A successor learns of it too; cancelling twice is no harm.
    f.other.cancel(after.key, LONG).await.unwrap();
    assert_eq!(open(&*f.other, &after, 2).await, (vec![], true));
}

pub async fn a_cancellation_reaches_all_workers(f: Arc<Fixture>) {
    let mut first = f.bus.control("w-1").await.unwrap();
    let mut second = f.other.control("w-2").await.unwrap();
    let keys: Vec<Uuid> = (0..5).map(|_| Uuid::new_v4()).collect();
    for key in &keys {
        f.other.cancel(*key, LONG).await.unwrap();
    }
    for key in &keys {
        assert_eq!(next(&mut first).await, Control::Cancel(*key));
        assert_eq!(next(&mut second).await, Control::Cancel(*key));
    }
}

pub async fn a_cancellation_expires(f: Arc<Fixture>) {
    let job = Job::new();
    f.bus.cancel(job.key, Duration::from_millis(300)).await.unwrap();
    eventually("it expires", async || !f.bus.is_cancelled(job.key).await.unwrap()).await;
    assert_eq!(open(&*f.bus, &job, 1).await, (vec![], false));
}

pub async fn words_reach_one_worker(f: Arc<Fixture>) {
    let mut first = f.bus.control("w-1").await.unwrap();
    let mut second = f.bus.control("w-2").await.unwrap();
    let key = Uuid::new_v4();
    assert!(f.other.tell("w-1", &Control::Ping).await.unwrap());
    assert!(f.other.tell("w-1", &Control::Cancel(key)).await.unwrap());
    assert!(f.other.tell("w-2", &Control::Drain).await.unwrap());
    assert!(!f.other.tell("w-3", &Control::Drain).await.unwrap());
    assert_eq!(next(&mut first).await, Control::Ping);
    assert_eq!(next(&mut first).await, Control::Cancel(key));
    assert_eq!(next(&mut second).await, Control::Drain);
}

pub async fn nobody_hears_after_the_worker_is_gone(f: Arc<Fixture>) {
    let control = f.bus.control("w-1").await.unwrap();
    assert!(f.other.tell("w-1", &Control::Ping).await.unwrap());
    drop(control);
    eventually("nobody hears", async || !f.other.tell("w-1", &Control::Ping).await.unwrap()).await;
}

pub async fn workers_are_listed_while_they_are_there(f: Arc<Fixture>) {
    assert_eq!(f.bus.workers().await.unwrap(), []);
    let (stays, ends, dies) = (worker("w-1", &["m"]), worker("w-2", &["m"]), worker("w-3", &[]));
    for presence in [&stays, &ends, &dies] {
        f.bus.announce_worker(presence).await.unwrap();
    }
    assert_eq!(f.other.workers().await.unwrap(), [stays.clone(), ends.clone(), dies]);
    f.bus.retire(&ends.id).await.unwrap();
    let renewed = WorkerPresence { draining: true, active: 4, ..stays };
    eventually("one expires", async || {
        f.bus.announce_worker(&renewed).await.unwrap();
        let there = f.other.workers().await.unwrap();
        assert!(!there.contains(&ends), "it has withdrawn");
        there == [renewed.clone()]
    })
    .await;
}

pub async fn models_are_remembered(f: Arc<Fixture>) {
    assert_eq!(f.bus.known_models().await.unwrap(), []);
    f.bus.announce_worker(&worker("w-1", &["b", "a"])).await.unwrap();
    f.bus.announce_worker(&worker("w-2", &["c.d*", "a"])).await.unwrap();
    f.bus.retire("w-1").await.unwrap();
    f.bus.retire("w-2").await.unwrap();
    let models = f.other.known_models().await.unwrap();
    assert_eq!(models.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["a", "b", "c.d*"]);
    assert!(models.iter().all(|m| m.context == 8192 && m.active == 0), "what runs now is not remembered");
}

pub async fn a_worker_lives_while_it_listens_and_renews(f: Arc<Fixture>) {
    let is = async |id: &str, expected| f.other.worker_liveness(id).await.unwrap() == expected;
    eventually("never there", async || is("w-0", Liveness::Gone).await).await;

    // Killed: its presence is fresh, but nobody listens.
    let control = f.bus.control("w-1").await.unwrap();
    f.bus.announce_worker(&worker("w-1", &[])).await.unwrap();
    assert!(is("w-1", Liveness::Alive).await);
    drop(control);
    eventually("killed", async || {
        f.bus.announce_worker(&worker("w-1", &[])).await.unwrap();
        is("w-1", Liveness::Gone).await
    })
    .await;

    // Frozen: somebody listens, but renews nothing.
    let _control = f.bus.control("w-2").await.unwrap();
    f.bus.announce_worker(&worker("w-2", &[])).await.unwrap();
    assert!(is("w-2", Liveness::Alive).await);
    eventually("frozen", async || is("w-2", Liveness::Gone).await).await;

    // A presence that is renewed does not expire.
    for _ in 0..8 {
        f.bus.announce_worker(&worker("w-2", &[])).await.unwrap();
        sleep(Duration::from_millis(500)).await;
        assert!(is("w-2", Liveness::Alive).await);
    }
    f.bus.retire("w-2").await.unwrap();
    assert!(is("w-2", Liveness::Gone).await);
}

pub async fn a_coordinator_lives_while_it_renews(f: Arc<Fixture>) {
    let is = async |id: &str, expected| f.other.coordinator_liveness(id).await.unwrap() == expected;
    f.bus.announce_coordinator("c-1").await.unwrap();
    f.bus.announce_coordinator("c-2").await.unwrap();
    assert!(is("c-1", Liveness::Alive).await && is("c-2", Liveness::Alive).await);
    eventually("never there", async || is("c-0", Liveness::Gone).await).await;
    eventually("one expires", async || {
        f.bus.announce_coordinator("c-2").await.unwrap();
        is("c-1", Liveness::Gone).await
    })
    .await;
    assert!(is("c-2", Liveness::Alive).await);
    f.bus.retire("c-2").await.unwrap();
    assert!(is("c-2", Liveness::Gone).await);
}
