//! Tokens guessed ahead, without a second model.
//!
//! Texts repeat themselves and their prompts: names, quotations, code that is edited. So a continuation is looked up: where
//! the sequence's last tokens stood before, what followed them then is likely to follow now ("prompt lookup decoding"). The
//! guess goes through the model in the same step as the newest token, one row for each token. A guessed token is right if it
//! is the one that the sampler takes anyway, from the logits and with the random number of its position. So the text is the
//! same with guesses and without; only the steps are fewer.
//!
//! Each row costs time. How long a guess is worth it depends on how many of this sequence's were right, and on what a step
//! takes with more rows: [`Drafter::length`].

use std::collections::HashMap;

use crate::pace::Pace;

/// Most tokens that are guessed for one step.
pub(crate) const LONGEST: usize = 8;
/// How many tokens must have stood before: the long run is tried first.
const RUNS: [usize; 2] = [3, 2];
/// Share of right guesses that is taken for granted in the beginning.
const FIRST_RATE: f64 = 0.5;
/// Weight of the newest guess.
const NEWEST: f64 = 0.1;
/// After so many chances that were not taken, one is: texts change.
const PROBE: u32 = 32;
/// A probe is made only if guesses would pay at this rate.
const PROMISING: f64 = 0.8;

/// Guesses for one sequence.
#[derive(Default)]
pub(crate) struct Drafter {
    /// What followed the latest occurrence of a run of tokens: a position.
    followers: HashMap<[u32; 3], u32>,
    /// Runs that end before this position are known.
    indexed: usize,
    /// By run: how many of the guessed tokens were right, a running mean.
    rates: [Option<f64>; RUNS.len()],
    /// Chances that were not taken since the last guess.
    missed: u32,
}

/// A place where the last tokens of a sequence stood before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Chance {
    /// Position of what followed.
    follower: usize,
    /// Which of the runs was found.
    run: usize,
}

impl Drafter {
    /// Looks for an earlier occurrence of the last of `tokens`: those of the last call, and any number more.
    pub fn find(&mut self, tokens: &[u32]) -> Option<Chance> {
        // The run at the very end is not known yet, so what is found is an earlier one.
        for follower in self.indexed.max(1)..tokens.len() {
            for key in RUNS.iter().filter_map(|&run| key(&tokens[..follower], run)) {
                self.followers.insert(key, follower as u32);
            }
        }
        self.indexed = tokens.len();
        let find = |run: usize| self.followers.get(&key(tokens, RUNS[run])?);
        (0..RUNS.len()).find_map(|run| Some(Chance { follower: *find(run)? as usize, run }))
    }

    /// How many tokens, up to `most`, make the step take the least time per token that comes of it. Without them it has
    /// `rows` rows and yields as many tokens.
    pub fn length(&mut self, chance: Chance, most: usize, rows: usize, pace: &Pace) -> usize {
        #[cfg(test)]
        if let Some(fixed) = pace.fixed_draft {
            return fixed.min(most);
        }
        let best = |rate: f64| {
            let speed = |length: usize| {
                let right: f64 = (1..=length as i32).map(|token| rate.powi(token)).sum();
                pace.step(rows + length).map_or(0.0, |took| (rows as f64 + right) / took)
            };
            (0..=most.min(LONGEST)).rev().max_by(|a, b| speed(*a).total_cmp(&speed(*b))).unwrap_or(0)
        };
        let length = best(self.rates[chance.run].unwrap_or(FIRST_RATE));
        let probes = length == 0 && most > 0 && self.missed >= PROBE && best(PROMISING) > 0;
        self.missed = if length > 0 || probes { 0 } else { self.missed + 1 };
        if probes { 1 } else { length }
    }

