//! An adapter under test, with names of its own on the shared broker, which are cleaned up afterwards.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use lapin::options::{ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties};
use stoker_shared::config::Services;
use stoker_shared::embedded::EmbeddedQueue;
use stoker_shared::job::{Lane, encode_model};
use stoker_shared::ports::{Consumer, Delivery, Destination, Message, Queue, Source};
use stoker_shared::rabbitmq::RabbitQueue;
use uuid::Uuid;

use crate::services::configured;

/// How long anything may take that is bound to happen.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An adapter under test.
pub struct Fixture {
    pub queue: Arc<dyn Queue>,
    pub broker: Option<Broker>,
}

/// Names of one test on the shared broker.
pub struct Broker {
    pub services: Services,
    models: Mutex<Vec<String>>,
}

impl Fixture {
    pub fn embedded() -> Self {
        Self { queue: Arc::new(EmbeddedQueue::new()), broker: None }
    }

    pub async fn rabbitmq() -> Self {
        let broker = Broker::new();
        let queue = RabbitQueue::connect_with_limit(&broker.services, PATIENCE).await.unwrap();
        Self { queue: Arc::new(queue), broker: Some(broker) }
    }

    /// Runs a test, and cleans up even if it fails.
    pub async fn run<F: Future<Output = ()>>(self, test: impl FnOnce(Arc<Self>) -> F) {
        let this = Arc::new(self);
        let outcome = AssertUnwindSafe(test(this.clone())).catch_unwind().await;
        // The adapter goes first: it would declare again what is gone.
        match Arc::try_unwrap(this) {
            Ok(Self { queue, broker: Some(broker) }) => {
                drop(queue);
                broker.clean_up().await;
            }
            Ok(Self { broker: None, .. }) => {}
            Err(shared) => {
                if let Some(broker) = &shared.broker {
                    broker.clean_up().await;
                }
            }
        }
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    }

    /// Declares a model's queues and gives their address.
    pub async fn model(&self) -> (Destination, Source) {
        let (to, from) = self.undeclared_model();
        let Source::Work { model, .. } = &from else { unreachable!() };
        eventually("the model is declared", || async { self.queue.declare_work(model).await.is_ok() }).await;
        (to, from)
    }

    /// The address of a model that nobody has declared. Its name needs encoding.
    pub fn undeclared_model(&self) -> (Destination, Source) {
        let model = format!("m.#{}", Uuid::new_v4().simple());
        if let Some(broker) = &self.broker {
            broker.models.lock().unwrap().push(model.clone());
        }
        let lane = Lane::Interactive;
        (Destination::Work { model: model.clone(), lane }, Source::Work { model, lane })
    }

    /// The same adapter, and a work queue that holds few messages.
    pub async fn small_queue(&self, limit: usize) -> (Arc<dyn Queue>, Destination, Source) {
        let (to, from) = self.undeclared_model();
        let Source::Work { model, .. } = &from else { unreachable!() };
        match &self.broker {
            Some(broker) => {
                broker.declare_small_queue(model, limit).await;
                (self.queue.clone(), to, from)
            }
            None => {
                let queue = EmbeddedQueue::with_limit(limit);
                queue.declare_work(model).await.unwrap();
                (Arc::new(queue), to, from)
            }
        }
    }

    pub async fn publish(&self, to: &Destination, body: &str) {
        self.queue.publish(to, message(body)).await.unwrap();
    }

    /// Waits until a queue holds so many ready messages.
    pub async fn depth_becomes(&self, of: &Source, expected: u64) {
        eventually(&format!("{of:?} holds {expected} messages"), || async {
            self.queue.depth(of).await.unwrap() == Some(expected)
        })
        .await;
    }
}

impl Broker {
    pub fn new() -> Self {
        Self { services: configured(), models: Mutex::default() }
    }

    /// A connection past the adapter.
    pub async fn connection(&self) -> Connection {
        Connection::connect(&self.services.amqp_url, ConnectionProperties::default()).await.unwrap()
    }

    pub fn work_queue(&self, model: &str, lane: Lane) -> String {
        self.services.name(&format!("llm.work.{}.{}", encode_model(model), lane.as_str()))
    }

    /// The arguments of a work queue and a length: a policy would set it, but needs an administrator's tools.
    async fn declare_small_queue(&self, model: &str, limit: usize) {
        let connection = self.connection().await;
        let channel = connection.create_channel().await.unwrap();
        let name = self.work_queue(model, Lane::Interactive);
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(limit as i32));
        channel.queue_declare(name.as_str().into(), QueueDeclareOptions::durable(), arguments).await.unwrap();
        let exchange = self.services.name("llm.exchange");
        eventually("the exchange is there", || async {
            let channel = connection.create_channel().await.unwrap();
            channel
                .queue_bind(
                    name.as_str().into(),
                    exchange.as_str().into(),
                    name.as_str().into(),
                    QueueBindOptions::default(),
                    FieldTable::default(),
                )
                .await
                .is_ok()
        })
        .await;
    }

    async fn clean_up(&self) {
        let connection = self.connection().await;
        let channel = connection.create_channel().await.unwrap();
        let mut names: Vec<String> = ["requests", "responses", "metrics", "errors", "dead"]
            .iter()
            .map(|name| self.services.name(&format!("llm.{name}")))
            .collect();
        for model in self.models.lock().unwrap().iter() {
            names.extend(Lane::ALL.iter().map(|lane| self.work_queue(model, *lane)));
        }
        for name in names {
            channel.queue_delete(name.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
        }
        let exchange = self.services.name("llm.exchange");
        channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    }
}

pub fn message(body: &str) -> Message {
    Message { id: Uuid::new_v4().to_string(), body: body.to_owned().into(), ..Default::default() }
}

pub fn text(delivery: &Delivery) -> &str {
    std::str::from_utf8(&delivery.message.body).unwrap()
}

/// The next delivery.
pub async fn next(consumer: &mut Consumer) -> Delivery {
    tokio::time::timeout(PATIENCE, consumer.deliveries.recv())
        .await
        .expect("a delivery was bound to come")
        .expect("the consumer was not stopped")
}

/// Waits until something holds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "it never came true that {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
