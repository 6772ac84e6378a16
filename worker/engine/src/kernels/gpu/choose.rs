//! Chooses tokens where the logits are, as the [sampler](crate::sampler) does: a step brings one word a row to the host.
//!
//! Nothing is sorted. Logits are compared by how far they are below their row's greatest, the bits of which, of a number that is
//! not negative, are in its order: a whole number, the *key*. The `k` likeliest and the nucleus are all tokens up to some key,
//! which is found by bisection, and of those with this very key only the first. What turns out to be farther away is let go
//! of on the way, so only the first of the thirty passes are over much. In the end the random number's place is looked for
//! in ever shorter pieces of the row.
//!
//! Sums are in f32, and exponentials are the device's: where the random number falls on the border between two tokens, or a
//! nucleus' share on that of a token, the choice may be another than the host's. It is the same whenever it is repeated.

use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::bytes::Bytes;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::reduce::cube_sum_in;
use super::{cubes, dims};
use crate::sampler::Choice;

/// Units of a cube.
const UNITS: usize = 256;
/// Pieces of a row, or of a piece of it, whose masses are compared.
const PIECES: usize = 32;
/// Units that work on a piece, on neighbouring numbers.
const LANES: usize = UNITS / PIECES;

/// Numbers that the kernel has of a row's choice.
const PARAMETERS: usize = 5;
/// A limit that is none.
const OFF: f32 = f32::MAX;
/// Tokens so many times the temperature below the greatest logit have no weight; see the sampler's exponential.
const FARTHEST: f32 = 87.0;

/// See [`PARAMETERS`]: the temperature, 0 where the likeliest is taken; the farthest that a logit may be below the greatest;
/// the limits of number and share; the random number.
fn parameters(choice: &Choice) -> [f32; PARAMETERS] {
    let &Choice { temperature, top_k, min_p, top_p, random } = choice;
    // Above 1 it excludes all but leaves the likeliest.
    if choice.is_greedy() || min_p > 1.0 {
        return [0.0; PARAMETERS];
    }
    // So that nothing overflows, or is too small for a device.
    let temperature = temperature.clamp(f32::MIN_POSITIVE, 1e30);
    // No negative zero, whose bits would be far from those of 0.
    let below = if min_p > 0.0 { min_p.ln().abs().min(FARTHEST) } else { FARTHEST };
    let top_k = if top_k > 0 { top_k as f32 } else { OFF };
    let top_p = if top_p < 1.0 { top_p } else { OFF };
    [temperature, temperature * below, top_k, top_p, random as f32]
}

/// The index of a row's greatest logit, the first of several; 0 where nothing is greater than the least f32.
#[cube]
fn likeliest(x: &Array<f32>, row: usize, width: usize) -> u32 {
    let unit = UNIT_POS as usize;
    let mut best = f32::MIN.runtime();
    let mut place = 0u32;
    let mut i = unit;
    while i < width {
        let value = x[row + i];
        if value > best {
            best = value;
            place = u32::cast_from(i);
        }
        i += UNITS;
    }
    let mut values = SharedMemory::<f32>::new(UNITS);
    let mut places = SharedMemory::<u32>::new(UNITS);
    values[unit] = best;
    places[unit] = place;
    sync_cube();
    let mut half = comptime!(UNITS / 2).runtime();
    while half > 0 {
        if unit < half {
            let (value, other) = (values[unit + half], places[unit + half]);
            if value > values[unit] || (value == values[unit] && other < places[unit]) {
                values[unit] = value;
                places[unit] = other;
            }
        }
        sync_cube();
        half /= 2;
    }
    places[0]
}

/// What logits are compared by: the less, the likelier. That of what is no number is greater than all others.
#[cube]
fn key(logit: f32, greatest: f32) -> u32 {
    u32::reinterpret(greatest - logit)
}

/// The probability of a token, up to a common factor: 1 for the likeliest.
#[cube]
fn weight(key: u32, temperature: f32) -> f32 {
    (0.0 - f32::reinterpret(key) / temperature).exp()
}

/// What is limited: the number of tokens, or their weight.
#[cube]
fn measure(key: u32, temperature: f32, #[comptime] counting: bool) -> f32 {
    let mut measure = 1.0f32;
    if comptime!(!counting) {
        measure = weight(key, temperature);
    }
    measure
}

/// The measure of all the cube's keys from `low` on that are less than `high`. A unit's own ones are every [`UNITS`]th from
/// `first` on, `count` of them.
#[cube]
#[allow(clippy::too_many_arguments)]
fn total(
    keys: &Array<u32>,
    first: usize,
    count: usize,
    low: u32,
    high: u32,
    temperature: f32,
    shared: &mut SharedMemory<f32>,
    #[comptime] counting: bool,
) -> f32 {
    let mut sum = 0.0f32;
    for i in 0..count {
        let key = keys[first + i * UNITS];
        if key >= low && key < high {
            sum += measure(key, temperature, counting);
        }
    }
    cube_sum_in(shared, sum, UNITS)
}

