//! Keeps a text within a grammar: before each token, those that would leave it are masked out.
//!
//! Grammars are the `llguidance` library's: an Earley parser over a lexer of regular expressions, run over a trie of the
//! vocabulary's bytes. What it computes depends on the tokens alone, so a successor that feeds the same tokens stands where
//! its predecessor stood.
//!
//! Schemas and grammars come from strangers. Their text is bounded, so is the work of one step and the memory of one
//! guide, and they are compiled on a stack of their own: the library descends into them as deep as they go.

mod schema;

use std::panic::resume_unwind;
use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::deep::{LONGEST_TEXT, on_deep_stack};
use crate::{Constraint, RequestError, RequestErrorKind, Tokenizer};

/// White space between JSON's tokens: none, a blank, or a line's end and its indentation. Any more, and a small model may
/// not come to an end of it.
const WHITE_SPACE: &str = r"\x20|\n[\x20\t]{0,32}";

/// Makes guides for one model.
pub(crate) struct Grammars {
    factory: ParserFactory,
}

/// Where a text stands in its grammar.
pub(crate) struct Guide {
    matcher: Matcher,
    /// The tokens that may come next; `None` if that is not known yet, or never will be.
    allowed: Option<SimpleVob>,
}

impl Grammars {
    /// Sorts the vocabulary. It takes a fraction of a second.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let slices = SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&vocabulary(tokenizer), InferenceCapabilities::default(), &slices);
        let mut factory = factory.expect("the library's own expressions compile");
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            initial_lexer_fuel: 500_000,
            step_lexer_fuel: 100_000,
            step_max_items: 25_000,
            max_lexer_states: 50_000,
            max_grammar_size: 100_000,
            precompute_large_lexemes: false,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Self { factory }
    }

    /// A guide at the beginning of its text.
    ///
    /// # Errors
    /// `Invalid`, saying what is wrong with the constraint or what of it can't be enforced.
    pub fn guide(&self, constraint: &Constraint) -> Result<Guide, RequestError> {
        let invalid = |why: String| invalid(format!("the {} can't be used: {why}", name(constraint)));
        let compile = || -> Result<Guide, String> {
            let grammar = grammar(constraint)?;
            let parser = self.factory.create_parser(grammar).map_err(|e| reason(&e.to_string()))?;
            let mut matcher = Matcher::new(Ok(parser));
            let allowed = matcher.compute_mask().map_err(|e| reason(&e.to_string()))?;
            Ok(Guide { matcher, allowed: Some(allowed) })
        };
        on_deep_stack("grammar", compile).unwrap_or_else(|panic| resume_unwind(panic)).map_err(invalid)
    }
}

/// What the constraint is called in messages.
fn name(constraint: &Constraint) -> &'static str {
    match constraint {
        Constraint::JsonObject | Constraint::JsonSchema(_) => "JSON schema",
        Constraint::Regex(_) => "regular expression",
        Constraint::Lark(_) => "grammar",
    }
}

/// The constraint in the library's terms.
fn grammar(constraint: &Constraint) -> Result<TopLevelGrammar, String> {
    match constraint {
        Constraint::JsonObject => Ok(json_grammar(json!({ "type": "object" }))),
        Constraint::JsonSchema(text) => {
            let value: Value = serde_json::from_str(bounded(text)?).map_err(|e| e.to_string())?;
            if !value.is_object() {
                return Err("it must be an object".into());
            }
            schema::check(&value)?;
            Ok(json_grammar(value))
        }
        Constraint::Regex(text) => Ok(TopLevelGrammar::from_regex(bounded(text)?)),
        Constraint::Lark(text) => {
            for inner in bounded(text)?.split("%json").skip(1) {
                // As the library reads it; what is no schema is for it to refuse.
                let mut values = serde_json::Deserializer::from_str(inner).into_iter();
                values.next().and_then(Result::ok).as_ref().map_or(Ok(()), schema::check)?;
            }
            Ok(TopLevelGrammar::from_lark(text.clone()))
        }
    }
}

