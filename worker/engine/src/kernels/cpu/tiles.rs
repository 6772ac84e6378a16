//! AMX's tiles, of 16 rows of 64 bytes, and the sums of products of 16-bit integers on them.
//!
//! Two integers `256 * high + low` are multiplied byte by byte: sums of the products of high bytes are on tile 0, of the mixed ones
//! on tile 1, of the low ones on tile 2. They are stored one behind another.

use std::arch::asm;
use std::arch::x86_64::*;

use super::activations::TILE_ROWS;

/// Bytes of a tile.
pub(super) const TILE_BYTES: usize = 64 * TILE_ROWS;
/// Tiles of sums.
pub(super) const PLANES: usize = 3;

/// The tiles' shapes, as the instruction that sets them wants them; and that they are set, for as long as this lives.
#[repr(C, align(64))]
pub(super) struct Configured {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configured {
    /// For products of 16 rows of activations over `inputs` inputs. The tiles from number `weights` on are weights, the two
    /// before them activations or sums if these are as wide, the others sums.
    ///
    /// # Safety
    /// The instruction set is there.
    pub unsafe fn new(inputs: u8, weights: usize) -> Configured {
        let mut row_bytes = [0; 16];
        let mut rows = [0; 16];
        row_bytes[..8].fill(64);
        row_bytes[weights - 2..weights].fill(inputs.into());
        rows[..weights].fill(TILE_ROWS as u8);
        rows[weights..8].fill(inputs / 4);
        let shapes = Configured { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: the caller's promise; 64 bytes, and shapes within a tile's limits.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly, preserves_flags))
        }
        shapes
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: there are tiles, or this would not be. A thread whose tiles are released has nothing of them to be saved.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
    }
}

/// Begins new sums.
///
/// # Safety
/// The tiles are configured.
#[inline(always)]
pub(super) unsafe fn clear_sums() {
    // SAFETY: the caller's promise. No other code uses the tiles' registers.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", options(nostack, nomem, preserves_flags))
    }
}

/// Stores the sums.
///
/// # Safety
/// The tiles are configured, and there is room for [`PLANES`] of them at `to`.
#[inline(always)]
pub(super) unsafe fn store_sums(to: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilestored [{to} + {line}], tmm0",
            "tilestored [{to} + {line} + 1024], tmm1",
            "tilestored [{to} + {line} + 2048], tmm2",
            to = in(reg) to,
            line = in(reg) 64usize,
            options(nostack, preserves_flags),
        )
    }
}

/// Row `row` of stored sums, joined, less their lowest 8 bits.
///
/// # Safety
/// The instruction set is there, and so are the sums at `stored`, on a cache line.
#[inline(always)]
pub(super) unsafe fn sums_of_row(stored: *const u8, row: usize) -> __m512i {
    // Always inlined, which functions with an instruction set of their own cannot be: a call would cost more than the sum.
    // SAFETY: the caller's promise.
    unsafe {
        let plane = |plane: usize| stored.add(plane * TILE_BYTES + 64 * row).cast();
        let sum = _mm512_slli_epi32::<8>(_mm512_load_si512(plane(0)));
        let sum = _mm512_add_epi32(sum, _mm512_load_si512(plane(1)));
        _mm512_add_epi32(sum, _mm512_srai_epi32::<8>(_mm512_load_si512(plane(2))))
    }
}
