//! Products of activations with packed weights: `y = x W^T`.
//!
//! Every output element is one chain of operations over the blocks of its inputs, in order, whatever the number of rows,
//! threads or tiles. So a row's result is bit for bit the same alone and in a batch, which keeps texts independent of
//! what else an engine happens to do.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod floats;
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
mod instances;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use std::cell::RefCell;
use std::ops::Range;

use super::activations::{Activations, TILE_ROWS};
use super::format::{BLOCK, Layout, layout};
use super::isa::Isa;
use super::pack::{LANES, Packed, Shared};
use super::pool::{Pool, share, shrinking};

/// Rows of activations that a kernel takes at once.
const TILE: usize = 4;
/// The same for a kernel that has registers for more.
const WIDE: usize = 8;
/// Rows of activations that stay in the second-level cache while all weights pass by.
const PASS: usize = 128;
/// Bytes of weights that stay in the second-level cache while all rows of activations pass by.
const KEPT: usize = 256 << 10;
/// Weights are asked for this many bytes before they are needed: the processor's own prefetching hides a third of the
/// memory's latency at best. Measured on Zen 5, 4 and 3; too much also runs further into what another thread reads.
const AHEAD: usize = 12 << 10;
/// So few threads take rows of their own, so that the activations stay where they are, from product to product. Each reads
/// all weights then; more threads would want more of the memory than it gives.
const BY_ROWS: usize = 4;
/// Bytes of weights, times tiles of activations, that are worth another thread.
const WORTH: usize = 16 << 10;

/// Computes a [`Problem`] whose weights are in a block format.
type Kernel = unsafe fn(&Problem<'_>);

/// A thread's piece of a product: groups of a matrix with rows of activations.
struct Problem<'a> {
    w: &'a Packed,
    groups: Range<usize>,
    x: &'a Activations,
    rows: Range<usize>,
    y: Shared<f32>,
}

/// 16 rows of weights of a block format: codes and scales of as many blocks as the activations have, the codes on a cache
/// line.
struct Group<'a> {
    codes: &'a [u8],
    scales: &'a [u8],
    layout: Layout,
    /// Whether the memory ahead has to be asked for: once for all rows of activations.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86 asks"))]
    fetch: bool,
}

impl Problem<'_> {
    /// A group of weights, to be used with the activations' rows from `first` on.
    fn group(&self, index: usize, first: usize) -> Group<'_> {
        let layout = layout(self.w.dtype()).expect("a block format");
        let (codes, scales) = self.w.group(index).split_at(self.x.blocks * layout.code_bytes());
        assert!(scales.len() >= layout.scale_bytes(self.x.blocks));
        assert!(codes.as_ptr().align_offset(64) == 0);
        Group { codes, scales, layout, fetch: first == self.rows.start }
    }

    /// Stores the outputs of a group for a row of activations.
    #[inline(always)]
    fn put(&self, row: usize, group: usize, values: &[f32; LANES]) {
        debug_assert!(self.rows.contains(&row) && self.groups.contains(&group));
        let (width, first) = (self.w.rows(), group * LANES);
        let to = self.y.at(row * width + first);
        // SAFETY: row and group are of this piece, so the destination lies within `y`, whose length was checked, and is
        // written by this task alone.
        unsafe {
            if first + LANES <= width {
                // Of known length: a store, not a call.
                to.cast::<[f32; LANES]>().write_unaligned(*values);
            } else {
                put_some(&values[..width - first], to);
            }
        }
    }
}

/// Stores the outputs of a last group that is not full. Apart, or compilers make one call of it and of the store of all.
///
/// # Safety
/// There is room for the values.
#[cold]
#[inline(never)]
unsafe fn put_some(values: &[f32], to: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len()) }
}

/// Asks for the line of an output that will be written: the processor fetches it first even if it is written whole, and a
/// kernel so fast that it has nothing else to do meanwhile would wait.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[inline(always)]
fn announce(output: *const f32) {
    // SAFETY: asking for memory that is not there does nothing.
    unsafe { std::arch::asm!("prefetchw [{}]", in(reg) output, options(nostack, preserves_flags)) }
}

/// Has `tile(group, first, out)` compute the outputs of each group for each few rows, from `first` on, and stores them: `most`
/// rows at once as long as there are so many, then up to [`TILE`]. Groups that stay in the second-level cache pass by each few
/// rows, which so stay in the first.
#[inline(always)]
fn each_tile(problem: &Problem<'_>, most: usize, mut tile: impl FnMut(usize, usize, &mut [[f32; LANES]])) {
    let mut out = [[0.0; LANES]; WIDE];
    let bytes = problem.w.bytes() / problem.w.groups().max(1);
    for groups in pieces(problem.groups.clone(), (KEPT / bytes.max(1)).max(1)) {
        let mut first = problem.rows.start;
        while first < problem.rows.end {
            let left = problem.rows.end - first;
            let out = &mut out[..if left >= most { most } else { left.min(TILE) }];
            for group in groups.clone() {
                tile(group, first, out);
                for (row, values) in (first..).zip(out.iter()) {
                    problem.put(row, group, values);
                }
            }
            first += out.len();
        }
    }
}

/// A range in pieces of at most `size`.
fn pieces(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(size).map(move |start| start..(start + size).min(range.end))
}

thread_local! {
    static QUANTISED: RefCell<Activations> = RefCell::default();
}

/// `y = x W^T`: `x` is `[n, cols]`, `y` `[n, rows]`.
///
/// # Panics
/// If the lengths of `x` and `y` do not fit the shape of `w`.
pub fn linear(pool: &Pool, x: &[f32], w: &Packed, y: &mut [f32]) {
    linear_many(pool, x, None, &[w], &mut [y]);
}

