//! Text to tokens, and tokens to the bytes they stand for.
//!
//! The work of splitting is done by Hugging Face's `tokenizers` library, whose pipeline is put together from a GGUF file's
//! metadata ([`gguf`]) or read from a `tokenizer.json` ([`json`]). What the library leaves open is here: the bytes of each
//! token (a token may be a part of a character, so text is made by [`crate::detokenize`]), which tokens end a
//! generation, and whether text that looks like a control token is one.

mod gguf;
mod json;
mod spm;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::OnceLock;

use aho_corasick::AhoCorasick;
use tokenizers::models::bpe::BPE;
use tokenizers::{
    DecoderWrapper, Model, NormalizerWrapper, OffsetReferential, OffsetType, PostProcessorWrapper,
    PreTokenizerWrapper, Token, TokenizerImpl,
};

use crate::weights::Fault;

pub(crate) use gguf::{from_gguf, named_token};
pub(crate) use json::{Special, from_json};

/// Names of tokens that end a turn or a text in the models that people run. A file's own end-of-sequence tokens count
/// too, whatever their names.
const END_NAMES: [&str; 11] = [
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<EOT>",
    "<|return|>",
    "<|call|>",
];

/// Whether a token of that name is a mark of turns and texts, even where its file has it as text to be found.
fn is_mark(name: &str) -> bool {
    let named = name.strip_prefix("<|").and_then(|rest| rest.strip_suffix("|>"));
    END_NAMES.contains(&name) || named.is_some_and(|name| !name.is_empty())
}

/// The library's pipeline around a model.
type Pipeline<M> =
    TokenizerImpl<M, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// A pipeline from text to ids.
#[derive(Clone)]
enum Encoder {
    /// Byte-level pair encoding from a GGUF file.
    Bpe(Box<Pipeline<BPE>>),
    /// SentencePiece's pair encoding from a GGUF file.
    Spm(Box<Pipeline<spm::Spm>>),
    /// Whatever a `tokenizer.json` describes.
    Json(Box<tokenizers::Tokenizer>),
}

impl Encoder {
    fn encode(&self, text: &str) -> Option<Vec<u32>> {
        let encoding = match self {
            Self::Bpe(p) => p.encode_fast(text, false),
            Self::Spm(p) => p.encode_fast(text, false),
            Self::Json(p) => p.encode_fast(text, false),
        };
        encoding.ok().map(|e| e.get_ids().to_vec())
    }

    /// Where a text spells control tokens out.
    fn control_tokens(&self, text: &str) -> Vec<Range<usize>> {
        match self {
            Self::Bpe(p) => control_tokens(p, text),
            Self::Spm(p) => control_tokens(p, text),
            Self::Json(p) => control_tokens(p, text),
        }
    }

    /// Finds the names of its control tokens; `None` if it looks for some in a changed text.
    fn control_names(&self) -> Option<AhoCorasick> {
        match self {
            Self::Bpe(p) => control_names(p),
            Self::Spm(p) => control_names(p),
            Self::Json(p) => control_names(p),
        }
    }

    /// The same as this one, but taking control tokens in the text for plain text.
    fn literal(&self) -> Self {
        let mut this = self.clone();
        match &mut this {
            Self::Bpe(p) => p.set_encode_special_tokens(true),
            Self::Spm(p) => p.set_encode_special_tokens(true),
            Self::Json(p) => p.set_encode_special_tokens(true),
        }
        this
    }
}

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenKind {
    /// Text.
    Normal,
    /// Text that is one token wherever it occurs.
    UserDefined,
    /// Structure: begin and end of texts and turns, padding. Stands for no text.
    Control,
    /// Nothing: not to be generated.
    Unused,
    /// One byte, for text that has no other token.
    Byte,
}

/// Which tokens begin a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Begin {
    token: Option<u32>,
    /// Whether the model expects it.
    wanted: bool,
}

