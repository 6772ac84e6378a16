use super::*;
use crate::kernels::cpu::{Angles, Isa, append};
use crate::weights::RopeStyle;

/// A batch of sequences with rows at their ends, and a cache that holds more than these.
struct Case {
    shape: KvShape,
    spec: AttentionSpec,
    /// Per sequence: positions in the cache, and how many of the last are rows of the step.
    sequences: Vec<(usize, usize)>,
}

/// What memory may be full of: as a number or as a scale it is NaN.
trait Garbage: Element {
    const NAN: Self;
}

impl Garbage for f32 {
    const NAN: f32 = f32::NAN;
}

impl Garbage for i16 {
    const NAN: i16 = i16::MAX;
}

struct Batch {
    tables: Vec<Vec<u32>>,
    sequences: Vec<u32>,
    positions: Vec<u32>,
    /// Per sequence `[position][heads * head_dim]`.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    q: Vec<f32>,
}

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

impl Case {
    fn batch(&self) -> Batch {
        let width = self.shape.heads * self.shape.head_dim;
        let mut blocks = (0..self.blocks() as u32).rev().filter(|b| b % 3 != 1);
        let mut batch = Batch {
            tables: vec![],
            sequences: vec![],
            positions: vec![],
            keys: vec![],
            values: vec![],
            q: vec![],
        };
        for (index, &(len, rows)) in self.sequences.iter().enumerate() {
            batch.tables.push(blocks.by_ref().take(len.div_ceil(self.shape.block)).collect());
            batch.sequences.extend(std::iter::repeat_n(index as u32, rows));
            batch.positions.extend((len - rows..len).map(|p| p as u32));
            batch.keys.push(noise(len * width, index as u32 * 2 + 1));
            batch.values.push(noise(len * width, index as u32 * 2 + 2));
        }
        let scale = 3.0;
        batch.q = noise(batch.positions.len() * self.spec.heads * self.shape.head_dim, 99);
        batch.q.iter_mut().for_each(|q| *q *= scale);
        batch
    }

    fn blocks(&self) -> usize {
        2 * self.sequences.iter().map(|(len, _)| len.div_ceil(self.shape.block)).sum::<usize>() + 3
    }

    /// Writes everything into a cache that is full of NaN, as memory that other sequences left behind may be.
    fn cache<E: Garbage>(&self, pool: &Pool, batch: &Batch) -> (Vec<E>, Vec<E>) {
        let mut keys = vec![E::NAN; self.blocks() * self.shape.key_block::<E>()];
        let mut values = vec![E::NAN; self.blocks() * self.shape.value_block::<E>()];
        for (index, &(len, _)) in self.sequences.iter().enumerate() {
            let tables: Vec<&[u32]> = batch.tables.iter().map(Vec::as_slice).collect();
            let positions: Vec<u32> = (0..len as u32).collect();
            let sequences = vec![index as u32; len];
            let rows = Rows { sequences: &sequences, positions: &positions, tables: &tables };
            // Nothing is rotated.
            let rotation = (RopeStyle::Half, &Angles { pairs: 0, cos: &[], sin: &[] });
            let mut new = batch.keys[index].clone();
            let v = &batch.values[index];
            append(pool, &self.shape, &mut keys, &mut values, &rows, rotation, &mut [], &mut new, v);
        }
        (keys, values)
    }

    fn run<E: Garbage>(&self, pool: &Pool, batch: &Batch, rows: Range<usize>) -> Vec<f32> {
        let (keys, values) = self.cache::<E>(pool, batch);
        let tables: Vec<&[u32]> = batch.tables.iter().map(Vec::as_slice).collect();
        let width = self.spec.heads * self.shape.head_dim;
        let q = &batch.q[rows.start * width..rows.end * width];
        let mut out = vec![f32::NAN; q.len()];
        let rows = Rows {
            sequences: &batch.sequences[rows.clone()],
            positions: &batch.positions[rows],
            tables: &tables,
        };
        attention(pool, &self.spec, &self.shape, &keys, &values, &rows, q, &mut out, None);
        out
    }

