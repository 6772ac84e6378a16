//! How much of a prompt goes into one step.
//!
//! While nobody is streaming, large chunks are the most efficient. Beside running streams a chunk lengthens the gap between
//! two of their tokens; so its size follows from measured times: a step with a chunk shall take about two and a half times
//! one without.

use std::time::Duration;

/// Most prompt tokens in one step.
const LARGEST: usize = 512;
/// Fewest; also a prompt must get on.
const SMALLEST: usize = 8;
/// Time for a chunk, in steps without one.
const STRETCH: f64 = 1.5;
/// Weight of the newest measurement.
const NEWEST: f64 = 0.2;

/// Running means of what steps take, seconds.
#[derive(Default)]
pub(crate) struct Pace {
    /// A step that only decodes.
    decode: Option<f64>,
    /// What one prompt token adds.
    token: Option<f64>,
    /// Tests choose the chunks themselves.
    #[cfg(test)]
    pub fixed: Option<usize>,
}

impl Pace {
    /// Prompt tokens for the next step, in which `decoding` sequences stream.
    pub fn chunk(&self, decoding: usize) -> usize {
        #[cfg(test)]
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        match (decoding, self.decode, self.token) {
            (0, _, _) => LARGEST,
            (_, Some(decode), Some(token)) => {
                ((STRETCH * decode / token) as usize).clamp(SMALLEST, LARGEST) & !7
            }
            _ => 4 * SMALLEST,
        }
    }

    /// Learns from a step of `rows` rows, `decoding` of which were single tokens of streams.
    pub fn record(&mut self, decoding: usize, rows: usize, took: Duration) {
        let took = took.as_secs_f64();
        let prompt = rows.saturating_sub(decoding);
        if prompt == 0 {
            mix(&mut self.decode, took);
        } else if prompt >= SMALLEST {
            let beside = if decoding > 0 { self.decode.unwrap_or(0.0) } else { 0.0 };
            mix(&mut self.token, (took - beside).max(0.1 * took) / prompt as f64);
        }
    }
}

fn mix(mean: &mut Option<f64>, newest: f64) {
    *mean = Some(mean.map_or(newest, |mean| mean + NEWEST * (newest - mean)));
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
            pace.record(8, 8, Duration::from_millis(20));
        }
        assert_eq!(pace.chunk(0), LARGEST);
        // 20 ms a step, 1 ms a token: 30 tokens, in whole eights.
        assert_eq!(pace.chunk(8), 24);
        pace.record(8, 8, Duration::from_nanos(1));
        for _ in 0..100 {
            pace.record(8, 8, Duration::from_micros(10));
        }
        assert_eq!(pace.chunk(8), SMALLEST);
    }
}
