//! Who owns which block of the KV cache.
//!
//! The cache is cut into blocks of [`BLOCK`] positions; a sequence owns as many as its length needs, in any order. A full block
//! is known by a digest of all tokens up to its end: a new sequence that starts with the same tokens takes the block over
//! instead of computing it, and counts as one more reference. Blocks that nobody references any more stay findable until
//! their room is needed, the longest unused first. Only bookkeeping happens here; the memory is the model's.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};

use crate::kernels::BLOCK;

/// Digest of all tokens up to a block's end. Cryptographic, so that nobody can make up a prompt that finds another's block.
pub(crate) type Key = [u8; 16];

const ROOT: Key = [0; 16];

#[derive(Clone, Default)]
struct Block {
    references: u32,
    /// Under which digest it can be found.
    key: Option<Key>,
    /// When it was last given up; its place in `idle`.
    idle_since: u64,
}

/// All blocks of a cache.
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    /// Blocks that hold nothing.
    free: Vec<u32>,
    /// Blocks by digest, referenced or idle.
    by_key: HashMap<Key, u32>,
    /// Blocks that hold something but that nobody references, longest unused first.
    idle: BTreeMap<u64, u32>,
    clock: u64,
}

/// The blocks of one sequence.
#[derive(Debug, Default)]
pub(crate) struct Table {
    blocks: Vec<u32>,
    /// How many of its first blocks are full and findable.
    full: usize,
    /// Digests of its tokens up to the ends of its first blocks, as far as they were asked for. Tokens stay, so these do, even
    /// while it has no blocks: one that waits behind a long cached prefix asks in every step.
    keys: Vec<Key>,
}

impl Table {
    /// Block numbers in order of positions.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Under which digest the first of its blocks that is not full yet can be found once it is; `tokens` are the sequence's.
    /// `None` if that will never be of use: whole blocks only, and never all tokens, since the last one's logits are wanted.
    pub fn next_key(&mut self, tokens: &[u32]) -> Option<Key> {
        let reusable = tokens.len().saturating_sub(1) / BLOCK;
        (self.full < reusable).then(|| self.key(self.full, tokens))
    }

    /// The digest of the tokens up to a block's end; those of the blocks before it are known.
    fn key(&mut self, block: usize, tokens: &[u32]) -> Key {
        if block == self.keys.len() {
            let key = digest(self.keys.last().unwrap_or(&ROOT), &tokens[block * BLOCK..(block + 1) * BLOCK]);
            self.keys.push(key);
        }
        self.keys[block]
    }

    /// Its blocks, to be released.
    pub fn take_blocks(&mut self) -> Self {
        self.full = 0;
        Self { blocks: std::mem::take(&mut self.blocks), ..Self::default() }
    }
}

