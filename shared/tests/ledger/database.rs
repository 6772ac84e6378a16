//! A Postgres database for one test.

use stoker_shared::config::Services;
use stoker_shared::postgres::PostgresLedger;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

use crate::proxy::{Mode, Proxy};

/// A database that goes away with the test.
pub struct Database {
    pub name: String,
    pub url: String,
}

impl Database {
    pub async fn create() -> Self {
        let name = format!("stoker_test_{}", Uuid::new_v4().simple());
        let server = server_url();
        let admin = client(&server).await;
        admin.batch_execute(&format!("CREATE DATABASE {name} TEMPLATE template0")).await.unwrap();
        Self { url: with_path(&server, &name), name }
    }

    pub async fn ledger(&self) -> PostgresLedger {
        connect(&self.url).await
    }

    pub async fn client(&self) -> Client {
        client(&self.url).await
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

impl Drop for Database {
    fn drop(&mut self) {
        // Dropping is not async, and the test's runtime may be ending: a thread with a runtime of its own.
        let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { client(&server_url()).await.batch_execute(&sql).await })
        });
        if let Err(e) = dropped.join().unwrap() {
            eprintln!("{} stays behind: {e}", self.name);
        }
    }
}

fn server_url() -> String {
    std::env::var("POSTGRES_URL").unwrap_or_else(|_| Services::default().postgres_url)
}

/// The same server, another database.
fn with_path(url: &str, database: &str) -> String {
    let (scheme, rest) = url.split_once("://").expect("a URL");
    let authority = rest.split(['/', '?']).next().unwrap();
    format!("{scheme}://{authority}/{database}")
}

async fn client(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("Postgres must be there");
    tokio::spawn(connection);
    client
}

pub async fn connect(url: &str) -> PostgresLedger {
    PostgresLedger::connect(&Services { postgres_url: url.into(), ..Services::default() }).await.unwrap()
}

pub async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}
