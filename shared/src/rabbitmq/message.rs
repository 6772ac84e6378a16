//! Messages as AMQP carries them.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::refused;
use super::topology::short;
use crate::ports::{Message, PortResult};

/// How often a quorum queue has delivered the message before; absent on the first delivery.
const DELIVERY_COUNT: &str = "x-delivery-count";

/// What a publisher writes that consumes its replies itself; the broker puts an address in its place, or closes the
/// channel of a publisher that does not.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// Headers by which a publisher names further queues; the broker closes the channel if they are not lists.
const CARBON_COPIES: [&str; 2] = ["CC", "BCC"];

/// Longest value of a header, bytes; what is longer is cut. All properties of a message must fit into one frame (128
/// KiB): with longer ones the broker closes the connection, to the loss of all who share it. Ours are short and few, but
/// a reason may quote what a stranger sent.
const LONGEST_VALUE: usize = 4 << 10;

/// Delivery modes of AMQP.
const TRANSIENT: u8 = 1;
const PERSISTENT: u8 = 2;

/// Properties of a message on its way out; its headers' values are cut to [`LONGEST_VALUE`].
///
/// # Errors
/// An id or a header's name is longer than 255 bytes, or the broker would close the channel over it, to the loss of all
/// who share it.
pub fn to_properties(message: &Message, persistent: bool) -> PortResult<BasicProperties> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_delivery_mode(if persistent { PERSISTENT } else { TRANSIENT })
        .with_timestamp(now.as_secs());
    if !message.id.is_empty() {
        properties = properties.with_message_id(short(message.id.as_str())?);
    }
    if let Some(id) = &message.correlation_id {
        properties = properties.with_correlation_id(short(id.as_str())?);
    }
    if let Some(queue) = &message.reply_to {
        if queue == DIRECT_REPLY_TO {
            return Err(refused(format!("{DIRECT_REPLY_TO} is no address")));
        }
        properties = properties.with_reply_to(short(queue.as_str())?);
    }
    if !message.headers.is_empty() {
        let mut headers = FieldTable::default();
        for (name, value) in
            message.headers.iter().filter(|(name, _)| !CARBON_COPIES.contains(&name.as_str()))
        {
            let value = &value[..value.floor_char_boundary(LONGEST_VALUE)];
            headers.insert(short(name.as_str())?, AMQPValue::LongString(value.into()));
        }
        properties = properties.with_headers(headers);
    }
    Ok(properties)
}

/// A message that came in, and whether someone has had it before.
pub fn from_delivery(delivery: &mut lapin::message::Delivery) -> (Message, bool) {
    let text = |value: &Option<ShortString>| value.as_ref().map(|text| text.as_str().to_owned());
    let properties = &delivery.properties;
    let mut headers: BTreeMap<String, String> = properties
        .headers()
        .iter()
        .flat_map(|table| table.inner())
        .filter_map(|(name, value)| Some((name.as_str().to_owned(), printed(value)?)))
        .collect();
    // The broker's own bookkeeping, not the sender's.
    let delivered_before = headers.remove(DELIVERY_COUNT).is_some_and(|count| count != "0");
    let message = Message {
        id: text(properties.message_id()).unwrap_or_default(),
        correlation_id: text(properties.correlation_id()),
        reply_to: text(properties.reply_to()),
        user_id: text(properties.user_id()),
        headers,
        body: Bytes::from(std::mem::take(&mut delivery.data)),
    };
    (message, delivery.redelivered || delivered_before)
}

fn printed(value: &AMQPValue) -> Option<String> {
    Some(match value {
        AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).ok()?,
        AMQPValue::ShortString(text) => text.to_string(),
        AMQPValue::Boolean(v) => v.to_string(),
        AMQPValue::ShortShortInt(v) => v.to_string(),
        AMQPValue::ShortShortUInt(v) => v.to_string(),
        AMQPValue::ShortInt(v) => v.to_string(),
        AMQPValue::ShortUInt(v) => v.to_string(),
        AMQPValue::LongInt(v) => v.to_string(),
        AMQPValue::LongUInt(v) => v.to_string(),
        AMQPValue::LongLongInt(v) => v.to_string(),
        AMQPValue::Timestamp(v) => v.to_string(),
        AMQPValue::Float(v) => v.to_string(),
        AMQPValue::Double(v) => v.to_string(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_amqp_cannot_carry_are_refused() {
        let message = Message { id: "x".repeat(256), ..Default::default() };
        assert!(to_properties(&message, true).is_err());
        let message = Message { id: "x".repeat(255), ..Default::default() };
        assert!(to_properties(&message, true).is_ok());
        let message = Message { reply_to: Some(DIRECT_REPLY_TO.into()), ..Default::default() };
        assert!(to_properties(&message, true).is_err());
    }

    #[test]
    fn values_of_headers_are_cut_at_a_whole_character() {
        let headers = BTreeMap::from([("x".to_owned(), "a".to_owned() + &"é".repeat(LONGEST_VALUE))]);
        let properties = to_properties(&Message { headers, ..Default::default() }, true).unwrap();
        let table = properties.headers().as_ref().unwrap();
        let AMQPValue::LongString(value) = &table.inner()["x"] else { panic!("{table:?}") };
        assert_eq!(value.as_bytes().len(), LONGEST_VALUE - 1);
        assert!(std::str::from_utf8(value.as_bytes()).is_ok());
    }
}
