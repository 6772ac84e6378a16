//! One suite for both adapters of the queue port, and what only the one on RabbitMQ can show.

mod fixture;
#[path = "../common/proxy.rs"]
mod proxy;
mod rabbitmq;
#[path = "../common/services.rs"]
mod services;
mod suite;

use fixture::Fixture;

/// Runs each function of the suite on both adapters.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod embedded {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::Fixture::embedded().run(super::suite::$name).await;
                }
            )*
        }

        mod on_rabbitmq {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::Fixture::rabbitmq().await.run(super::suite::$name).await;
                }
            )*
        }
    };
}

on_both!(
    messages_come_in_order,
    messages_come_as_they_were_sent,
    no_more_than_the_prefetch_is_out,
    consumers_share_a_queue,
    what_a_dropped_consumer_held_comes_again,
    what_is_requeued_comes_again,
    what_is_rejected_dies,
    what_comes_back_too_often_dies,
    the_front_door_has_no_dead_letters,
    a_stopped_consumer_can_still_settle,
    a_receipt_goes_stale_with_its_consumer,
    settling_twice_changes_nothing,
    an_undeclared_queue_takes_nothing,
    consuming_declares_the_queue,
    a_full_queue_refuses,
    each_publisher_hears_of_its_own_message,
    many_publish_at_once,
    replies_need_no_reader,
    the_feeds_can_be_read,
);
