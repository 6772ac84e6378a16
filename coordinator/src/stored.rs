//! Accepted jobs as the ledger keeps them: the work message's body, and its headers and addresses as one JSON object.

use stoker_shared::envelope::Envelope;
use stoker_shared::job::Job;
use stoker_shared::ports::{Message, StoredJob};

use serde_json::{Map, Value};

/// The header by which an outcome goes to `llm.responses`.
const FRONT_DOOR: &str = "x-stoker-front-door";
/// Addresses among the headers. No header has these names: ours begin with `x-stoker-`, and others are not kept.
const REPLY_TO: &str = "reply-to";
const CORRELATION_ID: &str = "correlation-id";

/// What is kept of a message beside its body.
pub fn headers(message: &Message) -> Value {
    let mut kept: Map<String, Value> =
        message.headers.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect();
    for (name, value) in [(REPLY_TO, &message.reply_to), (CORRELATION_ID, &message.correlation_id)] {
        if let Some(value) = value {
            kept.insert(name.into(), Value::from(value.as_str()));
        }
    }
    Value::Object(kept)
}

/// Whether what is kept of a message has its outcome sent where that of this one, from the front door, is to go.
pub fn answers(kept: &Value, message: &Message) -> bool {
    let text = |name| kept.get(name).and_then(Value::as_str);
    text(FRONT_DOOR).is_some()
        && text(REPLY_TO) == message.reply_to.as_deref()
        && text(CORRELATION_ID) == message.correlation_id.as_deref()
}

/// A stored job as it was before.
pub struct Restored {
    /// The job.
    pub job: Job,
    /// What stood beside it.
    pub envelope: Envelope,
    /// Its work message.
    pub message: Message,
}

/// Puts a stored job together again, if it is whole.
pub fn restore(stored: StoredJob) -> Option<Restored> {
    let key = stored.key;
    read(stored).inspect_err(|e| tracing::error!(job = %key, "an accepted job is lost: {e}")).ok()
}

fn read(stored: StoredJob) -> Result<Restored, String> {
    let job: Job =
        serde_json::from_slice(&stored.body).map_err(|e| format!("its body can't be read: {e}"))?;
    let Value::Object(kept) = stored.headers else { return Err("its headers can't be read".into()) };
    let mut message =
        Message { id: job.id.clone().unwrap_or_default(), body: stored.body, ..Message::default() };
    for (name, value) in kept {
        let Value::String(value) = value else { continue };
        match name.as_str() {
            REPLY_TO => message.reply_to = Some(value),
            CORRELATION_ID => message.correlation_id = Some(value),
            _ => drop(message.headers.insert(name, value)),
        }
    }
    let envelope = Envelope::from_headers(&message.headers).ok_or("its headers can't be read")?;
    Ok(Restored { job, envelope, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_reads_back() {
        let envelope = Envelope {
            key: uuid::Uuid::now_v7(),
            tenant: "t".into(),
            once: false,
            front_door: true,
            body_hash: "00".into(),
            accepted_ms: 17,
            cache_key: None,
            revision: None,
            coordinator: None,
        };
        let message = Message {
            id: "a".into(),
            body: br#"{"id":"a","prompt":"p"}"#.as_slice().into(),
            correlation_id: Some("c".into()),
            reply_to: Some("r".into()),
            headers: envelope.to_headers(),
            ..Message::default()
        };
        let stored = StoredJob { key: envelope.key, body: message.body.clone(), headers: headers(&message) };
        let restored = restore(stored.clone()).unwrap();
        assert_eq!((&restored.message, &restored.envelope), (&message, &envelope));
        assert!(answers(&stored.headers, &message));
        assert!(!answers(&stored.headers, &Message { reply_to: None, ..message.clone() }));
        assert!(!answers(&stored.headers, &Message { correlation_id: Some("d".into()), ..message.clone() }));
        let over_http = Message { headers: Default::default(), ..message.clone() };
        assert!(!answers(&headers(&over_http), &message));
        assert!(read(StoredJob { headers: Value::Null, ..stored }).is_err());
    }
}
