//! What Redis's errors mean to a caller of the port.

use redis::{ErrorKind, RedisError, ServerErrorKind};

use crate::ports::PortError;

const SERVICE: &str = "Redis";

/// Codes of answers that pass: out of memory, busy with a script, can't write to disk, lacks replicas.
const PASSING: [&str; 4] = ["OOM", "BUSY", "MISCONF", "NOREPLICAS"];

/// The port's error for one of the client library's.
pub(super) fn port(error: RedisError) -> PortError {
    let message = error.to_string();
    if is_passing(&error) {
        PortError::Unavailable { service: SERVICE, message }
    } else {
        PortError::Refused { service: SERVICE, message }
    }
}

/// It can't be reached now.
pub(super) fn unavailable(message: impl ToString) -> PortError {
    PortError::Unavailable { service: SERVICE, message: message.to_string() }
}

/// Whether a new connection is needed: this one is lost or hangs, or leads to a server that was demoted.
pub(super) fn means_reconnect(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_unrecoverable_error()
        || error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly)
}

fn is_passing(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, ClusterDown, MasterDown, TryAgain};
    means_reconnect(error)
        || matches!(error.kind(), ErrorKind::Server(BusyLoading | ClusterDown | MasterDown | TryAgain))
        || error.code().is_some_and(|code| PASSING.contains(&code))
}
