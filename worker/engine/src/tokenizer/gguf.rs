//! A tokenizer from a GGUF file's metadata.
//!
//! The file has the vocabulary, and the merges or scores; how text is cut before that (the pre-tokenizer) is only named.
//! The names are llama.cpp's (`tokenizer.ggml.pre`); the rules behind them are those in the `tokenizer.json` of the models
//! that the names stand for.

use std::collections::HashSet;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper};

use super::spm::Spm;
use super::{
    Begin, END_NAMES, Encoder, Pipeline, TokenKind, Tokenizer, byte_level_piece, is_mark, spm_piece,
};
use crate::weights::{Fault, gguf::Gguf};

/// How text is cut into words before pairs are joined.
struct Cut {
    /// Digits stand alone.
    digits: bool,
    /// `None`: GPT-2's rule.
    pattern: Option<&'static str>,
    /// Characters are composed first.
    compose: bool,
    /// A word that is a token is one, whatever the merges say; and a text begins with BOS unless the file says no.
    whole_words: bool,
}

/// GPT-2's rule and no more.
const GPT2: Cut = Cut { digits: false, pattern: None, compose: false, whole_words: false };

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl Cut {
    /// By llama.cpp's name.
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "default" | "gpt-2" | "phi-2" | "mpt" | "olmo" => GPT2,
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => Cut { digits: true, ..GPT2 },
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => {
                Cut { pattern: Some(LLAMA3), whole_words: true, ..GPT2 }
            }
            "qwen2" | "deepseek-r1-qwen" => Cut { pattern: Some(QWEN2), compose: true, ..GPT2 },
            "tekken" => Cut { pattern: Some(TEKKEN), whole_words: true, ..GPT2 },
            _ => return None,
        })
    }

    fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper, Fault> {
        let bytes = |cut| PreTokenizerWrapper::from(ByteLevel::new(false, true, cut));
        let mut steps = Vec::new();
        if self.digits {
            steps.push(Digits::new(true).into());
        }
        if let Some(pattern) = self.pattern {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(library)?;
            steps.push(split.into());
        }
        steps.push(bytes(self.pattern.is_none()));
        Ok(Sequence::new(steps).into())
    }
}

/// The vocabulary's columns.
struct Vocabulary<'a> {
    tokens: Vec<(&'a str, TokenKind)>,
    gguf: &'a Gguf,
    data: &'a [u8],
}

