//! What only the adapter on RabbitMQ can show: lost and silent connections, queues that others declared or deleted,
//! replies that somebody reads.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel};
use stoker_shared::config::Services;
use stoker_shared::job::Lane;
use stoker_shared::ports::{Consumer, Destination, PortError, PublishError, Source};
use stoker_shared::rabbitmq::RabbitQueue;

use crate::fixture::{Broker, Fixture, PATIENCE, eventually, message, next, text};
use crate::proxy::{Mode, Proxy};

/// A limit that a test can wait for, and that a busy machine may miss: so what is bound to succeed is tried again.
const SHORT: Duration = Duration::from_secs(2);

/// A fixture whose adapter reaches the broker through a proxy.
async fn proxied(mode: Mode, limit: Duration) -> (Fixture, Proxy) {
    let broker = Broker::new();
    let mut uri: lapin::uri::AMQPUri = broker.services.amqp_url.parse().unwrap();
    let proxy = Proxy::start(format!("{}:{}", uri.authority.host, uri.authority.port), mode).await;
    uri.authority.host = "127.0.0.1".into();
    uri.authority.port = proxy.port();
    let services = Services { amqp_url: uri.to_string(), ..broker.services.clone() };
    let queue = RabbitQueue::connect_with_limit(&services, limit).await.unwrap();
    (Fixture { queue: Arc::new(queue), broker: Some(broker) }, proxy)
}

async fn is_ready(test: &Fixture) {
    eventually("the queue is ready", || async { test.queue.ready().await.is_ok() }).await;
}

async fn publishes_again(test: &Fixture, to: &Destination, body: &str) {
    eventually("publishing works", || async { test.queue.publish(to, message(body)).await.is_ok() }).await;
}

/// A consumer, however often it takes.
async fn consumes_again(test: &Fixture, from: &Source) -> Consumer {
    let consumer = tokio::sync::OnceCell::new();
    eventually("consuming works", || async {
        match test.queue.consume(from, 1).await {
            Ok(made) => consumer.set(made).is_ok(),
            Err(_) => false,
        }
    })
    .await;
    consumer.into_inner().unwrap()
}

