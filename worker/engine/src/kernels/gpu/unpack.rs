//! From a matrix' words to weights in f32, on the device; see [`matrix`](super::matrix) for how they lie.
//!
//! Vectors go along the outputs. All conversions are made of operations on words: they run where there are no 16-bit
//! types, and are as fast as others.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;

use super::matrix::Form;
use crate::kernels::cpu::format::Scales;

/// Upper bits of the f32 2^23, whose unit is 1: with a small whole number in its lower bits it is 2^23 more than that.
const TWO_TO_23: u32 = 0x4B00_0000;

/// `scale * (code - bias) + offset` is the weight.
#[derive(CubeType)]
struct Scale<N: Size> {
    scale: Vector<f32, N>,
    offset: Vector<f32, N>,
}

/// The eight weights of part `part` (of four) of `block`, for the outputs of vector `column` of `width`.
#[cube]
pub(super) fn unpack<N: Size>(
    words: &Array<Vector<u32, N>>,
    scales: &Array<Vector<u32, N>>,
    block: usize,
    part: usize,
    column: usize,
    width: usize,
    #[comptime] form: Form,
) -> Array<Vector<f32, N>> {
    let mut weights = Array::<Vector<f32, N>>::new(8usize);
    let base = block * comptime!(form.words()) * width + column;
    match comptime!(form) {
        Form::Single =>
        {
            #[unroll]
            for i in 0..8usize {
                weights[i] = Vector::reinterpret(words[base + (part * 8 + i) * width]);
            }
        }
        Form::Half =>
        {
            #[unroll]
            for i in 0..4usize {
                let pair = words[base + (part * 4 + i) * width];
                weights[2 * i] = from_half::<N>(lower::<N>(pair));
                weights[2 * i + 1] = from_half::<N>(upper::<N>(pair));
            }
        }
        Form::Brain =>
        {
            #[unroll]
            for i in 0..4usize {
                let pair = words[base + (part * 4 + i) * width];
                weights[2 * i] = Vector::reinterpret(pair << Vector::new(16u32));
                weights[2 * i + 1] = Vector::reinterpret(pair & Vector::new(0xFFFF_0000u32));
            }
        }
        Form::Codes { high, scales: kind, bias } => {
            let scale = scale_of::<N>(scales, block, part / 2, column, width, kind);
            let zero = Vector::new(comptime!(8_388_608.0 + bias as f32).runtime());
            let low = words[base + part * width];
            let mut above = Vector::<u32, N>::new(0u32);
            if comptime!(high > 0) {
                let bit = part * comptime!(8 * high as usize);
                above = words[base + (4 + bit / 32) * width] >> Vector::new(u32::cast_from(bit % 32));
            }
            #[unroll]
            for i in 0..8usize {
                let shift = u32::cast_from(i);
                let mut code = (low >> Vector::new(shift * 4)) & Vector::new(15u32);
                if comptime!(high > 0) {
                    let bits = (above >> Vector::new(shift * high))
                        & Vector::new(comptime!((1u32 << high) - 1).runtime());
                    code |= bits << Vector::new(4u32);
                }
                let code = Vector::<f32, N>::reinterpret(code | Vector::new(TWO_TO_23)) - zero;
                if comptime!(matches!(kind, Scales::Offset | Scales::Nested)) {
                    weights[i] = code * scale.scale + scale.offset;
                } else {
                    weights[i] = code * scale.scale;
                }
            }
        }
    }
    weights
}

/// Scale and offset of a half of `block`.
#[cube]
fn scale_of<N: Size>(
    scales: &Array<Vector<u32, N>>,
    block: usize,
    half: usize,
    column: usize,
    width: usize,
    #[comptime] kind: Scales,
) -> Scale<N> {
    let none = Vector::<f32, N>::new(0.0f32);
    // The nested kinds: where a super-block's words start, and its block's two bytes.
    let head = block / 8 * 5;
    let odd = Vector::<u32, N>::new(u32::cast_from(block % 2 * 16));
    match comptime!(kind) {
        Scales::Plain => {
            let bits = lower::<N>(scales[block / 2 * width + column] >> odd);
            Scale::<N> { scale: from_half::<N>(bits), offset: none }
        }
        Scales::Offset => {
            let pair = scales[block * width + column];
            Scale::<N> { scale: from_half::<N>(lower::<N>(pair)), offset: from_half::<N>(upper::<N>(pair)) }
        }
        Scales::Nested => {
            let pair = scales[head * width + column];
            let bytes = scales[(head + 1 + block % 8 / 2) * width + column] >> odd;
            let own = Vector::<f32, N>::cast_from(bytes & Vector::new(255u32));
            let minimum = Vector::<f32, N>::cast_from((bytes >> Vector::new(8u32)) & Vector::new(255u32));
            let offset = none - from_half::<N>(upper::<N>(pair)) * minimum;
            Scale::<N> { scale: from_half::<N>(lower::<N>(pair)) * own, offset }
        }
        Scales::Halves => {
            let pair = scales[head * width + column];
            let bytes = scales[(head + 1 + block % 8 / 2) * width + column] >> odd;
            let byte = (bytes >> Vector::new(u32::cast_from(half * 8))) & Vector::new(255u32);
            // A signed byte: with its sign bit turned it is 128 more.
            let own = Vector::<f32, N>::cast_from(byte ^ Vector::new(128u32)) - Vector::new(128.0f32);
            Scale::<N> { scale: from_half::<N>(lower::<N>(pair)) * own, offset: none }
        }
    }
}

#[cube]
fn lower<N: Size>(pair: Vector<u32, N>) -> Vector<u32, N> {
    pair & Vector::new(0xFFFFu32)
}

#[cube]
fn upper<N: Size>(pair: Vector<u32, N>) -> Vector<u32, N> {
    pair >> Vector::new(16u32)
}

/// The f32 of finite f16 bits.
#[cube]
fn from_half<N: Size>(bits: Vector<u32, N>) -> Vector<f32, N> {
    let rest = bits & Vector::new(0x7FFFu32);
    // The exponent's bias is 112 more in an f32.
    let normal = Vector::<f32, N>::reinterpret((rest << Vector::new(13u32)) + Vector::new(0x3800_0000u32));
    // Without an exponent they count units of 2^-24. As bits of an f32 they might be flushed to zero.
    let tiny = Vector::<f32, N>::cast_from(rest) * Vector::new(5.960_464_5e-8f32);
    let size = select_many(rest.less_than(Vector::new(0x400u32)), tiny, normal);
    let sign = (bits & Vector::new(0x8000u32)) << Vector::new(16u32);
    Vector::reinterpret(Vector::<u32, N>::reinterpret(size) | sign)
}
