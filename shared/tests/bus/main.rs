//! One suite for both adapters of the bus port, and what only the one on Redis can show.

mod fencing;
mod fixture;
mod logs;
mod presence;
mod private;
#[path = "../common/proxy.rs"]
mod proxy;
mod redis_faults;
mod redis_shapes;
#[path = "../common/services.rs"]
mod services;
mod subscriptions;

use fixture::Fixture;

/// Runs each function of the suite on both adapters.
macro_rules! on_both {
    ($($module:ident :: $name:ident),* $(,)?) => {
        mod embedded {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::Fixture::embedded().run(super::$module::$name).await;
                }
            )*
        }

        mod on_redis {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::Fixture::redis().await.run(super::$module::$name).await;
                }
            )*
        }
    };
}

on_both!(
    logs::a_log_keeps_its_records,
    logs::a_successor_takes_over_with_all_records,
    logs::an_older_attempt_is_refused,
    logs::of_two_attempts_with_one_epoch_the_first_holds,
    logs::without_a_log_nothing_is_recorded_or_published,
    logs::a_first_record_opens_its_log,
    logs::a_first_record_takes_no_log_from_another,
    logs::an_older_log_counts_as_missing,
    logs::a_batch_is_answered_in_order,
    logs::logs_expire,
    logs::ended_logs_expire_early_and_never_late,
    logs::any_text_survives,
    logs::what_is_no_frame_harms_no_other,
    logs::nothing_asked_nothing_done,
    fencing::nothing_old_is_visible_after_anything_newer,
    fencing::writers_of_many_jobs_share_steps,
    subscriptions::a_step_is_one_message_per_channel,
    subscriptions::channels_that_nobody_hears_are_told,
    subscriptions::all_subscribers_hear,
    subscriptions::who_leaves_is_no_longer_counted,
    subscriptions::a_lagging_subscriber_is_told_and_goes_on,
    subscriptions::the_slow_do_not_hold_up_the_quick,
    presence::a_cancellation_waits_for_the_job,
    presence::a_cancellation_reaches_all_workers,
    presence::a_cancellation_expires,
    presence::words_reach_one_worker,
    presence::nobody_hears_after_the_worker_is_gone,
    presence::workers_are_listed_while_they_are_there,
    presence::models_are_remembered,
    presence::a_worker_lives_while_it_listens_and_renews,
    presence::a_coordinator_lives_while_it_renews,
);
