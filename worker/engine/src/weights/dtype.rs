//! Number formats that weights come in, and how many bytes they take.

/// A number format. The quantised ones store a row in blocks; see [`super::dequant`] for their layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an [`DType::F32`].
    BF16,
    /// 4 bits and a scale per 32.
    Q4_0,
    /// 4 bits, a scale and a minimum per 32.
    Q4_1,
    /// 5 bits and a scale per 32.
    Q5_0,
    /// 5 bits, a scale and a minimum per 32.
    Q5_1,
    /// 8 bits and a scale per 32.
    Q8_0,
    /// 4 bits, scales and minima quantised too, per 256.
    Q4K,
    /// 5 bits, scales and minima quantised too, per 256.
    Q5K,
    /// 6 bits, scales quantised too, per 256.
    Q6K,
}

impl DType {
    /// All of them.
    pub const ALL: [DType; 11] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// How many values a block holds; 1 for the plain formats.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// How many bytes a block takes.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `len` values; `None` if that is no whole number of blocks, or too many bytes to count.
    pub fn row_bytes(self, len: usize) -> Option<usize> {
        if !len.is_multiple_of(self.block_len()) {
            return None;
        }
        (len / self.block_len()).checked_mul(self.block_bytes())
    }

    /// As people write it, e.g. `Q4_K`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// By [`name`](Self::name), whatever its case.
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name().eq_ignore_ascii_case(name))
    }

    /// From a GGUF tensor's type number. `Err` holds the name of a format that exists but is not supported, or the
    /// number.
    pub(crate) fn from_gguf(code: u32) -> Result<Self, String> {
        Ok(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::BF16,
            9 => return Err("Q8_1".into()),
            10 => return Err("Q2_K".into()),
            11 => return Err("Q3_K".into()),
            15 => return Err("Q8_K".into()),
            16 => return Err("IQ2_XXS".into()),
            17 => return Err("IQ2_XS".into()),
            18 => return Err("IQ3_XXS".into()),
            19 => return Err("IQ1_S".into()),
            20 => return Err("IQ4_NL".into()),
            21 => return Err("IQ3_S".into()),
            22 => return Err("IQ2_S".into()),
            23 => return Err("IQ4_XS".into()),
            39 => return Err("MXFP4".into()),
            other => return Err(format!("number {other}")),
        })
    }
}
