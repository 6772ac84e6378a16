//! The ledger's test suite, on both adapters.

mod database;
mod embedded;
mod guide;
mod hostile;
mod postgres;
#[path = "../common/proxy.rs"]
mod proxy;
mod samples;
#[path = "../common/services.rs"]
mod services;
mod suite;

/// Makes a test of every function of the suite, each on a ledger of its own: `$open` gives one, with what must outlive
/// it.
#[macro_export]
macro_rules! suite_tests {
    ($open:expr) => {
        $crate::suite_tests!($open =>
            an_accepted_job_waits_with_its_body,
            an_id_belongs_to_its_first_body,
            of_many_acceptances_one_is_new,
            unconfirmed_jobs_are_given_until_they_are_published,
            jobs_whose_rows_expire_soon_are_given_until_they_are_done,
            of_racing_claims_exactly_one_wins,
            a_claim_must_know_the_row,
            a_released_job_has_no_owner,
            an_end_is_final_and_repeats_byte_for_byte,
            the_body_is_cleared_at_the_end,
            an_older_attempt_is_superseded,
            concurrent_commits_of_a_key_end_it_once,
            a_key_may_come_twice_in_a_batch,
            hostile_values_do_not_block_an_end,
            hostile_values_are_accepted_and_claimed,
            a_cached_answer_is_found_until_it_expires,
            ended_jobs_are_purged_when_they_expire,
            bills_and_dead_letters_are_kept_as_long_as_is_asked,
            dead_letters_come_newest_first,
            usage_counts_a_tenants_period,
            it_is_ready_and_migrating_again_changes_nothing,
        );
    };
    ($open:expr => $($name:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
            async fn $name() {
                let (ledger, _kept) = ($open)().await;
                suite::$name(ledger).await;
            }
        )*
    };
}
