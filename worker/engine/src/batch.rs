//! One forward pass' worth of rows, from several sequences at once.
//!
//! A step mixes whatever there is to do: a chunk of one prompt, the single next token of others. So a batch is ragged: a list
//! of spans, each a run of consecutive positions of one sequence, whose rows lie one after another. Linear layers and
//! norms see only the rows; attention sees the spans. The buffers are kept from step to step.

use std::ops::Range;

/// Consecutive positions of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// Position of its first row: how many of the sequence's positions are cached already.
    pub start: usize,
    /// Its part of [`Batch::tables`].
    table: Range<usize>,
}

impl Span {
    /// How many positions the sequence has once this span is done.
    pub fn len(&self) -> usize {
        self.start + self.rows.len()
    }
}

/// Rows of several sequences that go through the model together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Batch {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// The rows' sequences.
    pub spans: Vec<Span>,
    /// Rows whose logits are wanted, ascending.
    pub outputs: Vec<u32>,
    /// The spans' block tables, one after another.
    tables: Vec<u32>,
}

impl Batch {
    /// Takes everything out, keeps the memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.spans.clear();
        self.outputs.clear();
        self.tables.clear();
    }

    /// Adds `tokens` at positions from `start` on, of a sequence whose cache lies in `blocks`; logits are wanted of the
    /// last `outputs` of them.
    pub fn push(&mut self, tokens: &[u32], start: usize, blocks: &[u32], outputs: usize) {
        let first = self.tokens.len();
        let rows = first..first + tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.positions.extend((start..start + tokens.len()).map(|position| position as u32));
        self.outputs.extend((rows.end - outputs..rows.end).map(|row| row as u32));
        let table = self.tables.len()..self.tables.len() + blocks.len();
        self.tables.extend_from_slice(blocks);
        self.spans.push(Span { rows, start, table });
    }

    /// Adds `tokens` behind the last span, as part of it; logits are wanted of all.
    pub fn extend(&mut self, tokens: &[u32]) {
        let span = self.spans.last_mut().expect("there is a span");
        let (first, last) = (span.len(), span.rows.end);
        span.rows.end += tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.positions.extend((first..first + tokens.len()).map(|position| position as u32));
        self.outputs.extend((last..last + tokens.len()).map(|row| row as u32));
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The blocks in which a span's sequence keeps its keys and values, in order of positions.
    pub fn blocks(&self, span: &Span) -> &[u32] {
        &self.tables[span.table.clone()]
    }
}