/// A model's tokenizer.
pub struct Tokenizer {
    encoder: Encoder,
    /// Made when it is first asked for: rare, and as large as the first.
    literal: OnceLock<Encoder>,
    /// See [`Encoder::control_names`].
    control_names: Option<AhoCorasick>,
    /// The bytes of all tokens, one after another.
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<u32>,
    longest: usize,
    begin: Begin,
    /// End of generation, in order.
    end: BTreeSet<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).field("end", &self.end).finish()
    }
}

impl Tokenizer {
    /// For weights that never learned a language: `count` tokens that all stand for the same letters, and no text that has
    /// tokens.
    pub(crate) fn placeholder(count: usize) -> Self {
        const PIECE: &[u8] = b"word";
        Self {
            encoder: Encoder::Bpe(Pipeline::new(BPE::default()).into()),
            literal: OnceLock::new(),
            control_names: None,
            bytes: PIECE.repeat(count),
            ends: (1..=count).map(|n| (n * PIECE.len()) as u32).collect(),
            longest: PIECE.len(),
            begin: Begin::default(),
            end: BTreeSet::new(),
        }
    }

    /// Tokens of a text.
    ///
    /// `parse_special`: whether control tokens that the text spells out (a rendered chat template's, say) become those
    /// tokens, or are plain text. `add_bos`: put the begin-of-text token in front, if the model expects one and the text
    /// does not begin with it already.
    pub fn encode(&self, text: &str, parse_special: bool, add_bos: bool) -> Vec<u32> {
        let encoder = match parse_special {
            true => &self.encoder,
            false => self.literal.get_or_init(|| self.encoder.literal()),
        };
        let mut ids = Vec::new();
        encode_into(encoder, text, &mut ids);
        if let (true, Begin { token: Some(bos), wanted: true }) = (add_bos, self.begin)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        ids
    }

    /// Whether a text may spell out control tokens: found out in one pass, and without a copy of it.
    pub(crate) fn may_spell_controls(&self, text: &str) -> bool {
        self.control_names.as_ref().is_none_or(|names| names.is_match(text))
    }

    /// Where a text spells out control tokens: ranges of its bytes, in order.
    pub(crate) fn control_tokens(&self, text: &str) -> Vec<Range<usize>> {
        self.encoder.control_tokens(text)
    }

    /// The bytes that a token stands for. Control tokens, and ids that are no token, give none.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Whether a token ends the generation.
    pub fn is_eog(&self, id: u32) -> bool {
        self.end.contains(&id)
    }

    /// All tokens that end the generation, in order.
    pub fn eog_tokens(&self) -> impl Iterator<Item = u32> {
        self.end.iter().copied()
    }

    /// How many tokens there are. A model may have more logits: its sizes are rounded up.
    pub fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    /// The begin-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.begin.token
    }

    /// A number of tokens that a text of so many bytes can't be below (as long as the tokenizer does not shorten text
    /// before it splits it), so that a prompt that is far too long can be refused without splitting it.
    pub fn least_tokens(&self, bytes: usize) -> usize {
        bytes / self.longest.max(1)
    }

    /// Puts the parts together. `tokens`: name and kind of each; `piece` makes the bytes of a normal one from its name.
    fn new(
        encoder: Encoder,
        tokens: &[(&str, TokenKind)],
        piece: impl Fn(&str, &mut Vec<u8>),
        begin: Begin,
        end: impl IntoIterator<Item = u32>,
    ) -> Result<Self, Fault> {
        let (mut bytes, mut ends, mut longest) = (Vec::new(), Vec::with_capacity(tokens.len()), 0);
        let mut eog: BTreeSet<u32> = end.into_iter().collect();
        for (id, (name, kind)) in tokens.iter().enumerate() {
            let before = bytes.len();
            match kind {
                TokenKind::Normal => piece(name, &mut bytes),
                TokenKind::UserDefined => bytes.extend_from_slice(name.as_bytes()),
                TokenKind::Byte => bytes.extend(byte_token(name)),
                TokenKind::Control | TokenKind::Unused => {}
            }
            let structural = matches!(kind, TokenKind::Control | TokenKind::UserDefined);
            if structural && END_NAMES.contains(name) {
                eog.insert(id as u32);
            }
            // Control tokens have no bytes, but take their names' place in a text.
            longest = longest.max(bytes.len() - before).max(name.len());
            ends.push(
                u32::try_from(bytes.len())
                    .map_err(|_| Fault::Malformed("the vocabulary is too large".into()))?,
            );
        }
        let control_names = encoder.control_names();
        Ok(Self { encoder, literal: OnceLock::new(), control_names, bytes, ends, longest, begin, end: eog })
    }
}

