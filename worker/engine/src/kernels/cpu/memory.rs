//! Memory for weights: large chunks that lie on large pages, because a decoding step reads all weights once and with
//! small pages spends a tenth of its time on address translation.

use std::sync::{Arc, Mutex};

use memmap2::{MmapOptions, MmapRaw};

/// Where a huge page may start.
const PAGE: usize = 2 << 20;
/// Weights of several matrices share a chunk of this size; larger ones get their own.
const CHUNK: usize = 32 << 20;
/// Every piece starts on a cache line, which the widest loads want.
const LINE: usize = 64;

/// Hands out pieces of chunks. Pieces live as long as somebody holds them; nothing is reused before.
#[derive(Default)]
pub(super) struct Arena {
    current: Mutex<Option<(Arc<Chunk>, usize)>>,
}

struct Chunk {
    map: MmapRaw,
    start: usize,
    len: usize,
}

/// A piece of memory that begins on a cache line.
pub(super) struct Piece {
    chunk: Arc<Chunk>,
    offset: usize,
    len: usize,
}

impl Arena {
    /// `len` zeroed bytes, filled by `fill` before anybody else sees them.
    ///
    /// # Panics
    /// If the system has no memory left.
    pub fn piece(&self, len: usize, fill: impl FnOnce(&mut [u8])) -> Piece {
        let size = len.next_multiple_of(LINE);
        let mut current = self.current.lock().unwrap_or_else(|e| e.into_inner());
        let fits = matches!(&*current, Some((chunk, used)) if used + size <= chunk.len);
        if !fits {
            *current = Some((Arc::new(Chunk::new(size.max(CHUNK))), 0));
        }
        let Some((chunk, used)) = current.as_mut() else { unreachable!("a chunk was just made") };
        let piece = Piece { chunk: chunk.clone(), offset: *used, len };
        *used += size;
        drop(current);
        // SAFETY: the range was handed out to this piece alone, and the piece has not been shared yet, so nothing else
        // refers to it. The mapping is writable and lives as long as the piece's chunk.
        fill(unsafe { std::slice::from_raw_parts_mut(piece.pointer(), len) });
        piece
    }
}

impl Chunk {
    fn new(len: usize) -> Chunk {
        let map = MmapOptions::new().len(len + PAGE).map_anon().expect("no memory left for weights");
        let map = MmapRaw::from(map);
        #[cfg(target_os = "linux")]
        // Only advice: without huge pages it is slower, not wrong.
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_ptr().align_offset(PAGE).min(PAGE);
        Chunk { map, start, len }
    }
}

impl Piece {
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the range lies within the mapping, which the chunk keeps alive, and was last written in
        // `Arena::piece`, before this piece could be seen.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.len) }
    }

    fn pointer(&self) -> *mut u8 {
        self.chunk.map.as_mut_ptr().wrapping_add(self.chunk.start + self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_do_not_overlap() {
        let arena = Arena::default();
        let pieces: Vec<Piece> =
            (1..200u8).map(|i| arena.piece(i as usize * 777, |bytes| bytes.fill(i))).collect();
        let large = arena.piece(CHUNK + 5, |bytes| bytes[CHUNK + 4] = 9);
        assert_eq!(large.as_slice()[CHUNK + 4], 9);
        for (piece, i) in pieces.iter().zip(1..200u8) {
            assert_eq!(piece.as_slice().as_ptr().align_offset(LINE), 0);
            assert_eq!(piece.as_slice().len(), i as usize * 777);
            assert!(piece.as_slice().iter().all(|&b| b == i));
        }
    }
}
