//! Fills gaps: reads the replay log of feeds that missed something, and the ledger when there is no log any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;
use stoker_shared::frame::Pushed;
use stoker_shared::outcome::Outcome;
use stoker_shared::ports::{JobState, PortResult, Ports};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{End, Feed, Inbox};

/// Logs that are read side by side.
const PARALLEL: usize = 32;
/// Between two looks of which the first found nothing new.
const PAUSE: Duration = Duration::from_millis(250);
/// After so many fruitless looks at a log, the ledger is asked whether the job is over.
const LOOKS_BEFORE_LEDGER: u32 = 4;

/// Reads the logs of the feeds that ask for it.
pub async fn run(inbox: Arc<Inbox>, queue: mpsc::UnboundedReceiver<Arc<Feed>>) {
    let feeds = stream::unfold(queue, |mut queue| async move { Some((queue.recv().await?, queue)) });
    feeds.for_each_concurrent(PARALLEL, |feed| rescue(&inbox, feed)).await;
}

async fn rescue(inbox: &Inbox, feed: Arc<Feed>) {
    loop {
        let advanced = look(inbox, &feed).await.unwrap_or_else(|e| {
            tracing::debug!(job = %feed.key, "can't read the log yet: {e}");
            false
        });
        if feed.ended() {
            inbox.table.remove(&feed);
        }
        if !feed.rescued() {
            return;
        }
        if !advanced {
            // The log has the hole, too, for now.
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Whether there was something new.
async fn look(inbox: &Inbox, feed: &Feed) -> PortResult<bool> {
    let mut advanced = false;
    if let Some(log) = inbox.ports.bus.read_log(feed.key).await? {
        let now = Instant::now();
        for frame in &log.frames {
            advanced |= feed.push(frame, now) == Pushed::Advanced;
        }
    }
    // Of an attached job (not owned) the log may be gone already; of others it outlives the stream.
    if !feed.ended()
        && (feed.looks() >= LOOKS_BEFORE_LEDGER || !feed.owned)
        && let Some(outcome) = outcome(&inbox.ports, feed.key).await?
    {
        feed.finish(Some(&outcome.text), End::new(outcome.finish_reason, outcome.usage, outcome.error));
    }
    Ok(advanced)
}

/// A job's outcome, if the ledger has it.
pub async fn outcome(ports: &Ports, key: Uuid) -> PortResult<Option<Outcome>> {
    let Some(row) = ports.ledger.find(key).await? else { return Ok(None) };
    let bytes = row.outcome.filter(|_| row.state == JobState::Done);
    Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}
