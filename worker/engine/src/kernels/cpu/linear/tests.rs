use super::*;
use crate::kernels::cpu::PackError;
use crate::kernels::cpu::format::{decode, float, layout};
use crate::weights::DType;

const BLOCKS: [DType; 8] =
    [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::Q4K, DType::Q5K, DType::Q6K];
const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A small generator, so that tests need nothing else and always see the same numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    /// Nearly normal.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.next() as f32 / (1u64 << 31) as f32).sum::<f32>() - 6.0
    }
    /// Activations with outliers of 30 times the usual.
    fn activations(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|i| self.normal() * if i % 101 == 7 { 30.0 } else { 1.0 }).collect()
    }
}

/// A matrix's bytes with all codes possible and scales that make sense.
fn weights(format: DType, rows: usize, cols: usize, random: &mut Random) -> Vec<u8> {
    let (per_block, size) = (format.block_len(), format.block_bytes());
    let mut bytes: Vec<u8> = (0..rows * cols / per_block * size).map(|_| random.next() as u8).collect();
    let half = |random: &mut Random, at: &mut [u8], scale: f32| {
        let factor = 0.5 + random.next() as f32 / (1u64 << 31) as f32;
        at.copy_from_slice(&half::f16::from_f32(scale * factor).to_le_bytes());
    };
    for block in bytes.chunks_exact_mut(size) {
        match format {
            DType::F32 => block.copy_from_slice(&random.normal().to_le_bytes()),
            DType::F16 => block.copy_from_slice(&half::f16::from_f32(random.normal()).to_le_bytes()),
            DType::BF16 => block.copy_from_slice(&half::bf16::from_f32(random.normal()).to_le_bytes()),
            DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => half(random, &mut block[..2], 0.01),
            DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => {
                half(random, &mut block[..2], 0.01);
                half(random, &mut block[2..4], -0.08);
            }
            DType::Q6K => half(random, &mut block[208..], 0.001),
        }
    }
    bytes
}

/// The weights as the format defines them, in f64.
fn reference_weights(format: DType, row: &[u8], cols: usize) -> Vec<f64> {
    match layout(format) {
        Some(layout) => (0..cols / BLOCK).flat_map(|b| decode(format, row, b).weights(layout)).collect(),
        None => (0..cols).map(|i| f64::from(float(format, row, i))).collect(),
    }
}

/// The products of a matrix of so many rows with rows of `x`, in f64.
fn reference_products(format: DType, bytes: &[u8], rows: usize, x: &[f32], cols: usize) -> Vec<f64> {
    let weights: Vec<Vec<f64>> =
        bytes.chunks(bytes.len() / rows).map(|row| reference_weights(format, row, cols)).collect();
    let product = |w: &[f64], x: &[f32]| w.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum::<f64>();
    x.chunks(cols).flat_map(|x| weights.iter().map(move |w| product(w, x))).collect()
}

/// How far `y` is from `want`, by the size of that.
fn relative_error(y: &[f32], want: &[f64]) -> f64 {
    let error: f64 = y.iter().zip(want).map(|(y, want)| (f64::from(*y) - want).powi(2)).sum();
    (error / want.iter().map(|want| want.powi(2)).sum::<f64>()).sqrt()
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.supported())
}

