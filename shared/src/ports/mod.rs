//! The three ports: [`Queue`] delivers jobs (at least once), [`Bus`] carries tokens and remembers the running half,
//! [`Ledger`] says what is final. None of the three is trusted with another's part.
//!
//! Each has two adapters that pass one test suite: the real service, and an embedded one in this process.

mod bus;
mod ledger;
mod queue;

pub use bus::*;
pub use ledger::*;
pub use queue::*;

use std::sync::Arc;

/// The three ports, as a process holds them.
#[derive(Clone)]
pub struct Ports {
    /// Delivers jobs.
    pub queue: Arc<dyn Queue>,
    /// Carries tokens.
    pub bus: Arc<dyn Bus>,
    /// Says what is final.
    pub ledger: Arc<dyn Ledger>,
}

/// Why a port could not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PortError {
    /// The service can't be reached now; the adapter goes on reconnecting, so trying again later can succeed.
    #[error("{service} is unavailable: {message}")]
    Unavailable {
        /// `RabbitMQ`, `Redis`, `Postgres` or `SQLite`.
        service: &'static str,
        /// What the client library said.
        message: String,
    },
    /// The connection that the delivery came on is gone; the job will be delivered again.
    #[error("the delivery's connection is gone; it will be delivered again")]
    Stale,
    /// The service refuses it, and will refuse it again.
    #[error("{service} refuses it: {message}")]
    Refused {
        /// `RabbitMQ`, `Redis`, `Postgres` or `SQLite`.
        service: &'static str,
        /// What it said.
        message: String,
    },
}

impl PortError {
    /// Whether trying again later can help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

/// What ports answer.
pub type PortResult<T> = Result<T, PortError>;
