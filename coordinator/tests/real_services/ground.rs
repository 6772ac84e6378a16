//! The real services, under names that no other test uses; they go away with the test.

use std::env::var;

use lapin::options::{ExchangeDeleteOptions, QueueDeleteOptions};
use lapin::{Connection, ConnectionProperties};
use stoker_shared::config::Services;
use stoker_shared::job::{Lane, encode_model};
use stoker_shared::ports::Ports;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

use crate::fleet::MODELS;

/// What one test has to itself: a prefix on RabbitMQ and Redis, a database on Postgres.
pub struct Ground {
    services: Services,
    database: String,
}

impl Ground {
    /// Names of its own, and the ports on them.
    pub async fn open() -> (Self, Ports) {
        let defaults = Services::default();
        let database = format!("stoker_test_{}", Uuid::new_v4().simple());
        client(&server())
            .await
            .batch_execute(&format!("CREATE DATABASE {database} TEMPLATE template0"))
            .await
            .unwrap();
        let services = Services {
            amqp_url: var("AMQP_URL").unwrap_or(defaults.amqp_url),
            redis_url: var("REDIS_URL").unwrap_or(defaults.redis_url),
            postgres_url: of(&server(), &database),
            prefix: format!("t{}.", Uuid::new_v4().simple()),
        };
        let ports = stoker_shared::connect(&services).await.unwrap();
        (Self { services, database }, ports)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // Dropping is not async, and the test's runtime may be ending: a thread with a runtime of its own.
        let (services, database) = (self.services.clone(), self.database.clone());
        let cleaned = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(clean_up(&services, &database));
        });
        if cleaned.join().is_err() {
            eprintln!("{} and {} stay behind", self.services.prefix, self.database);
        }
    }
}

async fn clean_up(services: &Services, database: &str) {
    let sql = format!("DROP DATABASE IF EXISTS {database} WITH (FORCE)");
    client(&server()).await.batch_execute(&sql).await.unwrap();

    let connection = Connection::connect(&services.amqp_url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let fixed = ["requests", "responses", "metrics", "errors", "dead"].map(|name| format!("llm.{name}"));
    let work = MODELS.iter().flat_map(|model| {
        Lane::ALL.map(|lane| format!("llm.work.{}.{}", encode_model(model), lane.as_str()))
    });
    for queue in fixed.into_iter().chain(work) {
        let queue = services.name(&queue);
        channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    }
    let exchange = services.name("llm.exchange");
    channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await.unwrap();

    let redis = redis::Client::open(services.redis_url.as_str()).unwrap();
    let mut redis = redis.get_multiplexed_async_connection().await.unwrap();
    let mut cursor = 0_u64;
    loop {
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(format!("{}*", services.prefix)).arg("COUNT").arg(1000);
        let (next, keys): (u64, Vec<String>) = scan.query_async(&mut redis).await.unwrap();
        if !keys.is_empty() {
            let () = redis::cmd("DEL").arg(keys).query_async(&mut redis).await.unwrap();
        }
        cursor = next;
        if cursor == 0 {
            return;
        }
    }
}

fn server() -> String {
    var("POSTGRES_URL").unwrap_or_else(|_| Services::default().postgres_url)
}

/// The same server, another database.
fn of(url: &str, database: &str) -> String {
    let (scheme, rest) = url.split_once("://").expect("a URL");
    let authority = rest.split(['/', '?']).next().unwrap();
    format!("{scheme}://{authority}/{database}")
}

async fn client(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("Postgres must be there");
    tokio::spawn(connection);
    client
}
