//! A request's view of a job's text: takes what has come, waits for more, and reads the log when it is too far behind.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_shared::frame::Assembly;
use stoker_shared::outcome::{JobError, code};

use super::{End, Feed, Heard, Inbox, rescue};

/// Most text that a reader takes from the log at once, bytes: each time the whole log is read.
const PIECE: usize = 256 << 10;
/// How long the text may be nowhere once the job is over, or its deadline has passed.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait before the log is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// One who waits for a job's text. Dropping it gives the place up; the last reader to go cancels the job.
pub struct Reader {
    inbox: Arc<Inbox>,
    feed: Arc<Feed>,
    slot: usize,
    at: usize,
    beats: u32,
}

impl Reader {
    pub(super) fn new(inbox: Arc<Inbox>, feed: Arc<Feed>, slot: usize) -> Self {
        Self { inbox, feed, slot, at: 0, beats: 0 }
    }

    /// The job's feed.
    pub fn feed(&self) -> &Arc<Feed> {
        &self.feed
    }

    /// Skips the text before byte `at`.
    pub fn start_at(&mut self, at: usize) {
        self.at = at;
    }

    /// Waits for the next text (appended to `out`), the end, or ten idle seconds.
    pub async fn next(&mut self, out: &mut String) -> Heard {
        let Self { feed, slot, at, beats, .. } = self;
        let heard = poll_fn(|cx| feed.poll(cx, *slot, at, beats, out)).await;
        if heard == Heard::Behind { self.catch_up(out).await } else { heard }
    }

    /// Takes text that is no longer in memory from the log, or from the outcome once the log is gone.
    async fn catch_up(&mut self, out: &mut String) -> Heard {
        let give_up = self.feed.deadline.max(Instant::now()) + PATIENCE;
        let mut ended = None;
        loop {
            match self.earlier_text().await {
                Ok(Some(text)) => {
                    let Some(rest) = text.get(self.at..) else { break };
                    let cut = rest.floor_char_boundary(PIECE.min(rest.len()));
                    out.push_str(&rest[..cut]);
                    self.at += cut;
                    return Heard::Text;
                }
                // A bus that has lost it gets it again from the worker; once the job is over it is with the ledger.
                Ok(None) if ended.is_some_and(|since: Instant| since.elapsed() > PATIENCE) => break,
                failed if Instant::now() < give_up => {
                    tracing::warn!(job = %self.feed.key, "can't read the text of a slow reader yet: {failed:?}");
                    if self.feed.ended() {
                        ended.get_or_insert_with(Instant::now);
                    }
                    tokio::time::sleep(RETRY).await;
                }
                _ => break,
            }
        }
        let message = "the client fell behind, and the text that it has not read is gone";
        Heard::End(End::failed(JobError::new(code::INTERNAL, message)))
    }

    async fn earlier_text(&self) -> stoker_shared::ports::PortResult<Option<String>> {
        let ports = &self.inbox.ports;
        let log = ports.bus.read_log(self.feed.key).await;
        if let Ok(Some(log)) = &log {
            let mut whole = Assembly::default();
            for frame in &log.frames {
                whole.push(frame);
            }
            if whole.end() > self.at {
                return Ok(Some(whole.text));
            }
        }
        match rescue::outcome(ports, self.feed.key).await? {
            Some(outcome) => Ok(Some(outcome.text)),
            None => log.map(|_| None),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.inbox.leave(&self.feed, self.slot);
    }
}