    fn reference(&self, batch: &Batch) -> Vec<f64> {
        let (dim, sharing) = (self.shape.head_dim, self.spec.heads / self.shape.heads);
        let width = self.shape.heads * dim;
        let mut out = Vec::new();
        for (row, (&sequence, &position)) in batch.sequences.iter().zip(&batch.positions).enumerate() {
            let (keys, values) = (&batch.keys[sequence as usize], &batch.values[sequence as usize]);
            let end = position as usize + 1;
            let start = self.spec.window.map_or(0, |window| end.saturating_sub(window));
            for head in 0..self.spec.heads {
                let q = &batch.q[(row * self.spec.heads + head) * dim..][..dim];
                let at = |p: usize| p * width + head / sharing * dim;
                let mut scores: Vec<f64> = (start..end)
                    .map(|p| {
                        let key = &keys[at(p)..][..dim];
                        let dot: f64 = q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                        let score = dot * f64::from(self.spec.scale);
                        self.spec
                            .softcap
                            .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::MIN, f64::max);
                scores.iter_mut().for_each(|s| *s = (*s - largest).exp());
                let sum: f64 = scores.iter().sum();
                out.extend((0..dim).map(|d| {
                    let weighted =
                        scores.iter().zip(start..end).map(|(s, p)| s * f64::from(values[at(p) + d]));
                    weighted.sum::<f64>() / sum
                }));
            }
        }
        out
    }
}

fn cases() -> Vec<Case> {
    let spec = |heads, dim: usize| AttentionSpec {
        heads,
        scale: 1.0 / (dim as f32).sqrt(),
        window: None,
        softcap: None,
    };
    vec![
        // The model's shape: decoding sequences of all lengths around the borders of blocks and chunks.
        Case {
            shape: KvShape { block: 32, heads: 3, head_dim: 64 },
            spec: spec(9, 64),
            sequences: [1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 700].map(|len| (len, 1)).to_vec(),
        },
        // One long context alone: split over threads.
        Case {
            shape: KvShape { block: 32, heads: 3, head_dim: 64 },
            spec: spec(9, 64),
            sequences: vec![(1500, 1)],
        },
        // Prompts of the model's shape, one continued, beside a decoding sequence: tiles of integers, where there are some.
        Case {
            shape: KvShape { block: 32, heads: 3, head_dim: 64 },
            spec: spec(9, 64),
            sequences: vec![(40, 40), (300, 1), (290, 77), (600, 33), (5, 5)],
        },
        // The same with heads that leave parts of tiles empty, a window and capped scores.
        Case {
            shape: KvShape { block: 32, heads: 2, head_dim: 84 },
            spec: AttentionSpec { window: Some(300), softcap: Some(2.0), ..spec(8, 84) },
            sequences: vec![(900, 20), (100, 100), (700, 1), (50, 2)],
        },
        Case {
            shape: KvShape { block: 64, heads: 1, head_dim: 256 },
            spec: spec(2, 256),
            sequences: vec![(130, 5), (400, 19), (20, 1)],
        },
        // Prompts, one continued, beside a decoding sequence; a head that is no whole number of vectors.
        Case {
            shape: KvShape { block: 16, heads: 2, head_dim: 24 },
            spec: spec(10, 24),
            sequences: vec![(40, 40), (300, 1), (290, 77), (5, 5)],
        },
        // Heads on their own, wide, with a window and capped scores.
        Case {
            shape: KvShape { block: 48, heads: 2, head_dim: 144 },
            spec: AttentionSpec { window: Some(300), softcap: Some(2.0), ..spec(2, 144) },
            sequences: vec![(900, 20), (100, 100), (700, 1)],
        },
        // Very wide heads, an odd number of which share one; rows that make up batches of all sizes.
        Case {
            shape: KvShape { block: 32, heads: 1, head_dim: 272 },
            spec: spec(7, 272),
            sequences: vec![(300, 16), (40, 1), (50, 2), (60, 3), (70, 5)],
        },
        Case {
            shape: KvShape { block: 16, heads: 1, head_dim: 8 },
            spec: AttentionSpec { window: Some(1), ..spec(4, 8) },
            sequences: vec![(600, 30)],
        },
    ]
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.supported())
}

fn assert_close(got: &[f32], want: &[f64], limit: f64, what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*got) - want).abs() <= limit, "{what}: element {i} is {got}, not {want}");
    }
}

#[test]
fn attention_agrees_with_f64_on_every_instruction_set() {
    for (index, case) in cases().iter().enumerate() {
        let batch = case.batch();
        let want = case.reference(&batch);
        let all = 0..batch.positions.len();
        for isa in isas() {
            let pool = Pool::with_isa(2, isa);
            let what = format!("case {index} on {isa}");
            assert_close(&case.run::<f32>(&pool, &batch, all.clone()), &want, 3e-6, &what);
            assert_close(&case.run::<i16>(&pool, &batch, all.clone()), &want, 1e-4, &what);
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch_or_on_threads() {
    for (index, case) in cases().iter().enumerate() {
        let batch = case.batch();
        for isa in isas() {
            independent::<f32>(case, &batch, isa, index);
            independent::<i16>(case, &batch, isa, index);
        }
    }
}

fn independent<E: Garbage>(case: &Case, batch: &Batch, isa: Isa, index: usize) {
    let count = batch.positions.len();
    let pool = Pool::with_isa(1, isa);
    let alone: Vec<f32> = (0..count).flat_map(|row| case.run::<E>(&pool, batch, row..row + 1)).collect();
    let width = alone.len() / count;
    for threads in [1, 2, 4] {
        let pool = Pool::with_isa(threads, isa);
        for rows in [0..count, 0..1, count / 3..count, 0..count.min(3), 0..count - count / 4] {
            let got = case.run::<E>(&pool, batch, rows.clone());
            let want = &alone[rows.start * width..rows.end * width];
            let same = got.iter().zip(want).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "case {index} on {isa}, {threads} threads, rows {rows:?}");
        }
    }
}

#[test]
fn what_is_kept_of_chunks_is_bounded() {
    let spec = AttentionSpec { heads: 2, scale: 0.1, window: None, softcap: None };
    let shape = KvShape { block: 32, heads: 2, head_dim: 64 };
    // In several groups, and each of these is smaller than all together.
    let case = Case { shape, spec, sequences: vec![(3000, 64)] };
    let batch = case.batch();
    let all = 0..batch.positions.len();
    let many = case.run::<f32>(&Pool::new(8), &batch, all.clone());
    let kept = PARTIAL_STATES.with_borrow(Vec::capacity);
    assert!((1..=2 * PARTIAL).contains(&kept), "{kept} numbers");
    let one = case.run::<f32>(&Pool::new(1), &batch, all);
    assert!(many.iter().zip(&one).all(|(many, one)| many.to_bits() == one.to_bits()));
}
