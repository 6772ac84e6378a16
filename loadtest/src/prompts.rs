//! What the clients ask.

use std::path::Path;

use anyhow::{Context, Result, ensure};

/// A source of prompts; each number gives the same prompt always.
#[derive(Debug)]
pub enum Prompts {
    /// Words that no other prompt has: with the echo engine, a text that mixes two jobs shows at once.
    Unique,
    /// A fixed list, in turn.
    List(Vec<String>),
}

const QUESTIONS: &[&str] = &[
    "What is the capital of France?",
    "Explain what a hash table is to a ten year old.",
    "Write a haiku about rain.",
    "List three uses of a paper clip.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "What does HTTP stand for?",
    "Tell me about the moon in two sentences.",
    "Name five animals that live in the sea.",
    "What is 17 plus 25?",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "How do plants make food?",
    "Describe a lighthouse at night.",
    "What is the largest planet?",
    "Write one sentence about trains.",
];

impl Prompts {
    /// From a file with one prompt a line.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let all: Vec<_> = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
        ensure!(!all.is_empty(), "{} has no prompt in it", path.display());
        Ok(Self::List(all))
    }

    /// A few questions for a real model.
    pub fn questions() -> Self {
        Self::List(QUESTIONS.iter().map(|&q| q.to_owned()).collect())
    }

    /// The `n`-th prompt.
    pub fn get(&self, n: u64) -> String {
        match self {
            Self::Unique => (0..8).map(|i| format!("{n}w{i}")).collect::<Vec<_>>().join(" "),
            Self::List(all) => all[(n % all.len() as u64) as usize].clone(),
        }
    }
}
