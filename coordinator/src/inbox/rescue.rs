//! Fills gaps: reads the replay log of feeds that missed something, and the ledger when there is no log any more.

use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::stream;
use stoker_shared::outcome::Outcome;
use stoker_shared::ports::{JobState, PortResult, Ports};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{End, Feed, Inbox};

/// Logs that are read side by side.
const PARALLEL: usize = 32;
/// After so many fruitless looks at a log, the ledger is asked whether the job is over.
const LOOKS_BEFORE_LEDGER: u32 = 4;

/// Reads the logs of the feeds that ask for it.
pub async fn run(inbox: Arc<Inbox>, queue: mpsc::UnboundedReceiver<Arc<Feed>>) {
    let feeds = stream::unfold(queue, |mut queue| async move { Some((queue.recv().await?, queue)) });
    feeds.for_each_concurrent(PARALLEL, |feed| rescue(&inbox, feed)).await;
}

async fn rescue(inbox: &Inbox, feed: Arc<Feed>) {
    loop {
        match look(inbox, &feed).await {
            Ok(()) => {}
            Err(e) => tracing::debug!(job = %feed.key, "can't read the log yet: {e}"),
        }
        if feed.ended() {
            inbox.table.remove(&feed);
        }
        if !feed.rescued() {
            return;
        }
    }
}

async fn look(inbox: &Inbox, feed: &Feed) -> PortResult<()> {
    if let Some(log) = inbox.ports.bus.read_log(feed.key).await? {
        let now = Instant::now();
        for frame in &log.frames {
            feed.push(frame, now);
        }
    }
    // Of an attached job (not owned) the log may be gone already; of others it outlives the stream.
    if !feed.ended()
        && (feed.looks() >= LOOKS_BEFORE_LEDGER || !feed.owned)
        && let Some(outcome) = outcome(&inbox.ports, feed.key).await?
    {
        feed.finish(Some(&outcome.text), End::new(outcome.finish_reason, outcome.usage, outcome.error));
    }
    Ok(())
}

/// A job's outcome, if the ledger has it.
pub async fn outcome(ports: &Ports, key: Uuid) -> PortResult<Option<Outcome>> {
    let Some(row) = ports.ledger.find(key).await? else { return Ok(None) };
    let bytes = row.outcome.filter(|_| row.state == JobState::Done);
    Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}
