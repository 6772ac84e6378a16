//! How a job ended: the object on `llm.responses`, on `reply_to`, and behind `GET /v1/jobs/{id}`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Why a text ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop string.
    Stop,
    /// `maxTokens`, or the context's end.
    Length,
    /// The model asks for a tool.
    ToolCalls,
    /// Its submitter cancelled it, or went away.
    Cancelled,
    /// Its deadline passed.
    Deadline,
    /// It failed; see the error.
    Error,
}

impl FinishReason {
    /// As written on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::Cancelled => "cancelled",
            Self::Deadline => "deadline",
            Self::Error => "error",
        }
    }

    /// Whether the text is whole: the job did what was asked.
    pub fn is_success(self) -> bool {
        matches!(self, Self::Stop | Self::Length | Self::ToolCalls)
    }
}

/// Token counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// Tokens of the prompt, template included.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Prompt tokens that did not have to be computed.
    #[serde(default)]
    pub cached_prompt_tokens: u32,
}

/// What went wrong, for a program (`code`) and for people (`message`, which says what to do).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct JobError {
    /// One of [`code`]'s words.
    pub code: String,
    /// For people.
    pub message: String,
    /// The field at fault.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub param: Option<String>,
}

impl JobError {
    /// An error that no field is to blame for.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), param: None }
    }

    /// An error in a field.
    pub fn field(code: &str, param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), param: Some(param.into()) }
    }

    /// What the fleet needs, its bus, say, is down for now.
    pub fn out_of_reach(what: &str) -> Self {
        Self::new(code::SERVICE_UNAVAILABLE, format!("the fleet's {what} can't be reached; try again"))
    }
}

/// The words that [`JobError::code`] holds.
pub mod code {
    /// The body is not a job: not JSON, wrong types, out of range, a field missing.
    pub const INVALID_REQUEST: &str = "invalid_request";
    /// Prompt and output do not fit the model's context.
    pub const CONTEXT_LENGTH: &str = "context_length_exceeded";
    /// Nobody registered this model.
    pub const MODEL_NOT_FOUND: &str = "model_not_found";
    /// The model is known, but nothing serves it now.
    pub const MODEL_UNAVAILABLE: &str = "model_unavailable";
    /// The id belongs to a job with another body.
    pub const ID_TAKEN: &str = "id_taken";
    /// The queue takes no more.
    pub const QUEUE_FULL: &str = "queue_full";
    /// A service that the fleet needs is down.
    pub const SERVICE_UNAVAILABLE: &str = "service_unavailable";
    /// The deadline passed.
    pub const DEADLINE: &str = "deadline_exceeded";
    /// It was cancelled.
    pub const CANCELLED: &str = "cancelled";
    /// Workers died under it too often.
    pub const POISON: &str = "poison";
    /// The broker gave it up.
    pub const UNDELIVERABLE: &str = "undeliverable";
    /// In `llm_requests` only: the job ended, but its row's texts could not be stored.
    pub const UNSTORABLE: &str = "unstorable";
    /// A fault of ours.
    pub const INTERNAL: &str = "internal_error";
}

/// How a job ended. Serialized once, by whoever ends the job; every copy is the same bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Version of the format.
    pub v: u32,
    /// The job's id as given.
    pub id: String,
    /// Whether `text` is what was asked for.
    pub success: bool,
    /// The whole text; what there is of it after a failure.
    pub text: String,
    /// Completion tokens.
    pub tokens: u32,
    /// Token counts.
    pub usage: Usage,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The model that wrote it.
    pub model: String,
    /// As given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    /// `model`, `executionTime`, `queueTime`, `timeToFirstToken` (ms), `cached`, `worker`, `attempts`, `request`, and
    /// the job's own metadata.
    pub metadata: Map<String, Value>,
    /// When `success` is false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<JobError>,
    /// RFC 3339, when it ended.
    pub timestamp: String,
}
