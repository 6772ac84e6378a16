//! Replay logs: who may write them, what they keep, when they go.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use stoker_shared::frame::Frame;
use stoker_shared::outcome::{FinishReason, Usage};
use stoker_shared::ports::{Append, Appended, Notice, Opened, Opening, ReplayLog};
use uuid::Uuid;

use crate::fixture::{Fixture, Job, eventually, next_frames, open, open_as};

pub async fn a_log_keeps_its_records(f: Arc<Fixture>) {
    let job = Job::new();
    assert_eq!(f.bus.read_log(job.key).await.unwrap(), None);
    assert_eq!(open(&*f.bus, &job, 1).await, (vec![], false));
    let empty = ReplayLog { header: job.header(1, "w-1"), frames: vec![] };
    assert_eq!(f.other.read_log(job.key).await.unwrap(), Some(empty));
    for n in 0..100 {
        let report = f.bus.append(&[job.append(1, n)]).await.unwrap();
        assert_eq!(report.jobs, [Appended::Accepted]);
    }
    let log = f.other.read_log(job.key).await.unwrap().unwrap();
    assert_eq!(log.header, job.header(1, "w-1"));
    assert_eq!(log.frames, (0..100).map(|n| job.frame(1, n)).collect::<Vec<_>>());
}

pub async fn a_successor_takes_over_with_all_records(f: Arc<Fixture>) {
    let job = Job::new();
    open(&*f.bus, &job, 1).await;
    f.bus.append(&[job.append(1, 0)]).await.unwrap();
    assert_eq!(open(&*f.other, &job, 2).await.0, [job.frame(1, 0)]);
    f.other.append(&[job.append(2, 1)]).await.unwrap();
    // Epochs need not follow each other, and are numbers, not texts.
    assert_eq!(open(&*f.bus, &job, 10).await.0, [job.frame(1, 0), job.frame(2, 1)]);
    let log = f.bus.read_log(job.key).await.unwrap().unwrap();
    assert_eq!(log.header, job.header(10, "w-10"));
    assert_eq!(log.frames.len(), 2);
}

pub async fn an_older_attempt_is_refused(f: Arc<Fixture>) {
    let job = Job::new();
    open(&*f.bus, &job, 2).await;
    open(&*f.other, &job, 10).await;
    assert_eq!(f.bus.append(&[job.append(2, 0)]).await.unwrap().jobs, [Appended::Superseded]);
    assert_eq!(open_as(&*f.bus, &job.opening(2)).await, Opened::Superseded { epoch: 10 });
    let log = f.bus.read_log(job.key).await.unwrap().unwrap();
    assert_eq!((log.header, log.frames), (job.header(10, "w-10"), vec![]));
}

pub async fn of_two_attempts_with_one_epoch_the_first_holds(f: Arc<Fixture>) {
    let job = Job::new();
    open(&*f.bus, &job, 3).await;
    f.bus.append(&[job.append(3, 0)]).await.unwrap();
    let thief = Opening { header: job.header(3, "thief"), ..job.opening(3) };
    assert_eq!(open_as(&*f.other, &thief).await, Opened::Superseded { epoch: 3 });
    // The same attempt may open it again, after an answer that it did not get.
    assert_eq!(open(&*f.bus, &job, 3).await.0, [job.frame(3, 0)]);
}

pub async fn without_a_log_nothing_is_recorded_or_published(f: Arc<Fixture>) {
    let (lost, kept) = (Job::new(), Job::new());
    let mut heard = f.other.subscribe(&lost.channel).await.unwrap();
    open(&*f.bus, &kept, 1).await;
    let report = f.bus.append(&[lost.append(1, 0), kept.append(1, 0)]).await.unwrap();
    assert_eq!(report.jobs, [Appended::Missing, Appended::Accepted]);
    assert_eq!(f.bus.read_log(lost.key).await.unwrap(), None);
    open(&*f.bus, &lost, 1).await;
    f.bus.append(&[lost.append(1, 7)]).await.unwrap();
    assert_eq!(next_frames(&mut heard).await, [lost.frame(1, 7)]);
}