/// A cube per row. `choices`: each row's [`parameters`]. `keys` is memory of `x`'s shape.
#[cube(launch_unchecked)]
fn choose_kernel(
    x: &Array<f32>,
    choices: &Array<f32>,
    keys: &mut Array<u32>,
    out: &mut Array<u32>,
    width: usize,
) {
    let unit = UNIT_POS as usize;
    let row = CUBE_POS_X as usize * width;
    let choice = CUBE_POS_X as usize * PARAMETERS;
    let mut shared = SharedMemory::<f32>::new(UNITS);
    let mut pieces = SharedMemory::<f32>::new(UNITS);
    let mut tied = SharedMemory::<f32>::new(UNITS);

    let mut token = likeliest(x, row, width);
    let temperature = choices[choice];
    if temperature > 0.0 {
        // Those that are near enough, each unit's in its own column.
        let greatest = x[row + token as usize];
        let reach = u32::reinterpret(choices[choice + 1]);
        let first = row + unit;
        let mut count = 0usize;
        let mut i = unit;
        while i < width {
            let key = key(x[row + i], greatest);
            if key <= reach {
                keys[first + count * UNITS] = key;
                count += 1;
            }
            i += UNITS;
        }

        // Kept is what is nearer than the border, and the first so many of what is at it.
        let mut border = reach + 1;
        let mut ties = 0.0f32;
        #[unroll]
        for filter in 0..2usize {
            let counting = comptime!(filter == 0);
            let limit = choices[choice + 2 + filter];
            if limit < OFF {
                let nearer = total(keys, first, count, 0, border, temperature, &mut shared, counting);
                let kept = nearer + ties * measure(border, temperature, counting);
                let mut needed = limit;
                if comptime!(!counting) {
                    needed *= kept;
                }
                if kept > needed {
                    let mut low = 0u32;
                    let mut high = border;
                    while low < high {
                        let middle = (low + high) / 2;
                        let up_to =
                            total(keys, first, count, 0, middle + 1, temperature, &mut shared, counting);
                        if up_to >= needed {
                            high = middle;
                            let mut left = 0usize;
                            for i in 0..count {
                                let key = keys[first + i * UNITS];
                                if key <= middle {
                                    keys[first + left * UNITS] = key;
                                    left += 1;
                                }
                            }
                            count = left;
                        } else {
                            low = middle + 1;
                        }
                    }
                    let mut most = total(keys, first, count, high, high + 1, temperature, &mut shared, true);
                    if high == border {
                        most = ties;
                    }
                    let nearer = total(keys, first, count, 0, high, temperature, &mut shared, counting);
                    let missing = (needed - nearer) / measure(high, temperature, counting);
                    ties = min(max(missing.ceil(), 1.0), most);
                    border = high;
                }
            }
        }

        let nearer = total(keys, first, count, 0, border, temperature, &mut shared, false);
        let at_border = weight(border, temperature);
        let mass = nearer + ties * at_border;
        // Nothing is near a greatest that is infinite, or no number.
        if mass > 0.0 {
            let mut target = choices[choice + 4] * mass;
            let mut begin = 0usize;
            let mut end = width;
            while begin + 1 < end {
                let length = (end - begin).div_ceil(PIECES);
                let start = begin + unit / LANES * length;
                let stop = min(start + length, end);
                let mut sum = 0.0f32;
                let mut equal = 0.0f32;
                let mut i = start + unit % LANES;
                while i < stop {
                    let key = key(x[row + i], greatest);
                    if key < border {
                        sum += weight(key, temperature);
                    }
                    if key == border {
                        equal += 1.0;
                    }
                    i += LANES;
                }
                pieces[unit] = sum;
                tied[unit] = equal;
                sync_cube();

                // All units do the same. If rounding puts the target behind the end, it is in the last piece.
                let mut found = false;
                let mut chosen = 0usize;
                let mut passed = 0.0f32;
                let mut before = 0.0f32;
                let mut left = ties;
                for piece in 0..PIECES {
                    let mut sum = 0.0f32;
                    let mut equal = 0.0f32;
                    for lane in 0..LANES {
                        sum += pieces[piece * LANES + lane];
                        equal += tied[piece * LANES + lane];
                    }
                    equal = min(equal, left);
                    sum += equal * at_border;
                    if sum > 0.0 && !found {
                        chosen = piece;
                        passed = before;
                        ties = left;
                        found = before + sum > target;
                    }
                    before += sum;
                    left -= equal;
                }
                sync_cube();
                begin += chosen * length;
                end = min(begin + length, end);
                target -= passed;
            }
            token = u32::cast_from(begin);
        }
    }
    if unit == 0 {
        out[CUBE_POS_X as usize] = token;
    }
}

/// See [`choose`](super::Kernels::choose).
pub(super) fn choose<R: CubeRuntime>(x: CubeTensor<R>, choices: &[Choice]) -> Vec<u32> {
    let [rows, width] = dims(&x);
    assert_eq!(choices.len(), rows, "a choice per row");
    let client = x.client.clone();
    let numbers: Vec<f32> = choices.iter().flat_map(parameters).collect();
    let count = numbers.len();
    let choices = client.create(Bytes::from_elems(numbers));
    let keys = client.empty(rows * width * size_of::<u32>());
    let out = client.empty(rows * size_of::<u32>());
    // SAFETY: a cube per row, whose units stay within its `width`, here and in the memory for keys.
    unsafe {
        choose_kernel::launch_unchecked::<R>(
            &client,
            cubes(rows, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            x.into_array_arg(),
            ArrayArg::from_raw_parts(choices, count),
            ArrayArg::from_raw_parts(keys, rows * width),
            ArrayArg::from_raw_parts(out.clone(), rows),
            width,
        );
    }
    let bytes = client.read_one(out).expect("the device answers");
    bytes.as_chunks().0.iter().map(|bytes| u32::from_ne_bytes(*bytes)).collect()
}
