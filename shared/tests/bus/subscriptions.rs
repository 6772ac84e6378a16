//! Token channels: what subscribers hear, and what a worker is told of them.

use std::sync::Arc;

use stoker_shared::ports::{AppendReport, Appended, Notice};

use crate::fixture::{Fixture, Job, eventually, next, next_frames, open};

pub async fn a_step_is_one_message_per_channel(f: Arc<Fixture>) {
    let jobs = ["a", "b", "a", "b", "a"].map(|c| Job::on(&format!("llm.tokens.{c}")));
    let mut a = f.other.subscribe("llm.tokens.a").await.unwrap();
    let mut b = f.other.subscribe("llm.tokens.b").await.unwrap();
    for job in &jobs {
        open(&*f.bus, job, 1).await;
    }
    open(&*f.bus, &jobs[2], 2).await;
    let step: Vec<_> = jobs.iter().zip(0..).map(|(job, n)| job.append(1, n)).collect();
    let report = f.bus.append(&step).await.unwrap();
    let mut expected = vec![Appended::Accepted; 5];
    expected[2] = Appended::Superseded;
    assert_eq!(report, AppendReport { jobs: expected, unheard: vec![] });
    assert_eq!(next_frames(&mut a).await, [jobs[0].frame(1, 0), jobs[4].frame(1, 4)]);
    assert_eq!(next_frames(&mut b).await, [jobs[1].frame(1, 1), jobs[3].frame(1, 3)]);
}

pub async fn channels_that_nobody_hears_are_told(f: Arc<Fixture>) {
    let jobs = ["heard", "unheard", "refused", "unheard"].map(|c| Job::on(&format!("llm.tokens.{c}")));
    let _heard = f.other.subscribe("llm.tokens.heard").await.unwrap();
    for job in &jobs {
        open(&*f.bus, job, if job.channel.ends_with("refused") { 2 } else { 1 }).await;
    }
    let step: Vec<_> = jobs.iter().map(|job| job.append(1, 0)).collect();
    // Nothing was published to the third, so nobody can have missed it.
    assert_eq!(f.bus.append(&step).await.unwrap().unheard, ["llm.tokens.unheard"]);
}

pub async fn all_subscribers_hear(f: Arc<Fixture>) {
    let job = Job::new();
    let mut subscribers = Vec::new();
    for _ in 0..3 {
        subscribers.push(f.bus.subscribe(&job.channel).await.unwrap());
        subscribers.push(f.other.subscribe(&job.channel).await.unwrap());
    }
    open(&*f.bus, &job, 1).await;
    for n in 0..10 {
        f.bus.append(&[job.append(1, n)]).await.unwrap();
    }
    for heard in &mut subscribers {
        for n in 0..10 {
            assert_eq!(next_frames(heard).await, [job.frame(1, n)]);
        }
    }
}

pub async fn who_leaves_is_no_longer_counted(f: Arc<Fixture>) {
    let job = Job::new();
    let first = f.other.subscribe(&job.channel).await.unwrap();
    let mut second = f.other.subscribe(&job.channel).await.unwrap();
    open(&*f.bus, &job, 1).await;
    drop(first);
    assert!(f.bus.append(&[job.append(1, 0)]).await.unwrap().unheard.is_empty());
    assert_eq!(next_frames(&mut second).await, [job.frame(1, 0)]);
    drop(second);
    eventually("nobody hears", async || !f.bus.append(&[job.append(1, 1)]).await.unwrap().unheard.is_empty())
        .await;
    let mut third = f.other.subscribe(&job.channel).await.unwrap();
    assert!(f.bus.append(&[job.append(1, 2)]).await.unwrap().unheard.is_empty());
    assert_eq!(next_frames(&mut third).await, [job.frame(1, 2)]);
}

pub async fn a_lagging_subscriber_is_told_and_goes_on(f: Arc<Fixture>) {
    const STEPS: u32 = 3000;
    let job = Job::new();
    let mut heard = f.other.subscribe(&job.channel).await.unwrap();
    let mut probe = f.other.subscribe(&job.channel).await.unwrap();
    open(&*f.bus, &job, 1).await;
    for n in 0..STEPS {
        f.bus.append(&[job.append(1, n)]).await.unwrap();
        // What the quick subscriber has heard, the slow one has been offered.
        assert_eq!(next_frames(&mut probe).await, [job.frame(1, n)]);
    }
    let mut n = 0;
    while let Notice::Frames(frames) = next(&mut heard).await {
        assert_eq!(frames, [job.frame(1, n)], "nothing is dropped before it is told");
        n += 1;
    }
    assert!(n < STEPS, "a mailbox is bounded");
    assert_eq!(f.other.read_log(job.key).await.unwrap().unwrap().frames.len(), STEPS as usize);
    f.bus.append(&[job.append(1, STEPS)]).await.unwrap();
    assert_eq!(next_frames(&mut heard).await, [job.frame(1, STEPS)]);
}

pub async fn the_slow_do_not_hold_up_the_quick(f: Arc<Fixture>) {
    let (slow, quick) = (Job::new(), Job::new());
    let _slow = f.other.subscribe(&slow.channel).await.unwrap();
    let mut heard = f.other.subscribe(&quick.channel).await.unwrap();
    open(&*f.bus, &slow, 1).await;
    open(&*f.bus, &quick, 1).await;
    for n in 0..3000 {
        let report = f.bus.append(&[slow.append(1, n), quick.append(1, n)]).await.unwrap();
        assert!(report.unheard.is_empty(), "the slow one is still there");
        assert_eq!(next_frames(&mut heard).await, [quick.frame(1, n)]);
    }
}
