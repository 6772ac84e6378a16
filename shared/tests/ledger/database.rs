//! The ledger on a Postgres database for one test.

use stoker_shared::config::Services;
use stoker_shared::postgres::PostgresLedger;
use tokio_postgres::Client;

use crate::proxy::{Mode, Proxy};
use crate::services::configured;

pub use crate::services::Database;

impl Database {
    pub async fn create() -> Self {
        Self::create_on(&configured().postgres_url).await
    }

    pub async fn ledger(&self) -> PostgresLedger {
        connect(&self.url).await
    }

    /// The database through a proxy.
    pub async fn proxied(&self) -> (Proxy, PostgresLedger) {
        let config: tokio_postgres::Config = self.url.parse().unwrap();
        let host = match &config.get_hosts()[0] {
            tokio_postgres::config::Host::Tcp(host) => host.clone(),
            other => panic!("{other:?} can't be proxied"),
        };
        let port = config.get_ports().first().copied().unwrap_or(5432);
        let proxy = Proxy::start(format!("{host}:{port}"), Mode::Pass).await;
        let authority = self.url.split("://").nth(1).unwrap().split('/').next().unwrap();
        let user = authority.rsplit_once('@').map_or("postgres", |(user, _)| user);
        let url = format!("postgres://{user}@127.0.0.1:{}/{}", proxy.port(), self.name);
        let ledger = connect(&url).await;
        (proxy, ledger)
    }
}

pub async fn connect(url: &str) -> PostgresLedger {
    PostgresLedger::connect(&Services { postgres_url: url.into(), ..Services::default() }).await.unwrap()
}

pub async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}
