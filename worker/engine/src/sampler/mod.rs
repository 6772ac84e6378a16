//! Chooses the next token from a model's logits.
//!
//! In this order: presence and frequency penalties, temperature, the `k` likeliest, the minimal share, the nucleus. The
//! random number is a function of the seed and the position alone ([`uniform`]), so a text does not depend on what else
//! is in the batch, on who continues it, or on how many numbers were drawn before.
//!
//! Vocabularies have 50,000 to 260,000 entries and every token of every sequence passes here. So nothing is sorted but
//! a sliver. Mostly the `k` likeliest, or the nucleus, are few and lie above some small share of the likeliest: a few quick
//! passes find it, and what is above it is sorted. Where they are many, probabilities are counted into buckets by their
//! leading bits, which tells in which bucket the limit lies, and that one is sorted. Everything works in place, and the long
//! loops are vectorised ([`lanes`]). They use the same operations in the same order everywhere, so the same logits give
//! the same token on every machine.

mod lanes;
mod random;

use std::collections::HashMap;

pub use random::uniform;

use crate::Sampling;

/// Values that are summed at once: short enough for sums in single precision.
const BLOCK: usize = 1024;

/// How often each token was generated so far.
#[derive(Clone, Debug, Default)]
pub struct TokenCounts(HashMap<u32, u32>);

impl TokenCounts {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a generated token.
    pub fn add(&mut self, token: u32) {
        *self.0.entry(token).or_default() += 1;
    }
}

/// How a token is chosen from its logits, once penalties are applied: all that a device must know to choose by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    /// See [`Sampling`], as for the next three. What is not above 0 takes the likeliest.
    pub temperature: f32,
    /// 0: all.
    pub top_k: u32,
    /// 0: all.
    pub min_p: f32,
    /// 1: all.
    pub top_p: f32,
    /// The token's random number, in [0, 1).
    pub random: f64,
}

impl Choice {
    /// The likeliest, whatever the others are.
    pub const LIKELIEST: Self = Self { temperature: 0.0, top_k: 0, min_p: 0.0, top_p: 1.0, random: 0.0 };

    /// That of the token at `position`, its index in the generated text, counted from 0.
    pub fn new(sampling: &Sampling, position: u64) -> Self {
        let &Sampling { temperature, top_k, min_p, top_p, seed, .. } = sampling;
        Self { temperature, top_k, min_p, top_p, random: uniform(seed, position) }
    }

    /// Whether it is the likeliest that is taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature.is_nan() || self.temperature <= 0.0
    }
}

/// The next token. `position` is its index in the generated text, counted from 0; `logits` is overwritten.
///
/// Logits may be anything: one that is no number is never chosen, unless all are. Ties go to the lowest id.
pub fn sample(logits: &mut [f32], sampling: &Sampling, counts: &TokenCounts, position: u64) -> u32 {
    penalise(logits, sampling, counts);
    choose(logits, &Choice::new(sampling, position))
}

/// The same without penalties.
pub(crate) fn choose(logits: &mut [f32], choice: &Choice) -> u32 {
    let likeliest = argmax(logits);
    let max = logits.get(likeliest as usize).copied().unwrap_or(f32::NAN);
    if choice.is_greedy() || !max.is_finite() {
        return likeliest;
    }
    let weights = logits;
    lanes::to_weights(weights, max, choice.temperature);
    if choice.top_k > 0 && (choice.top_k as usize) < weights.len() {
        let k = u64::from(choice.top_k);
        keep_likeliest(weights, |count, _, _| count >= k);
    }
    if choice.min_p > 0.0 {
        // The likeliest has weight 1.
        lanes::zero_below(weights, choice.min_p);
    }
    if choice.top_p < 1.0 {
        let p = f64::from(choice.top_p);
        keep_likeliest(weights, |_, mass, total| mass >= p * total);
    }
    pick(weights, choice.random).unwrap_or(likeliest)
}

/// OpenAI's penalties.
fn penalise(logits: &mut [f32], sampling: &Sampling, counts: &TokenCounts) {
    if sampling.presence_penalty == 0.0 && sampling.frequency_penalty == 0.0 {
        return;
    }
    for (&token, &count) in &counts.0 {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit -= sampling.presence_penalty + sampling.frequency_penalty * count as f32;
        }
    }
}

/// The index of the greatest logit, the first of several; 0 if there is none.
pub fn argmax(logits: &[f32]) -> u32 {
    let (mut best, mut block) = (f32::NEG_INFINITY, 0);
    for (i, values) in logits.chunks(BLOCK).enumerate() {
        let max = lanes::max(values);
        if max > best {
            (best, block) = (max, i);
        }
    }
    let start = block * BLOCK;
    let found = logits.iter().skip(start).position(|x| *x == best);
    found.map_or(0, |i| (start + i) as u32)
}

