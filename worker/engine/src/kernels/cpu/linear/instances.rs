//! The instances of a tile kernel: one for each layout of the weights and number of rows, so that nothing is left to
//! decide in its loops.

use super::{Group, Kernel, TILE};
use crate::kernels::cpu::activations::Activations;
use crate::kernels::cpu::format::{Layout, Scales};
use crate::kernels::cpu::pack::LANES;

/// The tile kernel of an instruction set.
pub(super) trait Tile {
    /// A tile of `T` rows: see [`Kernel`].
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

/// The instance for a layout.
pub(super) fn kernel<K: Tile>(layout: Layout) -> Kernel {
    match (layout.bits, layout.scales) {
        (4, Scales::Plain) => tile::<K, 4, PLAIN>,
        (4, Scales::Offset) => tile::<K, 4, OFFSET>,
        (4, Scales::Nested) => tile::<K, 4, NESTED>,
        (5, Scales::Plain) => tile::<K, 5, PLAIN>,
        (5, Scales::Offset) => tile::<K, 5, OFFSET>,
        (5, Scales::Nested) => tile::<K, 5, NESTED>,
        (6, Scales::Halves) => tile::<K, 6, HALVES>,
        (8, Scales::Plain) => tile::<K, 8, PLAIN>,
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

/// See [`Kernel`].
///
/// # Safety
/// The instruction set is there.
unsafe fn tile<K: Tile, const BITS: u32, const SCALES: u8>(
    group: &Group<'_>,
    x: &Activations,
    first: usize,
    out: &mut [[f32; LANES]],
) {
    let layout = const { layout_of::<BITS, SCALES>() };
    assert_eq!(group.layout, layout);
    assert!(group.codes.len() >= x.blocks * layout.code_bytes());
    assert!(group.scales.len() >= layout.scale_bytes(x.blocks));
    assert!(group.codes.as_ptr().align_offset(64) == 0);
    assert!(
        first + out.len() <= x.rows
            && x.codes.len() >= x.rows * x.blocks
            && x.scales.len() >= x.rows * x.blocks
    );
    // SAFETY: the caller's promise, and what was just checked.
    unsafe {
        match out.len() {
            1 => K::rows::<BITS, SCALES, 1>(group, x, first, out),
            2 => K::rows::<BITS, SCALES, 2>(group, x, first, out),
            3 => K::rows::<BITS, SCALES, 3>(group, x, first, out),
            4 => K::rows::<BITS, SCALES, 4>(group, x, first, out),
            n => unreachable!("a tile of {n} rows of at most {TILE}"),
        }
    }
}
