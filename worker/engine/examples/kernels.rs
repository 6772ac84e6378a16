//! How fast the CPU kernels are, with the sizes of SmolLM2-135M: `cargo run --release -p stoker-engine --example kernels
//! [threads [rows ...]]`. With numbers of rows only the products are timed, with those.
//!
//! Prints the read bandwidth, then for several numbers of rows the time of one step's 211 products (30 layers, each with
//! weights of its own, and the head), of its attention at two lengths of context, and of what lies between. Every figure
//! is the best of many runs: on a machine that does other things too, that is the one that can be compared.

use std::hint::black_box;
use std::time::{Duration, Instant};

use stoker_engine::kernels::cpu::{
    Angles, AttentionSpec, KvShape, Packed, Pool, Rows, add_rms_norm, append, attention, gated, linear,
    linear_many, rms_norm,
};
use stoker_engine::weights::{Activation, DType, RopeStyle};

const LAYERS: usize = 30;
const WIDTH: usize = 576;
const HIDDEN: usize = 1536;
const HEADS: usize = 9;
const VOCABULARY: usize = 49152;
const SHAPE: KvShape = KvShape { block: 32, heads: 3, head_dim: 64 };
const KV: usize = SHAPE.heads * SHAPE.head_dim;

fn main() {
    let mut numbers = std::env::args().skip(1).map(|n| n.parse().expect("a number"));
    let threads = numbers.next();
    let rows: Vec<usize> = numbers.collect();
    let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let pool = Pool::new(threads);
    println!("{threads} threads, {}", pool.isa());
    println!("an empty region: {:.0} ns", 1e9 * seconds_per(2000, || pool.run(pool.threads(), |_| {})));
    let bandwidth = bandwidth(&pool);
    println!("read bandwidth: {:.1} GB/s", bandwidth / 1e9);

    let model = Model::new(&pool);
    let bytes = model.bytes() as f64;
    println!("\nweights: {:.1} MB, so at most {:.0} steps/s\n", bytes / 1e6, bandwidth / bytes);
    println!(
        "{:>5} {:>10} {:>10} {:>10} {:>8} {:>10}",
        "rows", "step, ms", "layers", "head", "rows/s", "bandwidth"
    );
    let all = [1, 2, 4, 8, 16, 32, 512];
    for &n in if rows.is_empty() { &all } else { rows.as_slice() } {
        let x = noise(n * WIDTH, 1);
        let mut buffers = Buffers::new(n);
        let (layers, head) = model.best(&pool, &x, &mut buffers);
        let step = layers + head;
        let share = bytes / step.as_secs_f64() / bandwidth;
        println!(
            "{n:>5} {:>10.3} {:>10.3} {:>10.3} {:>8.0} {:>9.0}%",
            millis(step),
            millis(layers),
            millis(head),
            n as f64 / step.as_secs_f64(),
            100.0 * share
        );
    }

    if !rows.is_empty() {
        return;
    }
    println!(
        "\nof 30 layers:\n{:>5} {:>9} {:>8} {:>14} {:>10}",
        "rows", "sequences", "context", "attention, ms", "bandwidth"
    );
    let one = [(1, 512), (1, 2000), (4, 4000), (8, 4000), (16, 4000), (128, 4000), (512, 512)];
    let many = [(16, 512), (16, 2000)];
    let all =
        one.map(|(n, context)| (n, 1, context)).into_iter().chain(many.map(|(n, context)| (n, n, context)));
    for (n, sequences, context) in all {
        let bench = Attention::new(&pool, n, sequences, context);
        let q = noise(n * WIDTH, 2);
        let mut out = vec![0.0; q.len()];
        let time = best(n, || (0..LAYERS).for_each(|layer| bench.run(&pool, layer, &q, &mut out)));
        let read = (LAYERS * bench.sequences * context * 2 * (KV * 2 + SHAPE.heads * 4)) as f64;
        let share = read / time.as_secs_f64() / bandwidth;
        println!("{n:>5} {sequences:>9} {context:>8} {:>14.3} {:>9.0}%", millis(time), 100.0 * share);
    }

    println!("\nof 30 layers, ms:\n{:>5} {:>10} {:>10} {:>10}", "rows", "norms", "append", "gated");
    for n in [1, 16, 512] {
        between(&pool, n);
    }
}

/// The matrices of a model, in the formats of its file.
struct Model {
    layers: Vec<Layer>,
    head: Packed,
}

struct Layer {
    qkv: [Packed; 3],
    output: Packed,
    gate_up: [Packed; 2],
    down: Packed,
}

struct Buffers {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    hidden: [Vec<f32>; 2],
    out: Vec<f32>,
    logits: Vec<f32>,
}

