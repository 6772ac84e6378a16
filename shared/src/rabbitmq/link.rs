//! A connection that is kept open: host after host is tried, for ever, and whoever needs the connection asks for the
//! one that lives now.
//!
//! lapin's own recovery is left off. It would hide from a consumer which deliveries died with the old connection, and
//! from a publisher which confirms will never come.

use std::net::Shutdown;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{StreamExt, pin_mut};
use lapin::tcp::{AsyncTcpStream, OwnedTLSConfig};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{refused, unavailable};
use crate::backoff::Backoff;
use crate::ports::{PortError, PortResult};

/// A peer that is silent for twice as long is dead, seconds.
const HEARTBEAT: u16 = 5;

/// How long opening a connection may take before the next host is tried.
const OPEN_LIMIT: Duration = Duration::from_secs(5);

/// Pauses between attempts to connect or to subscribe. A broker is slow to come back when all of a fleet's connections
/// arrive at once, so chance spreads them widely.
pub const BACKOFF: Backoff =
    Backoff::new().first(Duration::from_millis(100)).longest(Duration::from_secs(5)).jitter(0.8);

/// Reads the configured URLs, separated by commas.
///
/// # Errors
/// One of them is not an AMQP URL.
pub fn parse(urls: &str) -> PortResult<Vec<AMQPUri>> {
    urls.split(',')
        .map(|url| {
            // The URL itself may hold a password.
            let mut uri: AMQPUri =
                url.trim().parse().map_err(|error| refused(format!("the AMQP URL is wrong: {error}")))?;
            uri.query.heartbeat.get_or_insert(HEARTBEAT);
            if uri.vhost.is_empty() {
                uri.vhost = "/".into();
            }
            Ok(uri)
        })
        .collect()
}

/// How a connection presents itself to the broker.
pub fn properties(purpose: &str) -> ConnectionProperties {
    ConnectionProperties::default()
        .with_client_property("product".into(), "Stoker".into())
        .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into())
        .with_connection_name(format!("stoker {purpose} {}", std::process::id()).into())
}

/// A connection that lives, with what was opened on it.
pub struct Live<T> {
    /// Counts the connections of this link, from 1.
    pub number: u64,
    /// Which of the configured hosts it leads to.
    pub host: usize,
    /// The connection.
    pub connection: Arc<Connection>,
    /// What was opened on it.
    pub extra: T,
}

enum State<T> {
    Down(String),
    Up(Arc<Live<T>>),
}

/// Keeps one connection open until it is dropped.
pub struct Link<T> {
    state: watch::Receiver<State<T>>,
    _stop: DropGuard,
}

impl<T: Send + Sync + 'static> Link<T> {
    /// Begins to connect. `on_open` prepares each new connection; if it fails, the connection counts as not opened.
    pub fn keep(
        purpose: &'static str,
        hosts: Vec<AMQPUri>,
        on_open: impl Fn(Arc<Connection>) -> BoxFuture<'static, PortResult<T>> + Send + Sync + 'static,
    ) -> Self {
        let (sender, state) = watch::channel(State::Down("not connected yet".into()));
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = run(purpose, hosts, on_open, sender) => {}
            }
        });
        Self { state, _stop: stop.drop_guard() }
    }

    /// The connection that lives now.
    pub fn live_now(&self) -> PortResult<Arc<Live<T>>> {
        match &*self.state.borrow() {
            State::Up(live) if live.connection.status().connected() => Ok(live.clone()),
            State::Up(_) => Err(unavailable("the connection broke a moment ago")),
            State::Down(reason) => Err(unavailable(reason)),
        }
    }

    /// The connection that lives, or comes to life within the limit.
    pub async fn live(&self, limit: Duration) -> PortResult<Arc<Live<T>>> {
        if let Ok(live) = self.live_now() {
            return Ok(live);
        }
        let mut state = self.state.clone();
        let up = state.wait_for(|s| matches!(s, State::Up(live) if live.connection.status().connected()));
        let _ = tokio::time::timeout(limit, up).await;
        self.live_now()
    }
}

async fn run<T>(
    purpose: &'static str,
    hosts: Vec<AMQPUri>,
    on_open: impl Fn(Arc<Connection>) -> BoxFuture<'static, PortResult<T>>,
    state: watch::Sender<State<T>>,
) {
    let mut backoff = BACKOFF;
    let mut last_reason = String::new();
    let mut number = 0;
    for host in (0..hosts.len()).cycle() {
        match open(&hosts[host], purpose, &on_open).await {
            Ok((connection, extra)) => {
                number += 1;
                backoff.reset();
                last_reason.clear();
                tracing::info!(purpose, host = %hosts[host].authority.host, "connected to RabbitMQ");
                let live = Live { number, host, connection: connection.clone(), extra };
                state.send_replace(State::Up(Arc::new(live)));
                let reason = broken(&connection).await;
                tracing::warn!(purpose, reason, "the connection to RabbitMQ broke");
                state.send_replace(State::Down(reason));
            }
            Err(error) => {
                let reason = match error {
                    PortError::Unavailable { message, .. } => message,
                    other => other.to_string(),
                };
                if reason != last_reason {
                    tracing::warn!(purpose, host = %hosts[host].authority.host, reason, "no connection to RabbitMQ");
                    last_reason.clone_from(&reason);
                }
                state.send_replace(State::Down(reason));
            }
        }
        // All hosts are tried before there is a pause, unless there is only one.
        if host + 1 == hosts.len() {
            backoff.pause().await;
        }
    }
}