impl BlockPool {
    /// A pool of `count` blocks.
    pub fn new(count: usize) -> Self {
        Self {
            blocks: vec![Block::default(); count],
            free: (0..count as u32).rev().collect(),
            by_key: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be had now.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that could be had if `table` were released: those that nobody else has.
    pub fn held_alone(&self, table: &Table) -> usize {
        table.blocks.iter().filter(|block| self.blocks[**block as usize].references == 1).count()
    }

    /// Takes over what is cached of `tokens`, behind the full blocks of `table` and in place of those that it was to fill. Says
    /// how many positions are full now.
    pub fn reuse(&mut self, table: &mut Table, tokens: &[u32]) -> usize {
        while let Some(key) = table.next_key(tokens)
            && let Some(&block) = self.by_key.get(&key)
        {
            self.reference(block);
            match table.blocks.get_mut(table.full) {
                Some(own) => {
                    let own = std::mem::replace(own, block);
                    self.release(Table { blocks: vec![own], ..Table::default() });
                }
                None => table.blocks.push(block),
            }
            table.full += 1;
        }
        table.full * BLOCK
    }

    /// Gives `table` room for `positions`; false (and nothing changed) when there are not enough blocks.
    pub fn grow(&mut self, table: &mut Table, positions: usize) -> bool {
        let missing = positions.div_ceil(BLOCK).saturating_sub(table.blocks.len());
        if missing > self.available() {
            return false;
        }
        for _ in 0..missing {
            let block = self.take();
            self.blocks[block as usize].references = 1;
            table.blocks.push(block);
        }
        true
    }

    /// Takes back what `table` has beyond its first `positions`, which must be beyond all that is findable.
    pub fn shrink(&mut self, table: &mut Table, positions: usize) {
        let needed = positions.div_ceil(BLOCK).min(table.blocks.len());
        let blocks = table.blocks.split_off(needed);
        self.release(Table { blocks, ..Table::default() });
    }

    /// Makes the full blocks among the first `computed` positions findable; `tokens` are the sequence's.
    pub fn publish(&mut self, table: &mut Table, tokens: &[u32], computed: usize) {
        for index in table.full..computed / BLOCK {
            let key = table.key(index, tokens);
            table.full += 1;
            let block = table.blocks[index];
            // Where two sequences computed the same block side by side, the first one's stays.
            self.by_key.entry(key).or_insert_with(|| {
                self.blocks[block as usize].key = Some(key);
                block
            });
        }
    }

    /// Gives a sequence's blocks up. The last ones first, so that a prefix outlives its continuations.
    pub fn release(&mut self, table: Table) {
        for &number in table.blocks.iter().rev() {
            let block = &mut self.blocks[number as usize];
            block.references -= 1;
            if block.references > 0 {
                continue;
            }
            if block.key.is_some() {
                self.clock += 1;
                block.idle_since = self.clock;
                self.idle.insert(self.clock, number);
            } else {
                self.free.push(number);
            }
        }
    }

    fn reference(&mut self, number: u32) {
        let block = &mut self.blocks[number as usize];
        if block.references == 0 {
            self.idle.remove(&block.idle_since);
        }
        block.references += 1;
    }

    fn take(&mut self) -> u32 {
        if let Some(block) = self.free.pop() {
            return block;
        }
        let (_, block) = self.idle.pop_first().expect("the caller has looked at what is available");
        if let Some(key) = self.blocks[block as usize].key.take() {
            self.by_key.remove(&key);
        }
        block
    }
}

fn digest(parent: &Key, tokens: &[u32]) -> Key {
    let mut hash = Sha256::new_with_prefix(parent);
    for token in tokens {
        hash.update(token.to_le_bytes());
    }
    let mut key = ROOT;
    key.copy_from_slice(&hash.finalize()[..16]);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(pool: &mut BlockPool, tokens: &[u32]) -> Table {
        let mut table = Table::default();
        assert_eq!(pool.reuse(&mut table, tokens), table.blocks().len() * BLOCK);
        table
    }

    fn tokens(seed: u32, count: usize) -> Vec<u32> {
        (0..count as u32).map(|i| seed * 1000 + i).collect()
    }

    #[test]
    fn growing_takes_what_it_needs_or_nothing() {
        let mut pool = BlockPool::new(3);
        let mut a = Table::default();
        assert!(pool.grow(&mut a, BLOCK + 1));
        assert_eq!((a.blocks().len(), pool.available()), (2, 1));
        let mut b = Table::default();
        assert!(!pool.grow(&mut b, BLOCK + 1));
        assert_eq!((b.blocks().len(), pool.available()), (0, 1));
        pool.release(a);
        assert!(pool.grow(&mut b, 3 * BLOCK));
        pool.release(b);
        assert_eq!(pool.available(), 3);
    }

    #[test]
    fn shrinking_gives_back_what_is_beyond() {
        let mut pool = BlockPool::new(3);
        let mut table = Table::default();
        pool.grow(&mut table, 3 * BLOCK);
        let first = table.blocks()[0];
        pool.shrink(&mut table, BLOCK);
        assert_eq!((table.blocks(), pool.available()), (&[first][..], 2));
        pool.shrink(&mut table, 2 * BLOCK);
        pool.release(table);
        assert_eq!(pool.available(), 3);
    }

    #[test]
    fn a_prefix_is_shared_while_used_and_found_again_afterwards() {
        let mut pool = BlockPool::new(8);
        let prompt = tokens(1, 2 * BLOCK + 5);
        let mut a = found(&mut pool, &prompt);
        assert!(a.blocks().is_empty());
        pool.grow(&mut a, prompt.len());
        pool.publish(&mut a, &prompt, prompt.len());
        let b = found(&mut pool, &prompt);
        assert_eq!(b.blocks(), &a.blocks()[..2]);
        let first = b.blocks().to_vec();
        pool.release(a);
        pool.release(b);
        assert_eq!(pool.available(), 8);
        let c = found(&mut pool, &prompt);
        assert_eq!(c.blocks(), first);
        pool.release(c);
    }

    #[test]
    fn what_another_has_computed_meanwhile_takes_the_place_of_own_blocks() {
        let mut pool = BlockPool::new(8);
        let prompt = tokens(1, 3 * BLOCK + 5);
        let [mut a, mut b] = [(); 2].map(|()| found(&mut pool, &prompt));
        for table in [&mut a, &mut b] {
            assert!(pool.grow(table, prompt.len()));
        }
        assert_eq!((a.next_key(&prompt), pool.available()), (b.next_key(&prompt), 0));
        pool.publish(&mut a, &prompt, 2 * BLOCK + 1);
        assert_ne!(a.next_key(&prompt), b.next_key(&prompt));
        assert_eq!(pool.reuse(&mut b, &prompt), 2 * BLOCK);
        assert_eq!((&b.blocks()[..2], b.blocks().len()), (&a.blocks()[..2], 4));
        assert_ne!(b.blocks()[2..], a.blocks()[2..]);
        assert_eq!((pool.available(), pool.held_alone(&a), pool.held_alone(&b)), (2, 2, 2));
        assert_eq!(pool.reuse(&mut b, &prompt), 2 * BLOCK, "nothing new");
        pool.release(a);
        assert_eq!((pool.available(), pool.held_alone(&b)), (4, 4));
        pool.release(b);
        assert_eq!(pool.available(), 8);
    }

    #[test]
    fn what_has_given_its_blocks_up_finds_them_again_by_digests_that_it_knows() {
        let mut pool = BlockPool::new(4);
        let prompt = tokens(1, 2 * BLOCK + 5);
        let mut table = Table::default();
        pool.grow(&mut table, prompt.len());
        pool.publish(&mut table, &prompt, prompt.len());
        let (blocks, keys) = (table.blocks()[..2].to_vec(), table.keys.clone());
        pool.release(table.take_blocks());
        assert_eq!((table.blocks().len(), &table.keys, pool.available()), (0, &keys, 4));
        assert_eq!(table.next_key(&prompt), Some(keys[0]));
        assert_eq!((pool.reuse(&mut table, &prompt), table.blocks()), (2 * BLOCK, &blocks[..]));
        assert_eq!(table.keys, keys);
    }

    #[test]
    fn the_last_token_is_never_taken_from_the_cache() {
        let mut pool = BlockPool::new(4);
        let prompt = tokens(1, 2 * BLOCK);
        let mut a = Table::default();
        pool.grow(&mut a, prompt.len());
        pool.publish(&mut a, &prompt, prompt.len());
        assert_eq!(found(&mut pool, &prompt).blocks().len(), 1);
    }

    #[test]
    fn a_block_is_found_only_behind_its_own_prefix() {
        let mut pool = BlockPool::new(8);
        let (a, b) = (tokens(1, BLOCK), tokens(2, BLOCK));
        let one = [a.clone(), b.clone(), vec![0]].concat();
        let mut table = Table::default();
        pool.grow(&mut table, one.len());
        pool.publish(&mut table, &one, one.len());
        assert!(found(&mut pool, &[b, a, vec![0]].concat()).blocks().is_empty());
    }

    #[test]
    fn the_longest_unused_goes_first_and_prefixes_outlive_continuations() {
        let mut pool = BlockPool::new(4);
        let (old, new) = (tokens(1, 2 * BLOCK), tokens(2, 2 * BLOCK));
        for prompt in [&old, &new] {
            let mut table = Table::default();
            pool.grow(&mut table, prompt.len());
            pool.publish(&mut table, prompt, prompt.len());
            pool.release(table);
        }
        let mut table = Table::default();
        assert!(pool.grow(&mut table, BLOCK));
        let more = |prompt: &[u32]| [prompt, &[0]].concat();
        assert_eq!(found(&mut pool, &more(&old)).blocks().len(), 1);
        assert_eq!(found(&mut pool, &more(&new)).blocks().len(), 2);
    }
}
