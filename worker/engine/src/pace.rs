//! How much of a prompt goes into one step.
//!
//! While nobody is streaming, large chunks are the most efficient. Beside running streams a chunk lengthens the gap between
//! two of their tokens; so its size follows from measured times: a step with a chunk shall take about half as long again as
//! one without. That leaves room below three times for what is not foreseen: times vary, and behind a long context a token
//! costs more than those before it did. The same times tell what guessed tokens cost.

use std::collections::BTreeMap;
use std::time::Duration;

/// Most prompt tokens in one step.
const LARGEST: usize = 512;
/// Fewest; also a prompt must get on.
const SMALLEST: usize = 2;
/// Time for a chunk, in steps without one.
const STRETCH: f64 = 0.5;
/// Weight of the newest measurement.
const NEWEST: f64 = 0.2;

/// Running means of what steps take, seconds.
#[derive(Default)]
pub(crate) struct Pace {
    /// A step that only decodes, by its rows.
    steps: BTreeMap<usize, f64>,
    /// What one prompt token adds.
    token: Option<f64>,
    /// Tests choose the chunks themselves.
    #[cfg(test)]
    pub fixed: Option<usize>,
    /// And how many tokens are guessed.
    #[cfg(test)]
    pub fixed_draft: Option<usize>,
}

impl Pace {
    /// Prompt tokens for the next step, in which `decoding` sequences stream.
    pub fn chunk(&self, decoding: usize) -> usize {
        #[cfg(test)]
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        if decoding == 0 {
            return LARGEST;
        }
        match (self.step(decoding), self.token) {
            (Some(step), Some(token)) => ((STRETCH * step / token) as usize).clamp(SMALLEST, LARGEST) & !1,
            _ => 8 * SMALLEST,
        }
    }

    /// What a step of `rows` rows takes that only decodes; `None` if there was no step yet.
    pub fn step(&self, rows: usize) -> Option<f64> {
        let below = self.steps.range(..=rows).next_back();
        let above = self.steps.range(rows..).next();
        match (below, above) {
            (Some((low, short)), Some((high, long))) if low < high => {
                Some(short + (long - short) * (rows - low) as f64 / (high - low) as f64)
            }
            // A row beyond costs what a prompt's does.
            (Some((low, short)), None) => Some(short + self.token.unwrap_or(0.0) * (rows - low) as f64),
            (_, Some((_, long))) => Some(*long),
            (None, None) => None,
        }
    }

    /// Learns from a step of `streams` rows that decode and `prompt` rows of prompts.
    pub fn record(&mut self, streams: usize, prompt: usize, took: Duration) {
        let took = took.as_secs_f64();
        if prompt == 0 {
            mix(self.steps.entry(streams).or_insert(took), took);
        } else if prompt >= SMALLEST {
            let beside = if streams > 0 { self.step(streams).unwrap_or(0.0) } else { 0.0 };
            let token = (took - beside).max(0.1 * took) / prompt as f64;
            mix(self.token.get_or_insert(token), token);
        }
    }
}

fn mix(mean: &mut f64, newest: f64) {
    *mean += NEWEST * (newest - *mean);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_large_alone_and_bounded_by_time_beside_streams() {
        let mut pace = Pace::default();
        assert_eq!(pace.chunk(0), LARGEST);
        for _ in 0..50 {
            pace.record(0, 512, Duration::from_millis(512));
            pace.record(8, 0, Duration::from_millis(20));
        }
        assert_eq!(pace.chunk(0), LARGEST);
        // 20 ms a step, 1 ms a token: 10 tokens take half as long.
        assert_eq!(pace.chunk(8), 10);
        pace.record(8, 0, Duration::from_nanos(1));
        for _ in 0..100 {
            pace.record(8, 0, Duration::from_micros(10));
        }
        assert_eq!(pace.chunk(8), SMALLEST);
    }

    #[test]
    fn steps_never_seen_lie_between_those_that_were() {
        let mut pace = Pace::default();
        assert_eq!(pace.step(1), None);
        pace.record(2, 0, Duration::from_millis(20));
        pace.record(6, 0, Duration::from_millis(40));
        let millis = |pace: &Pace, rows| (pace.step(rows).unwrap() * 1e3).round() as u32;
        assert_eq!([1, 2, 3, 6, 9].map(|rows| millis(&pace, rows)), [20, 20, 25, 40, 40]);
        pace.record(0, 100, Duration::from_millis(500));
        assert_eq!(millis(&pace, 9), 55, "a row beyond costs what a prompt's does");
    }

    #[test]
    fn a_step_with_a_chunk_stays_below_three_without() {
        // Eight streams, on machines where a prompt's token costs little or much beside a step.
        for token in [0.01, 0.1, 0.3, 0.7] {
            let mut pace = Pace::default();
            let mut longest = 0.0_f64;
            for round in 0..300 {
                // Times vary by a tenth.
                let vary = 1.0 + 0.1 * ((round * 7 % 10) as f64 / 4.5 - 1.0);
                let chunk = if round % 2 == 0 { 0 } else { pace.chunk(8) };
                let took = (5.0 + token * chunk as f64) * vary;
                if round > 20 {
                    longest = longest.max(took);
                }
                pace.record(8, chunk, Duration::from_secs_f64(took / 1e3));
            }
            assert!(longest < 3.0 * 5.0, "{longest} ms where a token takes {token}");
        }
    }
}