async fn open<T>(
    host: &AMQPUri,
    purpose: &str,
    on_open: &impl Fn(Arc<Connection>) -> BoxFuture<'static, PortResult<T>>,
) -> PortResult<(Arc<Connection>, T)> {
    let socket = Arc::new(Mutex::new(None));
    let opening = async {
        let connection = Arc::new(connect(host.clone(), purpose, socket.clone()).await.map_err(unavailable)?);
        let extra = on_open(connection.clone()).await?;
        Ok((connection, extra))
    };
    let opened = tokio::time::timeout(OPEN_LIMIT, opening).await;
    // lapin has a thread for the connection, which waits as long as the socket is open.
    let socket: Option<std::net::TcpStream> = socket.lock().unwrap_or_else(PoisonError::into_inner).take();
    opened.unwrap_or_else(|_| {
        if let Some(socket) = socket {
            let _ = socket.shutdown(Shutdown::Both);
        }
        Err(unavailable(format!("no answer within {OPEN_LIMIT:?}")))
    })
}

/// Connects, and leaves a handle of the socket that it can be shut down by.
async fn connect(
    host: AMQPUri,
    purpose: &str,
    socket: Arc<Mutex<Option<std::net::TcpStream>>>,
) -> lapin::Result<Connection> {
    let runtime = lapin::runtime::default_runtime()?;
    let properties = properties(purpose);
    // A closure at its place of use, where the compiler knows the type of the stream.
    Connection::connector(
        host,
        runtime,
        async move |uri, runtime| {
            let authority = &uri.authority;
            let stream = tokio::time::timeout(OPEN_LIMIT, async {
                let addresses = tokio::net::lookup_host((authority.host.as_str(), authority.port)).await?;
                AsyncTcpStream::connect(&runtime, addresses.collect::<Vec<_>>()).await
            });
            let stream = stream.await.map_err(std::io::Error::from)??;
            #[cfg(unix)]
            if let AsyncTcpStream::Plain(plain) = &stream {
                let handle = std::os::fd::AsFd::as_fd(plain.get_ref()).try_clone_to_owned()?;
                *socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle.into());
            }
            match uri.scheme {
                AMQPScheme::AMQP => Ok(stream),
                AMQPScheme::AMQPS => {
                    Ok(stream.into_tls(&authority.host, OwnedTLSConfig::default().as_ref()).await?)
                }
            }
        },
        properties,
    )
    .await
}

/// Waits until a connection is of no more use, and says why.
async fn broken(connection: &Connection) -> String {
    let events = connection.events_listener();
    pin_mut!(events);
    let mut reason = "it was closed".to_owned();
    while connection.status().connected() {
        // The clock is for an end that nothing is said about.
        match tokio::time::timeout(Duration::from_millis(250), events.next()).await {
            Ok(Some(lapin::Event::Error(error))) => reason = error.to_string(),
            Ok(Some(lapin::Event::ConnectionBlocked(why))) => {
                tracing::warn!(why, "RabbitMQ blocks publishers");
            }
            Ok(Some(lapin::Event::ConnectionUnblocked)) => tracing::info!("RabbitMQ unblocked publishers"),
            Ok(Some(_)) | Err(_) => {}
            Ok(None) => break,
        }
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_hosts_are_read_and_get_a_heartbeat() {
        let hosts = parse("amqp://a:5672/%2f, amqp://b:5673/x?heartbeat=7,amqp://c/").unwrap();
        let read: Vec<_> = hosts
            .iter()
            .map(|uri| {
                (uri.authority.host.as_str(), uri.authority.port, uri.vhost.as_str(), uri.query.heartbeat)
            })
            .collect();
        assert_eq!(read[0], ("a", 5672, "/", Some(HEARTBEAT)));
        assert_eq!(read[1], ("b", 5673, "x", Some(7)));
        assert_eq!(read[2], ("c", 5672, "/", Some(HEARTBEAT)));
        assert!(matches!(parse("http://a"), Err(PortError::Refused { .. })));
        assert!(matches!(parse(""), Err(PortError::Refused { .. })));
    }
}
