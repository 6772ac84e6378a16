//! Request bodies: whole, bounded, and JSON whatever the content type says.

use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONTENT_LENGTH, EXPECT};
use axum::http::request::Parts;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use stoker_shared::outcome::{JobError, code};

use super::error::TOO_LARGE;

/// Largest body, bytes.
pub const LIMIT: usize = 10 << 20;
/// A client that sends more is read on for so much before it hears of it: many don't read an answer before they have
/// sent everything, and would see a broken connection instead.
const DRAINED: usize = 64 << 20;
/// A body must be here within this time.
const PATIENCE: Duration = Duration::from_secs(60);

/// Reads a body.
pub async fn read(parts: &Parts, body: Body) -> Result<Bytes, JobError> {
    let announced = parts.headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    let asks_first = parts.headers.contains_key(EXPECT);
    if announced.is_some_and(|n| n > LIMIT) && asks_first {
        return Err(too_large());
    }
    match tokio::time::timeout(PATIENCE, collect(body)).await {
        Ok(result) => result,
        Err(_) => Err(JobError::new(code::INVALID_REQUEST, "the body did not come in time")),
    }
}

async fn collect(body: Body) -> Result<Bytes, JobError> {
    let mut pieces = body.into_data_stream();
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    let mut read = 0;
    while let Some(piece) = pieces.next().await {
        let piece =
            piece.map_err(|e| JobError::new(code::INVALID_REQUEST, format!("the body broke off: {e}")))?;
        read += piece.len();
        if read > DRAINED {
            break;
        } else if read > LIMIT {
            rest = BytesMut::new();
        } else if first.is_empty() {
            first = piece;
        } else {
            if rest.is_empty() {
                rest.extend_from_slice(&first);
            }
            rest.extend_from_slice(&piece);
        }
    }
    match read {
        0..=LIMIT if rest.is_empty() => Ok(first),
        0..=LIMIT => Ok(rest.freeze()),
        _ => Err(too_large()),
    }
}

fn too_large() -> JobError {
    JobError::new(TOO_LARGE, "the body is over 10 MB")
}
