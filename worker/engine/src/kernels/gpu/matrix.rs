//! Weights on the device, in the precision of their file and about its size.
//!
//! Outputs lie side by side: the same word of neighbouring outputs is in neighbouring words of memory, so that a unit loads
//! those of four outputs at once, and a product over the inputs needs no sum across units. Inputs go in blocks of 32:
//! - codes: four words of eight codes' low four bits each, the first code lowest; then the bits above, if the format
//!   has any (one, two or four a code), in the same order;
//! - 16-bit floats: sixteen words of two each; f32: 32 words.
//!
//! The scales of the formats in blocks lie in words of their own, again with outputs side by side; see [`Form`]. Outputs
//! are filled up with zeros to whole tiles, inputs to whole blocks.

use std::thread::{available_parallelism, scope};

use burn::tensor::Tensor;
use burn_cubecl::cubecl::Runtime;
use burn_cubecl::cubecl::bytes::Bytes;
use burn_cubecl::cubecl::client::ComputeClient;
use burn_cubecl::cubecl::server::Handle;
use burn_cubecl::{BoolElement, CubeRuntime};

use super::{Gpu, bare, linear, wrap};
use crate::kernels::Weight;
use crate::kernels::cpu::format::{BLOCK, SUPER, Scales, decode, layout};
use crate::weights::{DType, TensorView};

/// Outputs are filled up to a multiple of this.
pub(super) const OUTPUTS: usize = 64;

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// f32.
    Single,
    /// f16.
    Half,
    /// bf16.
    Brain,
    /// Unsigned codes: a weight is `scale * (code - bias) + offset`. Words of scales:
    /// - [`Scales::Plain`]: one for two blocks, their f16 scales;
    /// - [`Scales::Offset`]: one a block, scale and offset in f16;
    /// - the nested kinds: five for eight blocks. The first has the super-block's f16 scale and minimum, each of the
    ///   others the two bytes of two blocks.
    Codes {
        /// Bits of a code above the low four: 0, 1, 2 or 4.
        high: u32,
        /// Kind of scales.
        scales: Scales,
        /// Subtracted from each code.
        bias: i32,
    },
}

impl Form {
    /// That of a file's format.
    fn new(dtype: DType) -> Self {
        match (dtype, layout(dtype)) {
            (_, Some(layout)) => {
                Self::Codes { high: layout.bits - 4, scales: layout.scales, bias: layout.bias }
            }
            (DType::F16, None) => Self::Half,
            (DType::BF16, None) => Self::Brain,
            (_, None) => Self::Single,
        }
    }

    /// Words of a block of inputs.
    pub fn words(self) -> usize {
        match self {
            Self::Single => BLOCK,
            Self::Half | Self::Brain => BLOCK / 2,
            Self::Codes { high, .. } => 4 + high as usize,
        }
    }

    /// Words of scales of eight blocks.
    fn scale_words(self) -> usize {
        match self {
            Self::Single | Self::Half | Self::Brain => 0,
            Self::Codes { scales: Scales::Plain, .. } => SUPER / 2,
            Self::Codes { scales: Scales::Offset, .. } => SUPER,
            Self::Codes { scales: Scales::Nested | Scales::Halves, .. } => 1 + SUPER / 2,
        }
    }
}

/// A matrix of weights on the device.
pub(crate) struct Matrix {
    /// How the weights are stored.
    pub(super) form: Form,
    /// Outputs.
    pub(super) outputs: usize,
    /// Inputs.
    pub(super) inputs: usize,
    /// The codes, or floats.
    pub(super) words: Handle,
    /// Their scales; of no use for floats.
    pub(super) scales: Handle,
    bytes: usize,
}

impl Matrix {
    /// Outputs, as many as there is room for.
    pub fn padded_outputs(&self) -> usize {
        self.outputs.next_multiple_of(OUTPUTS)
    }

    /// Blocks of inputs.
    pub fn blocks(&self) -> usize {
        self.inputs.div_ceil(BLOCK)
    }

    /// Words of scales.
    pub fn scale_words(&self) -> usize {
        let supers = self.inputs.div_ceil(BLOCK * SUPER);
        (supers * self.form.scale_words() * self.padded_outputs()).max(OUTPUTS)
    }