    /// Learns that of `guessed` tokens the first `right` were right.
    pub fn learn(&mut self, chance: Chance, guessed: usize, right: usize) {
        let rate = &mut self.rates[chance.run];
        let mut mix = |was: f64| *rate = Some(rate.unwrap_or(FIRST_RATE) * (1.0 - NEWEST) + NEWEST * was);
        (0..right).for_each(|_| mix(1.0));
        if right < guessed {
            mix(0.0);
        }
    }
}

impl Chance {
    /// The `length` tokens that followed. Where the text's end is reached, it goes on in circles.
    pub fn guess(self, tokens: &[u32], length: usize) -> Vec<u32> {
        tokens[self.follower..].iter().copied().cycle().take(length).collect()
    }
}

/// The last `run` tokens as a key.
fn key(tokens: &[u32], run: usize) -> Option<[u32; 3]> {
    match (run, tokens) {
        (3, [.., a, b, c]) => Some([*a, *b, *c]),
        // No token has this number.
        (2, [.., b, c]) => Some([u32::MAX, *b, *c]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn guess(drafter: &mut Drafter, tokens: &[u32], length: usize) -> Vec<u32> {
        drafter.find(tokens).map(|chance| chance.guess(tokens, length)).unwrap_or_default()
    }

    #[test]
    fn what_followed_the_latest_earlier_occurrence_is_guessed() {
        let mut drafter = Drafter::default();
        let mut tokens = vec![1, 2, 3, 4, 9, 2, 3, 5, 1, 2];
        assert_eq!(guess(&mut drafter, &tokens, 3), [3, 4, 9]);
        tokens.push(3);
        assert_eq!(guess(&mut drafter, &tokens, 2), [4, 9], "three tokens count more than two");
        tokens.extend([7, 2, 3]);
        assert_eq!(guess(&mut drafter, &tokens, 2), [7, 2], "the latest, though looked up before");
        tokens.push(6);
        assert!(guess(&mut drafter, &tokens, 2).is_empty());
    }

    #[test]
    fn a_circle_is_followed_beyond_the_text() {
        let tokens = [5, 1, 2, 3, 1, 2, 3];
        assert_eq!(guess(&mut Drafter::default(), &tokens, 7), [1, 2, 3, 1, 2, 3, 1]);
        assert_eq!(guess(&mut Drafter::default(), &[4, 4, 4], 3), [4, 4, 4]);
        assert!(guess(&mut Drafter::default(), &[4, 4], 3).is_empty());
        assert!(guess(&mut Drafter::default(), &[4], 3).is_empty());
    }

    /// A machine on which a step takes `base` milliseconds and `row` for each row.
    fn pace(base: f64, row: f64) -> Pace {
        let mut pace = Pace::default();
        for rows in 1..40 {
            pace.record(rows, 0, Duration::from_secs_f64((base + row * rows as f64) / 1e3));
        }
        pace
    }

    fn lengths(pace: &Pace, rows: usize, right: bool) -> Vec<usize> {
        let mut drafter = Drafter::default();
        let chance = Chance { follower: 0, run: 0 };
        let one = |_| {
            let length = drafter.length(chance, LONGEST, rows, pace);
            drafter.learn(chance, length, if right { length } else { 0 });
            length
        };
        (0..200).map(one).collect()
    }

    #[test]
    fn guesses_are_made_where_they_pay() {
        let bound_by_memory = pace(10.0, 0.1);
        let right = lengths(&bound_by_memory, 1, true);
        assert!(right[0] > 0 && right[10..].iter().all(|length| *length == LONGEST), "{right:?}");
        let wrong = lengths(&bound_by_memory, 1, false);
        let rare = |lengths: &[usize]| lengths[100..].iter().sum::<usize>() <= 4;
        assert!(wrong[0] > 0 && rare(&wrong), "{wrong:?}");
        assert!(wrong[100..].contains(&1), "it is tried again: {wrong:?}");
        let bound_by_arithmetic = pace(0.1, 1.0);
        assert_eq!(lengths(&bound_by_arithmetic, 8, true).iter().sum::<usize>(), 0);
    }
}
