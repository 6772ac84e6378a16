//! Redis, and the way to it, at their worst.

use std::time::Duration;

use stoker_shared::config::Services;
use stoker_shared::ports::{
    Append, AppendReport, Appended, Bus, Control, Liveness, Notice, PortError, WorkerPresence,
};
use stoker_shared::redis::RedisBus;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::fixture::{Job, PATIENCE, delete_names, eventually, next, next_frames, open, plain_connection};
use crate::private::PrivateRedis;
use crate::proxy::{Mode, Proxy};
use crate::services::configured;

/// A bus behind a proxy, and one that goes straight to the shared Redis.
struct Behind {
    proxy: Proxy,
    bus: RedisBus,
    straight: RedisBus,
    services: Services,
}

impl Behind {
    async fn start(mode: Mode) -> Self {
        let services = configured();
        let target = services.redis_url.rsplit(['/', '@']).next().unwrap().to_owned();
        let proxy = Proxy::start(target.clone(), mode).await;
        let url = services.redis_url.replace(&target, &format!("127.0.0.1:{}", proxy.port()));
        let bus = RedisBus::connect(&Services { redis_url: url, ..services.clone() }).await.unwrap();
        let straight = RedisBus::connect(&services).await.unwrap();
        Self { proxy, bus, straight, services }
    }

    /// Waits until Redis itself knows that nobody listens: for a moment after a cut it still counts the subscriptions.
    async fn unheard(&self, channel: &str) {
        let channel = self.services.name(channel);
        let connection = plain_connection(&self.services).await;
        eventually("Redis notices", async || {
            let mut numsub = redis::cmd("PUBSUB");
            numsub.arg("NUMSUB").arg(&channel);
            let (_, listeners): (String, u64) = numsub.query_async(&mut connection.clone()).await.unwrap();
            listeners == 0
        })
        .await;
    }

    async fn end(self) {
        delete_names(&self.services).await;
    }
}

/// Reads until an interruption is told.
async fn interruption(heard: &mut mpsc::Receiver<Notice>) {
    while next(heard).await != Notice::Interrupted {}
}

async fn recovers(bus: &RedisBus) {
    eventually("it recovers", async || bus.ready().await.is_ok()).await;
}