async fn raw_channel(test: &Fixture) -> (lapin::Connection, Channel) {
    let connection = test.broker.as_ref().unwrap().connection().await;
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_outlives_its_connection() {
    let (test, proxy) = proxied(Mode::Pass, PATIENCE).await;
    test.run(async move |test| {
        is_ready(&test).await;
        let (to, from) = test.model().await;
        let mut consumer = test.queue.consume(&from, 2).await.unwrap();
        test.publish(&to, "a").await;
        test.publish(&to, "b").await;
        let (a, b) = (next(&mut consumer).await, next(&mut consumer).await);
        a.receipt.ack().await.unwrap();
        // AMQP does not confirm acknowledgements. That another message comes, although no more than two may be under way,
        // shows that this one has reached the broker: a cut takes with it what has only been written to the socket.
        test.publish(&to, "c").await;
        let c = next(&mut consumer).await;

        proxy.cut();
        let mut again = [next(&mut consumer).await, next(&mut consumer).await];
        again.sort_by_key(|delivery| text(delivery).to_owned());
        assert_eq!(again.each_ref().map(text), ["b", "c"]);
        for stale in [b, c] {
            assert!(stale.receipt.is_stale());
            assert!(matches!(stale.receipt.ack().await, Err(PortError::Stale)));
        }
        for delivery in again {
            assert!(delivery.redelivered && !delivery.receipt.is_stale());
            delivery.receipt.ack().await.unwrap();
        }
        publishes_again(&test, &to, "d").await;
        let d = next(&mut consumer).await;
        assert_eq!(text(&d), "d");
        d.receipt.ack().await.unwrap();
        is_ready(&test).await;
        test.depth_becomes(&from, 0).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn confirmed_means_kept_through_cuts() {
    let (test, proxy) = proxied(Mode::Pass, PATIENCE).await;
    test.run(async move |test| {
        is_ready(&test).await;
        let (to, from) = test.model().await;
        let publishers = (0..16).map(|publisher| {
            let (test, to) = (test.clone(), to.clone());
            tokio::spawn(async move {
                let mut kept = Vec::new();
                for n in 0..200 {
                    let body = format!("{publisher}/{n}");
                    if test.queue.publish(&to, message(&body)).await.is_ok() {
                        kept.push(body);
                    }
                }
                kept
            })
        });
        let publishers: Vec<_> = publishers.collect();
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            proxy.cut();
        }
        let mut kept = std::collections::BTreeSet::new();
        for publisher in publishers {
            kept.extend(publisher.await.unwrap());
        }
        assert!(!kept.is_empty());

        let mut consumer = test.queue.consume(&from, 100).await.unwrap();
        while !kept.is_empty() {
            let delivery = next(&mut consumer).await;
            kept.remove(text(&delivery));
            let _ = delivery.receipt.ack().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_broker_is_noticed_and_left() {
    let (test, proxy) = proxied(Mode::Pass, SHORT).await;
    test.run(async move |test| {
        is_ready(&test).await;
        let (to, from) = test.model().await;
        let mut consumer = consumes_again(&test, &from).await;
        publishes_again(&test, &to, "a").await;
        let a = next(&mut consumer).await;

        proxy.set(Mode::Silent);
        let verdict = test.queue.publish(&to, message("b")).await;
        assert!(matches!(verdict, Err(PublishError::Unconfirmed)), "{verdict:?}");
        assert!(test.queue.ready().await.is_err());
        // Both links give the connection up after two heartbeats.
        eventually("the connection is given up", || async {
            matches!(test.queue.publish(&to, message("c")).await, Err(PublishError::Port(_)))
        })
        .await;

        proxy.cut();
        proxy.set(Mode::Pass);
        let again = next(&mut consumer).await;
        assert_eq!(text(&again), "a");
        assert!(again.redelivered);
        assert!(matches!(a.receipt.ack().await, Err(PortError::Stale)));
        is_ready(&test).await;
        publishes_again(&test, &to, "d").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_comes_later_is_found() {
    let (test, proxy) = proxied(Mode::Refuse, SHORT).await;
    test.run(async move |test| {
        let (to, from) = test.undeclared_model();
        let unavailable = |error: &PortError| matches!(error, PortError::Unavailable { .. });
        assert!(unavailable(&test.queue.ready().await.unwrap_err()));
        assert!(unavailable(&test.queue.consume(&from, 1).await.unwrap_err()));
        assert!(unavailable(&test.queue.depth(&from).await.unwrap_err()));
        for to in [&to, &Destination::Metrics] {
            let refused = test.queue.publish(to, message("a")).await;
            assert!(matches!(&refused, Err(PublishError::Port(error)) if unavailable(error)), "{refused:?}");
        }

        proxy.set(Mode::Pass);
        is_ready(&test).await;
        let mut consumer = consumes_again(&test, &from).await;
        publishes_again(&test, &to, "a").await;
        assert_eq!(text(&next(&mut consumer).await), "a");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_are_tried_in_turn() {
    let broker = Broker::new();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let urls = format!("amqp://guest:guest@127.0.0.1:{closed}, {}", broker.services.amqp_url);
    let services = Services { amqp_url: urls, ..broker.services.clone() };
    let queue = RabbitQueue::connect_with_limit(&services, PATIENCE).await.unwrap();
    let test = Fixture { queue: Arc::new(queue), broker: Some(broker) };
    test.run(async move |test| {
        let (to, from) = test.model().await;
        test.publish(&to, "a").await;
        test.depth_becomes(&from, 1).await;
        is_ready(&test).await;
    })
    .await;
}

#[tokio::test]
async fn a_wrong_url_is_refused_at_once() {
    let services = Services { amqp_url: "redis://localhost".into(), ..Default::default() };
    assert!(matches!(RabbitQueue::connect(&services).await, Err(PortError::Refused { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_seed_queues_suit_other_services() {
    Fixture::rabbitmq()
        .await
        .run(async |test| {
            is_ready(&test).await;
            let (_connection, channel) = raw_channel(&test).await;
            // As amqplib sends it: the smallest integer type that holds the number.
            let mut arguments = FieldTable::default();
            arguments.insert("x-message-ttl".into(), AMQPValue::LongInt(86_400_000));
            arguments.insert("x-max-length".into(), AMQPValue::ShortInt(10_000));
            for queue in ["requests", "responses", "metrics", "errors"] {
                let name = test.broker.as_ref().unwrap().services.name(&format!("llm.{queue}"));
                channel
                    .queue_declare(name.as_str().into(), QueueDeclareOptions::durable(), arguments.clone())
                    .await
                    .unwrap();
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_was_declared_differently_is_reported() {
    Fixture::rabbitmq()
        .await
        .run(async |test| {
            let (_, to, from) = test.small_queue(5).await;
            let Source::Work { model, .. } = &from else { unreachable!() };
            let refusal = test.queue.declare_work(model).await.unwrap_err();
            assert!(matches!(refusal, PortError::Refused { .. }), "{refusal:?}");
            assert!(refusal.to_string().contains("inequivalent arg"), "{refusal}");
            assert!(matches!(test.queue.consume(&from, 1).await, Err(PortError::Refused { .. })));
            test.publish(&to, "publishing goes on").await;
            is_ready(&test).await;
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_queue_is_declared_again() {
    Fixture::rabbitmq()
        .await
        .run(async |test| {
            let (to, from) = test.model().await;
            let mut consumer = test.queue.consume(&from, 1).await.unwrap();
            let mut front_door = test.queue.consume(&Source::FrontDoor, 1).await.unwrap();
            let broker = test.broker.as_ref().unwrap();
            let (_connection, channel) = raw_channel(&test).await;
            let Source::Work { model, .. } = &from else { unreachable!() };
            for queue in [
                broker.work_queue(model, Lane::Interactive),
                broker.services.name("llm.requests"),
                broker.services.name("llm.errors"),
            ] {
                channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
            }
            // The first two by their consumers, the last by its publisher.
            publishes_again(&test, &to, "a").await;
            assert_eq!(text(&next(&mut consumer).await), "a");
            publishes_again(&test, &Destination::FrontDoor, "b").await;
            assert_eq!(text(&next(&mut front_door).await), "b");
            test.publish(&Destination::Errors, "c").await;
            test.depth_becomes(&Source::Errors, 1).await;
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn channels_that_the_broker_closed_are_opened_again() {
    Fixture::rabbitmq()
        .await
        .run(async |test| {
            let (to, from) = test.model().await;
            let (_connection, channel) = raw_channel(&test).await;
            let exchange = test.broker.as_ref().unwrap().services.name("llm.exchange");
            let options = ExchangeDeleteOptions::default();
            channel.exchange_delete(exchange.as_str().into(), options).await.unwrap();
            let verdict = test.queue.publish(&to, message("a")).await;
            assert!(matches!(verdict, Err(PublishError::Unconfirmed)), "{verdict:?}");
            // The exchange is there again, but the work queue is bound to it only once it is declared again.
            let Source::Work { model, .. } = &from else { unreachable!() };
            eventually("publishing works", || async {
                test.queue.declare_work(model).await.unwrap();
                test.queue.publish(&to, message("b")).await.is_ok()
            })
            .await;
            for _ in 0..8 {
                test.publish(&Destination::Responses, "c").await;
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replies_reach_who_asked() {
    Fixture::rabbitmq()
        .await
        .run(async |test| {
            let (_connection, channel) = raw_channel(&test).await;
            let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
            let own = channel.queue_declare("".into(), exclusive, FieldTable::default()).await.unwrap();
            let mut answers = Vec::new();
            for queue in [own.name().as_str(), "amq.rabbitmq.reply-to"] {
                let no_ack = BasicConsumeOptions { no_ack: true, ..Default::default() };
                let consumer = channel
                    .basic_consume(queue.into(), "".into(), no_ack, FieldTable::default())
                    .await
                    .unwrap();
                answers.push((queue, consumer));
            }
            let mut front_door = test.queue.consume(&Source::FrontDoor, 1).await.unwrap();
            let services = &test.broker.as_ref().unwrap().services;
            let exchange = services.name("llm.exchange");
            let key = services.name("llm.requests");
            for (queue, consumer) in &mut answers {
                let properties = BasicProperties::default()
                    .with_reply_to((*queue).into())
                    .with_correlation_id("question".into())
                    .with_user_id("guest".into());
                channel
                    .basic_publish(
                        exchange.as_str().into(),
                        key.as_str().into(),
                        BasicPublishOptions::default(),
                        b"{}",
                        properties,
                    )
                    .await
                    .unwrap();
                let request = next(&mut front_door).await;
                assert_eq!(request.message.user_id.as_deref(), Some("guest"));
                assert_eq!(request.message.correlation_id.as_deref(), Some("question"));
                request.receipt.ack().await.unwrap();

                let mut reply = message("answer");
                reply.correlation_id.clone_from(&request.message.correlation_id);
                let to = Destination::Reply(request.message.reply_to.clone().unwrap());
                test.queue.publish(&to, reply).await.unwrap();
                let answer = tokio::time::timeout(PATIENCE, consumer.next()).await.unwrap().unwrap().unwrap();
                assert_eq!(answer.data, b"answer");
                let id = answer.properties.correlation_id().as_ref().map(|id| id.as_str());
                assert_eq!(id, Some("question"));
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_types_of_headers_are_printed() {
    Fixture::rabbitmq()
        .await
        .run(async |test| {
            let mut front_door = test.queue.consume(&Source::FrontDoor, 1).await.unwrap();
            let (_connection, channel) = raw_channel(&test).await;
            let services = &test.broker.as_ref().unwrap().services;
            let mut headers = FieldTable::default();
            headers.insert("number".into(), AMQPValue::LongLongInt(-7));
            headers.insert("truth".into(), AMQPValue::Boolean(true));
            headers.insert("half".into(), AMQPValue::Double(0.5));
            headers.insert("table".into(), AMQPValue::FieldTable(FieldTable::default()));
            headers.insert("bytes".into(), AMQPValue::LongString(vec![0xff, 0xfe].into()));
            channel
                .basic_publish(
                    services.name("llm.exchange").as_str().into(),
                    services.name("llm.requests").as_str().into(),
                    BasicPublishOptions::default(),
                    b"{}",
                    BasicProperties::default().with_headers(headers),
                )
                .await
                .unwrap();
            let headers = next(&mut front_door).await.message.headers;
            let printed: Vec<_> = headers.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            assert_eq!(printed, [("half", "0.5"), ("number", "-7"), ("truth", "true")]);
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_that_is_too_long_is_cut_and_harms_nobody() {
    Fixture::rabbitmq()
        .await
        .run(async |test| {
            let (to, from) = test.model().await;
            let mut long = message("a");
            long.headers.insert("x-reason".into(), "é".repeat(150_000));
            test.queue.publish(&to, long).await.unwrap();
            test.publish(&to, "b").await;
            let mut consumer = test.queue.consume(&from, 2).await.unwrap();
            let (a, b) = (next(&mut consumer).await, next(&mut consumer).await);
            assert_eq!(a.message.headers["x-reason"], "é".repeat(2048));
            assert_eq!((text(&a), text(&b)), ("a", "b"));
            for delivery in [a, b] {
                delivery.receipt.ack().await.unwrap();
            }
        })
        .await;
}