/// Encodes a text, in parts where the library fails on it: vocabularies exist that lack both a token for some character and
/// one for unknown characters, and then only that character is lost.
fn encode_into(encoder: &Encoder, text: &str, ids: &mut Vec<u32>) {
    if let Some(all) = encoder.encode(text) {
        ids.extend(all);
        return;
    }
    let middle = text.ceil_char_boundary(text.len() / 2);
    if 0 < middle && middle < text.len() {
        let (left, right) = text.split_at(middle);
        encode_into(encoder, left, ids);
        encode_into(encoder, right, ids);
    }
}

/// Finds the names of a pipeline's control tokens; `None` if it looks for some in what its normalizer makes of a text.
fn control_names<M: Model>(pipeline: &Pipeline<M>) -> Option<AhoCorasick> {
    let added = pipeline.get_added_vocabulary().get_added_tokens_decoder();
    let special: Vec<_> = added.values().filter(|token| token.special).collect();
    if pipeline.get_normalizer().is_some() && special.iter().any(|token| token.normalized) {
        return None;
    }
    AhoCorasick::new(special.iter().map(|token| &token.content)).ok()
}

/// Where a pipeline would find control tokens in a text.
fn control_tokens<M: Model>(pipeline: &Pipeline<M>, text: &str) -> Vec<Range<usize>> {
    let added = pipeline.get_added_vocabulary();
    let special = |token: &Token| added.get_added_tokens_decoder().get(&token.id).is_some_and(|t| t.special);
    let parts = added.extract_and_normalize(pipeline.get_normalizer(), text);
    let parts = parts.get_splits(OffsetReferential::Original, OffsetType::Byte).into_iter();
    let controls = parts.filter(|(.., tokens)| tokens.iter().flatten().any(special));
    controls.map(|(_, (start, end), _)| start..end).collect()
}

/// The byte that `<0x41>` names.
fn byte_token(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a character of the byte-level alphabet stands for (GPT-2's table: printable Latin-1 characters stand
/// for themselves, the other bytes, in order, for U+0100 and the following).
fn alphabet_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        n @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(n as u8),
        n @ 0x100..=0x120 => Some((n - 0x100) as u8),
        n @ 0x121..=0x142 => Some((n - 0x121) as u8 + 0x7F),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// Bytes of a byte-level token. Characters outside the alphabet stand for themselves.
fn byte_level_piece(name: &str, out: &mut Vec<u8>) {
    for c in name.chars() {
        match alphabet_byte(c) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

/// Bytes of a SentencePiece token: U+2581 stands for a space.
fn spm_piece(name: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(name.replace('\u{2581}', " ").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_has_every_byte_once() {
        let mut bytes: Vec<u8> = ('\0'..='\u{200}').filter_map(alphabet_byte).collect();
        assert_eq!(bytes.len(), 256);
        bytes.sort_unstable();
        bytes.dedup();
        assert_eq!(bytes.len(), 256);
        assert_eq!(
            (alphabet_byte('Ġ'), alphabet_byte('Ċ'), alphabet_byte('Ń')),
            (Some(b' '), Some(b'\n'), Some(0xAD))
        );
    }
}
