//! What the machine could do at most: how fast it reads memory, how fast it multiplies. Measured, so that speeds can be
//! given as shares of what is possible here and now.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::lanes::{Lanes, on_isa};
use super::pool::Pool;

/// Larger than the caches of a server's processor, as a model's weights are.
const BUFFER: usize = 512 << 20;
/// How long each measurement goes on.
const TIME: Duration = Duration::from_millis(600);

/// Bytes that all threads together read from memory in a second: the best of several passes.
pub fn read_bandwidth(pool: &Pool) -> f64 {
    let buffer = vec![1.0f32; BUFFER / size_of::<f32>()];
    best_rate(BUFFER as f64, || {
        pool.split(buffer.len() / 16, 4096, |range| {
            let mut sum = 0.0;
            total(pool.isa(), &buffer[range.start * 16..range.end * 16], &mut sum);
            black_box(sum);
        });
    })
}

/// Multiplications and additions of f32 that all threads together do in a second: the best of several runs.
pub fn float_peak(pool: &Pool) -> f64 {
    const ROUNDS: usize = 200_000;
    // Two operations on sixteen lanes, in as many chains as the function below has.
    let work = (pool.threads() * ROUNDS * CHAINS * 16 * 2) as f64;
    best_rate(work, || {
        pool.run(pool.threads(), |_| {
            let mut out = 0.0;
            chains(pool.isa(), black_box(ROUNDS), &mut out);
            black_box(out);
        });
    })
}

/// The highest rate at which `work` is done by `pass`.
fn best_rate(work: f64, mut pass: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = 0.0f64;
    while begin.elapsed() < TIME {
        let start = Instant::now();
        pass();
        best = best.max(work / start.elapsed().as_secs_f64());
    }
    best
}

/// Chains of dependent operations side by side: more than the latency of an operation times how many start at once.
const CHAINS: usize = 12;

on_isa!(fn chains(rounds: usize, out: &mut f32) = chains_body);
on_isa!(fn total(values: &[f32], out: &mut f32) = total_body);

#[inline(always)]
fn chains_body<L: Lanes>(rounds: usize, out: &mut f32) {
    let factor = L::splat(black_box(0.999));
    let mut sums = [L::splat(black_box(1.0)); CHAINS];
    // No more of them than the registers hold, but the same work.
    let chains = CHAINS.min(L::REGISTERS - 2);
    for _ in 0..rounds * (CHAINS / chains) {
        let mut chain = 0;
        while chain < chains {
            sums[chain] = sums[chain].mul_add(factor, factor);
            chain += 1;
        }
    }
    *out = sums.iter().map(|sum| sum.sum()).sum();
}

#[inline(always)]
fn total_body<L: Lanes>(values: &[f32], out: &mut f32) {
    let mut sums = [L::splat(0.0); 8];
    for chunk in values.chunks_exact(8 * 16) {
        let mut part = 0;
        while part < 8 {
            // SAFETY: the chunk has eight times sixteen values.
            let v = unsafe { L::load(chunk.as_ptr().add(part * 16)) };
            sums[part] = sums[part].add(v);
            part += 1;
        }
    }
    *out = sums.iter().map(|sum| sum.sum()).sum();
}
