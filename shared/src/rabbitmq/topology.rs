//! Names of exchange and queues, and how they are declared.
//!
//! The arguments of a queue can't be changed later, and a client that declares it with others is refused. The four
//! queues that other services know carry exactly the arguments that those services declare; ours carry only what must
//! never differ: type, overflow and dead-lettering. All else is a matter of policies.

use lapin::options::{BasicQosOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Connection, ExchangeKind};

use super::{port_error, refused};
use crate::config::{DEFAULT_PREFIX, prefixed};
use crate::job::encode_model;
use crate::ports::{Destination, PortError, PortResult, Source};

/// How long a message may stay in a queue that other services know, milliseconds: 24 hours.
const MESSAGE_TTL: i32 = 86_400_000;
/// Most messages in such a queue.
const MAX_LENGTH: i32 = 10_000;
/// A message of a quorum queue that came back more often than this is dead.
const DELIVERY_LIMIT: i32 = 100;

/// The queues that are there whatever models there are.
const FIXED: [&str; 5] = ["llm.requests", "llm.responses", "llm.metrics", "llm.errors", DEAD];
const DEAD: &str = "llm.dead";

/// Names under the configured prefix.
pub struct Names {
    prefix: String,
    exchange: ShortString,
}

/// Where a message goes, and how surely.
pub struct Address {
    /// Empty: the default exchange.
    pub exchange: ShortString,
    /// Routing key; a queue's name.
    pub key: ShortString,
    /// Returned if no queue takes it.
    pub mandatory: bool,
    /// Survives a restart of the broker.
    pub persistent: bool,
    /// The caller waits for the confirm.
    pub confirmed: bool,
}

impl Names {
    /// Names that start with this instead of `llm.`.
    ///
    /// # Errors
    /// The prefix is too long for AMQP.
    pub fn new(prefix: &str) -> PortResult<Self> {
        Ok(Self { prefix: prefix.to_owned(), exchange: short(prefixed(prefix, "llm.exchange"))? })
    }

    /// The exchange that everything is published to.
    pub fn exchange(&self) -> ShortString {
        self.exchange.clone()
    }

    fn fixed(&self, contract: &str) -> PortResult<ShortString> {
        short(prefixed(&self.prefix, contract))
    }

    /// A queue's name, which is its routing key as well.
    pub fn queue(&self, source: &Source) -> PortResult<ShortString> {
        match source {
            Source::FrontDoor => self.fixed("llm.requests"),
            Source::Work { model, lane } => {
                self.fixed(&format!("llm.work.{}.{}", encode_model(model), lane.as_str()))
            }
            Source::Dead => self.fixed(DEAD),
            Source::Responses => self.fixed("llm.responses"),
            Source::Errors => self.fixed("llm.errors"),
        }
    }

    /// Where a destination's messages are published.
    pub fn address(&self, to: &Destination) -> PortResult<Address> {
        let key = match to {
            Destination::FrontDoor => self.fixed("llm.requests")?,
            Destination::Work { model, lane } => {
                self.queue(&Source::Work { model: model.clone(), lane: *lane })?
            }
            Destination::Responses => self.fixed("llm.responses")?,
            Destination::Errors => self.fixed("llm.errors")?,
            Destination::Metrics => self.fixed("llm.metrics")?,
            Destination::Reply(name) => return self.reply(name),
        };
        let job = !matches!(to, Destination::Metrics);
        Ok(Address { exchange: self.exchange(), key, mandatory: job, persistent: job, confirmed: job })
    }

    fn reply(&self, name: &str) -> PortResult<Address> {
        if name.starts_with(DEFAULT_PREFIX) || name.starts_with(&self.prefix) {
            return Err(refused(format!("replies can't go to {name:?}, a queue of the fleet's own")));
        }
        let (exchange, key) = (ShortString::default(), short(name)?);
        Ok(Address { exchange, key, mandatory: false, persistent: true, confirmed: true })
    }
}

/// A name as AMQP carries it: at most 255 bytes.
pub fn short(name: impl Into<String>) -> PortResult<ShortString> {
    ShortString::try_new(name).map_err(refused)
}

/// Declares the exchange and the queues that are always there. Queues that somebody has declared differently are left
/// as they are; the first such refusal is handed back.
pub async fn declare_fixed(connection: &Connection, names: &Names) -> PortResult<Option<PortError>> {
    let mut refusal = None;
    for contract in FIXED {
        let arguments = if contract == DEAD { dead_arguments() } else { seed_arguments() };
        match declare(connection, names, names.fixed(contract)?, arguments).await {
            Err(error @ PortError::Refused { .. }) => {
                tracing::error!(queue = %names.fixed(contract)?, %error, "a queue was declared differently");
                refusal.get_or_insert(error);
            }
            other => other?,
        }
    }
    Ok(refusal)
}

/// Declares the queue behind a source.
pub async fn declare_source(connection: &Connection, names: &Names, source: &Source) -> PortResult<()> {
    let arguments = match source {
        Source::Work { .. } => work_arguments(names)?,
        Source::Dead => dead_arguments(),
        Source::FrontDoor | Source::Responses | Source::Errors => seed_arguments(),
    };
    declare(connection, names, names.queue(source)?, arguments).await
}

/// On a channel of its own, since a refusal closes it.
async fn declare(
    connection: &Connection,
    names: &Names,
    queue: ShortString,
    arguments: FieldTable,
) -> PortResult<()> {
    let channel = connection.create_channel().await.map_err(port_error)?;
    let declared = declare_on(&channel, names, queue, arguments).await;
    if declared.is_ok() {
        let _ = channel.close(200, "done".into()).await;
    }
    declared.map_err(port_error)
}

async fn declare_on(
    channel: &Channel,
    names: &Names,
    queue: ShortString,
    arguments: FieldTable,
) -> lapin::Result<()> {
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare(names.exchange(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
    channel.queue_declare(queue.clone(), QueueDeclareOptions::durable(), arguments).await?;
    channel
        .queue_bind(
            queue.clone(),
            names.exchange(),
            queue,
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await
}

/// Opens a channel to consume from, with its prefetch: per consumer, since quorum queues refuse one per channel.
pub async fn consuming_channel(connection: &Connection, prefetch: u16) -> lapin::Result<Channel> {
    let channel = connection.create_channel().await?;
    channel.basic_qos(prefetch, BasicQosOptions { global: false }).await?;
    Ok(channel)
}

fn seed_arguments() -> FieldTable {
    table([("x-message-ttl", MESSAGE_TTL.into()), ("x-max-length", MAX_LENGTH.into())])
}

fn dead_arguments() -> FieldTable {
    table([("x-queue-type", text("quorum"))])
}

fn work_arguments(names: &Names) -> PortResult<FieldTable> {
    Ok(table([
        ("x-queue-type", text("quorum")),
        ("x-overflow", text("reject-publish")),
        ("x-delivery-limit", DELIVERY_LIMIT.into()),
        ("x-dead-letter-exchange", text(names.exchange().as_str())),
        ("x-dead-letter-routing-key", text(names.fixed(DEAD)?.as_str())),
        ("x-dead-letter-strategy", text("at-least-once")),
    ]))
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert(name.into(), value);
    }
    table
}
