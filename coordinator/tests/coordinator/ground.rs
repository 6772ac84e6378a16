//! Ports in memory, which go away by themselves.

use stoker_shared::embedded;
use stoker_shared::ports::Ports;

/// What one test has to itself.
pub struct Ground;

impl Ground {
    /// A queue, a bus and a ledger in memory.
    pub async fn open() -> (Self, Ports) {
        (Self, embedded::ports(None).unwrap())
    }
}
