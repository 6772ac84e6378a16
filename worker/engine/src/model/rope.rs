//! Rotary position embedding (Su et al., RoFormer, arXiv:2104.09864): the angles.

use crate::kernels::Rotation;
use crate::weights::RopeStyle;

/// The angles of one kind of rotation.
pub(crate) struct Rope {
    style: RopeStyle,
    /// Angle per position of each pair, `dim / 2` of them.
    frequencies: Vec<f64>,
}

impl Rope {
    /// Pair `i` of a head of width `dim` turns by `base^(-2i / dim) / factors[i]` per position.
    pub fn new(style: RopeStyle, base: f32, dim: usize, factors: Option<&[f32]>) -> Self {
        let frequency = |i: usize| {
            let factor = factors.and_then(|factors| factors.get(i)).copied().unwrap_or(1.0);
            f64::from(base).powf(-2.0 * i as f64 / dim as f64) / f64::from(factor)
        };
        Self { style, frequencies: (0..dim / 2).map(frequency).collect() }
    }

    /// For rows at `positions`. In f64, where an angle of many thousands still has all its digits.
    pub fn rotation(&self, positions: &[u32]) -> Rotation {
        let angles = positions.iter().flat_map(|&p| self.frequencies.iter().map(move |f| f64::from(p) * f));
        let (sin, cos) = angles.map(f64::sin_cos).map(|(sin, cos)| (sin as f32, cos as f32)).unzip();
        Rotation { style: self.style, cos, sin }
    }
}