/// Zeroes all but the likeliest: as few as make `enough(count, their mass, mass of all)` true.
fn keep_likeliest(weights: &mut [f32], enough: impl Fn(u64, f64, f64) -> bool) {
    /// Shares of the likeliest above which the limit is looked for.
    const LEAST: [f32; 4] = [1.0 / 16.0, 1.0 / 256.0, 1.0 / 4096.0, 1.0 / 65536.0];
    /// More than these are not sorted.
    const FEW: u64 = 2048;
    let total: f64 = weights.chunks(BLOCK).map(lanes::sum).sum();
    for least in LEAST {
        let (mut count, mut mass) = (0, 0.0);
        for block in weights.chunks(BLOCK) {
            let (n, sum) = lanes::count_and_sum(block, least);
            (count, mass) = (count + n, mass + sum);
        }
        if count > FEW {
            break;
        }
        if enough(count, mass, total) {
            let few: Vec<_> = entries(weights).filter(|(w, _)| *w >= least).collect();
            weights.fill(0.0);
            return restore(weights, few, (0, 0.0), |count, mass| enough(count, mass, total));
        }
    }
    keep_likeliest_by_bucket(weights, |count, mass| enough(count, mass, total));
}

/// The same for many.
fn keep_likeliest_by_bucket(weights: &mut [f32], enough: impl Fn(u64, f64) -> bool) {
    // Exponent and three bits of fraction: buckets are in the weights' order. Weights are at most 1, but for a last bit.
    const BUCKETS: usize = (1.0f32.to_bits() >> 20) as usize + 1;
    let bucket = |weight: f32| ((weight.to_bits() >> 20) as usize).min(BUCKETS - 1);
    let mut buckets = [(0u64, 0f64); BUCKETS];
    for &w in weights.iter() {
        let b = &mut buckets[bucket(w)];
        *b = (b.0 + 1, b.1 + f64::from(w));
    }
    let (mut count, mut mass) = (0, 0.0);
    let border = buckets.iter().rposition(|&(n, m)| {
        let reached = n > 0 && enough(count + n, mass + m);
        if !reached {
            (count, mass) = (count + n, mass + m);
        }
        reached
    });
    let Some(border) = border else { return };
    let at_border: Vec<_> = entries(weights).filter(|(w, _)| bucket(*w) == border).collect();
    weights.iter_mut().for_each(|w| *w = if bucket(*w) > border { *w } else { 0.0 });
    restore(weights, at_border, (count, mass), enough);
}

/// Weights with their ids.
fn entries(weights: &[f32]) -> impl Iterator<Item = (f32, u32)> {
    weights.iter().copied().zip(0u32..)
}

/// Puts the likeliest of some entries back, until they are enough together with those that are there already.
fn restore(
    weights: &mut [f32],
    mut entries: Vec<(f32, u32)>,
    (mut count, mut mass): (u64, f64),
    enough: impl Fn(u64, f64) -> bool,
) {
    entries.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    for (w, id) in entries {
        weights[id as usize] = w;
        (count, mass) = (count + 1, mass + f64::from(w));
        if enough(count, mass) {
            break;
        }
    }
}

