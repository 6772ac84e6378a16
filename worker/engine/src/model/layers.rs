//! Building blocks that architectures share, and how they are taken out of a checkpoint.

use burn::tensor::{Tensor, TensorData};

use super::{Cost, Setup};
use crate::LoadError;
use crate::kernels::{Kernels, Weight};
use crate::weights::Checkpoint;

/// `N` linear layers with one input: matrices and, rarely, biases.
pub(crate) struct Linear<B: Kernels, const N: usize> {
    weights: [B::Weight; N],
    biases: Option<[Tensor<B, 2>; N]>,
}

impl<B: Kernels, const N: usize> Linear<B, N> {
    /// `x` `[rows, in]` → `[rows, out]` each.
    pub fn apply(&self, context: &B::Context, x: Tensor<B, 2>) -> [Tensor<B, 2>; N] {
        let mut ys = B::project(context, x, self.weights.each_ref());
        if let Some(biases) = &self.biases {
            let mut biases = biases.iter();
            ys = ys.map(|y| y + biases.next().expect("as many as matrices").clone());
        }
        ys
    }

    /// Adds what a pass through the layer takes.
    pub fn add_to(&self, cost: &mut Cost) {
        for weight in &self.weights {
            cost.weight_bytes += weight.bytes();
            cost.multiplications += weight.elements();
        }
    }
}

/// Takes tensors out of a checkpoint.
pub(crate) struct Source<'a, 'b, B: Kernels> {
    /// The file.
    pub checkpoint: &'a Checkpoint,
    /// Where tensors go.
    pub setup: &'a mut Setup<'b, B>,
}

impl<B: Kernels> Source<'_, '_, B> {
    /// The layers `names`, which share their input. Biases are taken over where the first layer has one.
    pub fn linear<const N: usize>(&mut self, names: [String; N]) -> Result<Linear<B, N>, LoadError> {
        let biases = match self.checkpoint.has(&format!("{}.bias", names[0])) {
            true => Some(all(names.each_ref().map(|name| self.bias(name)))?),
            false => None,
        };
        let weights = all(names.map(|name| self.matrix(&name)))?;
        Ok(Linear { weights, biases })
    }

    fn matrix(&mut self, name: &str) -> Result<B::Weight, LoadError> {
        let view = self.checkpoint.tensor(&format!("{name}.weight"))?;
        let weight = B::Weight::load(&self.setup.context, &self.setup.device, &view);
        (self.setup.progress)(view.data.len() as u64);
        Ok(weight)
    }

    fn bias(&mut self, name: &str) -> Result<Tensor<B, 2>, LoadError> {
        Ok(self.vector(&format!("{name}.bias"))?.unsqueeze())
    }

    /// A vector, e.g. a norm's weight.
    pub fn vector(&mut self, name: &str) -> Result<Tensor<B, 1>, LoadError> {
        let view = self.checkpoint.tensor(name)?;
        (self.setup.progress)(view.data.len() as u64);
        let values = view.dequantize();
        let shape = [values.len()];
        Ok(Tensor::from_data(TensorData::new(values, shape), &self.setup.device))
    }
}

/// The values, or the first error.
fn all<T, E, const N: usize>(results: [Result<T, E>; N]) -> Result<[T; N], E> {
    let values = results.into_iter().collect::<Result<Vec<_>, _>>()?;
    Ok(values.try_into().unwrap_or_else(|_| unreachable!("as many values as results")))
}
