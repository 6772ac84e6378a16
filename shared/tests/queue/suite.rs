//! What every adapter does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;
use stoker_shared::ports::{Destination, Message, PortError, PublishError, Source};

use crate::fixture::{Fixture, PATIENCE, eventually, message, next, text};

type Test = Arc<Fixture>;

pub async fn messages_come_in_order(test: Test) {
    let (to, from) = test.model().await;
    for n in 0..20 {
        test.publish(&to, &n.to_string()).await;
    }
    test.depth_becomes(&from, 20).await;
    let mut consumer = test.queue.consume(&from, 4).await.unwrap();
    for n in 0..20 {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery), n.to_string());
        assert!(!delivery.redelivered);
        delivery.receipt.ack().await.unwrap();
    }
    test.depth_becomes(&from, 0).await;
}

pub async fn messages_come_as_they_were_sent(test: Test) {
    let (to, from) = test.model().await;
    let headers = [
        ("x-stoker-key", "0190a1b2"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("ünïcode", "größer"),
        ("empty", ""),
    ];
    let sent = Message {
        id: "job-1".into(),
        body: Bytes::from(vec![0, 159, 146, 150, b'{', b'}']),
        correlation_id: Some("correlation".into()),
        reply_to: Some("somewhere".into()),
        user_id: None,
        headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
    };
    let long = Message { id: "job-2".into(), body: vec![b'x'; 3_000_000].into(), ..Default::default() };
    let bare = Message::default();
    for message in [&sent, &long, &bare] {
        test.queue.publish(&to, message.clone()).await.unwrap();
    }
    let mut consumer = test.queue.consume(&from, 3).await.unwrap();
    for message in [&sent, &long, &bare] {
        assert_eq!(next(&mut consumer).await.message, *message);
    }
}

pub async fn no_more_than_the_prefetch_is_out(test: Test) {
    let (to, from) = test.model().await;
    let mut consumer = test.queue.consume(&from, 2).await.unwrap();
    for n in 0..5 {
        test.publish(&to, &n.to_string()).await;
    }
    let first = next(&mut consumer).await;
    let second = next(&mut consumer).await;
    test.depth_becomes(&from, 3).await;
    assert!(consumer.deliveries.try_recv().is_err(), "a third delivery is out");
    second.receipt.ack().await.unwrap();
    assert_eq!(text(&next(&mut consumer).await), "2");
    test.depth_becomes(&from, 2).await;
    first.receipt.ack().await.unwrap();
    assert_eq!(text(&next(&mut consumer).await), "3");
}

pub async fn consumers_share_a_queue(test: Test) {
    let (to, from) = test.model().await;
    let mut one = test.queue.consume(&from, 1).await.unwrap();
    let mut other = test.queue.consume(&from, 1).await.unwrap();
    test.publish(&to, "a").await;
    test.publish(&to, "b").await;
    let (a, b) = (next(&mut one).await, next(&mut other).await);
    let bodies = BTreeSet::from([text(&a).to_owned(), text(&b).to_owned()]);
    assert_eq!(bodies, BTreeSet::from(["a".to_owned(), "b".to_owned()]));
}

pub async fn what_a_dropped_consumer_held_comes_again(test: Test) {
    let (to, from) = test.model().await;
    for body in ["a", "b", "c"] {
        test.publish(&to, body).await;
    }
    let mut consumer = test.queue.consume(&from, 3).await.unwrap();
    next(&mut consumer).await.receipt.ack().await.unwrap();
    let _unsettled = next(&mut consumer).await;
    drop(consumer);

    let mut consumer = test.queue.consume(&from, 3).await.unwrap();
    for body in ["b", "c"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery), body);
        assert!(delivery.redelivered, "{body} was delivered before");
        delivery.receipt.ack().await.unwrap();
    }
    test.depth_becomes(&from, 0).await;
}

pub async fn what_is_requeued_comes_again(test: Test) {
    let (to, from) = test.model().await;
    let sent = message("a");
    test.queue.publish(&to, sent.clone()).await.unwrap();
    let mut consumer = test.queue.consume(&from, 1).await.unwrap();
    let first = next(&mut consumer).await;
    assert!(!first.redelivered);
    first.receipt.nack(true).await.unwrap();
    let again = next(&mut consumer).await;
    assert!(again.redelivered);
    assert_eq!(again.message, sent);
}