fn bounded(text: &str) -> Result<&str, String> {
    match text.len() {
        0 => Err("it is empty".into()),
        n if n > LONGEST_TEXT => Err(format!("it has {n} bytes; the most are {LONGEST_TEXT}")),
        _ => Ok(text),
    }
}

/// A schema's grammar. A schema may say itself, in the library's own key, how its JSON is written.
fn json_grammar(mut schema: Value) -> TopLevelGrammar {
    if let Some(object) = schema.as_object_mut() {
        object.entry("x-guidance").or_insert_with(|| json!({ "whitespace_pattern": WHITE_SPACE }));
    }
    TopLevelGrammar::from_json_schema(schema)
}

/// What the library says, without what it adds for its own developers.
fn reason(message: &str) -> String {
    let end = message.find("\n<").unwrap_or(message.len());
    match message[..end].trim_end() {
        "NoExtensionBias" => "nothing fits it".into(),
        panic if panic.starts_with("panic: ") => "the library fails on it".into(),
        reason => reason.to_owned(),
    }
}

fn invalid(message: String) -> RequestError {
    RequestError { kind: RequestErrorKind::Invalid, message }
}

/// The vocabulary's bytes, as the library wants them. Tokens without bytes are never allowed, but for those that end a
/// generation: they are allowed where the text may end, whatever they say.
///
/// The library could force a text that leaves no choice to be split as the tokenizer splits it. It finds such a text to its end
/// then, however long, and `a{10000000}` would fill the memory: so the model chooses among all tokens that fit.
fn vocabulary(tokenizer: &Tokenizer) -> TokEnv {
    let bytes = |id| if tokenizer.is_eog(id) { &[] } else { tokenizer.token_bytes(id) };
    let words: Vec<_> = (0..tokenizer.vocab_size() as u32).map(|id| bytes(id).to_vec()).collect();
    let ends: Vec<_> = tokenizer.eog_tokens().filter(|id| (*id as usize) < words.len()).collect();
    let first = ends.first().copied().unwrap_or(INVALID_TOKEN);
    let mut trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first), &words);
    if !ends.is_empty() {
        trie = trie.with_eos_tokens(&ends);
    }
    Arc::new(ApproximateTokEnv::new(trie))
}

impl Guide {
    /// Whether it is known which tokens may come next.
    pub fn is_ready(&self) -> bool {
        self.allowed.is_some()
    }

    /// Finds out which tokens may come next: tens to hundreds of microseconds.
    pub fn look_ahead(&mut self) {
        self.allowed = self.matcher.compute_mask().ok();
    }

    /// Makes all other tokens impossible.
    ///
    /// # Errors
    /// That of the last [`look_ahead`](Self::look_ahead).
    pub fn mask(&self, logits: &mut [f32]) -> Result<(), RequestError> {
        let Some(allowed) = &self.allowed else { return Err(self.failure()) };
        let words = allowed.as_slice().iter().copied().chain(std::iter::repeat(0));
        for (word, logits) in words.zip(logits.chunks_mut(32)) {
            match word {
                0 => logits.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                _ => {
                    let others = (0..).zip(logits).filter(|(bit, _)| word >> bit & 1 == 0);
                    others.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
                }
            }
        }
        Ok(())
    }

    /// Goes past a token; true if the text is whole and nothing may follow.
    ///
    /// # Errors
    /// `Invalid`, if the grammar does not allow it, or is too much work from here on.
    pub fn accept(&mut self, token: u32) -> Result<bool, RequestError> {
        self.allowed = None;
        self.matcher.consume_token(token).map_err(|_| self.failure())?;
        Ok(self.matcher.is_stopped())
    }

    fn failure(&self) -> RequestError {
        let why = self.matcher.get_error().unwrap_or_default();
        invalid(format!("the response format can't be followed any further: {}", reason(&why)))
    }
}
