//! Pauses between attempts that grow, with some randomness so that processes don't knock in step.

use std::time::Duration;

/// First pause.
const FIRST: Duration = Duration::from_millis(50);
/// Longest pause.
const LONGEST: Duration = Duration::from_secs(5);

/// The pauses of one series of attempts.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    /// Starts with a short pause.
    pub fn new() -> Self {
        Self { next: FIRST }
    }

    /// It worked: the next series starts with a short pause again.
    pub fn reset(&mut self) {
        self.next = FIRST;
    }

    /// Waits, longer each time.
    pub async fn wait(&mut self) {
        let pause = self.next.mul_f64(rand::random_range(0.75..1.25));
        self.next = (self.next * 2).min(LONGEST);
        tokio::time::sleep(pause).await;
    }
}
