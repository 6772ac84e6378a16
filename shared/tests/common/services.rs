//! The real services, for the tests of all crates: where they are, and a database for one test.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::env::var;

use stoker_shared::config::Services;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

/// Those that the environment names, or the usual local ones, under a prefix that no other test uses.
pub fn configured() -> Services {
    let usual = Services::default();
    Services {
        amqp_url: var("AMQP_URL").unwrap_or(usual.amqp_url),
        redis_url: var("REDIS_URL").unwrap_or(usual.redis_url),
        postgres_url: var("POSTGRES_URL").unwrap_or(usual.postgres_url),
        prefix: format!("t{}.", Uuid::new_v4().simple()),
    }
}

/// A Postgres database that goes away with the test.
pub struct Database {
    server: String,
    pub name: String,
    pub url: String,
}

impl Database {
    /// On the server that `server`, any of its databases' URLs, leads to.
    pub async fn create_on(server: &str) -> Self {
        let name = format!("stoker_test_{}", Uuid::new_v4().simple());
        let sql = format!("CREATE DATABASE {name} TEMPLATE template0");
        client(server).await.batch_execute(&sql).await.unwrap();
        Self { url: with_path(server, &name), name, server: server.into() }
    }

    /// A connection past the adapter.
    pub async fn client(&self) -> Client {
        client(&self.url).await
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // Dropping is not async, and the test's runtime may be ending: a thread with a runtime of its own.
        let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        let server = self.server.clone();
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { client(&server).await.batch_execute(&sql).await.unwrap() });
        });
        // A panic in a drop would hide the test's own.
        if dropped.join().is_err() {
            eprintln!("{} stays behind", self.name);
        }
    }
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
