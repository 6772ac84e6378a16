//! What a caller says to an engine, and what it hears back.

use std::fmt;
use std::time::Instant;

/// Names a request while it is in an engine; chosen by the caller, unique among those in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// One message of a conversation, as a chat template sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or whatever else the template knows.
    pub role: String,
    /// The message's text.
    pub content: String,
}

/// What is to be continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Raw text: tokenized as it is (with the model's BOS token if it wants one), no template.
    Text(String),
    /// A conversation: rendered by the model's chat template, which asks for the assistant's turn.
    Chat(Vec<ChatMessage>),
}

/// How the next token is chosen. The random number of position `p` is a function of `(seed, p)` alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token (greedy).
    pub temperature: f32,
    /// Nucleus: the smallest set of likeliest tokens whose probability reaches this, in (0, 1].
    pub top_p: f32,
    /// Only the `k` likeliest tokens; 0 means all.
    pub top_k: u32,
    /// Only tokens at least this share as likely as the likeliest; 0 means all.
    pub min_p: f32,
    /// Subtracted from the logit of each token generated before (OpenAI's definition).
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once per earlier occurrence in the generated text (OpenAI's definition).
    pub frequency_penalty: f32,
    /// Seed of the position-keyed random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }
}

/// Which requests go first when slots are short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Someone is waiting for the tokens.
    #[default]
    Interactive,
    /// Nobody is in a hurry.
    Batch,
}

/// What a text must be, in the end; on the way to it, tokens that lead elsewhere are not chosen.
///
/// A text that `max_tokens` or a stop string cuts is the beginning of such a one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Constraint {
    /// A JSON object.
    JsonObject,
    /// JSON that fits a schema: the schema, as JSON text, an object. Properties come in the schema's order. What the
    /// library can't enforce is refused by name.
    JsonSchema(String),
    /// A text that matches a regular expression from its beginning to its end.
    Regex(String),
    /// A text of a grammar in llguidance's variant of Lark's syntax.
    Lark(String),
}

/// What an earlier attempt generated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resume {
    /// Token ids, in order.
    pub tokens: Vec<u32>,
    /// The text that was released for them, or the beginning of it: a model that reads the tokens otherwise refuses to go on.
    pub text: String,
}

/// One generation.
#[derive(Clone, Debug)]
pub struct Request {
    /// The caller's name for it.
    pub id: SequenceId,
    /// What to continue.
    pub prompt: Prompt,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// At most so many new tokens, those of `resume` included; `None`: what the context has left.
    pub max_tokens: Option<u32>,
    /// Text at which generation ends; not part of the output. May span token borders.
    pub stop: Vec<String>,
    /// What the text must be. The end-of-generation token is allowed where it is that, and nowhere else.
    pub constraint: Option<Constraint>,
    /// What an earlier attempt generated. The tokens are put after the prompt, run through detokenizer and stop
    /// matcher without being emitted again, and generation goes on at the next position with the random numbers
    /// it would have had. Text released for a prefix of tokens depends on that prefix alone.
    pub resume: Resume,
    /// Who goes first.
    pub priority: Priority,
    /// After this moment the request ends with [`FinishReason::Deadline`].
    pub deadline: Option<Instant>,
    /// Whose it is. Within a priority, turns go to the user who has had the least computed.
    pub user: u64,
}

/// Why a generation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-generation token or a stop string.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// [`Engine::cancel`].
    Cancelled,
    /// [`Request::deadline`] passed.
    Deadline,
    /// It could not be run, or failed while running; other requests are not affected.
    Error(RequestError),
}

/// What was wrong with a request, or what befell it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// Whose fault it is, so that a caller can answer 4xx or 5xx.
    pub kind: RequestErrorKind,
    /// For people; says what to do.
    pub message: String,
}

/// The kinds of [`RequestError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestErrorKind {
    /// Prompt (and resume) leave no room in the context.
    ContextLength,
    /// Another fault of the request, e.g. messages that the chat template refuses, or a constraint that makes no sense.
    Invalid,
    /// A fault of the engine.
    Internal,
}

/// Token counts of an ended generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, template included.
    pub prompt_tokens: u32,
    /// New tokens, those of `resume` included, the end-of-generation token (if one was sampled) too.
    pub completion_tokens: u32,
    /// Of `prompt_tokens`, those whose keys and values were found in the cache.
    pub cached_prompt_tokens: u32,
}

/// The end of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// What it took.
    pub usage: Usage,
}

/// What one step did for one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Which request.
    pub id: SequenceId,
    /// Token ids chosen in this step, in order: several where guesses were right; those of a held-back text too.
    pub tokens: Vec<u32>,
    /// Text released in this step: whole characters only, nothing that could still become a stop string.
    pub text: String,
    /// Set on a request's last event.
    pub finish: Option<Finish>,
}

/// Where an engine puts what a step did: called once per step, on the engine's own thread, with the events of all
/// requests that the step touched. Must not block. Dropped when that thread ends, even if it does so by itself, because its
/// model is broken: then no more is heard of the requests that it had.
pub type Sink = Box<dyn FnMut(Vec<Event>) + Send>;

/// What an engine serves, fixed once it is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelInfo {
    /// Name under which the fleet knows the model.
    pub name: String,
    /// Identifies the weights: equal revisions give equal texts.
    pub revision: String,
    /// Architecture as the file names it, e.g. `llama`.
    pub architecture: String,
    /// Quantisation or number format of most weights, e.g. `Q4_1`.
    pub format: String,
    /// Context length, tokens.
    pub context: u32,
    /// Backend, `cpu`, `wgpu`, `cuda` or `echo`.
    pub backend: String,
    /// Device, for people.
    pub device: String,
    /// Most requests that decode together.
    pub slots: u32,
}

/// A running engine's state.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Requests in the running batch.
    pub active: u32,
    /// Requests that wait for a slot.
    pub waiting: u32,
    /// Cached positions in use.
    pub kv_used: u64,
    /// Cached positions there are.
    pub kv_total: u64,
    /// Tokens generated since start.
    pub tokens: u64,
    /// Decoding steps since start.
    pub steps: u64,
    /// Tokens that were guessed ahead since start.
    pub drafted: u64,
    /// Of these, those that were right.
    pub accepted: u64,
}

/// A model that runs. Dropping it ends its thread; requests in flight get no further events.
pub trait Engine: Send + Sync + 'static {
    /// What it serves.
    fn info(&self) -> &ModelInfo;
    /// Hands over a request; every request gets exactly one event with `finish` set, whatever is wrong with it, as long as the
    /// engine has its [`Sink`].
    fn submit(&self, request: Request);
    /// Asks that a request end with [`FinishReason::Cancelled`] within one step; unknown ids are ignored.
    fn cancel(&self, id: SequenceId);
    /// How it is doing.
    fn stats(&self) -> Stats;
}

impl fmt::Debug for dyn Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Engine").field(self.info()).finish()
    }
}
