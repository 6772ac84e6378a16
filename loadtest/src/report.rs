//! What a run measured.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::client::Answer;

/// Figures of one client, or of all.
#[derive(Debug)]
pub struct Report {
    requests: u64,
    tokens: u64,
    first: Histogram<u64>,
    per_token: Histogram<u64>,
    total: Histogram<u64>,
    errors: BTreeMap<String, u64>,
    /// Ids of the jobs that were answered.
    pub ids: Vec<String>,
}

impl Default for Report {
    fn default() -> Self {
        // Microseconds up to an hour, three significant digits.
        let histogram = || Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("the bounds are valid");
        Self {
            requests: 0,
            tokens: 0,
            first: histogram(),
            per_token: histogram(),
            total: histogram(),
            errors: BTreeMap::new(),
            ids: Vec::new(),
        }
    }
}

fn micros(d: Duration) -> u64 {
    d.as_micros() as u64
}

impl Report {
    /// Counts an answer.
    pub fn answer(&mut self, answer: Answer) {
        self.requests += 1;
        self.tokens += answer.tokens;
        self.first.saturating_record(micros(answer.first));
        self.total.saturating_record(micros(answer.total));
        if answer.tokens > 1 {
            self.per_token.saturating_record(micros(answer.total - answer.first) / (answer.tokens - 1));
        }
        self.ids.extend(answer.id);
    }

    /// Counts a failure.
    pub fn error(&mut self, what: String) {
        *self.errors.entry(what).or_default() += 1;
    }

    /// Takes in another client's figures.
    pub fn merge(&mut self, other: Self) {
        self.requests += other.requests;
        self.tokens += other.tokens;
        // All have the same bounds, so that adding cannot fail.
        let _ = self.first.add(other.first);
        let _ = self.per_token.add(other.per_token);
        let _ = self.total.add(other.total);
        for (what, n) in other.errors {
            *self.errors.entry(what).or_default() += n;
        }
        self.ids.extend(other.ids);
    }

    /// Failures in all.
    pub fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Prints the figures of a run that took `elapsed`.
    pub fn print(&self, elapsed: Duration, as_json: bool) {
        if as_json {
            println!("{}", self.to_json(elapsed));
            return;
        }
        let s = elapsed.as_secs_f64();
        println!("{} requests in {s:.1} s, {} errors", self.requests, self.error_count());
        println!("{:>10.1} requests/s {:>10.1} tokens/s", self.requests as f64 / s, self.tokens as f64 / s);
        println!("{:<24} {:>9} {:>9} {:>9} {:>9}", "milliseconds", "p50", "p95", "p99", "max");
        for (name, h) in self.histograms() {
            let q = |q| h.value_at_quantile(q) as f64 / 1e3;
            println!("{name:<24} {:>9.2} {:>9.2} {:>9.2} {:>9.2}", q(0.5), q(0.95), q(0.99), q(1.0));
        }
        for (what, n) in self.errors.iter().take(10) {
            println!("{n} × {what}");
        }
    }

    fn histograms(&self) -> [(&'static str, &Histogram<u64>); 3] {
        [
            ("time to first token", &self.first),
            ("time per output token", &self.per_token),
            ("whole request", &self.total),
        ]
    }

    fn to_json(&self, elapsed: Duration) -> Value {
        let s = elapsed.as_secs_f64();
        let ms = |h: &Histogram<u64>| {
            let q = |q| h.value_at_quantile(q) as f64 / 1e3;
            json!({"p50": q(0.5), "p95": q(0.95), "p99": q(0.99), "max": q(1.0)})
        };
        json!({
            "seconds": s,
            "requests": self.requests,
            "requests_per_second": self.requests as f64 / s,
            "tokens_per_second": self.tokens as f64 / s,
            "time_to_first_token_ms": ms(&self.first),
            "time_per_output_token_ms": ms(&self.per_token),
            "request_ms": ms(&self.total),
            "errors": self.error_count(),
            "error_kinds": self.errors,
        })
    }
}
