//! SentencePiece's byte-pair encoding, for GGUF files of the `llama` kind (Llama 2, Mistral 7B, TinyLlama, Gemma).
//!
//! Such a vocabulary has scores and no list of merges. The algorithm (Kudo and Richardson, "SentencePiece", EMNLP 2018, and
//! the library of that name): begin with single characters; of all neighbours whose concatenation is a piece, join those
//! with the highest score, the leftmost first; repeat. What is no piece at the end is spelled in byte tokens. The library
//! that the other tokenizers use knows merges only, and turning scores into a list of merges would take hundreds of
//! thousands of entries and change some ties: so the algorithm is here, as a model for that library's pipeline.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{Model, Token};

use super::{TokenKind, byte_token};

/// A vocabulary with scores.
#[derive(Clone)]
pub struct Spm(Arc<Vocabulary>);

struct Vocabulary {
    ids: HashMap<String, u32>,
    names: Vec<String>,
    scores: Vec<f32>,
    kinds: Vec<TokenKind>,
    /// Tokens of the 256 bytes.
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
}

impl Spm {
    /// From name, kind and score of every token.
    pub fn new(tokens: &[(&str, TokenKind)], scores: Vec<f32>, unknown: Option<u32>) -> Self {
        let mut ids = HashMap::with_capacity(tokens.len());
        let mut bytes = [None; 256];
        for (id, (name, kind)) in (0u32..).zip(tokens) {
            ids.entry((*name).to_owned()).or_insert(id);
            if let (TokenKind::Byte, Some(byte)) = (kind, byte_token(name)) {
                bytes[usize::from(byte)] = Some(id);
            }
        }
        let names = tokens.iter().map(|(name, _)| (*name).to_owned()).collect();
        let kinds = tokens.iter().map(|(_, kind)| *kind).collect();
        Self(Arc::new(Vocabulary { ids, names, scores, kinds, bytes, unknown }))
    }

    /// A piece that text may be joined into, and its score.
    fn piece(&self, text: &str) -> Option<(u32, f32)> {
        let id = *self.0.ids.get(text)?;
        (self.0.kinds[id as usize] == TokenKind::Normal).then(|| (id, self.0.scores[id as usize]))
    }

    /// The text's pieces, as ranges.
    fn split(&self, text: &str) -> Vec<(usize, usize)> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol { start, len: c.len_utf8(), before: i.checked_sub(1), next: i + 1 })
            .collect();
        let mut queue = BinaryHeap::new();
        for left in 1..symbols.len() {
            self.offer(&mut queue, text, &symbols, left - 1);
        }
        while let Some(Candidate { left: Reverse(left), len, .. }) = queue.pop() {
            let right = symbols[left].next;
            // Outdated if one of the two was joined to something since.
            if symbols[left].len == 0
                || right >= symbols.len()
                || symbols[left].len + symbols[right].len != len
            {
                continue;
            }
            symbols[left].len = len;
            symbols[left].next = symbols[right].next;
            symbols[right].len = 0;
            let next = symbols[left].next;
            if next < symbols.len() {
                symbols[next].before = Some(left);
                self.offer(&mut queue, text, &symbols, left);
            }
            if let Some(before) = symbols[left].before {
                self.offer(&mut queue, text, &symbols, before);
            }
        }
        symbols.iter().filter(|s| s.len > 0).map(|s| (s.start, s.start + s.len)).collect()
    }

    /// Queues a symbol and its right neighbour, if they make a piece.
    fn offer(&self, queue: &mut BinaryHeap<Candidate>, text: &str, symbols: &[Symbol], left: usize) {
        let (a, b) = (&symbols[left], &symbols[symbols[left].next]);
        let len = a.len + b.len;
        if let Some((_, score)) = self.piece(&text[a.start..a.start + len]) {
            queue.push(Candidate { score, left: Reverse(left), len });
        }
    }
}

/// A part of the text that is joined already; `len` is 0 once it belongs to the one before it.
struct Symbol {
    start: usize,
    len: usize,
    before: Option<usize>,
    next: usize,
}

/// Two neighbours that could be joined; the greatest is joined first.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    score: f32,
    left: Reverse<usize>,
    /// Bytes of both together, by which an outdated candidate is known.
    len: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.score.total_cmp(&other.score).then(self.left.cmp(&other.left)).then(self.len.cmp(&other.len))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

impl Model for Spm {
    type Trainer = BpeTrainer;

    fn tokenize(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        let mut tokens = Vec::new();
        for (start, end) in self.split(text) {
            let part = &text[start..end];
            let mut push = |id| tokens.push(Token::new(id, String::new(), (start, end)));
            match self.piece(part) {
                Some((id, _)) => push(id),
                None => {
                    let bytes =
                        part.bytes().map(|b| self.0.bytes[usize::from(b)]).collect::<Option<Vec<_>>>();
                    match bytes {
                        Some(ids) => ids.into_iter().for_each(push),
                        None => self.0.unknown.into_iter().for_each(push),
                    }
                }
            }
        }
        Ok(tokens)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.ids.get(token).copied()
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.names.get(id as usize).cloned()
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.ids.clone()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.names.len()
    }

    fn save(&self, _: &Path, _: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("a vocabulary from a GGUF file is not saved".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split<'a>(pieces: &[(&str, f32)], text: &'a str) -> Vec<&'a str> {
        let tokens: Vec<_> = pieces.iter().map(|(name, _)| (*name, TokenKind::Normal)).collect();
        let spm = Spm::new(&tokens, pieces.iter().map(|p| p.1).collect(), None);
        spm.split(text).into_iter().map(|(a, b)| &text[a..b]).collect()
    }

    #[test]
    fn the_highest_score_is_joined_first_and_the_leftmost_of_equals() {
        assert_eq!(split(&[("ab", -2.0), ("bc", -1.0)], "abc"), ["a", "bc"]);
        assert_eq!(split(&[("ab", -1.0), ("bc", -1.0)], "abc"), ["ab", "c"]);
        assert_eq!(split(&[("aa", -1.0), ("aaaa", -2.0)], "aaaaaaa"), ["aaaa", "aa", "a"]);
        assert_eq!(split(&[("ab", -1.0), ("abab", -2.0)], "ababab"), ["abab", "ab"]);
        assert_eq!(split(&[("é€", -1.0)], "xé€"), ["x", "é€"]);
        assert_eq!(split(&[("ab", f32::NAN)], "ab"), ["ab"]);
        assert!(split(&[("a", 0.0)], "").is_empty());
    }
}