impl Buffers {
    fn new(n: usize) -> Self {
        let zeros = |len| vec![0.0; n * len];
        Self {
            q: zeros(WIDTH),
            k: zeros(KV),
            v: zeros(KV),
            hidden: [zeros(HIDDEN), zeros(HIDDEN)],
            out: zeros(WIDTH),
            logits: zeros(VOCABULARY),
        }
    }
}

impl Model {
    fn new(pool: &Pool) -> Self {
        let mut seed = 0;
        let mut matrix = |dtype: DType, rows, cols| {
            seed += 1;
            Packed::pack(dtype, rows, cols, &weights(dtype, rows, cols, seed), pool).expect("whole blocks")
        };
        let layers = (0..LAYERS)
            .map(|_| Layer {
                qkv: [WIDTH, KV, KV].map(|rows| matrix(DType::Q4_1, rows, WIDTH)),
                output: matrix(DType::Q4_1, WIDTH, WIDTH),
                gate_up: [HIDDEN, HIDDEN].map(|rows| matrix(DType::Q4_1, rows, WIDTH)),
                down: matrix(DType::Q4_1, WIDTH, HIDDEN),
            })
            .collect();
        Self { layers, head: matrix(DType::Q8_0, VOCABULARY, WIDTH) }
    }

    fn bytes(&self) -> usize {
        let of = |l: &Layer| {
            l.qkv.iter().chain(&l.gate_up).chain([&l.output, &l.down]).map(Packed::bytes).sum::<usize>()
        };
        self.layers.iter().map(of).sum::<usize>() + self.head.bytes()
    }

    /// The shortest times of a step's products, layers and head: the sums of each call's own best, so that a step need
    /// not be undisturbed from end to end. Between two runs of a call all other weights are read, as in real steps.
    fn best(&self, pool: &Pool, x: &[f32], b: &mut Buffers) -> (Duration, Duration) {
        let mut calls = vec![Duration::MAX; 4 * LAYERS + 1];
        for _ in 0..runs(x.len() / WIDTH) {
            let mut timed = |call: usize, run: &mut dyn FnMut()| {
                let start = Instant::now();
                run();
                calls[call] = calls[call].min(start.elapsed());
            };
            for (index, layer) in self.layers.iter().enumerate() {
                let [q, k, v] = &layer.qkv;
                timed(4 * index, &mut || {
                    linear_many(pool, x, None, &[q, k, v], &mut [&mut b.q, &mut b.k, &mut b.v])
                });
                timed(4 * index + 1, &mut || linear(pool, &b.q, &layer.output, &mut b.out));
                let ([gate, up], [to_gate, to_up]) = (&layer.gate_up, &mut b.hidden);
                timed(4 * index + 2, &mut || linear_many(pool, x, None, &[gate, up], &mut [to_gate, to_up]));
                timed(4 * index + 3, &mut || linear(pool, &b.hidden[0], &layer.down, &mut b.out));
            }
            timed(4 * LAYERS, &mut || linear(pool, x, &self.head, &mut b.logits));
        }
        (calls[..4 * LAYERS].iter().sum(), calls[4 * LAYERS])
    }
}

/// A cache in which a step decodes `n` sequences of `context` positions, or a prompt of `n` is as long as its context.
struct Attention {
    keys: Vec<Vec<i16>>,
    values: Vec<Vec<i16>>,
    tables: Vec<Vec<u32>>,
    sequences: usize,
    n: usize,
    context: usize,
}

impl Attention {
    /// `n` rows of one sequence, its last ones, or the last rows of `n` sequences.
    fn new(pool: &Pool, n: usize, sequences: usize, context: usize) -> Self {
        let per_sequence = context.div_ceil(SHAPE.block);
        let blocks = sequences * per_sequence;
        let tables: Vec<Vec<u32>> =
            (0..sequences).map(|s| (0..per_sequence).map(|b| (b * sequences + s) as u32).collect()).collect();
        let mut bench = Self { keys: vec![], values: vec![], tables, sequences, n, context };
        let new = noise(context * KV, 3);
        for _ in 0..LAYERS {
            let mut keys = vec![0; blocks * SHAPE.key_block::<i16>()];
            let mut values = vec![0; blocks * SHAPE.value_block::<i16>()];
            for sequence in 0..sequences {
                let positions: Vec<u32> = (0..context as u32).collect();
                let owners = vec![sequence as u32; context];
                let rows = Rows { sequences: &owners, positions: &positions, tables: &bench.tables() };
                // Nothing is rotated.
                let rotation = (RopeStyle::Half, &Angles { pairs: 0, cos: &[], sin: &[] });
                let mut k = new.clone();
                append(pool, &SHAPE, &mut keys, &mut values, &rows, rotation, &mut [], &mut k, &new);
            }
            bench.keys.push(keys);
            bench.values.push(values);
        }
        bench
    }

