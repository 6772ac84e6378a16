//! A tokenizer from a Hugging Face directory: `tokenizer.json`, and what other files say about special tokens.

use std::panic::catch_unwind;

use serde_json::Value;

use super::{Begin, Encoder, TokenKind, Tokenizer, byte_level_piece, byte_token, is_mark, spm_piece};
use crate::weights::Fault;

/// How many times as long a normalizer may make a text: known ones make each blank three bytes long.
const GREATEST_GROWTH: f64 = 256.0;
/// Tokens that a post-processor may put around a text.
const MOST_AROUND: usize = 64;

/// What the files beside `tokenizer.json` say.
#[derive(Clone, Debug, Default)]
pub(crate) struct Special {
    /// Text of the begin-of-text token.
    pub bos: Option<String>,
    /// Text of the end-of-text token.
    pub eos: Option<String>,
    /// Whether a text begins with the begin-of-text token; `None`: as the post-processor does.
    pub add_bos: Option<bool>,
    /// Tokens that end a generation.
    pub end: Vec<u32>,
}

/// Builds the tokenizer of a `tokenizer.json`. `limit`: rows of the model's embedding; tokens beyond it are not known.
pub(crate) fn from_json(bytes: &[u8], special: &Special, limit: usize) -> Result<Tokenizer, Fault> {
    // The library panics on parts that do not fit together, e.g. a template with a token that it does not describe.
    catch_unwind(|| build(bytes, special, limit))
        .unwrap_or_else(|_| Err(Fault::Malformed("tokenizer.json: its parts do not fit together".into())))
}

fn build(bytes: &[u8], special: &Special, limit: usize) -> Result<Tokenizer, Fault> {
    let bad = |e: &dyn std::fmt::Display| Fault::Malformed(format!("tokenizer.json: {e}"));
    let mut json: Value = serde_json::from_slice(bytes).map_err(|e| bad(&e))?;
    if json.pointer("/model/continuing_subword_prefix").and_then(Value::as_str).is_some_and(|p| !p.is_empty())
    {
        return Err(Fault::Unsupported("tokenizer.json: a prefix for words' continuations".into()));
    }
    let within = |token: &Value| token["id"].as_u64().is_some_and(|id| id < limit as u64);
    if let Some(added) = json.get_mut("added_tokens").and_then(Value::as_array_mut) {
        added.retain(within);
        // Some files have marks as if they were text.
        for token in added.iter_mut().filter(|token| token["content"].as_str().is_some_and(is_mark)) {
            token["special"] = true.into();
        }
    }
    if growth(&json["normalizer"]) > GREATEST_GROWTH {
        return Err(Fault::Unsupported("tokenizer.json: a normalizer that makes texts much longer".into()));
    }
    if repeats_text(&json["post_processor"]) {
        return Err(Fault::Unsupported("tokenizer.json: a template that repeats the text".into()));
    }
    if added_around(&json["post_processor"]) > MOST_AROUND {
        return Err(Fault::Unsupported("tokenizer.json: a template of very many tokens".into()));
    }
    let byte_level = mentions(&json["decoder"], "ByteLevel");
    let mut library: tokenizers::Tokenizer = serde_json::from_value(json).map_err(|e| bad(&e))?;
    // A prompt that does not fit is refused, not cut.
    library.with_truncation(None).map_err(|e| bad(&e))?;
    library.with_padding(None);

    let vocab = library.get_vocab(true);
    let size = vocab.values().max().map_or(0, |id| *id as usize + 1);
    if size > limit {
        return Err(bad(&format!("token {} is beyond the model's embedding of {limit} rows", size - 1)));
    }
    let added = library.get_added_tokens_decoder();
    let mut tokens = vec![("", TokenKind::Unused); size];
    for (name, id) in &vocab {
        let kind = match added.get(id) {
            Some(token) if token.special => TokenKind::Control,
            _ if !byte_level && byte_token(name).is_some() => TokenKind::Byte,
            Some(_) if byte_level => TokenKind::UserDefined,
            _ => TokenKind::Normal,
        };
        tokens[*id as usize] = (name, kind);
    }

    let id = |name: &Option<String>| name.as_ref().and_then(|name| library.token_to_id(name));
    let bos = id(&special.bos);
    let begins = |bos| library.encode("", true).is_ok_and(|e| e.get_ids().first() == Some(&bos));
    let wanted = special.add_bos.unwrap_or_else(|| bos.is_some_and(begins));
    let begin = Begin { token: bos, wanted };
    let end = special.end.iter().copied().chain(id(&special.eos)).filter(|id| (*id as usize) < size);
    let piece = if byte_level { byte_level_piece } else { spm_piece };
    let end: Vec<u32> = end.collect();
    Tokenizer::new(Encoder::Json(library.clone().into()), &tokens, piece, begin, end)
}

/// Whether a part of a pipeline is of a type, or a sequence that has one of it.
fn mentions(part: &Value, kind: &str) -> bool {
    part["type"] == kind
        || part["decoders"].as_array().is_some_and(|all| all.iter().any(|d| mentions(d, kind)))
}

/// How many times as long a normalizer can make a text of at least one byte; from above.
fn growth(normalizer: &Value) -> f64 {
    let len = |value: &Value| value.as_str().map_or(0, str::len) as f64;
    match normalizer["type"].as_str() {
        Some("Sequence") => normalizer["normalizers"].as_array().into_iter().flatten().map(growth).product(),
        Some("Prepend") => 1.0 + len(&normalizer["prepend"]),
        Some("Replace") => {
            let content = len(&normalizer["content"]);
            match len(&normalizer["pattern"]["String"]) {
                // An expression, or nothing: it may fit between any two characters.
                0.0 => 1.0 + content,
                pattern => (content / pattern).max(1.0),
            }
        }
        // A table of its own: as long as it likes.
        Some("Precompiled") => f64::INFINITY,
        // U+FDFA becomes 18 characters.
        Some("NFKC" | "NFKD") => 11.0,
        Some("Strip" | "StripAccents") => 1.0,
        None if normalizer.is_null() => 1.0,
        // The library also takes what has no type.
        None => f64::INFINITY,
        Some(_) => 3.0,
    }
}

/// How many tokens a post-processor can put around a text; from above.
fn added_around(processor: &Value) -> usize {
    let all = |value: &Value, each: &dyn Fn(&Value) -> usize| -> usize {
        value.as_array().into_iter().flatten().map(each).fold(0, usize::saturating_add)
    };
    let piece = |piece: &Value| match piece["SpecialToken"]["id"].as_str() {
        Some(id) => processor["special_tokens"][id]["ids"].as_array().map_or(1, Vec::len),
        None => 0,
    };
    let own = all(&processor["single"], &piece).saturating_add(all(&processor["pair"], &piece));
    own.saturating_add(all(&processor["processors"], &added_around))
}

/// Whether a post-processor puts a text more than once.
fn repeats_text(processor: &Value) -> bool {
    let pieces = |template: &str| processor[template].as_array().into_iter().flatten();
    let texts = |template| pieces(template).filter(|piece| !piece["Sequence"].is_null()).count();
    let within = processor["processors"].as_array().into_iter().flatten().any(repeats_text);
    texts("single") > 1 || texts("pair") > 2 || within
}