pub async fn what_is_rejected_dies(test: Test) {
    let (to, from) = test.model().await;
    let mut sent = message("poison");
    sent.headers = BTreeMap::from([("x-stoker-key".into(), "k".into())]);
    test.queue.publish(&to, sent.clone()).await.unwrap();
    let mut consumer = test.queue.consume(&from, 1).await.unwrap();
    next(&mut consumer).await.receipt.nack(false).await.unwrap();

    let mut dead = test.queue.consume(&Source::Dead, 1).await.unwrap();
    let delivery = next(&mut dead).await;
    assert_eq!(delivery.message.id, sent.id);
    assert_eq!(delivery.message.body, sent.body);
    assert_eq!(delivery.message.headers["x-stoker-key"], "k");
    assert_eq!(delivery.message.headers["x-first-death-reason"], "rejected");
    assert!(delivery.message.headers["x-first-death-queue"].ends_with(".interactive"));
    delivery.receipt.ack().await.unwrap();
    test.depth_becomes(&from, 0).await;
}

pub async fn what_comes_back_too_often_dies(test: Test) {
    let (to, from) = test.model().await;
    test.publish(&to, "boomerang").await;
    let mut consumer = test.queue.consume(&from, 1).await.unwrap();
    let mut dead = test.queue.consume(&Source::Dead, 1).await.unwrap();
    let mut deliveries = 0;
    let corpse = loop {
        tokio::select! {
            delivery = consumer.deliveries.recv() => {
                deliveries += 1;
                delivery.unwrap().receipt.nack(true).await.unwrap();
            }
            corpse = next(&mut dead) => break corpse,
        }
    };
    assert_eq!(deliveries, 101);
    assert_eq!(text(&corpse), "boomerang");
    assert_eq!(corpse.message.headers["x-first-death-reason"], "delivery_limit");
}

pub async fn the_front_door_has_no_dead_letters(test: Test) {
    test.publish(&Destination::FrontDoor, "bad").await;
    test.publish(&Destination::FrontDoor, "good").await;
    let mut consumer = test.queue.consume(&Source::FrontDoor, 1).await.unwrap();
    next(&mut consumer).await.receipt.nack(false).await.unwrap();
    let good = next(&mut consumer).await;
    assert_eq!(text(&good), "good");
    good.receipt.ack().await.unwrap();
    assert_eq!(test.queue.depth(&Source::FrontDoor).await.unwrap(), Some(0));
    assert_eq!(test.queue.depth(&Source::Dead).await.unwrap(), Some(0));
}

pub async fn a_stopped_consumer_can_still_settle(test: Test) {
    let (to, from) = test.model().await;
    for n in 0..4 {
        test.publish(&to, &n.to_string()).await;
    }
    let mut stopped = test.queue.consume(&from, 2).await.unwrap();
    let (zero, one) = (next(&mut stopped).await, next(&mut stopped).await);
    stopped.stop();
    let end = tokio::time::timeout(PATIENCE, stopped.deliveries.recv()).await;
    assert!(end.expect("deliveries end after a stop").is_none());
    zero.receipt.ack().await.unwrap();
    one.receipt.nack(true).await.unwrap();

    let mut consumer = test.queue.consume(&from, 10).await.unwrap();
    let mut bodies = BTreeSet::new();
    for _ in 0..3 {
        let delivery = next(&mut consumer).await;
        bodies.insert(text(&delivery).to_owned());
        delivery.receipt.ack().await.unwrap();
    }
    assert_eq!(bodies, ["1", "2", "3"].map(String::from).into());
    test.depth_becomes(&from, 0).await;
}

pub async fn a_receipt_goes_stale_with_its_consumer(test: Test) {
    let (to, from) = test.model().await;
    test.publish(&to, "a").await;
    let mut first = test.queue.consume(&from, 1).await.unwrap();
    let old = next(&mut first).await;
    assert!(!old.receipt.is_stale());
    drop(first);
    let mut second = test.queue.consume(&from, 1).await.unwrap();
    let new = next(&mut second).await;
    assert!(old.receipt.is_stale() && !new.receipt.is_stale());
    assert!(matches!(old.receipt.ack().await, Err(PortError::Stale)));
    assert!(matches!(old.receipt.nack(true).await, Err(PortError::Stale)));
    new.receipt.ack().await.unwrap();
    test.depth_becomes(&from, 0).await;
}

pub async fn settling_twice_changes_nothing(test: Test) {
    let (to, from) = test.model().await;
    test.publish(&to, "a").await;
    test.publish(&to, "b").await;
    let mut consumer = test.queue.consume(&from, 1).await.unwrap();
    let a = next(&mut consumer).await;
    a.receipt.ack().await.unwrap();
    a.receipt.ack().await.unwrap();
    a.receipt.nack(true).await.unwrap();
    let b = next(&mut consumer).await;
    assert_eq!(text(&b), "b");
    b.receipt.ack().await.unwrap();
    test.depth_becomes(&from, 0).await;
}

