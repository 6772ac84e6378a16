//! Whether the answers are right.

use std::collections::HashMap;
use std::sync::Mutex;

use clap::ValueEnum;

/// How answers are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Check {
    /// The echo engine's text for the prompt.
    Echo,
    /// The same text for the same prompt, always (temperature 0).
    Same,
    /// Not at all.
    None,
}

/// Remembers what was answered.
#[derive(Debug)]
pub struct Checker {
    check: Check,
    seen: Mutex<HashMap<String, String>>,
}

impl Checker {
    /// A checker.
    pub fn new(check: Check) -> Self {
        Self { check, seen: Mutex::default() }
    }

    /// Says what is wrong with an answer of `max_tokens` tokens to `prompt`.
    pub fn verify(&self, prompt: &str, max_tokens: u64, text: &str) -> Result<(), String> {
        match self.check {
            Check::None => Ok(()),
            Check::Echo => compare(&echo(prompt, max_tokens), text),
            Check::Same => {
                let mut seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                match seen.get(prompt) {
                    Some(expected) => compare(expected, text),
                    None => {
                        seen.insert(prompt.to_owned(), text.to_owned());
                        Ok(())
                    }
                }
            }
        }
    }
}

/// The echo engine's text: the prompt's words in turn.
pub fn echo(prompt: &str, tokens: u64) -> String {
    let words: Vec<_> = prompt.split_whitespace().collect();
    (0..tokens as usize).map(|i| words[i % words.len()]).collect::<Vec<_>>().join(" ")
}

fn compare(expected: &str, text: &str) -> Result<(), String> {
    if expected == text { Ok(()) } else { Err(format!("wrong text: {text:?}, expected {expected:?}")) }
}
