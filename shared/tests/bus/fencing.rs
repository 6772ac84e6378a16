//! Several attempts at one job, at the same time: nothing of an older one shows after anything of a newer one.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stoker_shared::frame::Frame;
use stoker_shared::ports::{Appended, Bus, Notice, Opened};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, yield_now};

use crate::fixture::{Fixture, Job, open, open_as};

/// Attempts at one job.
const EPOCHS: u64 = 5;
/// Most records of an attempt.
const RECORDS: u32 = 40;
/// Jobs that are fought over, one after the other.
const ROUNDS: u64 = 12;

pub async fn nothing_old_is_visible_after_anything_newer(f: Arc<Fixture>) {
    for round in 0..ROUNDS {
        let job = Job::new();
        let mut heard = f.other.subscribe(&job.channel).await.unwrap();
        let mut attempts = JoinSet::new();
        for epoch in 1..=EPOCHS {
            let bus = if epoch % 2 == 0 { f.bus.clone() } else { f.other.clone() };
            attempts.spawn(attempt(bus, job.clone(), epoch, round * EPOCHS + epoch));
        }
        let accepted: usize = attempts.join_all().await.into_iter().sum();

        let log = f.bus.read_log(job.key).await.unwrap().unwrap();
        let epochs: Vec<u64> = log.frames.iter().map(|frame| frame.epoch).collect();
        assert!(epochs.is_sorted(), "round {round}: {epochs:?}");
        assert_eq!(log.frames.len(), accepted, "round {round}: each accepted record is there once");
        assert_eq!(log.header.epoch, EPOCHS, "round {round}: the newest attempt holds it");
        assert_eq!(
            listen(&mut heard, accepted).await,
            log.frames,
            "round {round}: what is recorded is published"
        );
    }
}

/// One attempt: opens the log at some moment, appends until it is superseded or done; how much was accepted.
async fn attempt(bus: Arc<dyn Bus>, job: Job, epoch: u64, seed: u64) -> usize {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..rng.random_range(0..10 * epoch) {
        yield_now().await;
    }
    let mut accepted = 0;
    if let Opened::Superseded { epoch: by } = open_as(&*bus, &job.opening(epoch)).await {
        assert!(by > epoch);
        // It must not get through, even though it goes on trying.
        let report = bus.append(&[job.append(epoch, 0)]).await.unwrap();
        assert_eq!(report.jobs, [Appended::Superseded]);
        return 0;
    }
    for n in 0..rng.random_range(1..RECORDS) {
        match bus.append(&[job.append(epoch, n)]).await.unwrap().jobs[..] {
            [Appended::Accepted] => accepted += 1,
            [Appended::Superseded] => return accepted,
            ref other => panic!("{other:?}"),
        }
    }
    accepted
}

pub async fn writers_of_many_jobs_share_steps(f: Arc<Fixture>) {
    let mut rng = StdRng::seed_from_u64(7);
    let jobs: Vec<Job> = (0..24).map(|i| Job::on(&format!("llm.tokens.c{}", i % 3))).collect();
    let mut heard = Vec::new();
    for channel in 0..3 {
        heard.push(f.other.subscribe(&format!("llm.tokens.c{channel}")).await.unwrap());
    }
    let mut holder = vec![1; jobs.len()];
    for job in &jobs {
        open(&*f.bus, job, 1).await;
    }
    let mut expected: Vec<Vec<Frame>> = vec![Vec::new(); 3];
    for n in 0..60 {
        if n % 5 == 0 {
            let taken = rng.random_range(0..jobs.len());
            holder[taken] += 1;
            open(&*f.other, &jobs[taken], holder[taken]).await;
        }
        // Each job's writer may be the holder or the one before.
        let epochs: Vec<u64> = holder.iter().map(|h| (h - rng.random_range(0..2)).max(1)).collect();
        let step: Vec<_> = jobs.iter().zip(&epochs).map(|(job, epoch)| job.append(*epoch, n)).collect();
        let report = f.bus.append(&step).await.unwrap();
        for (i, job) in jobs.iter().enumerate() {
            let is_holder = epochs[i] == holder[i];
            assert_eq!(
                report.jobs[i] == Appended::Accepted,
                is_holder,
                "step {n}, job {i}: {:?}",
                report.jobs[i]
            );
            if is_holder {
                expected[i % 3].push(job.frame(epochs[i], n));
            }
        }
        assert_eq!(report.unheard, Vec::<String>::new());
    }
    for (expected, heard) in expected.iter().zip(&mut heard) {
        assert_eq!(listen(heard, expected.len()).await, *expected);
    }
}

/// The next `count` frames.
async fn listen(heard: &mut mpsc::Receiver<Notice>, count: usize) -> Vec<Frame> {
    let mut frames = Vec::new();
    while frames.len() < count {
        frames.extend(crate::fixture::next_frames(heard).await);
    }
    frames
}