pub async fn an_undeclared_queue_takes_nothing(test: Test) {
    let (to, from) = test.undeclared_model();
    assert_eq!(test.queue.depth(&from).await.unwrap(), None);
    let refused = test.queue.publish(&to, message("a")).await;
    assert!(matches!(refused, Err(PublishError::Unroutable)), "{refused:?}");

    let Source::Work { model, .. } = &from else { unreachable!() };
    test.queue.declare_work(model).await.unwrap();
    test.queue.declare_work(model).await.unwrap();
    assert_eq!(test.queue.depth(&from).await.unwrap(), Some(0));
    test.publish(&to, "a").await;
    test.depth_becomes(&from, 1).await;
}

pub async fn consuming_declares_the_queue(test: Test) {
    let (to, from) = test.undeclared_model();
    let mut consumer = test.queue.consume(&from, 1).await.unwrap();
    test.publish(&to, "a").await;
    assert_eq!(text(&next(&mut consumer).await), "a");
}

pub async fn a_full_queue_refuses(test: Test) {
    let (queue, to, from) = test.small_queue(3).await;
    let mut taken = 0;
    // A quorum queue may take a few more than its limit before it knows.
    let refusal = loop {
        match queue.publish(&to, message("a")).await {
            Ok(()) => taken += 1,
            Err(refusal) => break refusal,
        }
        assert!(taken < 1000, "the queue never refused");
    };
    assert!(matches!(refusal, PublishError::Full), "{refusal:?}");
    assert!(taken >= 3);
    assert_eq!(queue.depth(&from).await.unwrap(), Some(taken));

    let (other, _) = test.model().await;
    test.publish(&other, "another queue still takes").await;
}

pub async fn each_publisher_hears_of_its_own_message(test: Test) {
    let (to, from) = test.model().await;
    let (nowhere, _) = test.undeclared_model();
    let mut taken = 0;
    for _ in 0..10 {
        let publishes = (0..300).map(|n| {
            let (test, to) = (test.clone(), if n % 3 == 0 { nowhere.clone() } else { to.clone() });
            tokio::spawn(async move {
                let verdict = test.queue.publish(&to, message(&n.to_string())).await;
                match n % 3 {
                    0 => assert!(matches!(verdict, Err(PublishError::Unroutable)), "{n}: {verdict:?}"),
                    _ => verdict.unwrap(),
                }
            })
        });
        for publish in join_all(publishes).await {
            publish.unwrap();
        }
        taken += 200;
        test.depth_becomes(&from, taken).await;
    }
}

pub async fn many_publish_at_once(test: Test) {
    let (to, from) = test.model().await;
    let mut consumer = test.queue.consume(&from, 100).await.unwrap();
    let publishers = (0..32).map(|publisher| {
        let (test, to) = (test.clone(), to.clone());
        tokio::spawn(async move {
            for n in 0..50 {
                test.publish(&to, &format!("{publisher}/{n}")).await;
            }
        })
    });
    let publishers: Vec<_> = publishers.collect();
    let mut seen = BTreeSet::new();
    while seen.len() < 32 * 50 {
        let delivery = next(&mut consumer).await;
        assert!(seen.insert(text(&delivery).to_owned()), "{} came twice", text(&delivery));
        delivery.receipt.ack().await.unwrap();
    }
    for publisher in publishers {
        publisher.await.unwrap();
    }
}

pub async fn replies_need_no_reader(test: Test) {
    let nobody = Destination::Reply(format!("nobody-{}", uuid::Uuid::new_v4()));
    test.publish(&nobody, "outcome").await;
    for own in ["llm.requests", "llm.exchange"] {
        let refused = test.queue.publish(&Destination::Reply(own.into()), message("loop")).await;
        assert!(matches!(refused, Err(PublishError::Port(PortError::Refused { .. }))), "{refused:?}");
    }
}

pub async fn the_feeds_can_be_read(test: Test) {
    for (to, from) in [(Destination::Responses, Source::Responses), (Destination::Errors, Source::Errors)] {
        test.publish(&to, "a").await;
        let mut consumer = test.queue.consume(&from, 1).await.unwrap();
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery), "a");
        delivery.receipt.ack().await.unwrap();
        assert_eq!(test.queue.depth(&from).await.unwrap(), Some(0));
    }
    test.publish(&Destination::Metrics, "{}").await;
    eventually("the service answers", || async { test.queue.ready().await.is_ok() }).await;
}
