//! Chooses the next token from a model's logits.
//!
//! In this order: presence and frequency penalties, temperature, the `k` likeliest, the minimal share, the nucleus. The
//! random number is a function of the seed and the position alone ([`uniform`]), so a text does not depend on what else
//! is in the batch, on who continues it, or on how many numbers were drawn before.
//!
//! Vocabularies have 50,000 to 260,000 entries and every token of every sequence passes here. So nothing is sorted but
//! a sliver: probabilities are counted into buckets by their leading bits, which tells within which bucket the limit of
//! the `k` likeliest or of the nucleus lies, and only that bucket is put in order. Everything works in place, and the
//! long loops are plain enough for the compiler to vectorise. They use additions and multiplications only, in a fixed
//! order, so the same logits give the same token on every machine.

use std::collections::HashMap;

use crate::Sampling;

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

/// The next token. `position` is its index in the generated text, counted from 0; `logits` is overwritten.
///
/// Logits may be anything: one that is no number is never chosen, unless all are. Ties go to the lowest id.
pub fn sample(logits: &mut [f32], sampling: &Sampling, counts: &TokenCounts, position: u64) -> u32 {
    penalise(logits, sampling, counts);
    let likeliest = argmax(logits);
    let max = logits.get(likeliest as usize).copied().unwrap_or(f32::NAN);
    if !(sampling.temperature > 0.0 && max.is_finite()) {
        return likeliest;
    }
    let weights = logits;
    to_weights(weights, max, sampling.temperature);
    if sampling.top_k > 0 && (sampling.top_k as usize) < weights.len() {
        let k = u64::from(sampling.top_k);
        keep_likeliest(weights, |count, _, _| count >= k);
    }
    if sampling.min_p > 0.0 {
        // The likeliest has weight 1.
        weights.iter_mut().for_each(|w| *w = if *w < sampling.min_p { 0.0 } else { *w });
    }
    if sampling.top_p < 1.0 {
        let p = f64::from(sampling.top_p);
        keep_likeliest(weights, |_, mass, total| mass >= p * total);
    }
    pick(weights, uniform(sampling.seed, position)).unwrap_or(likeliest)
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
    const BLOCK: usize = 1024;
    let (mut best, mut block) = (f32::NEG_INFINITY, 0);
    for (i, values) in logits.chunks(BLOCK).enumerate() {
        let max = max(values);
        if max > best {
            (best, block) = (max, i);
        }
    }
    let start = block * BLOCK;
    let found = logits.iter().skip(start).position(|x| *x == best);
    found.map_or(0, |i| (start + i) as u32)
}

/// The greatest value, in lanes that the compiler can put side by side; what is no number does not count.
fn max(values: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let (lanes, rest) = values.as_chunks::<16>();
    let mut best = [f32::NEG_INFINITY; 16];
    for lane in lanes {
        for (b, x) in best.iter_mut().zip(lane) {
            *b = greater(*b, *x);
        }
    }
    best.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| greater(a, *b))
}

/// Logits to probabilities, up to a common factor: the likeliest gets 1.
fn to_weights(logits: &mut [f32], max: f32, temperature: f32) {
    for x in logits {
        *x = exp((*x - max) / temperature);
    }
}

/// `e^x` for `x ≤ 0`, within 2 units in the last place; 0 where the result would be below the normal numbers, and for
/// what is no number. Branchless: `2^n` by the exponent's bits, times a Taylor polynomial on half an octave around 1.
fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    // Adding it leaves no bits for a fraction: the sum is rounded to a whole number.
    const ROUND: f32 = 12_582_912.0;
    // The logarithm of 2 in two parts, the first with so few bits that its multiples are exact.
    const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    let clamped = if x > LOWEST { x } else { LOWEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN_2.0 - n * LN_2.1;
    let mut y = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = y * r + c;
    }
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x > LOWEST { y * scale } else { 0.0 }
}

/// A weight's bucket: exponent and three bits of fraction, so that buckets are in the weights' order.
fn bucket(weight: f32) -> usize {
    (weight.to_bits() >> 20) as usize
}