/// Appends once more where the first step over a new connection fails.
async fn append_again(bus: &RedisBus, step: &[Append]) -> AppendReport {
    match bus.append(step).await {
        Ok(report) => report,
        Err(e) => {
            assert!(e.is_transient(), "{e}");
            bus.append(step).await.unwrap()
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriptions_and_commands_outlive_a_cut_connection() {
    let b = Behind::start(Mode::Pass).await;
    let job = Job::new();
    let mut heard = b.bus.subscribe(&job.channel).await.unwrap();
    open(&b.straight, &job, 1).await;
    for n in 0..5 {
        assert!(b.straight.append(&[job.append(1, 2 * n)]).await.unwrap().unheard.is_empty());
        assert_eq!(next_frames(&mut heard).await, [job.frame(1, 2 * n)]);
        b.proxy.cut();
        assert_eq!(next(&mut heard).await, Notice::Interrupted);
        recovers(&b.bus).await;
        let report = append_again(&b.bus, &[job.append(1, 2 * n + 1)]).await;
        assert_eq!((report.jobs, report.unheard), (vec![Appended::Accepted], vec![]));
        assert_eq!(next_frames(&mut heard).await, [job.frame(1, 2 * n + 1)]);
    }
    b.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_hears_of_an_outage_that_none_of_its_steps_met() {
    let b = Behind::start(Mode::Pass).await;
    let job = Job::new();
    open(&b.bus, &job, 1).await;
    b.bus.append(&[job.append(1, 0)]).await.unwrap();
    b.proxy.set(Mode::Refuse);
    b.proxy.cut();
    eventually("it is noticed", async || b.bus.is_cancelled(job.key).await.is_err()).await;
    b.proxy.set(Mode::Pass);
    recovers(&b.bus).await;
    // Nobody knows whether the first record is still there: it is up to the writer to look.
    assert!(b.bus.append(&[job.append(1, 1)]).await.unwrap_err().is_transient());
    assert_eq!(open(&b.bus, &job, 1).await.0, [job.frame(1, 0)]);
    assert_eq!(b.bus.append(&[job.append(1, 1)]).await.unwrap().jobs, [Appended::Accepted]);
    b.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_said_during_an_outage_is_told_after_it() {
    let b = Behind::start(Mode::Pass).await;
    let job = Job::new();
    let mut heard = b.bus.subscribe(&job.channel).await.unwrap();
    let mut control = b.bus.control("w-1").await.unwrap();
    open(&b.straight, &job, 1).await;

    b.proxy.set(Mode::Refuse);
    b.proxy.cut();
    eventually("it is noticed", async || b.bus.ready().await.is_err()).await;
    b.unheard(&job.channel).await;
    let report = b.straight.append(&[job.append(1, 0)]).await.unwrap();
    assert_eq!(report.unheard, std::slice::from_ref(&job.channel));
    let cancelled = Uuid::new_v4();
    b.straight.cancel(cancelled, Duration::from_secs(60)).await.unwrap();
    assert!(!b.straight.tell("w-1", &Control::Drain).await.unwrap());
    assert!(b.bus.read_log(job.key).await.unwrap_err().is_transient());

    b.proxy.set(Mode::Pass);
    assert_eq!(next(&mut heard).await, Notice::Interrupted);
    assert_eq!(b.bus.read_log(job.key).await.unwrap().unwrap().frames, [job.frame(1, 0)]);
    assert_eq!(next(&mut control).await, Control::Cancel(cancelled));
    b.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_goes_silent_is_given_up() {
    let b = Behind::start(Mode::Pass).await;
    let job = Job::new();
    let mut heard = b.bus.subscribe(&job.channel).await.unwrap();
    open(&b.bus, &job, 1).await;
    b.bus.read_log(job.key).await.unwrap();

    b.proxy.set(Mode::Silent);
    let step = [job.append(1, 0)];
    let (append, read, ready) = timeout(PATIENCE, async {
        tokio::join!(b.bus.append(&step), b.bus.read_log(job.key), b.bus.ready())
    })
    .await
    .expect("every command is bounded in time");
    assert!(matches!(append, Err(PortError::Unavailable { service: "Redis", .. })));
    assert!(read.unwrap_err().is_transient() && ready.unwrap_err().is_transient());

    let given_up = async || match b.bus.ready().await {
        Err(error) => error.to_string().contains("subscriptions are not connected"),
        Ok(()) => panic!("nothing passes"),
    };
    eventually("the subscriptions' connection is given up too", given_up).await;
    // What was sent into the silence is lost with its connections: whether a step that failed so was taken is open, and
    // held back here it would be published in the midst of what comes next.
    b.proxy.cut();
    b.proxy.set(Mode::Pass);
    interruption(&mut heard).await;
    recovers(&b.bus).await;
    append_again(&b.bus, &[job.append(1, 1)]).await;
    assert_eq!(next_frames(&mut heard).await, [job.frame(1, 1)]);
    assert!(b.bus.read_log(job.key).await.unwrap().is_some());
    b.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_starts_without_redis() {
    let b = Behind::start(Mode::Refuse).await;
    let job = Job::new();
    assert!(b.bus.ready().await.unwrap_err().is_transient());
    assert!(b.bus.open(&[job.opening(1)]).await.unwrap_err().is_transient());
    assert!(b.bus.subscribe(&job.channel).await.unwrap_err().is_transient());
    assert!(b.bus.workers().await.unwrap_err().is_transient());
    b.proxy.set(Mode::Pass);
    recovers(&b.bus).await;
    let mut heard = b.bus.subscribe(&job.channel).await.unwrap();
    open(&b.bus, &job, 1).await;
    b.bus.append(&[job.append(1, 0)]).await.unwrap();
    assert_eq!(next_frames(&mut heard).await, [job.frame(1, 0)]);
    b.end().await;
}

#[tokio::test]
async fn an_address_that_makes_no_sense_is_refused() {
    for redis_url in ["", "localhost", "http://localhost:6379", "redis://"] {
        let services = Services { redis_url: redis_url.into(), ..Services::default() };
        let result = RedisBus::connect(&services).await;
        assert!(matches!(result, Err(PortError::Refused { .. })), "{redis_url}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_lost_everything_is_filled_again() {
    let mut redis = PrivateRedis::start().await;
    let bus = RedisBus::connect(&redis.services).await.unwrap();
    let job = Job::new();
    let mut heard = bus.subscribe(&job.channel).await.unwrap();
    open(&bus, &job, 1).await;
    bus.append(&[job.append(1, 0)]).await.unwrap();
    assert_eq!(next_frames(&mut heard).await, [job.frame(1, 0)]);

    redis.kill();
    let lost = bus.append(&[job.append(1, 1)]).await.unwrap_err();
    assert!(lost.is_transient(), "{lost}");
    redis.restart().await;
    recovers(&bus).await;
    assert_eq!(append_again(&bus, &[job.append(1, 1)]).await.jobs, [Appended::Missing]);
    assert_eq!(open(&bus, &job, 1).await, (vec![], false));
    let all = [job.append(1, 0), job.append(1, 1)];
    assert_eq!(bus.append(&all).await.unwrap().jobs, [Appended::Accepted; 2]);
    assert_eq!(next(&mut heard).await, Notice::Interrupted);
    assert_eq!(next_frames(&mut heard).await, [job.frame(1, 0), job.frame(1, 1)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn for_a_while_after_a_loss_nobody_is_taken_for_gone() {
    let mut redis = PrivateRedis::start().await;
    let bus = RedisBus::connect(&redis.services).await.unwrap();
    let there = WorkerPresence { id: "w-1".into(), ..WorkerPresence::default() };
    let _control = bus.control("w-1").await.unwrap();
    let announce = async || {
        bus.announce_worker(&there).await.unwrap();
        bus.announce_coordinator("c-1").await.unwrap();
    };
    let gone = async || {
        announce().await;
        bus.worker_liveness("w-2").await.unwrap() == Liveness::Gone
            && bus.coordinator_liveness("c-2").await.unwrap() == Liveness::Gone
    };
    eventually("nobody is there", gone).await;
    assert!(!bus.may_have_forgotten().await.unwrap());
    assert_eq!(bus.worker_liveness("w-1").await.unwrap(), Liveness::Alive);

    // A process that starts after the loss has seen nothing of it.
    redis.kill();
    redis.restart().await;
    let newcomer = RedisBus::connect(&redis.services).await.unwrap();
    for bus in [&newcomer, &bus] {
        recovers(bus).await;
        assert_eq!(bus.worker_liveness("w-1").await.unwrap(), Liveness::Unknown);
        assert_eq!(bus.coordinator_liveness("c-1").await.unwrap(), Liveness::Unknown);
        assert!(bus.may_have_forgotten().await.unwrap());
    }
    announce().await;
    eventually("it listens again", async || bus.worker_liveness("w-1").await.unwrap() == Liveness::Alive)
        .await;
    assert_eq!(bus.worker_liveness("w-2").await.unwrap(), Liveness::Unknown);
    eventually("nobody else is there", gone).await;

    // Its data are kept, but all presences have expired: it was away for longer than they live.
    redis.signal("-STOP");
    sleep(Duration::from_secs(4)).await;
    redis.signal("-CONT");
    recovers(&newcomer).await;
    assert_eq!(newcomer.worker_liveness("w-1").await.unwrap(), Liveness::Unknown);
    assert_eq!(newcomer.coordinator_liveness("c-1").await.unwrap(), Liveness::Unknown);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn for_a_while_after_a_failover_nobody_is_taken_for_gone() {
    let redis = PrivateRedis::start().await;
    let proxy = Proxy::start(redis.address(), Mode::Pass).await;
    let url = format!("redis://127.0.0.1:{}", proxy.port());
    let slow = RedisBus::connect(&Services { redis_url: url, ..redis.services.clone() }).await.unwrap();
    let _control = slow.control("w-1").await.unwrap();
    let bus = RedisBus::connect(&redis.services).await.unwrap();
    let is = async |expected| {
        let presence = WorkerPresence { id: "w-1".into(), ..WorkerPresence::default() };
        bus.announce_worker(&presence).await.unwrap();
        bus.worker_liveness("w-1").await.unwrap() == expected
    };
    assert!(is(Liveness::Alive).await);
    // A replica takes over that has all the data: only connections are lost, and this worker's is slow to come back.
    proxy.set(Mode::Refuse);
    proxy.cut();
    redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    redis.command(&["CLIENT", "KILL", "TYPE", "normal"]).await;
    recovers(&bus).await;
    assert!(is(Liveness::Unknown).await);
    eventually("it did not come back", async || is(Liveness::Gone).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_hangs_holds_nobody() {
    let redis = PrivateRedis::start().await;
    let bus = RedisBus::connect(&redis.services).await.unwrap();
    let job = Job::new();
    let mut heard = bus.subscribe(&job.channel).await.unwrap();
    open(&bus, &job, 1).await;
    redis.signal("-STOP");
    let append = timeout(PATIENCE, bus.append(&[job.append(1, 0)])).await.expect("it is bounded in time");
    assert!(append.unwrap_err().is_transient());
    redis.signal("-CONT");
    recovers(&bus).await;
    // The step may have been taken after all, as the port says.
    append_again(&bus, &[job.append(1, 1)]).await;
    while next(&mut heard).await != Notice::Frames(vec![job.frame(1, 1)]) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_redis_is_a_passing_state() {
    let redis = PrivateRedis::start().await;
    let bus = RedisBus::connect(&redis.services).await.unwrap();
    let job = Job::new();
    open(&bus, &job, 1).await;
    redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
    assert!(bus.append(&[job.append(1, 0)]).await.unwrap_err().is_transient());
    redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
    assert_eq!(bus.append(&[job.append(1, 0)]).await.unwrap().jobs, [Appended::Accepted]);
    assert_eq!(bus.read_log(job.key).await.unwrap().unwrap().frames, [job.frame(1, 0)]);
    // A script that was forgotten is sent again.
    redis.command(&["SCRIPT", "FLUSH"]).await;
    assert_eq!(bus.append(&[job.append(1, 1)]).await.unwrap().jobs, [Appended::Accepted]);
}