    fn tables(&self) -> Vec<&[u32]> {
        self.tables.iter().map(Vec::as_slice).collect()
    }

    fn run(&self, pool: &Pool, layer: usize, q: &[f32], out: &mut [f32]) {
        let spec = AttentionSpec { heads: HEADS, scale: 0.125, window: None, softcap: None };
        let (sequences, positions): (Vec<u32>, Vec<u32>) = match self.sequences {
            1 => (0..self.n).map(|row| (0, (self.context - self.n + row) as u32)).unzip(),
            _ => (0..self.n).map(|row| (row as u32, self.context as u32 - 1)).unzip(),
        };
        let tables = self.tables();
        let rows = Rows { sequences: &sequences, positions: &positions, tables: &tables };
        attention(pool, &spec, &SHAPE, &self.keys[layer], &self.values[layer], &rows, q, out, None);
    }
}

/// What lies between products and attention.
fn between(pool: &Pool, n: usize) {
    let bench = Attention::new(pool, n, if n == 512 { 1 } else { n }, 512);
    let (mut keys, mut values) = (bench.keys[0].clone(), bench.values[0].clone());
    let mut x = noise(n * WIDTH, 4);
    let (y, k, hidden) = (noise(n * WIDTH, 5), noise(n * KV, 6), noise(n * HIDDEN, 7));
    let (mut out, mut gate) = (vec![0.0; n * WIDTH], vec![0.0; n * HIDDEN]);
    let weight = vec![1.0; WIDTH];
    let norms = best(n, || {
        for _ in 0..LAYERS {
            rms_norm(pool, &y, &weight, 1e-5, &mut out);
            add_rms_norm(pool, &mut x, &y, (&weight, 1e-5), &mut out, None);
            x.copy_from_slice(&y);
        }
    });
    let (cos, sin) = (vec![0.8; n * 32], vec![0.6; n * 32]);
    let angles = Angles { pairs: 32, cos: &cos, sin: &sin };
    let (sequences, positions): (Vec<u32>, Vec<u32>) = match bench.sequences {
        1 => (0..n as u32).map(|row| (0, row)).unzip(),
        _ => (0..n as u32).map(|row| (row, 511)).unzip(),
    };
    let tables = bench.tables();
    let rows = Rows { sequences: &sequences, positions: &positions, tables: &tables };
    let write = best(n, || {
        for _ in 0..LAYERS {
            let rotation = (RopeStyle::Interleaved, &angles);
            append(pool, &SHAPE, &mut keys, &mut values, &rows, rotation, &mut out, &mut x[..n * KV], &k);
        }
    });
    let unit = best(n, || {
        (0..LAYERS).for_each(|_| gated(pool, Activation::Silu, (&hidden, &hidden), &mut gate, None));
    });
    println!("{n:>5} {:>10.3} {:>10.3} {:>10.3}", millis(norms), millis(write), millis(unit));
}

/// Bytes a second that all threads together read from memory, with what they read asked for well ahead.
fn bandwidth(pool: &Pool) -> f64 {
    let data = vec![[1u64; 8]; 32 << 20 >> 3];
    let time = best(1, || {
        pool.split(data.len() / 64, 1, |range| {
            let mut sums = [0u64; 8];
            for (index, line) in data[range.start * 64..range.end * 64].iter().enumerate() {
                ask_for(data.as_ptr().wrapping_add(range.start * 64 + index + 192));
                sums = std::array::from_fn(|i| sums[i] ^ line[i]);
            }
            black_box(sums);
        });
    });
    (data.len() * 64) as f64 / time.as_secs_f64()
}

fn ask_for<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: asking for memory that is not there does nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Plausible bytes for a matrix: any codes, small scales.
fn weights(dtype: DType, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes: Vec<u8> = (0..rows * dtype.row_bytes(cols).expect("whole blocks"))
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect();
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        block[..2].copy_from_slice(&half::f16::from_f32(0.01).to_le_bytes());
        if dtype == DType::Q4_1 {
            block[2..4].copy_from_slice(&half::f16::from_f32(-0.075).to_le_bytes());
        }
    }
    bytes
}

fn noise(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1000.0 - 1.0).collect()
}

/// How often a figure for `n` rows is taken.
fn runs(n: usize) -> usize {
    if n > 64 { 8 } else { 60 }
}

/// The shortest of many runs, fewer where they are long.
fn best(n: usize, mut run: impl FnMut()) -> Duration {
    let mut shortest = Duration::MAX;
    for _ in 0..runs(n) {
        let start = Instant::now();
        run();
        shortest = shortest.min(start.elapsed());
    }
    shortest
}

/// Seconds of one of `count` runs in a row, the best of a few times.
fn seconds_per(count: usize, mut run: impl FnMut()) -> f64 {
    best(1, || (0..count).for_each(|_| run())).as_secs_f64() / count as f64
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
