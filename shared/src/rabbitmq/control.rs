//! Declaring and inspecting: short calls that the broker may refuse, kept away from the connections that carry jobs.

use std::time::Duration;

use deadpool_lapin::{Config, Connection, Pool, PoolConfig, Runtime};
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::uri::AMQPUri;
use lapin::{ErrorKind, ExchangeKind};

use super::topology::{self, Names};
use super::{link, port_error, refused, unavailable, within};
use crate::ports::{PortError, PortResult, Source};

/// Connections that the pool may hold to one host.
const MAX_CONNECTIONS: usize = 2;

/// The broker's answer to asking for a queue that is not there.
const NOT_FOUND: u16 = 404;

/// Pooled connections to each host. Callers name the host that their link is connected to, so that nothing is tried
/// on a host that does not answer.
pub struct Control {
    pools: Vec<Pool>,
    limit: Duration,
}

impl Control {
    /// Opens nothing yet.
    pub fn new(hosts: &[AMQPUri], limit: Duration) -> PortResult<Self> {
        let pool = |host: &AMQPUri| {
            let mut size = PoolConfig::new(MAX_CONNECTIONS);
            size.timeouts.wait = Some(limit);
            size.timeouts.create = Some(limit);
            let config = Config { url: Some(host.to_string()), pool: Some(size) };
            config.create_pool(|| link::properties("control"), Runtime::Tokio1).map_err(refused)
        };
        Ok(Self { pools: hosts.iter().map(pool).collect::<PortResult<_>>()?, limit })
    }

    async fn connection(&self, host: usize) -> PortResult<Connection> {
        let pool = self.pools.get(host).ok_or_else(|| unavailable("no such host"))?;
        pool.get().await.map_err(unavailable)
    }

    /// Declares the queue behind a source, as the contract wants it.
    pub async fn declare(&self, host: usize, names: &Names, source: &Source) -> PortResult<()> {
        within(self.limit, async {
            topology::declare_source(&*self.connection(host).await?, names, source).await
        })
        .await
    }

    /// Declares the exchange and the queues that are always there; what the broker refused.
    pub async fn declare_fixed(&self, host: usize, names: &Names) -> PortResult<Option<PortError>> {
        within(self.limit, async { topology::declare_fixed(&*self.connection(host).await?, names).await })
            .await
    }

    /// Ready messages in a queue; `None` if it is not there.
    pub async fn depth(&self, host: usize, queue: &ShortString) -> PortResult<Option<u64>> {
        within(self.limit, async {
            let connection = self.connection(host).await?;
            let channel = connection.create_channel().await.map_err(port_error)?;
            let passive = QueueDeclareOptions { passive: true, ..Default::default() };
            match channel.queue_declare(queue.clone(), passive, FieldTable::default()).await {
                Ok(queue) => {
                    let _ = channel.close(200, "done".into()).await;
                    Ok(Some(u64::from(queue.message_count())))
                }
                Err(error) => match error.kind() {
                    ErrorKind::ProtocolError(amqp) if amqp.get_id() == NOT_FOUND => Ok(None),
                    _ => Err(port_error(error)),
                },
            }
        })
        .await
    }

    /// One round trip to the broker that also proves that the exchange is there.
    pub async fn ping(&self, host: usize, names: &Names) -> PortResult<()> {
        within(self.limit, async {
            let connection = self.connection(host).await?;
            let channel = connection.create_channel().await.map_err(port_error)?;
            let passive = ExchangeDeclareOptions { passive: true, ..Default::default() };
            channel
                .exchange_declare(names.exchange(), ExchangeKind::Topic, passive, FieldTable::default())
                .await
                .map_err(port_error)?;
            let _ = channel.close(200, "done".into()).await;
            Ok(())
        })
        .await
    }
}
