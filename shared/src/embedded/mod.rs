//! The three ports inside one process: tokio channels, and one SQLite file for what must survive a restart.

mod bus;
mod ledger;
mod queue;

use std::path::Path;
use std::sync::Arc;

pub use bus::EmbeddedBus;
pub use ledger::SqliteLedger;
pub use queue::EmbeddedQueue;

use crate::ports::{PortResult, Ports};

/// The three ports of a fleet in one process. The ledger is kept in `file`, or in memory.
///
/// # Errors
/// If the file can't be opened or belongs to another process.
pub fn ports(file: Option<&Path>) -> PortResult<Ports> {
    Ok(Ports {
        queue: Arc::new(EmbeddedQueue::new()),
        bus: Arc::new(EmbeddedBus::new()),
        ledger: Arc::new(SqliteLedger::open(file)?),
    })
}
