//! The three ports inside one process: tokio channels, and one SQLite file for what must survive a restart.

mod bus;
mod ledger;
mod queue;

pub use bus::EmbeddedBus;
pub use queue::EmbeddedQueue;
