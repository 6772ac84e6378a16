//! The instances of a kernel: one for each layout of the weights and number of rows, so that nothing is left to decide in
//! its loops.

#[cfg(target_arch = "x86_64")]
use super::AHEAD;
use super::{Group, Kernel, Problem, TILE, WIDE, each_tile};
use crate::kernels::cpu::activations::Activations;
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::format::SUPER;
use crate::kernels::cpu::format::{Layout, Scales, layout};
use crate::kernels::cpu::pack::LANES;

/// Most blocks of inputs whose activations stay in the first-level cache even with [`WIDE`] rows.
const NARROW: usize = 32;

/// The kernel of an instruction set.
pub(super) trait Product {
    /// See [`Kernel`]; for a layout.
    ///
    /// # Safety
    /// The instruction set is there.
    unsafe fn run<const BITS: u32, const SCALES: u8>(problem: &Problem<'_>);
}

/// A kernel that takes a group of weights with a few rows of activations, which stay in registers.
pub(super) trait Tile {
    /// Rows of the largest tile: [`TILE`], or [`WIDE`] where registers hold the sums of as many.
    const MOST: usize;
    /// A tile of `T` rows: `out[t]` becomes the outputs of 16 rows of weights for row `first + t` of the activations.
    ///
    /// # Safety
    /// The instruction set is there. Codes and scales of `x.blocks` blocks in the group, the codes on a cache line; `T`
    /// rows from `first` in `x`; `out` of `T`.
    unsafe fn rows<const BITS: u32, const SCALES: u8, const T: usize>(
        group: &Group<'_>,
        x: &Activations,
        first: usize,
        out: &mut [[f32; LANES]],
    );
}

impl<K: Tile> Product for K {
    unsafe fn run<const BITS: u32, const SCALES: u8>(problem: &Problem<'_>) {
        let x = problem.x;
        assert!(!x.tiled && x.codes.len() >= x.rows * x.blocks && x.scales.len() >= x.rows * x.blocks);
        assert!(problem.rows.end <= x.rows);
        check_layout::<BITS, SCALES>(problem);
        let most = if x.blocks <= NARROW { K::MOST } else { TILE };
        each_tile(problem, most, |group, first, out| {
            let group = &problem.group(group, first);
            // SAFETY: the caller's promise, what was just checked, and what a [`Group`] is.
            unsafe {
                match out.len() {
                    WIDE if K::MOST == WIDE => K::rows::<BITS, SCALES, WIDE>(group, x, first, out),
                    1 => K::rows::<BITS, SCALES, 1>(group, x, first, out),
                    2 => K::rows::<BITS, SCALES, 2>(group, x, first, out),
                    3 => K::rows::<BITS, SCALES, 3>(group, x, first, out),
                    4 => K::rows::<BITS, SCALES, 4>(group, x, first, out),
                    n => unreachable!("a tile of {n} rows"),
                }
            }
        });
    }
}

/// Asserts that the weights, whose groups all have one layout, have that of the instance.
pub(super) fn check_layout<const BITS: u32, const SCALES: u8>(problem: &Problem<'_>) {
    assert_eq!(layout(problem.w.dtype()), Some(const { layout_of::<BITS, SCALES>() }));
}

/// The instance for a layout.
pub(super) fn kernel<P: Product>(layout: Layout) -> Kernel {
    match (layout.bits, layout.scales) {
        (4, Scales::Plain) => P::run::<4, PLAIN>,
        (4, Scales::Offset) => P::run::<4, OFFSET>,
        (4, Scales::Nested) => P::run::<4, NESTED>,
        (5, Scales::Plain) => P::run::<5, PLAIN>,
        (5, Scales::Offset) => P::run::<5, OFFSET>,
        (5, Scales::Nested) => P::run::<5, NESTED>,
        (6, Scales::Halves) => P::run::<6, HALVES>,
        (8, Scales::Plain) => P::run::<8, PLAIN>,
        other => unreachable!("no format has {other:?}"),
    }
}

pub(super) const PLAIN: u8 = 0;
pub(super) const OFFSET: u8 = 1;
pub(super) const NESTED: u8 = 2;
pub(super) const HALVES: u8 = 3;

pub(super) const fn layout_of<const BITS: u32, const SCALES: u8>() -> Layout {
    let scales = match SCALES {
        PLAIN => Scales::Plain,
        OFFSET => Scales::Offset,
        NESTED => Scales::Nested,
        _ => Scales::Halves,
    };
    let bias = if matches!(SCALES, PLAIN | HALVES) { 1 << (BITS - 1) } else { 0 };
    Layout { bits: BITS, scales, bias }
}

/// Asks for the share of block `block` in the memory that lies [`AHEAD`] of a group: its scales, too, and the next
/// group's, since groups follow one another. With several rows the first-level cache is theirs, so weights are only
/// brought into the second.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn prefetch<const BITS: u32, const SCALES: u8, const T: usize>(group: *const u8, block: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    let layout = const { layout_of::<BITS, SCALES>() };
    let size = layout.code_bytes() + layout.scale_bytes(SUPER) / SUPER;
    for line in 0..size.div_ceil(64) {
        let at = group.wrapping_add(block * size + AHEAD + 64 * line).cast();
        // SAFETY: asking for memory that is not there does nothing.
        unsafe {
            if T <= 2 {
                _mm_prefetch::<_MM_HINT_T0>(at);
            } else {
                _mm_prefetch::<_MM_HINT_T1>(at);
            }
        }
    }
}