/// Builds the tokenizer that a file's metadata describes; `data` is the file.
pub(crate) fn from_gguf(gguf: &Gguf, data: &[u8]) -> Result<Tokenizer, Fault> {
    let vocabulary = Vocabulary::read(gguf, data)?;
    match gguf.str(data, "tokenizer.ggml.model") {
        Some("gpt2") => vocabulary.byte_level(),
        Some("llama") => vocabulary.sentence_piece(),
        Some(other) => Err(Fault::Unsupported(format!("tokenizer {other:?}; supported are gpt2 and llama"))),
        None => Err(Fault::Malformed("metadata has no tokenizer.ggml.model".into())),
    }
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a Gguf, data: &'a [u8]) -> Result<Self, Fault> {
        let Some(names) = gguf.strings(data, "tokenizer.ggml.tokens") else {
            return Err(Fault::Malformed("metadata has no tokenizer.ggml.tokens".into()));
        };
        let kinds = match gguf.has_key("tokenizer.ggml.token_type") {
            true => column(gguf, data, "tokenizer.ggml.token_type", names.len())?,
            false => vec![1.0; names.len()],
        };
        let mut tokens = Vec::with_capacity(names.len());
        for (name, kind) in names.into_iter().zip(kinds) {
            let name = std::str::from_utf8(name)
                .map_err(|_| Fault::Malformed(format!("token {} is not UTF-8", tokens.len())))?;
            // Numbers of llama.cpp's token types: 1 is normal, 2 unknown.
            let kind = match kind as i64 {
                2 | 3 => TokenKind::Control,
                // Older conversions of SentencePiece's models have all that was added as user-defined.
                4 if is_mark(name) => TokenKind::Control,
                4 => TokenKind::UserDefined,
                5 => TokenKind::Unused,
                6 => TokenKind::Byte,
                // Some files have a turn's end as if it were text; a model would never stop.
                _ if END_NAMES.contains(&name) => TokenKind::Control,
                _ => TokenKind::Normal,
            };
            tokens.push((name, kind));
        }
        Ok(Self { tokens, gguf, data })
    }

    /// A token that metadata names by its number.
    fn id(&self, key: &str) -> Result<Option<u32>, Fault> {
        match self.gguf.uint(key) {
            Some(id) if id >= self.tokens.len() as u64 => {
                Err(Fault::Malformed(format!("{key} is {id}; there are {} tokens", self.tokens.len())))
            }
            id => Ok(id.map(|id| id as u32)),
        }
    }

    fn byte_level(self) -> Result<Tokenizer, Fault> {
        let name = self.gguf.str(self.data, "tokenizer.ggml.pre").unwrap_or_else(|| {
            tracing::warn!(
                "the file does not say how its model cuts text into words (tokenizer.ggml.pre), so GPT-2's rule is used: \
                 unless that is the model's, its answers will be worse than they could be; convert the model again"
            );
            "default"
        });
        let Some(cut) = Cut::named(name) else {
            return Err(Fault::Unsupported(format!("pre-tokenizer {name:?} (tokenizer.ggml.pre)")));
        };
        let vocab: Vocab =
            (0u32..).zip(&self.tokens).map(|(id, (name, _))| ((*name).to_owned(), id)).collect();
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, self.merges()?)
            .ignore_merges(cut.whole_words)
            .build()
            .map_err(library)?;
        let mut pipeline = Pipeline::new(bpe);
        pipeline.with_pre_tokenizer(Some(cut.pre_tokenizer()?));
        if cut.compose {
            pipeline.with_normalizer(Some(NFC));
        }
        pipeline.add_tokens(&self.added());
        self.finish(Encoder::Bpe(pipeline.into()), byte_level_piece, cut.whole_words)
    }

    /// Pairs that are joined, the most urgent first.
    fn merges(&self) -> Result<Vec<(String, String)>, Fault> {
        let Some(merges) = self.gguf.strings(self.data, "tokenizer.ggml.merges") else {
            return Err(Fault::Malformed("metadata has no tokenizer.ggml.merges".into()));
        };
        let split = |merge: &[u8]| {
            let (left, right) = std::str::from_utf8(merge).ok()?.split_once(' ')?;
            Some((left.to_owned(), right.to_owned()))
        };
        let pairs = merges.into_iter().map(split).collect::<Option<Vec<_>>>();
        pairs.ok_or_else(|| Fault::Malformed("tokenizer.ggml.merges holds something that is no pair".into()))
    }

    fn sentence_piece(self) -> Result<Tokenizer, Fault> {
        let scores = column(self.gguf, self.data, "tokenizer.ggml.scores", self.tokens.len())?;
        let scores = scores.into_iter().map(|s| s as f32).collect();
        let spm = Spm::new(&self.tokens, scores, self.id("tokenizer.ggml.unknown_token_id")?);
        let mut pipeline = Pipeline::new(spm);
        let space = |text| Replace::new(text, "\u{2581}").map_err(library);
        let mut steps: Vec<NormalizerWrapper> = vec![space(" ")?.into()];
        if self.gguf.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true) {
            steps.insert(0, Prepend::new("\u{2581}".into()).into());
        }
        pipeline.with_normalizer(Some(Normalizers::new(steps)));
        pipeline.add_tokens(&self.added());
        self.finish(Encoder::Spm(pipeline.into()), spm_piece, true)
    }

    /// Tokens that are found in a text before anything else, in the order of their ids.
    fn added(&self) -> Vec<AddedToken> {
        let mut seen = HashSet::new();
        let special = |kind| match kind {
            TokenKind::Control => Some(true),
            TokenKind::UserDefined => Some(false),
            _ => None,
        };
        let all = self.tokens.iter().filter_map(|(name, kind)| Some((*name, special(*kind)?)));
        all.filter(|(name, _)| seen.insert(*name))
            .map(|(name, special)| AddedToken::from(name, special).normalized(false))
            .collect()
    }

    fn finish(
        self,
        encoder: Encoder,
        piece: impl Fn(&str, &mut Vec<u8>),
        bos_by_default: bool,
    ) -> Result<Tokenizer, Fault> {
        let wanted = self.gguf.bool("tokenizer.ggml.add_bos_token").unwrap_or(bos_by_default);
        let begin = Begin { token: self.id("tokenizer.ggml.bos_token_id")?, wanted };
        let eos = self.id("tokenizer.ggml.eos_token_id")?;
        let mut end: Vec<u32> = eos.into_iter().collect();
        for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
            end.extend(self.id(key)?);
        }
        Tokenizer::new(encoder, &self.tokens, piece, begin, end)
    }
}

/// The name of a token that metadata names by its number.
pub(crate) fn named_token<'a>(gguf: &Gguf, data: &'a [u8], key: &str) -> Option<&'a str> {
    let id = usize::try_from(gguf.uint(key)?).ok()?;
    let names = gguf.strings(data, "tokenizer.ggml.tokens")?;
    std::str::from_utf8(names.get(id)?).ok()
}

/// An array of numbers with one for each token.
fn column(gguf: &Gguf, data: &[u8], key: &str, len: usize) -> Result<Vec<f64>, Fault> {
    match gguf.numbers(data, key) {
        Some(column) if column.len() == len => Ok(column),
        Some(column) => Err(Fault::Malformed(format!("{key} has {} entries for {len} tokens", column.len()))),
        None => Err(Fault::Malformed(format!("metadata has no {key}"))),
    }
}

/// What the library says is wrong with a vocabulary.
fn library(error: tokenizers::Error) -> Fault {
    Fault::Malformed(format!("the tokenizer can't be built: {error}"))
}
