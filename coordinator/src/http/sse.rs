//! Server-sent events: a job's text as a response body.
//!
//! The status waits for the first thing that is heard, so that what goes wrong before the first token is a proper error
//! response. Whatever text has come since the last write goes out as one event, and an event (or several) as one chunk:
//! some readers take a chunk for a line.

use std::convert::Infallible;
use std::future::Future;

use axum::body::Body;
use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::Response;
use bytes::Bytes;
use futures::stream;
use stoker_shared::outcome::JobError;

use super::error::Family;
use crate::inbox::{End, Heard, Reader};
use crate::ticket::Ticket;

/// Tells a client (and proxies on the way) that the connection is in use.
const KEEP_ALIVE: &[u8] = b": waiting\n\n";

/// Writes one route's events.
pub trait Events: Send + 'static {
    /// New text. Never called with an empty one.
    fn text(&mut self, text: &str, out: &mut Vec<u8>);
    /// The end of a whole text.
    fn done(&mut self, end: &End, out: &mut Vec<u8>);
    /// The end of one that is not whole.
    fn failed(&mut self, error: &JobError, out: &mut Vec<u8>);
}

/// Where text comes from.
pub trait Source: Send + 'static {
    /// Waits for the next text (appended to `out`), the end, or ten idle seconds.
    fn next(&mut self, out: &mut String) -> impl Future<Output = Heard> + Send;
}

impl Source for Ticket {
    fn next(&mut self, out: &mut String) -> impl Future<Output = Heard> + Send {
        Ticket::next(self, out)
    }
}

impl Source for Reader {
    fn next(&mut self, out: &mut String) -> impl Future<Output = Heard> + Send {
        Reader::next(self, out)
    }
}

/// A stream whose status waits for the first thing that is heard.
pub async fn respond(source: impl Source, events: impl Events, family: Family) -> Response {
    let mut writer = Writer { source, events, text: String::new() };
    let (chunk, over) = match writer.source.next(&mut writer.text).await {
        Heard::End(End { error: Some(error), .. }) if writer.text.is_empty() => return family.refuse(&error),
        heard => writer.write(&heard),
    };
    response(writer, Some(chunk), over)
}

/// A stream that begins at once.
pub fn respond_now(source: impl Source, events: impl Events) -> Response {
    response(Writer { source, events, text: String::new() }, None, false)
}

fn response<S: Source, E: Events>(writer: Writer<S, E>, first: Option<Bytes>, over: bool) -> Response {
    let rest = (!over).then_some(writer);
    let chunks = stream::unfold((first, rest), |(first, rest)| async move {
        if let Some(chunk) = first {
            return Some((Ok::<_, Infallible>(chunk), (None, rest)));
        }
        let mut writer = rest?;
        let heard = writer.source.next(&mut writer.text).await;
        let (chunk, over) = writer.write(&heard);
        Some((Ok(chunk), (None, (!over).then_some(writer))))
    });
    let mut response = Response::new(Body::from_stream(chunks));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct Writer<S, E> {
    source: S,
    events: E,
    text: String,
}

impl<S: Source, E: Events> Writer<S, E> {
    /// What was heard, as a chunk; and whether it was the last.
    fn write(&mut self, heard: &Heard) -> (Bytes, bool) {
        let mut out = Vec::with_capacity(512 + self.text.len());
        if !self.text.is_empty() {
            self.events.text(&self.text, &mut out);
            self.text.clear();
        }
        let over = match heard {
            Heard::End(End { error: Some(error), .. }) => {
                self.events.failed(error, &mut out);
                true
            }
            Heard::End(end) => {
                self.events.done(end, &mut out);
                true
            }
            Heard::Text | Heard::Idle | Heard::Behind => false,
        };
        if out.is_empty() {
            out.extend_from_slice(KEEP_ALIVE);
        }
        (out.into(), over)
    }
}

/// Appends a text as a JSON string.
pub fn json_string(text: &str, out: &mut Vec<u8>) {
    // Writing to memory can't fail.
    let _ = serde_json::to_writer(out, text);
}

/// Appends an event with JSON data.
pub fn json_event(data: &serde_json::Value, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    let _ = serde_json::to_writer(&mut *out, data);
    out.extend_from_slice(b"\n\n");
}
