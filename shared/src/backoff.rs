//! Pauses between attempts that grow, for as long as something does not work.

use std::time::Duration;

/// The pauses of one series of attempts. The first lasts [`first`](Self::first), each one after it twice as long, up to
/// [`longest`](Self::longest). Every pause is shortened by a random part of it, up to [`jitter`](Self::jitter), because
/// the processes of a fleet lose a service together and should not come back to it together.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    jitter: f64,
    next: Duration,
}

impl Backoff {
    /// From 50 milliseconds to 2 seconds, each up to half shorter by chance.
    pub const fn new() -> Self {
        let first = Duration::from_millis(50);
        Self { first, longest: Duration::from_secs(2), jitter: 0.5, next: first }
    }

    /// Starts with this pause.
    #[must_use]
    pub const fn first(self, first: Duration) -> Self {
        Self { first, next: first, ..self }
    }

    /// No pause is longer.
    #[must_use]
    pub const fn longest(self, longest: Duration) -> Self {
        Self { longest, ..self }
    }

    /// The largest part of a pause that chance may take away: 0 is none, 1 all of it.
    #[must_use]
    pub const fn jitter(self, jitter: f64) -> Self {
        Self { jitter, ..self }
    }

    /// It worked: the next series begins anew with the first pause.
    pub fn reset(&mut self) {
        self.next = self.first;
    }

    /// Waits. Dropped half-way, the next pause is longer all the same.
    pub async fn pause(&mut self) {
        tokio::time::sleep(self.step()).await;
    }

    fn step(&mut self) -> Duration {
        let pause = self.next.min(self.longest);
        self.next = pause * 2;
        pause.mul_f64(1.0 - self.jitter * rand::random::<f64>())
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_millis(700);

    fn exact() -> Backoff {
        Backoff::new().first(FIRST).longest(LONGEST).jitter(0.0)
    }

    fn steps(backoff: &mut Backoff, count: usize) -> Vec<u128> {
        (0..count).map(|_| backoff.step().as_millis()).collect()
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        assert_eq!(steps(&mut exact(), 6), [100, 200, 400, 700, 700, 700]);
        assert_eq!(
            steps(&mut exact().longest(FIRST / 2), 2),
            [50, 50],
            "the first may not be longer, either"
        );
    }

    #[test]
    fn after_a_reset_they_begin_anew() {
        let mut backoff = exact();
        steps(&mut backoff, 5);
        backoff.reset();
        assert_eq!(steps(&mut backoff, 2), [100, 200]);
    }

    #[test]
    fn chance_shortens_a_pause_and_never_by_more_than_it_may() {
        let drawn: Vec<_> = (0..1000).map(|_| exact().jitter(0.75).step()).collect();
        let (least, most) = (drawn.iter().min().unwrap(), drawn.iter().max().unwrap());
        assert!(*least >= FIRST / 4 && *most <= FIRST, "{least:?} to {most:?}");
        // All of the range is used: a thousand draws miss a tenth of it at one end once in 10⁴⁵ runs.
        assert!(*least < FIRST * 325 / 1000 && *most > FIRST * 925 / 1000, "{least:?} to {most:?}");
    }

    #[test]
    fn chance_does_not_slow_the_growth() {
        let mut backoff = exact().jitter(1.0);
        steps(&mut backoff, 3);
        assert!((0..1000).map(|_| backoff.step()).max().unwrap() > LONGEST * 9 / 10);
    }

    #[tokio::test]
    async fn a_pause_lasts_as_long_as_it_says() {
        let (mut backoff, start) = (exact().first(FIRST / 10), std::time::Instant::now());
        backoff.pause().await;
        backoff.pause().await;
        assert!(start.elapsed() >= FIRST * 3 / 10);
    }
}
