//! Connections to Redis: how they are made, and the one that commands share.
//!
//! [`Link`] is one multiplexed connection that a task of its own keeps up: it connects in the background, again and
//! again with backoff, so that nobody has to care whether Redis was there when the process started. Every command is
//! bounded in time. A connection on which a command ran out of time is given up: a server that froze, or a network
//! that swallows packets, would otherwise hold it for as long as TCP retransmits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use redis::aio::{MultiplexedConnection, SendError};
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, FromRedisValue, IntoConnectionInfo, ProtocolVersion,
    PushInfo, PushKind, RedisError, RedisResult,
};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};
use tracing::{debug, info, warn};

use super::error;
use super::script::Call;
use crate::backoff::Backoff;
use crate::ports::PortResult;

/// How long connecting, or a command, may take.
pub(super) const TIMEOUT: Duration = Duration::from_secs(2);

/// Commands wait so long after a connection was lost for it to come back; later they fail at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// Pauses between attempts to connect: an outage that is over is noticed within a second.
const BACKOFF: Backoff = Backoff::new().longest(Duration::from_secs(1));

/// Makes connections.
#[derive(Clone)]
pub(super) struct Connector {
    client: Client,
}

impl Connector {
    /// Only the URL is looked at; nothing is connected.
    pub fn new(url: &str) -> PortResult<Self> {
        let info = connection_info(url).map_err(error::port)?;
        Ok(Self { client: Client::open(info).map_err(error::port)? })
    }

    /// What a pool needs to make more.
    pub fn info(&self) -> ConnectionInfo {
        self.client.get_connection_info().clone()
    }

    /// Connects, however long it takes, until it succeeds. `pushed` is called by the connection's own task with all
    /// that Redis sends unasked, and with the word that the connection is lost; it must not block.
    pub async fn connect<F>(
        &self,
        what: &str,
        pushed: F,
        failed: impl Fn(&RedisError),
    ) -> MultiplexedConnection
    where
        F: Fn(PushInfo) + Send + Sync + 'static,
    {
        let config = settings().set_push_sender(move |info: PushInfo| {
            pushed(info);
            Ok::<(), SendError>(())
        });
        let mut backoff = BACKOFF;
        let mut warned = false;
        loop {
            match self.client.get_multiplexed_async_connection_with_config(&config).await {
                Ok(connection) => {
                    info!(what, "connected to Redis");
                    return connection;
                }
                Err(error) => {
                    failed(&error);
                    match warned {
                        false => warn!(what, %error, "Redis can't be reached; trying on"),
                        true => debug!(what, %error, "Redis can't be reached"),
                    }
                    warned = true;
                }
            }
            backoff.pause().await;
        }
    }
}

fn connection_info(url: &str) -> RedisResult<ConnectionInfo> {
    let info = url.into_connection_info()?;
    // RESP3: replies and messages may share a connection, and its loss is told.
    let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    Ok(info.set_redis_settings(redis).set_tcp_settings(TcpSettings::default().set_nodelay(true)))
}

/// Settings of all connections.
pub(super) fn settings() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new()
        .set_connection_timeout(Some(TIMEOUT))
        .set_response_timeout(Some(TIMEOUT))
        .set_pipeline_buffer_size(1024)
        .set_write_backpressure_boundary(64 * 1024)
}

/// The connection that commands share.
pub(super) struct Link {
    state: watch::Receiver<State>,
    /// Over which connection the last step went; 0: there was none.
    last_step: AtomicU64,
}

#[derive(Clone)]
struct State {
    connection: Option<Connection>,
    /// How often it was connected.
    connects: u64,
    /// Since when it has been so.
    since: Instant,
    /// Why it can't be connected.
    error: String,
}

#[derive(Clone)]
struct Connection {
    inner: MultiplexedConnection,
    /// How many there were up to this one.
    number: u64,
    /// Told when the connection is of no more use.
    lost: Arc<Notify>,
}

