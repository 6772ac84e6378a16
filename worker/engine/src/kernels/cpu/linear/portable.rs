//! The tile kernel in plain Rust, which compilers vectorise as far as the target's baseline goes.

use super::{Group, Problem, TILE, each_tile};
use crate::kernels::cpu::activations::Activations;
use crate::kernels::cpu::format::{BLOCK, Scales};
use crate::kernels::cpu::pack::{LANES, block_codes, block_scales};

/// See [`Kernel`](super::Kernel).
pub(super) fn run(problem: &Problem<'_>) {
    each_tile(problem, TILE, |group, first, out| tile(&problem.group(group, first), problem.x, first, out));
}

/// `out[t]` becomes the outputs of a group for row `first + t` of the activations.
fn tile(group: &Group<'_>, x: &Activations, first: usize, out: &mut [[f32; LANES]]) {
    let layout = group.layout;
    out.fill([0.0; LANES]);
    for (block, codes) in group.codes.chunks_exact(layout.code_bytes()).enumerate() {
        let weights = block_codes(layout, codes);
        let scales = block_scales(layout, group.scales, block);
        for (t, out) in out.iter_mut().enumerate() {
            let at = (first + t) * x.blocks + block;
            let run = x.scales[at];
            let values = &x.codes[at].0;
            let mut sums = [[0i32; LANES]; 2];
            for (i, weights) in weights.iter().enumerate() {
                let value = i32::from(i16::from_le_bytes([values[2 * i], values[2 * i + 1]]));
                for (sum, &weight) in sums[i / (BLOCK / 2)].iter_mut().zip(weights) {
                    *sum += i32::from(weight) * value;
                }
            }
            for lane in 0..LANES {
                let mut y = out[lane];
                if layout.scales == Scales::Halves {
                    y += sums[0][lane] as f32 * (scales.halves[0][lane] * run.scale);
                    y += sums[1][lane] as f32 * (scales.halves[1][lane] * run.scale);
                } else {
                    y += (sums[0][lane] + sums[1][lane]) as f32 * (scales.halves[0][lane] * run.scale);
                }
                out[lane] = y + scales.offset[lane] * run.sum;
            }
        }
    }
}
