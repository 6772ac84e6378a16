//! What a step's kernels must know of its rows, sent to the device once and used by all layers.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};

use crate::kernels::Step;

/// Most rows that a cube of the attention kernel handles at once.
pub(super) const TILE_ROWS: usize = 16;

/// Tables of a step on the device.
pub(crate) struct Tables<B: Backend> {
    /// In this order: each row's position; where in this very index each row's block table starts; the block tables; the
    /// tiles of [`Work`], each a first row and a number of rows.
    pub index: Tensor<B, 1, Int>,
    /// Per rope: cosines, then sines of each row's angles, `[rows, 2, dim / 2]`.
    pub angles: Vec<Tensor<B, 1>>,
    /// What attention has to do.
    pub work: Work,
}

/// How attention divides a step's rows into tiles: spans of one row, and pieces of longer ones.
pub(crate) struct Work {
    /// Where in the index the tiles of one row are, and how many.
    pub single: Tiles,
    /// The others: of up to [`TILE_ROWS`] consecutive rows of a span.
    pub multiple: Tiles,
    /// The most positions that a row of the single ones looks at.
    pub longest: usize,
}

/// A run of tiles in the index.
#[derive(Clone, Copy)]
pub(crate) struct Tiles {
    /// Where it starts.
    pub start: usize,
    /// Number of tiles.
    pub count: usize,
}

impl<B: Backend> Tables<B> {
    /// Those of `step`.
    pub fn new(step: &Step<'_, B>) -> Self {
        let batch = step.batch;
        let mut index = batch.positions.clone();
        index.resize(2 * batch.rows(), 0);
        for span in &batch.spans {
            let start = index.len() as u32;
            index[batch.rows()..][span.rows.clone()].fill(start);
            index.extend(batch.blocks(span));
        }
        let (single, multiple): (Vec<_>, Vec<_>) = batch.spans.iter().partition(|span| span.rows.len() == 1);
        let longest = single.iter().map(|span| span.len()).max().unwrap_or(0);
        let mut append = |tiles: Vec<[u32; 2]>| {
            let part = Tiles { start: index.len(), count: tiles.len() };
            index.extend(tiles.into_iter().flatten());
            part
        };
        let work = Work {
            single: append(single.iter().map(|span| [span.rows.start as u32, 1]).collect()),
            multiple: append(multiple.iter().flat_map(|span| tiles(span.rows.clone())).collect()),
            longest,
        };
        let vector = |data: TensorData| Tensor::from_data(data, &step.device);
        Self {
            index: integers(index, &step.device),
            angles: step
                .rotations
                .iter()
                .map(|rotation| {
                    let pairs = rotation.cos.len() / batch.rows();
                    let rows = rotation.cos.chunks_exact(pairs).zip(rotation.sin.chunks_exact(pairs));
                    let angles: Vec<f32> = rows.flat_map(|(cos, sin)| [cos, sin].concat()).collect();
                    let shape = [angles.len()];
                    vector(TensorData::new(angles, shape))
                })
                .collect(),
            work,
        }
    }
}

/// Pieces of at most [`TILE_ROWS`] rows.
fn tiles(rows: std::ops::Range<usize>) -> impl Iterator<Item = [u32; 2]> {
    let end = rows.end;
    rows.step_by(TILE_ROWS).map(move |row| [row as u32, (end - row).min(TILE_ROWS) as u32])
}

fn integers<B: Backend>(values: Vec<u32>, device: &B::Device) -> Tensor<B, 1, Int> {
    let values: Vec<i32> = values.into_iter().map(|value| value as i32).collect();
    let shape = [values.len()];
    Tensor::from_data(TensorData::new(values, shape), device)
}