pub async fn a_first_record_opens_its_log(f: Arc<Fixture>) {
    let (job, other) = (Job::new(), Job::on("llm.tokens.shared"));
    let neighbour = Job::on("llm.tokens.shared");
    let mut heard = f.other.subscribe(&other.channel).await.unwrap();
    open(&*f.bus, &neighbour, 1).await;
    let first = |job: &Job, n| Append { opening: Some(job.opening(1)), ..job.append(1, n) };
    let step = [neighbour.append(1, 3), first(&job, 0), first(&other, 5)];
    assert_eq!(f.bus.append(&step).await.unwrap().jobs, [Appended::Accepted; 3]);
    let log = f.other.read_log(job.key).await.unwrap().unwrap();
    assert_eq!(log, ReplayLog { header: job.header(1, "w-1"), frames: vec![job.frame(1, 0)] });
    let mut frames = next_frames(&mut heard).await;
    frames.sort_by_key(|frame| frame.seq);
    assert_eq!(frames, [neighbour.frame(1, 3), other.frame(1, 5)]);
    // The opening that was under way comes, and finds what was written; or came before.
    assert_eq!(open(&*f.bus, &job, 1).await.0, [job.frame(1, 0)]);
    assert_eq!(f.bus.append(&[first(&job, 1)]).await.unwrap().jobs, [Appended::Accepted]);
    assert_eq!(f.other.read_log(job.key).await.unwrap().unwrap().frames, [job.frame(1, 0), job.frame(1, 1)]);
}

pub async fn a_first_record_takes_no_log_from_another(f: Arc<Fixture>) {
    let (overtaken, doubled) = (Job::new(), Job::new());
    open(&*f.other, &overtaken, 2).await;
    let thief = Opening { header: doubled.header(1, "thief"), ..doubled.opening(1) };
    open_as(&*f.other, &thief).await;
    let first = |job: &Job| Append { opening: Some(job.opening(1)), ..job.append(1, 0) };
    let report = f.bus.append(&[first(&overtaken), first(&doubled)]).await.unwrap();
    assert_eq!(report.jobs, [Appended::Superseded; 2]);
    for (job, header) in [(&overtaken, overtaken.header(2, "w-2")), (&doubled, thief.header)] {
        let log = f.other.read_log(job.key).await.unwrap().unwrap();
        assert_eq!(log, ReplayLog { header, frames: vec![] });
    }
    // Of an older log it makes nothing: that is opened, after its records were read.
    let late = Append { opening: Some(overtaken.opening(3)), ..overtaken.append(3, 0) };
    assert_eq!(f.bus.append(&[late]).await.unwrap().jobs, [Appended::Missing]);
}

pub async fn an_older_log_counts_as_missing(f: Arc<Fixture>) {
    // The service lost its data, and the older of two attempts noticed first.
    let job = Job::new();
    open(&*f.bus, &job, 1).await;
    f.bus.append(&[job.append(1, 0)]).await.unwrap();
    assert_eq!(f.other.append(&[job.append(2, 0)]).await.unwrap().jobs, [Appended::Missing]);
    assert_eq!(open(&*f.other, &job, 2).await.0, [job.frame(1, 0)]);
    assert_eq!(f.other.append(&[job.append(2, 1)]).await.unwrap().jobs, [Appended::Accepted]);
}

pub async fn a_batch_is_answered_in_order(f: Arc<Fixture>) {
    let jobs: Vec<Job> = (0..20).map(|_| Job::new()).collect();
    for (i, job) in jobs.iter().enumerate() {
        match i % 4 {
            0 => {}
            1 => drop(open(&*f.bus, job, 9).await),
            2 => f.bus.cancel(job.key, Duration::from_secs(60)).await.unwrap(),
            _ => {
                open(&*f.bus, job, 1).await;
                f.bus.append(&[job.append(1, i as u32)]).await.unwrap();
            }
        }
    }
    let openings: Vec<Opening> = jobs.iter().map(|job| job.opening(2)).collect();
    let opened = f.other.open(&openings).await.unwrap();
    let expected = jobs.iter().enumerate().map(|(i, job)| match i % 4 {
        0 => Opened::Started { frames: vec![], cancelled: false },
        1 => Opened::Superseded { epoch: 9 },
        2 => Opened::Started { frames: vec![], cancelled: true },
        _ => Opened::Started { frames: vec![job.frame(1, i as u32)], cancelled: false },
    });
    assert_eq!(opened, expected.collect::<Vec<_>>());
}

