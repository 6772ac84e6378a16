//! A few connections for what may take long: reading whole logs and lists must not hold up the steps of running jobs,
//! whose connection answers in order.

use deadpool_redis::{Connection, Manager, Pool, Runtime};
use redis::{Cmd, FromRedisValue, RedisResult};

use super::connection::{Connector, TIMEOUT, query, settings};
use super::error;
use super::script::Call;
use crate::ports::PortResult;

/// Most connections at a time. They are made when they are needed.
const SIZE: usize = 4;

/// Connections for reading.
pub(super) struct ReadPool(Pool);

impl ReadPool {
    /// Nothing is connected yet.
    pub fn new(connector: &Connector) -> PortResult<Self> {
        let manager = Manager::new_with_config(connector.info(), settings()).map_err(error::port)?;
        let pool = Pool::builder(manager)
            .max_size(SIZE)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(TIMEOUT))
            .create_timeout(Some(TIMEOUT))
            .recycle_timeout(Some(TIMEOUT))
            .build()
            .map_err(error::unavailable)?;
        Ok(Self(pool))
    }

    /// Runs a command.
    pub async fn query<T: FromRedisValue>(&self, command: &Cmd) -> PortResult<T> {
        let mut connection = self.0.get().await.map_err(error::unavailable)?;
        let result = query(&mut connection, command).await;
        settle(connection, result)
    }

    /// Runs a script.
    pub async fn call<T: FromRedisValue>(&self, call: &Call<'_>) -> PortResult<T> {
        let mut connection = self.0.get().await.map_err(error::unavailable)?;
        let result = call.run(&mut connection).await;
        settle(connection, result)
    }
}

/// Takes a connection that is of no more use out of the pool.
fn settle<T>(connection: Connection, result: RedisResult<T>) -> PortResult<T> {
    result.map_err(|e| {
        if error::means_reconnect(&e) {
            drop(Connection::take(connection));
        }
        error::port(e)
    })
}
