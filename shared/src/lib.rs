//! What coordinators and workers say to each other: the contract's types, the three ports, and their adapters.
//!
//! [`ports`] are the only way to a broker, a bus or a database; [`rabbitmq`], [`redis`] and [`postgres`] are the ports
//! on real services, [`embedded`] the same ports inside one process.

pub mod backoff;
pub mod config;
pub mod embedded;
pub mod envelope;
pub mod frame;
pub mod job;
mod mailbox;
pub mod outcome;
pub mod ports;
pub mod postgres;
pub mod rabbitmq;
pub mod redis;
pub mod response_format;
pub mod telemetry;

use std::sync::Arc;

use config::Services;
use ports::{PortResult, Ports};

/// The three ports on the real services. Returns at once even when a service is down: the ports go on connecting, and
/// `ready` of each tells how it stands.
///
/// # Errors
/// If a URL is not understood.
pub async fn connect(services: &Services) -> PortResult<Ports> {
    Ok(Ports {
        queue: Arc::new(rabbitmq::RabbitQueue::connect(services).await?),
        bus: Arc::new(self::redis::RedisBus::connect(services).await?),
        ledger: Arc::new(postgres::PostgresLedger::connect(services).await?),
    })
}