/// [`linear`] with several matrices that share their input: cheaper than one after the other. `quantised` is `x`, where that was
/// quantised already, with the same pool.
///
/// # Panics
/// If the lengths do not fit the shapes, or matrices differ in their columns.
pub fn linear_many(
    pool: &Pool,
    x: &[f32],
    quantised: Option<&Activations>,
    ws: &[&Packed],
    ys: &mut [&mut [f32]],
) {
    let Some(first) = ws.first() else { return };
    let cols = first.cols();
    assert_eq!(ws.len(), ys.len());
    assert!(cols > 0 && x.len().is_multiple_of(cols), "{} values are no rows of {cols}", x.len());
    let n = x.len() / cols;
    for (w, y) in ws.iter().zip(ys.iter()) {
        assert_eq!(w.cols(), cols);
        assert_eq!(y.len(), n * w.rows());
    }
    let jobs: Vec<Job<'_>> = ws
        .iter()
        .zip(ys.iter_mut())
        .map(|(w, y)| Job {
            w,
            y: Shared(y.as_mut_ptr()),
            kernel: layout(w.dtype()).map(|l| kernel(pool.isa(), l, w.is_fixed())),
        })
        .collect();
    let wanted = jobs.iter().any(|job| job.kernel.is_some());
    QUANTISED.with_borrow_mut(|own| {
        let quantised = match quantised {
            Some(quantised) => quantised,
            None => {
                if wanted {
                    own.quantise(pool, x, cols);
                }
                own
            }
        };
        assert!(!wanted || (quantised.rows, quantised.blocks) == (n, cols / BLOCK));
        let tile = if wanted && quantised.tiled { TILE_ROWS } else { TILE };
        run(pool, &Input { x, cols, n, tile, quantised }, &jobs);
    });
}

struct Job<'a> {
    w: &'a Packed,
    y: Shared<f32>,
    /// None for float formats.
    kernel: Option<Kernel>,
}

struct Input<'a> {
    x: &'a [f32],
    cols: usize,
    n: usize,
    /// Rows that are shared out together.
    tile: usize,
    quantised: &'a Activations,
}

/// Splits the work among tasks: groups of all matrices, and rows of activations where there are enough.
fn run(pool: &Pool, input: &Input<'_>, jobs: &[Job<'_>]) {
    let groups: usize = jobs.iter().map(|job| job.w.groups()).sum();
    let bytes: usize = jobs.iter().map(|job| job.w.bytes()).sum();
    let (tile, threads) = (input.tile, pool.threads());
    let tiles = input.n.div_ceil(tile);
    let by_rows = threads <= BY_ROWS && tiles >= 2 * threads;
    // Too little work is shared by fewer threads.
    let tiles_each = if by_rows { tiles / threads } else { tiles };
    let least = (WORTH * groups).div_ceil((bytes * tiles_each).max(1)).max(1);
    let sharing = threads.min(groups / least).max(1);
    let tasks: Vec<(Range<usize>, Range<usize>)> = (0..sharing)
        .flat_map(|thread| {
            let (rows, groups) = match by_rows {
                true => (share(tiles, sharing, thread), 0..groups),
                false => (0..tiles, share(groups, sharing, thread)),
            };
            // With few rows the time goes into reading weights, which is fastest in long runs. With many it goes into
            // computing, and pieces that get smaller even out what threads are kept from.
            let parts = if tiles <= 2 || sharing == 1 { 1 } else { 4 };
            let rows = rows.start * tile..(rows.end * tile).min(input.n);
            shrinking(groups, least, parts).map(move |piece| (rows.clone(), piece))
        })
        .collect();
    pool.run(tasks.len(), |task| {
        let (rows, mut range) = tasks[task].clone();
        for job in jobs {
            let mine = range.start.min(job.w.groups())..range.end.min(job.w.groups());
            if !mine.is_empty() {
                multiply(pool.isa(), input, job, rows.clone(), mine);
            }
            range = range.start.saturating_sub(job.w.groups())..range.end.saturating_sub(job.w.groups());
        }
    });
}

/// A range of rows of activations with a range of groups of one matrix.
fn multiply(isa: Isa, input: &Input<'_>, job: &Job<'_>, rows: Range<usize>, groups: Range<usize>) {
    for rows in pieces(rows, PASS) {
        let problem = Problem { w: job.w, groups: groups.clone(), x: input.quantised, rows, y: job.y };
        match job.kernel {
            // SAFETY: the kernel is of an instruction set that the pool found to be there.
            Some(kernel) => unsafe { kernel(&problem) },
            None => each_tile(&problem, TILE, |group, first, out| {
                let x = &input.x[first * input.cols..(first + out.len()) * input.cols];
                let fetch = first == problem.rows.start;
                floats::tile(isa, job.w.dtype(), job.w.group(group), fetch, x, input.cols, out);
            }),
        }
    }
}

fn kernel(isa: Isa, layout: Layout, is_fixed: bool) -> Kernel {
    assert!(!is_fixed || isa == Isa::Amx, "weights packed for AMX on {isa}");
    match isa {
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => instances::kernel::<neon::Neon>(layout),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => instances::kernel::<avx2::Avx2>(layout),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => instances::kernel::<avx512::Avx512>(layout),
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Isa::Amx if is_fixed => amx::fixed::run,
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Isa::Amx => instances::kernel::<amx::Amx>(layout),
        _ => portable::run,
    }
}

#[cfg(test)]
mod tests;
