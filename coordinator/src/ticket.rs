//! A connected request's claim to its answer, from whichever source it comes: a job of its own, one that it joined, or
//! the cache. Handlers take text and the end out of it; rows and metrics follow by themselves, and a ticket that is
//! dropped early (its client has gone) gives its place up.

use std::sync::Arc;
use std::time::Instant;

use metrics::histogram;
use stoker_shared::job::Job;
use stoker_shared::outcome::{JobError, code};
use stoker_shared::telemetry::metric;
use uuid::Uuid;

use crate::billing::{Billing, Free};
use crate::inbox::{End, Heard, Reader};
use crate::outcome::Story;
use crate::routing::Model;

/// A connected request's claim to its answer.
pub struct Ticket {
    /// Names the request: the job's key, or one of its own if it joined or was answered from the cache.
    pub key: Uuid,
    /// Who answers.
    pub model: Arc<Model>,
    /// When the request came, Unix seconds.
    pub created: i64,
    /// It was answered from the cache, or by another request's job.
    pub cached: bool,
    accepted: Instant,
    reader: Reader,
    /// Where a row is due for a request without a job of its own.
    bill: Option<Bill>,
    begun: bool,
}

struct Bill {
    job: Job,
    tenant: String,
    api_key_id: Option<String>,
    billing: Billing,
    text: String,
}

impl Ticket {
    /// For a job of its own.
    pub fn own(key: Uuid, model: Arc<Model>, accepted: Instant, reader: Reader) -> Self {
        let created = time::OffsetDateTime::now_utc().unix_timestamp();
        Self { key, model, created, cached: false, accepted, reader, bill: None, begun: false }
    }

    /// For an answer that no job of its own makes.
    pub fn free(mut self, job: Job, tenant: String, api_key_id: Option<String>, billing: Billing) -> Self {
        self.bill = Some(Bill { job, tenant, api_key_id, billing, text: String::new() });
        self.cached = true;
        self
    }

    /// Waits for the next text (appended to `out`), the end, or ten idle seconds.
    pub async fn next(&mut self, out: &mut String) -> Heard {
        let before = out.len();
        let heard = self.reader.next(out).await;
        if !self.begun && out.len() > before {
            self.begun = true;
            self.record_first_token();
        }
        if let Some(bill) = &mut self.bill {
            bill.text.push_str(&out[before..]);
        }
        if let Heard::End(end) = &heard {
            self.settle(end);
        }
        heard
    }

    /// Waits for the end; the whole text.
    pub async fn whole(&mut self) -> Result<(String, End), JobError> {
        let mut text = String::new();
        loop {
            if let Heard::End(end) = self.next(&mut text).await {
                return match end.error {
                    Some(error) => Err(error),
                    None => Ok((text, end)),
                };
            }
        }
    }

    /// Milliseconds since the request came.
    pub fn elapsed_ms(&self) -> u64 {
        millis(self.accepted, Instant::now())
    }

    /// Milliseconds from the request to its first text.
    pub fn first_token_ms(&self) -> Option<u64> {
        Some(millis(self.accepted, self.reader.feed().first_text()?))
    }

    fn record_first_token(&self) {
        let first = self.reader.feed().first_text().unwrap_or_else(Instant::now);
        let seconds = first.saturating_duration_since(self.accepted).as_secs_f64();
        histogram!(metric::TIME_TO_FIRST_TOKEN, "model" => self.model.name.clone()).record(seconds);
    }

    /// Hands in the row of a request that had no job of its own.
    fn settle(&mut self, end: &End) {
        let Some(bill) = self.bill.take() else { return };
        let story = Story {
            execution_ms: self.elapsed_ms(),
            first_token_ms: self.first_token_ms(),
            cached: true,
            ..Story::default()
        };
        let Bill { job, tenant, api_key_id, billing, text } = bill;
        billing.hand_in(Free { key: self.key, job, tenant, api_key_id, text, end: end.clone(), story });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.settle(&End::failed(JobError::new(code::CANCELLED, "the client went away")));
    }
}

fn millis(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_millis()).unwrap_or(u64::MAX)
}
