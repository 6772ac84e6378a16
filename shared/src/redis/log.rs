//! Replay logs: how attempts are opened, and steps recorded and published.
//!
//! A log is a Redis list: epoch, header (JSON), then records. It expires as a whole; when it does is set once, as an
//! attempt opens it, so that a step costs no more than the records themselves.

use std::time::Duration;

use uuid::Uuid;

use super::connection::Link;
use super::names::Names;
use super::pool::ReadPool;
use super::script::{APPEND, Call, OPEN};
use crate::frame::Frame;
use crate::ports::{Append, AppendReport, Appended, LogHeader, Opened, Opening, PortResult, ReplayLog};
use tracing::warn;

/// Milliseconds, as Redis takes them; it refuses 0.
pub(super) fn millis(life: Duration) -> String {
    life.as_millis().max(1).to_string()
}

/// [`crate::ports::Bus::open`].
pub(super) async fn open(link: &Link, names: &Names, openings: &[Opening]) -> PortResult<Vec<Opened>> {
    if openings.is_empty() {
        return Ok(Vec::new());
    }
    let keys: Vec<[String; 2]> =
        openings.iter().map(|o| [names.log(o.key), names.cancellation(o.key)]).collect();
    let args: Vec<[String; 3]> = openings
        .iter()
        .map(|o| [o.header.epoch.to_string(), header_json(&o.header), millis(o.ttl)])
        .collect();
    let mut call = Call::new(&OPEN);
    call.keys(keys.iter().flatten()).args(args.iter().flatten());
    let answers: Vec<(u64, bool, Vec<Vec<u8>>)> = link.call(&call).await?;
    let opened = |(held_by, cancelled, records): (u64, bool, Vec<Vec<u8>>)| match held_by {
        0 => Opened::Started { frames: parse_records(&records), cancelled },
        epoch => Opened::Superseded { epoch },
    };
    Ok(answers.into_iter().map(opened).collect())
}

/// [`crate::ports::Bus::append`].
pub(super) async fn append(link: &Link, names: &Names, step: &[Append]) -> PortResult<AppendReport> {
    if step.is_empty() {
        return Ok(AppendReport::default());
    }
    // Stable, so that records of one job stay in the order of the step.
    let mut order: Vec<usize> = (0..step.len()).collect();
    order.sort_by_key(|i| (&step[*i].channel, step[*i].opening.is_none()));
    let groups: Vec<&[usize]> = order.chunk_by(|a, b| step[*a].channel == step[*b].channel).collect();

    let keys: Vec<String> = order.iter().map(|i| names.log(step[*i].key)).collect();
    let epochs: Vec<String> = order.iter().map(|i| step[*i].epoch.to_string()).collect();
    let headers: Vec<Option<[String; 2]>> = order
        .iter()
        .map(|i| step[*i].opening.as_ref().map(|o| [header_json(&o.header), millis(o.ttl)]))
        .collect();
    let head = |group: &&[usize]| {
        let unopened = group.iter().filter(|i| step[**i].opening.is_some()).count();
        [names.tokens(&step[group[0]].channel), group.len().to_string(), unopened.to_string()]
    };
    let heads: Vec<[String; 3]> = groups.iter().map(head).collect();
    let mut call = Call::new(&APPEND);
    call.keys(&keys);
    let mut jobs = epochs.iter().zip(&headers);
    for (group, head) in groups.iter().zip(&heads) {
        call.args(head);
        for (i, (epoch, header)) in group.iter().zip(&mut jobs) {
            call.arg(epoch).arg(&step[*i].record).args(header.iter().flatten());
        }
    }

    let (superseded, missing, unheard): (Vec<usize>, Vec<usize>, Vec<usize>) = link.step(&call).await?;
    let mut jobs = vec![Appended::Accepted; step.len()];
    superseded.into_iter().for_each(|k| jobs[order[k]] = Appended::Superseded);
    missing.into_iter().for_each(|k| jobs[order[k]] = Appended::Missing);
    let unheard = unheard.into_iter().map(|group| step[groups[group][0]].channel.clone()).collect();
    Ok(AppendReport { jobs, unheard })
}

/// [`crate::ports::Bus::read_log`].
pub(super) async fn read(pool: &ReadPool, names: &Names, key: Uuid) -> PortResult<Option<ReplayLog>> {
    let mut command = redis::cmd("LRANGE");
    command.arg(names.log(key)).arg(0).arg(-1);
    let elements: Vec<Vec<u8>> = pool.query(&command).await?;
    let [_, header, records @ ..] = elements.as_slice() else { return Ok(None) };
    match serde_json::from_slice(header) {
        Ok(header) => Ok(Some(ReplayLog { header, frames: parse_records(records) })),
        Err(error) => {
            warn!(%key, %error, "a log whose header can't be read is taken for none");
            Ok(None)
        }
    }
}

/// [`crate::ports::Bus::expire_logs`].
pub(super) async fn expire(link: &Link, names: &Names, keys: &[Uuid], life: Duration) -> PortResult<()> {
    if keys.is_empty() {
        return Ok(());
    }
    let mut pipeline = redis::pipe();
    for key in keys {
        pipeline.cmd("PEXPIRE").arg(names.log(*key)).arg(millis(life)).arg("LT");
    }
    link.pipeline(&pipeline).await
}

fn header_json(header: &LogHeader) -> String {
    serde_json::to_string(header).expect("a header has only strings and numbers")
}

fn parse_records(records: &[Vec<u8>]) -> Vec<Frame> {
    let parse = |record: &Vec<u8>| match serde_json::from_slice(record) {
        Ok(frame) => Some(frame),
        Err(error) => {
            warn!(%error, "a record that is not a frame is skipped");
            None
        }
    };
    records.iter().filter_map(parse).collect()
}
