//! The reference's cases: what an independent implementation makes of some prompts.

use serde::Deserialize;
use stoker_engine::*;

#[derive(Deserialize)]
struct Reference {
    cases: Vec<Case>,
}

/// A prompt and its greedy continuation.
#[derive(Clone, Deserialize)]
pub struct Case {
    #[serde(default)]
    messages: Vec<Message>,
    pub prompt: String,
    pub prompt_tokens: Vec<u32>,
    /// New ones, the end-of-generation token included.
    pub tokens: Vec<u32>,
    pub text: String,
    /// `eos` or `limit`.
    pub stop: String,
    pub first_step_top5: Vec<Candidate>,
}

#[derive(Clone, Deserialize)]
struct Message {
    role: String,
    content: String,
}

/// A token that may come first.
#[derive(Clone, Deserialize)]
pub struct Candidate {
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// All cases.
pub fn cases() -> Vec<Case> {
    let text = std::fs::read_to_string(super::data("smollm2_greedy_f32.json")).unwrap();
    serde_json::from_str::<Reference>(&text).unwrap().cases
}

impl Case {
    /// The request whose answer the case holds.
    pub fn request(&self, id: u64) -> Request {
        let message = |m: &Message| ChatMessage { role: m.role.clone(), content: m.content.clone() };
        let prompt = match self.messages.is_empty() {
            true => Prompt::Text(self.prompt.clone()),
            false => Prompt::Chat(self.messages.iter().map(message).collect()),
        };
        Request {
            id: SequenceId(id),
            prompt,
            sampling: Sampling::default(),
            max_tokens: Some(64),
            stop: Vec::new(),
            constraint: None,
            resume: Resume::default(),
            priority: Priority::Interactive,
            deadline: None,
            user: 0,
        }
    }
}