    /// Rearranges `matrix` and sends it to the device.
    fn new<R: Runtime>(client: &ComputeClient<R>, matrix: &TensorView<'_>) -> Self {
        let form = Form::new(matrix.dtype);
        let (outputs, inputs) = (matrix.rows(), matrix.shape[1]);
        let (row, supers) = (outputs.next_multiple_of(OUTPUTS), inputs.div_ceil(BLOCK * SUPER));
        let mut words = vec![0u32; inputs.div_ceil(BLOCK) * form.words() * row];
        let mut scales = vec![0u32; (supers * form.scale_words() * row).max(OUTPUTS)];
        // Threads take super-blocks of all outputs: those lie one after another.
        let threads = available_parallelism().map_or(1, usize::from);
        let share = supers.div_ceil(threads);
        scope(|scope| {
            let words = words.chunks_mut(share * SUPER * form.words() * row);
            let mut scales = scales.chunks_mut((share * form.scale_words() * row).max(1));
            for (thread, words) in words.enumerate() {
                let scales = scales.next().unwrap_or_default();
                scope.spawn(move || pack(matrix, form, thread * share * SUPER, row, words, scales));
            }
        });
        let bytes =
            size_of_val(&words[..]) + if form.scale_words() == 0 { 0 } else { size_of_val(&scales[..]) };
        // Weights stay for good: memory of just their size, not a share of a pool's pages.
        let send = |words: Vec<u32>| client.create(Bytes::from_elems(words));
        let [words, scales] = client
            .memory_persistent_allocation([words, scales], |parts| parts.map(send))
            .expect("the device takes orders");
        Self { form, outputs, inputs, words, scales, bytes }
    }
}

/// Fills `words` and `scales` with the blocks of `matrix` from `first` on; `row` is how many outputs there is room for.
fn pack(
    matrix: &TensorView<'_>,
    form: Form,
    first: usize,
    row: usize,
    words: &mut [u32],
    scales: &mut [u32],
) {
    let outputs = matrix.rows();
    for (index, words) in words.chunks_exact_mut(form.words() * row).enumerate() {
        let block = first + index;
        let Form::Codes { high, scales: kind, .. } = form else {
            for output in 0..outputs {
                pack_floats(matrix, block, output, row, words);
            }
            continue;
        };
        for output in 0..outputs {
            let decoded = decode(matrix.dtype, matrix.row(output), block);
            for (part, codes) in decoded.codes.as_chunks::<8>().0.iter().enumerate() {
                let bits = |width: u32, of: fn(u8) -> u8| {
                    codes.iter().rev().fold(0, |word, code| word << width | u32::from(of(*code)))
                };
                words[part * row + output] = bits(4, |code| code & 15);
                if high > 0 {
                    let bit = part * 8 * high as usize;
                    words[(4 + bit / 32) * row + output] |= bits(high, |code| code >> 4) << (bit % 32);
                }
            }
            let [wide, narrow] = [
                u32::from(decoded.wide[0]) | u32::from(decoded.wide[1]) << 16,
                u32::from(decoded.narrow[0]) | u32::from(decoded.narrow[1]) << 8,
            ];
            let shift = index % 2 * 16;
            match kind {
                Scales::Plain => scales[index / 2 * row + output] |= wide << shift,
                Scales::Offset => scales[index * row + output] = wide,
                Scales::Nested | Scales::Halves => {
                    let head = index / SUPER * (1 + SUPER / 2);
                    scales[head * row + output] = wide;
                    scales[(head + 1 + index % SUPER / 2) * row + output] |= narrow << shift;
                }
            }
        }
    }
}

/// One block of one output of a float format. The last may be incomplete.
fn pack_floats(matrix: &TensorView<'_>, block: usize, output: usize, row: usize, words: &mut [u32]) {
    let bytes = matrix.row(output);
    let block_bytes = BLOCK * matrix.dtype.block_bytes();
    let bytes = &bytes[block * block_bytes..bytes.len().min((block + 1) * block_bytes)];
    for (index, bytes) in bytes.chunks(4).enumerate() {
        let mut word = [0; 4];
        word[..bytes.len()].copy_from_slice(bytes);
        words[index * row + output] = u32::from_le_bytes(word);
    }
}

impl<R: CubeRuntime, T: BoolElement> Weight<Gpu<R, T>> for Matrix {
    fn load((): &(), device: &R::Device, matrix: &TensorView<'_>) -> Self {
        Self::new(&R::client(device), matrix)
    }

    fn apply(&self, (): &(), x: Tensor<Gpu<R, T>, 2>) -> Tensor<Gpu<R, T>, 2> {
        let [rows, inputs] = x.dims();
        let missing = self.blocks() * BLOCK - inputs;
        let x = match missing {
            0 => x,
            // Only float formats have such inputs, and hardly any model.
            _ => Tensor::cat(vec![x.clone(), Tensor::zeros([rows, missing], &x.device())], 1),
        };
        wrap(linear::linear(bare(x), self))
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn elements(&self) -> usize {
        self.outputs * self.inputs
    }
}