impl Link {
    /// A link, and the task that keeps it up.
    pub fn new(connector: Connector) -> (Self, impl Future<Output = ()> + Send) {
        let state =
            State { connection: None, connects: 0, since: Instant::now(), error: "not connected yet".into() };
        let (sender, receiver) = watch::channel(state);
        (Self { state: receiver, last_step: AtomicU64::new(0) }, keep_up(connector, sender))
    }

    /// Runs a command.
    pub async fn query<T: FromRedisValue>(&self, command: &Cmd) -> PortResult<T> {
        let mut connection = self.connection().await?;
        let result = query(&mut connection.inner, command).await;
        connection.settle(result)
    }

    /// Runs a script.
    pub async fn call<T: FromRedisValue>(&self, call: &Call<'_>) -> PortResult<T> {
        let mut connection = self.connection().await?;
        let result = call.run(&mut connection.inner).await;
        connection.settle(result)
    }

    /// Runs a script that goes on with what the last one wrote. The first on each further connection fails instead: the
    /// server at its end may have lost the newest of what was written, and the hole would go unnoticed.
    pub async fn step<T: FromRedisValue>(&self, call: &Call<'_>) -> PortResult<T> {
        let mut connection = self.connection().await?;
        let last = self.last_step.swap(connection.number, Ordering::Relaxed);
        if last != 0 && last != connection.number {
            return Err(error::unavailable("the connection was lost, and maybe what was written last"));
        }
        let result = call.run(&mut connection.inner).await;
        connection.settle(result)
    }

    /// Runs commands in one round trip, of whose answers only errors matter.
    pub async fn pipeline(&self, pipeline: &redis::Pipeline) -> PortResult<()> {
        let mut connection = self.connection().await?;
        let result = pipeline.exec_async(&mut connection.inner).await;
        connection.settle(result)
    }

    /// Whether the connection has stood for `period`, or since this process first connected. If not, Redis may have
    /// been restarted or replaced, and other processes may still be on their way back to it.
    pub fn has_stood_for(&self, period: Duration) -> bool {
        let state = self.state.borrow();
        state.connection.is_some() && (state.connects == 1 || state.since.elapsed() >= period)
    }

    async fn connection(&self) -> PortResult<Connection> {
        let deadline = {
            let state = self.state.borrow();
            if let Some(connection) = &state.connection {
                return Ok(connection.clone());
            }
            state.since + PATIENCE
        };
        let mut state = self.state.clone();
        let connected = async { state.wait_for(|s| s.connection.is_some()).await.ok()?.connection.clone() };
        match timeout_at(deadline, connected).await {
            Ok(Some(connection)) => Ok(connection),
            _ => Err(error::unavailable(&self.state.borrow().error)),
        }
    }
}

impl Connection {
    /// Gives the connection up if that is what the error means.
    fn settle<T>(&self, result: RedisResult<T>) -> PortResult<T> {
        result.map_err(|e| {
            if error::means_reconnect(&e) {
                self.lost.notify_one();
            }
            error::port(e)
        })
    }
}

/// Runs one command on a connection.
pub(super) async fn query<T: FromRedisValue>(
    connection: &mut MultiplexedConnection,
    command: &Cmd,
) -> RedisResult<T> {
    let value = connection.send_packed_command(command).await?.extract_error()?;
    Ok(redis::from_redis_value(value)?)
}

async fn keep_up(connector: Connector, state: watch::Sender<State>) {
    loop {
        let lost = Arc::new(Notify::new());
        let notify = lost.clone();
        let pushed = move |info: PushInfo| {
            if info.kind == PushKind::Disconnection {
                notify.notify_one();
            }
        };
        let failed = |error: &RedisError| state.send_modify(|s| s.error = error.to_string());
        let inner = connector.connect("commands", pushed, failed).await;
        state.send_modify(|s| {
            s.connects += 1;
            s.connection = Some(Connection { inner, number: s.connects, lost: lost.clone() });
            s.since = Instant::now();
        });
        lost.notified().await;
        warn!("the connection to Redis for commands is lost");
        state.send_modify(|s| {
            s.connection = None;
            s.since = Instant::now();
            s.error = "the connection is lost".into();
        });
    }
}