/// The entry at share `u` of the running sum of the weights; `None` if all are 0.
fn pick(weights: &[f32], u: f64) -> Option<u32> {
    let sums: Vec<f64> = weights.chunks(BLOCK).map(lanes::sum).collect();
    let target = u * sums.iter().sum::<f64>();
    let mut before = 0.0;
    let mut last = None;
    for (i, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        last = Some((i, before));
        if before + sum > target {
            break;
        }
        before += sum;
    }
    let (block, mut running) = last?;
    let mut chosen = None;
    for (i, &w) in weights.iter().enumerate().skip(block * BLOCK).take(BLOCK).filter(|(_, w)| **w > 0.0) {
        chosen = Some(i as u32);
        running += f64::from(w);
        if running > target {
            break;
        }
    }
    chosen
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn drawn(logits: &[f32], sampling: &Sampling, position: u64) -> u32 {
        sample(&mut logits.to_vec(), sampling, &TokenCounts::new(), position)
    }

    #[test]
    fn greedy_takes_the_first_of_the_greatest() {
        let greedy = Sampling::default();
        let mut logits = vec![-1.0f32; 5000];
        logits[4100] = 3.0;
        logits[4200] = 3.0;
        assert_eq!(drawn(&logits, &greedy, 0), 4100);
        logits[17] = f32::NAN;
        assert_eq!(drawn(&logits, &greedy, 0), 4100);
        logits[4999] = f32::INFINITY;
        assert_eq!(drawn(&logits, &greedy, 0), 4999);
    }

    #[test]
    fn no_logits_make_it_panic() {
        let odd =
            [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE];
        let mut rng = StdRng::seed_from_u64(3);
        for round in 0..5000 {
            let logits: Vec<f32> =
                (0..rng.random_range(0..40)).map(|_| odd[rng.random_range(0..8)]).collect();
            let sampling = Sampling {
                temperature: [0.0, 1e-45, 1e-3, 1.0, 1e30, f32::NAN, -1.0][rng.random_range(0..7)],
                top_p: [0.0, 0.5, 1.0, f32::NAN][rng.random_range(0..4)],
                top_k: rng.random_range(0..5),
                min_p: [0.0, 0.1, 1.0, f32::NAN][rng.random_range(0..4)],
                presence_penalty: 1.0,
                ..Sampling::default()
            };
            let mut counts = TokenCounts::new();
            counts.add(rng.random_range(0..60));
            let token = sample(&mut logits.clone(), &sampling, &counts, round);
            assert!((token as usize) < logits.len().max(1));
            let chosen = logits.get(token as usize).copied().unwrap_or(0.0);
            assert!(!chosen.is_nan() || logits.iter().all(|x| x.is_nan() || *x == f32::NEG_INFINITY));
        }
    }

    #[test]
    fn penalties_count_what_was_generated() {
        let mut counts = TokenCounts::new();
        counts.add(1);
        counts.add(1);
        counts.add(2);
        counts.add(999); // not in the vocabulary
        let sampling = Sampling { presence_penalty: 0.5, frequency_penalty: 0.25, ..Sampling::default() };
        let mut logits = [0.0, 1.0, 1.0];
        penalise(&mut logits, &sampling, &counts);
        assert_eq!(logits, [0.0, 0.0, 0.25]);
    }

    /// The kept set by sorting everything: ids and weights, the likeliest first.
    pub(crate) fn kept(logits: &[f32], s: &Choice) -> Vec<(u32, f64)> {
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let mut all: Vec<(u32, f64)> = logits
            .iter()
            .enumerate()
            .map(|(i, x)| (i as u32, f64::from(lanes::exp((x - max) / s.temperature))))
            .collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if s.top_k > 0 {
            all.truncate(s.top_k as usize);
        }
        all.retain(|(_, w)| *w >= f64::from(s.min_p));
        let total: f64 = all.iter().map(|(_, w)| w).sum();
        let mut mass = 0.0;
        let needed = all.iter().position(|(_, w)| {
            mass += w;
            mass >= f64::from(s.top_p) * total
        });
        if let (true, Some(n)) = (s.top_p < 1.0, needed) {
            all.truncate(n + 1);
        }
        all
    }

    #[test]
    fn choices_are_as_frequent_as_they_are_likely_and_no_others_occur() {
        let mut rng = StdRng::seed_from_u64(5);
        for round in 0..60 {
            let n = [3, 50, 3000][round % 3];
            // Few distinct values: many ties at the limits.
            let logits: Vec<f32> = (0..n).map(|_| rng.random_range(-20..20) as f32 / 4.0).collect();
            let sampling = Sampling {
                temperature: [0.3, 1.0, 1.7][rng.random_range(0..3)],
                top_p: [0.1, 0.7, 0.95, 1.0][rng.random_range(0..4)],
                top_k: [0, 1, 2, 20, 5000][rng.random_range(0..5)],
                min_p: [0.0, 0.05, 0.5][rng.random_range(0..3)],
                seed: round as u64,
                ..Sampling::default()
            };
            let kept = kept(&logits, &Choice::new(&sampling, 0));
            let total: f64 = kept.iter().map(|(_, w)| w).sum();
            const DRAWS: u64 = 4000;
            let mut seen: HashMap<u32, u64> = HashMap::new();
            for position in 0..DRAWS {
                *seen.entry(drawn(&logits, &sampling, position)).or_default() += 1;
            }
            for (id, w) in &kept {
                let expected = w / total * DRAWS as f64;
                let got = seen.remove(id).unwrap_or(0) as f64;
                // Seven standard deviations, and the draws are always the same.
                assert!((got - expected).abs() <= 7.0 * expected.sqrt() + 3.0, "{id}: {got}, not {expected}");
            }
            assert!(seen.is_empty(), "chosen although filtered out: {seen:?} with {sampling:?}");
        }
    }

    #[test]
    fn a_choice_depends_on_seed_and_position_alone() {
        let logits: Vec<f32> = (0..50_000).map(|i| (i % 97) as f32 / 30.0).collect();
        let s = |seed| Sampling { temperature: 1.0, top_p: 0.9, seed, ..Sampling::default() };
        let run = |seed| (0..50).map(|p| drawn(&logits, &s(seed), p)).collect::<Vec<_>>();
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        assert_eq!(run(1)[49], drawn(&logits, &s(1), 49));
    }
}
