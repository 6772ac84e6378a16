//! The queue port on RabbitMQ.
//!
//! Two connections are kept open for ever ([`link`]): one publishes, one consumes, because a broker that is short of
//! memory or disk stops reading from connections that publish. Declaring and inspecting goes through a small pool of
//! its own ([`control`]), because a refused declaration closes the channel that it was made on.

mod consumer;
mod control;
mod link;
mod message;
mod publisher;
mod topology;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use tokio::time::Instant;

use self::consumer::Subscription;
use self::control::Control;
use self::link::Link;
use self::publisher::Publisher;
use self::topology::{Address, Names};
use crate::config::Services;
use crate::job::Lane;
use crate::ports::{Consumer, Destination, Message, PortError, PortResult, PublishError, Queue, Source};

/// What errors call the service.
const SERVICE: &str = "RabbitMQ";

/// How long a call may take, unless set otherwise.
const DEFAULT_LIMIT: Duration = Duration::from_secs(5);

/// The [`Queue`] port on RabbitMQ.
pub struct RabbitQueue {
    names: Arc<Names>,
    publishing: Link<Publisher>,
    consuming: Arc<Link<()>>,
    control: Arc<Control>,
    /// Models whose work queues were declared while the publishing connection with this number lived.
    declared: Mutex<(u64, HashSet<String>)>,
    limit: Duration,
}

impl RabbitQueue {
    /// Checks the URLs and begins to connect; a broker that is down now is connected to when it is up.
    ///
    /// # Errors
    /// A URL or the prefix is wrong.
    pub async fn connect(services: &Services) -> PortResult<Self> {
        Self::connect_with_limit(services, DEFAULT_LIMIT).await
    }

    /// The same, with another limit to how long a publish may wait for the connection and its confirm, and how long
    /// other calls may take; 5 s otherwise.
    pub async fn connect_with_limit(services: &Services, limit: Duration) -> PortResult<Self> {
        let names = Arc::new(Names::new(&services.prefix)?);
        let hosts = link::parse(&services.amqp_url)?;
        let on_open = {
            let names = names.clone();
            move |connection| Publisher::open(connection, names.clone()).boxed()
        };
        Ok(Self {
            control: Arc::new(Control::new(&hosts, limit)?),
            publishing: Link::keep("publish", hosts.clone(), on_open),
            consuming: Arc::new(Link::keep("consume", hosts, |_| async { Ok(()) }.boxed())),
            names,
            declared: Mutex::default(),
            limit,
        })
    }

    async fn publish_once(&self, address: &Address, message: &Message) -> Result<(), PublishError> {
        // What nobody hears of is not worth waiting for either.
        let limit = if address.confirmed { self.limit } else { Duration::ZERO };
        let deadline = Instant::now() + limit;
        let live = self.publishing.live(limit).await?;
        live.extra.publish(address, message, deadline).await
    }

    /// What was declared on a connection; nothing, if it is a new one.
    fn declared_on(&self, connection: u64) -> MutexGuard<'_, (u64, HashSet<String>)> {
        let mut declared = self.declared.lock().unwrap_or_else(PoisonError::into_inner);
        if declared.0 != connection {
            *declared = (connection, HashSet::new());
        }
        declared
    }
}

#[async_trait]
impl Queue for RabbitQueue {
    async fn declare_work(&self, model: &str) -> PortResult<()> {
        let live = self.publishing.live(self.limit).await?;
        if self.declared_on(live.number).1.contains(model) {
            return Ok(());
        }
        for lane in Lane::ALL {
            let source = Source::Work { model: model.to_owned(), lane };
            self.control.declare(live.host, &self.names, &source).await?;
        }
        self.declared_on(live.number).1.insert(model.to_owned());
        Ok(())
    }

    async fn publish(&self, to: &Destination, message: Message) -> Result<(), PublishError> {
        let address = self.names.address(to)?;
        let outcome = self.publish_once(&address, &message).await;
        match (&outcome, to) {
            (Err(PublishError::Unroutable), Destination::Work { model, .. }) => {
                self.declared.lock().unwrap_or_else(PoisonError::into_inner).1.remove(model);
                outcome
            }
            // The fleet's own queues are always meant to be there: somebody deleted one.
            (Err(PublishError::Unroutable), _) => {
                let live = self.publishing.live(self.limit).await?;
                tracing::warn!(
                    queue = address.key.as_str(),
                    "a queue of the fleet is gone; declaring it again"
                );
                live.extra.set_refusal(self.control.declare_fixed(live.host, &self.names).await?);
                self.publish_once(&address, &message).await
            }
            _ => outcome,
        }
    }

    async fn consume(&self, from: &Source, prefetch: u16) -> PortResult<Consumer> {
        Subscription::start(
            self.consuming.clone(),
            self.control.clone(),
            self.names.clone(),
            from.clone(),
            prefetch.max(1),
            self.limit,
        )
        .await
    }

    async fn depth(&self, of: &Source) -> PortResult<Option<u64>> {
        let live = self.consuming.live(self.limit).await?;
        self.control.depth(live.host, &self.names.queue(of)?).await
    }

    async fn ready(&self) -> PortResult<()> {
        let publishing = self.publishing.live_now()?;
        let consuming = self.consuming.live_now()?;
        if publishing.connection.status().blocked() {
            return Err(unavailable("it blocks publishers: a memory or disk alarm"));
        }
        if publishing.extra.refusal().is_some() {
            // Somebody may have put it right.
            let refusal = self.control.declare_fixed(publishing.host, &self.names).await?;
            publishing.extra.set_refusal(refusal.clone());
            refusal.map_or(Ok(()), Err)?;
        }
        self.control.ping(consuming.host, &self.names).await
    }
}

fn unavailable(message: impl ToString) -> PortError {
    PortError::Unavailable { service: SERVICE, message: message.to_string() }
}

fn refused(message: impl ToString) -> PortError {
    PortError::Refused { service: SERVICE, message: message.to_string() }
}

/// What a failure means to the caller: what the broker said no to it will say no to again, everything else passes.
fn port_error(error: lapin::Error) -> PortError {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(amqp) if error.is_amqp_soft_error() => refused(amqp),
        _ => unavailable(error),
    }
}

/// Runs something against the clock.
async fn within<T>(limit: Duration, what: impl Future<Output = PortResult<T>>) -> PortResult<T> {
    match tokio::time::timeout(limit, what).await {
        Ok(outcome) => outcome,
        Err(_) => Err(unavailable(format!("no answer within {limit:?}"))),
    }
}