pub async fn logs_expire(f: Arc<Fixture>) {
    let hasty = Job::new();
    let opening = Opening { ttl: Duration::from_millis(300), ..hasty.opening(1) };
    f.bus.append(&[Append { opening: Some(opening), ..hasty.append(1, 0) }]).await.unwrap();
    let (brief, lasting) = (Job::new(), Job::new());
    let opening = Opening { ttl: Duration::from_millis(300), ..brief.opening(1) };
    open_as(&*f.bus, &opening).await;
    open(&*f.bus, &lasting, 1).await;
    f.bus.append(&[brief.append(1, 0), lasting.append(1, 0)]).await.unwrap();
    eventually("it expires", async || f.bus.read_log(brief.key).await.unwrap().is_none()).await;
    eventually("it expires", async || f.bus.read_log(hasty.key).await.unwrap().is_none()).await;
    let report = f.bus.append(&[brief.append(1, 1), lasting.append(1, 1)]).await.unwrap();
    assert_eq!(report.jobs, [Appended::Missing, Appended::Accepted]);
    assert_eq!(open(&*f.bus, &brief, 1).await.0, []);
}

pub async fn ended_logs_expire_early_and_never_late(f: Arc<Fixture>) {
    let (early, never_late, lasting) = (Job::new(), Job::new(), Job::new());
    open(&*f.bus, &early, 1).await;
    open(&*f.bus, &lasting, 1).await;
    open_as(&*f.bus, &Opening { ttl: Duration::from_millis(1500), ..never_late.opening(1) }).await;
    f.bus.expire_logs(&[never_late.key, lasting.key], Duration::from_secs(3600)).await.unwrap();
    f.bus.expire_logs(&[early.key, Uuid::new_v4()], Duration::from_millis(100)).await.unwrap();
    for job in [early, never_late] {
        eventually("it expires", async || f.bus.read_log(job.key).await.unwrap().is_none()).await;
    }
    assert!(f.bus.read_log(lasting.key).await.unwrap().is_some());
}

pub async fn any_text_survives(f: Arc<Fixture>) {
    let job = Job::new();
    let mut heard = f.other.subscribe(&job.channel).await.unwrap();
    open(&*f.bus, &job, 1).await;
    let texts =
        ["", "\"],[{\\", "\0\u{1}\r\n\u{2028}", "naïve 🦀 日本語", "%s %d\\u0000", &"long ".repeat(50_000)];
    let mut frames: Vec<Frame> =
        (0..).zip(texts).map(|(n, text)| Frame { text: text.into(), ..job.frame(1, n) }).collect();
    frames.push(Frame {
        key: Some(Uuid::new_v4()),
        finish_reason: Some(FinishReason::Stop),
        usage: Some(Usage { prompt_tokens: 1, completion_tokens: 2, cached_prompt_tokens: 0 }),
        ..job.frame(1, 99)
    });
    let step: Vec<Append> = frames.iter().map(|frame| job.append_frame(frame)).collect();
    f.bus.append(&step).await.unwrap();
    assert_eq!(next_frames(&mut heard).await, frames);
    assert_eq!(f.bus.read_log(job.key).await.unwrap().unwrap().frames, frames);
}

pub async fn what_is_no_frame_harms_no_other(f: Arc<Fixture>) {
    let (job, odd) = (Job::on("llm.tokens.c"), Job::on("llm.tokens.c"));
    let mut heard = f.other.subscribe(&job.channel).await.unwrap();
    open(&*f.bus, &job, 1).await;
    open(&*f.bus, &odd, 1).await;
    let no_frame = Append { record: Bytes::from_static(br#"{"v":9,"who":"knows"}"#), ..odd.append(1, 0) };
    f.bus.append(&[no_frame, job.append(1, 0)]).await.unwrap();
    assert_eq!(next_frames(&mut heard).await, [job.frame(1, 0)]);
    assert_eq!(f.bus.read_log(odd.key).await.unwrap().unwrap().frames, []);
}

pub async fn nothing_asked_nothing_done(f: Arc<Fixture>) {
    assert_eq!(f.bus.open(&[]).await.unwrap(), []);
    assert_eq!(f.bus.append(&[]).await.unwrap(), Default::default());
    f.bus.expire_logs(&[], Duration::ZERO).await.unwrap();
    eventually("it connects", async || f.bus.ready().await.is_ok()).await;
    let mut heard = f.bus.subscribe("llm.tokens.none").await.unwrap();
    assert_eq!(heard.try_recv().ok(), None::<Notice>);
}
