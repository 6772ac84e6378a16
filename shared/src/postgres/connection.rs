//! Connections to Postgres: a pool, a limit on every wait, and what each kind of error means for the caller.

use std::error::Error as StdError;
use std::time::Duration;

use deadpool_postgres::{
    Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime, Timeouts,
};
use tokio_postgres::config::{SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Config, NoTls, Row};

use crate::ports::{PortError, PortResult};

/// Most connections of a process. A commit holds one for a few milliseconds, everything else for less.
const CONNECTIONS: usize = 8;
/// Longest wait for a connection: to be made, or for another caller to give one back.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for a single statement's answer.
pub const STATEMENT_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for a batch. The server itself gives up a little earlier (see [`SETTINGS`]), and frees its locks.
pub const BATCH_LIMIT: Duration = Duration::from_secs(20);
/// What a new connection is told. Not as start-up options, which connection poolers refuse.
const SETTINGS: &str = "SET statement_timeout = '18s'; SET idle_in_transaction_session_timeout = '30s'";

/// The error of a service that can't be reached or can't do it now.
pub fn unavailable(message: impl ToString) -> PortError {
    PortError::Unavailable { service: "Postgres", message: message.to_string() }
}

/// The error of a service that will refuse it again.
pub fn refused(message: impl ToString) -> PortError {
    PortError::Refused { service: "Postgres", message: message.to_string() }
}

/// What went wrong, and what can be done about it.
#[derive(Debug)]
pub struct Failure {
    /// For the caller.
    pub error: PortError,
    /// The connection can't be used any more.
    pub broken: bool,
    /// Doing the same again at once, on another connection, is likely to succeed.
    pub again: bool,
}

impl Failure {
    fn late(limit: Duration) -> Self {
        let error = unavailable(format!("no answer within {} s", limit.as_secs()));
        Self { error, broken: true, again: false }
    }
}

impl From<PoolError> for Failure {
    fn from(e: PoolError) -> Self {
        let message = match &e {
            PoolError::Backend(e) => explain(e),
            e => e.to_string(),
        };
        Self { error: unavailable(message), broken: false, again: false }
    }
}

impl From<tokio_postgres::Error> for Failure {
    fn from(e: tokio_postgres::Error) -> Self {
        let message = explain(&e);
        let Some(state) = e.code() else {
            // Without a word from the server: the connection broke, or the client library can't encode a value.
            let broke =
                e.is_closed() || e.source().is_some_and(|s| s.downcast_ref::<std::io::Error>().is_some());
            let error = if broke { unavailable(message) } else { refused(message) };
            return Self { error, broken: true, again: broke };
        };
        let class = &state.code()[..2];
        // Data that doesn't fit; constraints; a program that is not understood; limits of the program.
        let about_us = matches!(class, "0A" | "21" | "22" | "23" | "2F" | "42" | "44" | "54" | "P0");
        // A migration has changed a table under a prepared statement, or a pooler has changed the session under it.
        let stale = (*state == SqlState::FEATURE_NOT_SUPPORTED && message.contains("cached plan"))
            || *state == SqlState::INVALID_SQL_STATEMENT_NAME;
        let ended = matches!(class, "08" | "57") && *state != SqlState::QUERY_CANCELED;
        // Its server was demoted, or lets nobody write for a while: the session stays so even when that is over.
        let read_only = *state == SqlState::READ_ONLY_SQL_TRANSACTION;
        let collided =
            *state == SqlState::T_R_SERIALIZATION_FAILURE || *state == SqlState::T_R_DEADLOCK_DETECTED;
        let error = if about_us && !stale { refused(message) } else { unavailable(message) };
        let broken = stale || ended || read_only;
        Self { error, broken, again: broken || collided }
    }
}

/// The whole of an error: the client library's own text leaves out what the server said.
pub(super) fn explain(e: &tokio_postgres::Error) -> String {
    match (e.as_db_error(), e.source()) {
        (Some(db), _) => format!("{} (SQLSTATE {})", db.message(), db.code().code()),
        (None, Some(source)) => format!("{e}: {source}"),
        (None, None) => e.to_string(),
    }
}

/// Finds the database's error in whatever a library has wrapped around it.
pub fn find_cause<'a>(e: &'a (dyn StdError + 'static)) -> Option<&'a tokio_postgres::Error> {
    let mut next = Some(e);
    while let Some(e) = next {
        if let Some(cause) = e.downcast_ref() {
            return Some(cause);
        }
        next = e.source();
    }
    None
}

/// Reads a URL. TLS is not built in: a URL that insists on it is refused instead of being served without.
pub fn configuration(url: &str) -> PortResult<Config> {
    let mut config: Config = url
        .parse()
        .map_err(|e: tokio_postgres::Error| refused(format!("the URL is not understood: {}", explain(&e))))?;
    if config.get_ssl_mode() == SslMode::Require {
        return Err(refused(
            "sslmode=require is not supported; use a private network or a TLS proxy beside Stoker",
        ));
    }
    if config.get_application_name().is_none() {
        config.application_name("stoker");
    }
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_LIMIT);
    }
    // Of several hosts the one that takes writes is meant, and a session that can't write is of no use to a ledger.
    if config.get_target_session_attrs() == TargetSessionAttrs::Any {
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    }
    config.keepalives_idle(Duration::from_secs(30));
    config.tcp_user_timeout(BATCH_LIMIT);
    Ok(config)
}

/// The pool. Connections are made when they are needed, and made again after they broke.
pub struct Connections {
    pool: Pool,
}

impl Connections {
    /// A pool for a configuration; connects to nothing yet.
    pub fn new(config: Config) -> PortResult<Self> {
        let manager =
            Manager::from_config(config, NoTls, ManagerConfig { recycling_method: RecyclingMethod::Fast });
        let pool = Pool::builder(manager)
            .max_size(CONNECTIONS)
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts {
                wait: Some(CONNECT_LIMIT),
                create: Some(CONNECT_LIMIT),
                recycle: Some(CONNECT_LIMIT),
            })
            .post_create(deadpool_postgres::Hook::async_fn(|client, _| {
                Box::pin(async move {
                    client.batch_execute(SETTINGS).await.map_err(deadpool_postgres::HookError::Backend)
                })
            }))
            .build()
            .map_err(refused)?;
        Ok(Self { pool })
    }

    /// Runs one statement (prepared once per connection) and gives its rows. It is run again, once, when its connection
    /// turns out to be broken: it must be one that may run twice.
    pub async fn query(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> PortResult<Vec<Row>> {
        self.query_within(STATEMENT_LIMIT, sql, params).await
    }

    /// The same, with a limit of its own.
    pub async fn query_within(
        &self,
        limit: Duration,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> PortResult<Vec<Row>> {
        let once = async || {
            self.run(limit, async |client: &mut Object| {
                let statement = client.prepare_cached(sql).await?;
                Ok(client.query(&statement, params).await?)
            })
            .await
        };
        match once().await {
            Err(failure) if failure.again => once().await,
            result => result,
        }
        .map_err(|failure| failure.error)
    }

    /// Runs `work` on a connection, within a limit. A connection that broke, or didn't answer, is thrown away.
    pub async fn run<T>(
        &self,
        limit: Duration,
        work: impl AsyncFnOnce(&mut Object) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut client = self.pool.get().await?;
        let result = match tokio::time::timeout(limit, work(&mut client)).await {
            Ok(result) => result,
            Err(_) => Err(Failure::late(limit)),
        };
        if result.as_ref().is_err_and(|failure| failure.broken) {
            drop(Object::take(client));
        }
        result
    }
}