/// Zeroes all but the likeliest: as few as make `enough(count, their mass, mass of all)` true.
fn keep_likeliest(weights: &mut [f32], enough: impl Fn(u64, f64, f64) -> bool) {
    const BUCKETS: usize = (1.0f32.to_bits() >> 20) as usize + 1;
    let mut buckets = [(0u64, 0f64); BUCKETS];
    for &w in weights.iter() {
        // Weights are at most 1, but for a last bit.
        let b = &mut buckets[bucket(w).min(BUCKETS - 1)];
        b.0 += 1;
        b.1 += f64::from(w);
    }
    let total: f64 = buckets.iter().map(|b| b.1).sum();
    let (mut count, mut mass) = (0, 0.0);
    let border = buckets.iter().rposition(|&(n, m)| {
        let reached = n > 0 && enough(count + n, mass + m, total);
        if !reached {
            (count, mass) = (count + n, mass + m);
        }
        reached
    });
    let Some(border) = border else { return };

    let mut candidates = Vec::with_capacity(buckets[border].0 as usize);
    for (id, w) in weights.iter_mut().enumerate() {
        let b = bucket(*w).min(BUCKETS - 1);
        if b == border {
            candidates.push((*w, id as u32));
        }
        *w = if b > border { *w } else { 0.0 };
    }
    candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    for (w, id) in candidates {
        weights[id as usize] = w;
        (count, mass) = (count + 1, mass + f64::from(w));
        if enough(count, mass, total) {
            break;
        }
    }
}

/// The entry at share `u` of the running sum of the weights; `None` if all are 0.
fn pick(weights: &[f32], u: f64) -> Option<u32> {
    const BLOCK: usize = 1024;
    let sums: Vec<f64> = weights.chunks(BLOCK).map(sum).collect();
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

/// A sum in lanes that the compiler can put side by side.
fn sum(values: &[f32]) -> f64 {
    let (lanes, rest) = values.as_chunks::<16>();
    let mut sums = [0f32; 16];
    for lane in lanes {
        for (s, x) in sums.iter_mut().zip(lane) {
            *s += x;
        }
    }
    sums.iter().chain(rest).map(|x| f64::from(*x)).sum()
}

/// A random number in [0, 1), a function of seed and position alone.
///
/// The first 53 bits of Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
/// SC 2011) with the seed as its key and the position as its counter.
pub fn uniform(seed: u64, position: u64) -> f64 {
    let [a, b, ..] =
        philox([position as u32, (position >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    ((u64::from(b) << 32 | u64::from(a)) >> 11) as f64 / (1u64 << 53) as f64
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn choose(logits: &[f32], sampling: &Sampling, position: u64) -> u32 {
        sample(&mut logits.to_vec(), sampling, &TokenCounts::new(), position)
    }

    /// Known answers of the authors' Random123 library.
    #[test]
    fn the_random_numbers_are_philox() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        let pi = [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344];
        let answer = [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1];
        assert_eq!(philox(pi, [0xA409_3822, 0x299F_31D0]), answer);
    }

    #[test]
    fn greedy_takes_the_first_of_the_greatest() {
        let greedy = Sampling::default();
        let mut logits = vec![-1.0f32; 5000];
        logits[4100] = 3.0;
        logits[4200] = 3.0;
        assert_eq!(choose(&logits, &greedy, 0), 4100);
        logits[17] = f32::NAN;
        assert_eq!(choose(&logits, &greedy, 0), 4100);
        logits[4999] = f32::INFINITY;
        assert_eq!(choose(&logits, &greedy, 0), 4999);
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

    #[test]
    fn exp_is_exact_to_two_units() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let (got, want) = (exp(x), f64::from(x).exp());
            let error = (f64::from(got) - want).abs() / want;
            assert!(error <= 2.0 * f64::from(f32::EPSILON) || x <= -87.0, "e^{x}: {got}, not {want}");
        }
        assert_eq!((exp(0.0), exp(-1e9), exp(f32::NEG_INFINITY), exp(f32::NAN)), (1.0, 0.0, 0.0, 0.0));
    }

    /// The kept set by sorting everything.
    fn kept(logits: &[f32], s: &Sampling) -> Vec<(u32, f64)> {
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let mut all: Vec<(u32, f64)> = logits
            .iter()
            .enumerate()
            .map(|(i, x)| (i as u32, f64::from(exp((x - max) / s.temperature))))
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
            let kept = kept(&logits, &sampling);
            let total: f64 = kept.iter().map(|(_, w)| w).sum();
            const DRAWS: u64 = 4000;
            let mut seen: HashMap<u32, u64> = HashMap::new();
            for position in 0..DRAWS {
                *seen.entry(choose(&logits, &sampling, position)).or_default() += 1;
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
        let run = |seed| (0..50).map(|p| choose(&logits, &s(seed), p)).collect::<Vec<_>>();
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        assert_eq!(run(1)[49], choose(&logits, &s(1), 49));
    }
}
