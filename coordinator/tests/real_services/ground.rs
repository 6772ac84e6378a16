//! The real services, under names that no other test uses; they go away with the test.

use lapin::options::{ExchangeDeleteOptions, QueueDeleteOptions};
use lapin::{Connection, ConnectionProperties};
use stoker_shared::config::Services;
use stoker_shared::job::{Lane, encode_model};
use stoker_shared::ports::Ports;

use crate::fleet::MODELS;
use crate::services::{Database, configured};

/// What one test has to itself: a prefix on RabbitMQ and Redis, a database on Postgres.
pub struct Ground {
    services: Services,
    _database: Database,
}

impl Ground {
    /// Names of its own, and the ports on them.
    pub async fn open() -> (Self, Ports) {
        let mut services = configured();
        let database = Database::create_on(&services.postgres_url).await;
        services.postgres_url.clone_from(&database.url);
        let ports = stoker_shared::connect(&services).await.unwrap();
        (Self { services, _database: database }, ports)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // Dropping is not async, and the test's runtime may be ending: a thread with a runtime of its own.
        let services = self.services.clone();
        let cleaned = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(clean_up(&services));
        });
        if cleaned.join().is_err() {
            eprintln!("{} stays behind", self.services.prefix);
        }
    }
}

async fn clean_up(services: &Services) {
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