#[test]
fn products_agree_with_f64_in_every_format_on_every_instruction_set() {
    let mut random = Random(1);
    for format in BLOCKS.into_iter().chain(FLOATS) {
        // 41 rows: a last group that is not full, nor is the last tile of activations.
        let (rows, cols, n) = (41, 512, 11);
        let bytes = weights(format, rows, cols, &mut random);
        let x = random.activations(n * cols);
        let want = reference_products(format, &bytes, rows, &x, cols);
        for isa in isas() {
            let pool = Pool::with_isa(2, isa);
            let w = Packed::pack(format, rows, cols, &bytes, &pool).unwrap();
            let mut y = vec![f32::NAN; n * rows];
            linear(&pool, &x, &w, &mut y);
            let relative = relative_error(&y, &want);
            let limit = match format {
                DType::F32 | DType::F16 | DType::BF16 => 1e-6,
                // Outliers are felt by more inputs there.
                _ if isa == Isa::Amx => 2e-4,
                _ => 1e-4,
            };
            assert!(relative < limit, "{format:?} on {isa}: relative error {relative:e}");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch_or_on_threads() {
    let mut random = Random(2);
    for isa in isas() {
        for format in BLOCKS.into_iter().chain(FLOATS) {
            // More rows than a kernel takes in one pass, too.
            let (rows, cols, n) = (72, 256, 150);
            let bytes = weights(format, rows, cols, &mut random);
            let x = random.activations(n * cols);
            let mut alone = vec![0.0; n * rows];
            let pool = Pool::with_isa(1, isa);
            let w = Packed::pack(format, rows, cols, &bytes, &pool).unwrap();
            for (x, y) in x.chunks(cols).zip(alone.chunks_mut(rows)) {
                linear(&pool, x, &w, y);
            }
            for threads in [1, 2, 4] {
                let pool = Pool::with_isa(threads, isa);
                for n in (1..=40).chain([n]) {
                    let mut y = vec![f32::NAN; n * rows];
                    linear(&pool, &x[..n * cols], &w, &mut y);
                    let same = y.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{format:?} on {isa}, {threads} threads, {n} rows");
                }
            }
        }
    }
}

#[test]
fn matrices_that_share_their_input_give_what_each_gives_alone() {
    let mut random = Random(3);
    let pool = Pool::new(2);
    let (cols, n) = (256, 5);
    let x = random.activations(n * cols);
    let shapes = [(DType::Q4_1, 48), (DType::Q8_0, 17), (DType::F16, 33), (DType::Q6K, 16)];
    let ws: Vec<Packed> = shapes
        .iter()
        .map(|&(format, rows)| {
            Packed::pack(format, rows, cols, &weights(format, rows, cols, &mut random), &pool).unwrap()
        })
        .collect();
    let mut together: Vec<Vec<f32>> = ws.iter().map(|w| vec![f32::NAN; n * w.rows()]).collect();
    let mut outputs: Vec<&mut [f32]> = together.iter_mut().map(Vec::as_mut_slice).collect();
    linear_many(&pool, &x, None, &ws.iter().collect::<Vec<_>>(), &mut outputs);
    for (w, together) in ws.iter().zip(&together) {
        let mut alone = vec![f32::NAN; n * w.rows()];
        linear(&pool, &x, w, &mut alone);
        assert_eq!(&alone, together);
    }
}

#[test]
fn embeddings_are_the_weights_themselves_and_packing_takes_no_more_than_the_file() {
    let mut random = Random(4);
    let pool = Pool::new(2);
    for format in BLOCKS.into_iter().chain(FLOATS) {
        let (rows, cols) = (37, 512);
        let bytes = weights(format, rows, cols, &mut random);
        let w = Packed::pack(format, rows, cols, &bytes, &pool).unwrap();
        let row_bytes = bytes.len() / rows;
        // Whole groups, each rounded up to a cache line; the K formats' offsets of single bytes cost a little.
        assert!(
            w.bytes() <= (row_bytes * 48 * 104) / 100 + 3 * 64,
            "{format:?}: {} of {}",
            w.bytes(),
            bytes.len()
        );
        let mut out = vec![f32::NAN; cols];
        for (row, bytes) in bytes.chunks(row_bytes).enumerate() {
            super::super::embedding_row(&w, row, &mut out);
            for (got, want) in out.iter().zip(reference_weights(format, bytes, cols)) {
                // Where they are multiples of a unit, it is 1/16,256 of the largest at most, which here is below 1, and a code counts
                // half as many.
                let limit = if w.is_fixed() { 16.0 / 2.0 / 16_256.0 } else { 1e-6 * want.abs().max(0.01) };
                assert!((f64::from(*got) - want).abs() <= limit, "{format:?}: {got}, not {want}");
            }
        }
    }
}

#[test]
fn rows_whose_last_unit_is_short_agree_with_f64_and_whatever_their_number() {
    let mut random = Random(5);
    for isa in isas() {
        // Odd numbers of blocks, and less than a unit's.
        for cols in [32, 96, 128 + 64, 512 + 96] {
            let (rows, n) = (35, 21);
            let bytes = weights(DType::Q4_1, rows, cols, &mut random);
            let x = random.activations(n * cols);
            let pool = Pool::with_isa(2, isa);
            let w = Packed::pack(DType::Q4_1, rows, cols, &bytes, &pool).unwrap();
            let (mut together, mut alone) = (vec![f32::NAN; n * rows], vec![f32::NAN; n * rows]);
            linear(&pool, &x, &w, &mut together);
            for (x, y) in x.chunks(cols).zip(alone.chunks_mut(rows)) {
                linear(&pool, x, &w, y);
            }
            assert_eq!(together, alone, "{isa}, {cols} columns");
            let want = reference_products(DType::Q4_1, &bytes, rows, &x, cols);
            let relative = relative_error(&together, &want);
            assert!(relative < 2e-4, "{isa}, {cols} columns: relative error {relative:e}");
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let pool = Pool::new(1);
    let error = |format, rows, cols, bytes| Packed::pack(format, rows, cols, &vec![0; bytes], &pool).err();
    assert_eq!(error(DType::Q4_1, 16, 48, 480), Some(PackError::Columns { cols: 48, dtype: DType::Q4_1 }));
    assert_eq!(error(DType::Q4_1, 16, 64, 639), Some(PackError::Length { expected: 640, got: 639 }));
}
