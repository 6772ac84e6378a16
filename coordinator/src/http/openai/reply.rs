//! OpenAI's replies: whole objects, and streams of chunks.
//!
//! What is the same in all chunks of a stream is written down once; a chunk then is three copies and one escaped text.

use serde_json::{Value, json};
use stoker_shared::outcome::{FinishReason, JobError, Usage};

use crate::http::error::Family;
use crate::http::sse::{Events, json_event, json_string};
use crate::inbox::End;
use crate::ticket::Ticket;

/// Which of the two routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

impl Route {
    fn id(self, ticket: &Ticket) -> String {
        match self {
            Self::Chat => format!("chatcmpl-{}", ticket.key),
            Self::Completion => format!("cmpl-{}", ticket.key),
        }
    }
}

/// The reply of a request that did not ask for a stream.
pub fn whole(route: Route, ticket: &Ticket, text: &str, end: &End) -> Value {
    let (object, choice) = match route {
        Route::Chat => (
            "chat.completion",
            json!({
                "index": 0,
                "message": { "role": "assistant", "content": text, "refusal": null },
                "logprobs": null,
                "finish_reason": reason(end.reason),
            }),
        ),
        Route::Completion => (
            "text_completion",
            json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": reason(end.reason) }),
        ),
    };
    json!({
        "id": route.id(ticket),
        "object": object,
        "created": ticket.created,
        "model": &*ticket.model.name,
        "choices": [choice],
        "usage": usage(&end.usage),
        "system_fingerprint": ticket.model.fingerprint,
    })
}

fn usage(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": { "cached_tokens": usage.cached_prompt_tokens },
    })
}

/// Their word for it. Ends that are errors are told as errors instead.
fn reason(reason: FinishReason) -> &'static str {
    reason.as_str()
}

/// A stream of chunks.
pub struct Chunks {
    /// `data: {"id": …, "choices":`
    head: Vec<u8>,
    /// What stands before a text, and after it.
    around: (&'static [u8], &'static [u8]),
    /// After the choices.
    tail: &'static [u8],
    route: Route,
    include_usage: bool,
    begun: bool,
}

impl Chunks {
    /// The chunks of one reply.
    pub fn new(route: Route, ticket: &Ticket, include_usage: bool) -> Self {
        let object = if route == Route::Chat { "chat.completion.chunk" } else { "text_completion" };
        let mut head = Vec::with_capacity(256);
        head.extend_from_slice(b"data: {\"id\":");
        json_string(&route.id(ticket), &mut head);
        head.extend_from_slice(
            format!(",\"object\":\"{object}\",\"created\":{},\"model\":", ticket.created).as_bytes(),
        );
        json_string(&ticket.model.name, &mut head);
        head.extend_from_slice(b",\"system_fingerprint\":");
        match &ticket.model.fingerprint {
            Some(fingerprint) => json_string(fingerprint, &mut head),
            None => head.extend_from_slice(b"null"),
        }
        head.extend_from_slice(b",\"choices\":[");
        let around: (&[u8], &[u8]) = match route {
            Route::Chat => {
                (b"{\"index\":0,\"delta\":{\"content\":", b"},\"logprobs\":null,\"finish_reason\":null}")
            }
            Route::Completion => (b"{\"index\":0,\"text\":", b",\"logprobs\":null,\"finish_reason\":null}"),
        };
        let tail: &[u8] = if include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" };
        Self { head, around, tail, route, include_usage, begun: false }
    }

    /// A chunk with this choice.
    fn chunk(&self, choice: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head);
        out.extend_from_slice(choice);
        out.extend_from_slice(self.tail);
    }

    /// In a chat, the first chunk says who speaks.
    fn begin(&mut self, out: &mut Vec<u8>) {
        if !self.begun && self.route == Route::Chat {
            let choice =
                b"{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\",\"refusal\":null},\
                \"logprobs\":null,\"finish_reason\":null}";
            self.chunk(choice, out);
        }
        self.begun = true;
    }
}

impl Events for Chunks {
    fn text(&mut self, text: &str, out: &mut Vec<u8>) {
        self.begin(out);
        out.extend_from_slice(&self.head);
        out.extend_from_slice(self.around.0);
        json_string(text, out);
        out.extend_from_slice(self.around.1);
        out.extend_from_slice(self.tail);
    }

    fn done(&mut self, end: &End, out: &mut Vec<u8>) {
        self.begin(out);
        let empty = if self.route == Route::Chat { "\"delta\":{}" } else { "\"text\":\"\"" };
        let choice =
            format!("{{\"index\":0,{empty},\"logprobs\":null,\"finish_reason\":\"{}\"}}", reason(end.reason));
        self.chunk(choice.as_bytes(), out);
        if self.include_usage {
            out.extend_from_slice(&self.head);
            out.extend_from_slice(b"],\"usage\":");
            // Writing to memory can't fail.
            let _ = serde_json::to_writer(&mut *out, &usage(&end.usage));
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn failed(&mut self, error: &JobError, out: &mut Vec<u8>) {
        json_event(&Family::OpenAi.body(error), out);
    }
}
