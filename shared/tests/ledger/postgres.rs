//! The suite on Postgres, each test in a database of its own, and what only Postgres can show.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use stoker_shared::config::Services;
use stoker_shared::ports::{Claimed, Committed, DeadLetter, JobState, Ledger};
use stoker_shared::postgres::PostgresLedger;
use uuid::Uuid;

use crate::database::{Database, connect, number};
use crate::proxy::Mode;
use crate::samples::{new_answer, new_claim, new_ending, new_job};
use crate::suite;

crate::suite_tests!(|| async {
    let database = Database::create().await;
    let ledger = database.ledger().await;
    ledger.migrate().await.unwrap();
    (Arc::new(ledger), database)
});

#[tokio::test]
async fn processes_that_start_together_migrate_once() {
    let database = Database::create().await;
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let url = database.url.clone();
            tokio::spawn(async move { connect(&url).await.migrate().await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let client = database.client().await;
    assert_eq!(number(&client, "SELECT count(*) FROM stoker_schema_history").await, 2);

    // A newer version went further; this one still starts.
    client
        .batch_execute(
            "INSERT INTO stoker_schema_history (version, name, applied_on, checksum)
             VALUES (99, 'newer', '2030-01-01T00:00:00Z', '1')",
        )
        .await
        .unwrap();
    database.ledger().await.migrate().await.unwrap();
}

#[tokio::test]
async fn a_row_that_postgres_refuses_does_not_block_its_batch() {
    let database = Database::create().await;
    let ledger = database.ledger().await;
    ledger.migrate().await.unwrap();
    let client = database.client().await;
    client
        .batch_execute("ALTER TABLE llm_requests ADD CHECK (response <> 'poison'); ALTER TABLE llm_cache ADD CHECK (response <> 'poison')")
        .await
        .unwrap();
    let mut batch: Vec<_> = (0..20).map(|_| new_ending(Uuid::now_v7(), 1)).collect();
    batch[7].request.response = "poison".into();
    batch[7].dead = Some(DeadLetter {
        key: Some(batch[7].key),
        job_id: None,
        tenant: "acme".into(),
        body: b"body".as_slice().into(),
        code: "internal_error".into(),
        reason: "reason".into(),
        attempts: 1,
        worker: "w-1".into(),
    });
    batch[13].cache = Some(new_answer("k", "poison"));
    let (poison, outcome) = (batch[7].key, batch[7].outcome.clone());
    assert_eq!(ledger.commit(batch.clone()).await.unwrap(), vec![Committed::Done; 20]);
    let row = ledger.find(poison).await.unwrap().unwrap();
    assert_eq!((row.state, row.outcome), (JobState::Done, Some(outcome)));
    let sql = "SELECT response, tokens, error_code, tenant FROM llm_requests WHERE job_key = $1";
    let row = client.query_one(sql, &[&poison]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "");
    assert_eq!(row.get::<_, i32>(1), 5);
    assert_eq!((row.get::<_, &str>(2), row.get::<_, &str>(3)), ("unstorable", "acme"));
    assert_eq!(number(&client, "SELECT count(*) FROM llm_requests WHERE error_code IS NULL").await, 18);
    assert_eq!(ledger.dead_letters(10).await.unwrap().len(), 1);
    let again = ledger.commit(batch).await.unwrap();
    assert!(again.iter().all(|a| matches!(a, Committed::Already(_))), "{again:?}");
}

#[tokio::test]
async fn values_are_cut_to_their_columns() {
    let database = Database::create().await;
    let ledger = database.ledger().await;
    ledger.migrate().await.unwrap();
    let mut ending = new_ending(Uuid::now_v7(), 1);
    ending.request.user_id = Some("🦀".repeat(300));
    ending.request.model = format!("{}🦀🦀", "m".repeat(99));
    ending.request.prompt = "a\0b".into();
    ending.request.metadata = serde_json::json!({"k\u{0}": "v\u{0}"});
    ledger.commit(vec![ending]).await.unwrap();
    let row = database
        .client()
        .await
        .query_one("SELECT user_id, model, prompt, metadata::text, finished_at - queued_at > '50 ms' FROM llm_requests", &[])
        .await
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), "🦀".repeat(255));
    assert_eq!(row.get::<_, &str>(1), format!("{}🦀", "m".repeat(99)));
    assert_eq!((row.get::<_, &str>(2), row.get::<_, &str>(3)), ("ab", r#"{"k": "v"}"#));
    assert!(row.get::<_, bool>(4));
}

#[tokio::test]
async fn large_batches_are_cut_into_transactions() {
    let database = Database::create().await;
    let ledger = database.ledger().await;
    ledger.migrate().await.unwrap();
    let mut batch: Vec<_> = (0..1200).map(|_| new_ending(Uuid::now_v7(), 1)).collect();
    for ending in &mut batch[..12] {
        ending.request.response = "é".repeat(3 << 20);
    }
    batch.push(batch[0].clone());
    let first = batch[0].outcome.clone();
    let answers = ledger.commit(batch).await.unwrap();
    assert_eq!(answers[..1200], vec![Committed::Done; 1200]);
    assert_eq!(answers[1200..], [Committed::Already(first)]);
    assert_eq!(ledger.usage("acme", None, 3600).await.unwrap().request_count, 1200);
}

#[tokio::test]
async fn a_cut_connection_goes_unnoticed() {
    let database = Database::create().await;
    let (proxy, ledger) = database.proxied().await;
    ledger.migrate().await.unwrap();
    let key = Uuid::now_v7();
    for epoch in 2..12 {
        let expected = (epoch > 2).then(|| epoch - 1);
        proxy.cut();
        assert_eq!(ledger.claim(&new_claim(key, expected, epoch, "w-1")).await.unwrap(), Claimed::Won);
        proxy.cut();
        assert_eq!(ledger.find(key).await.unwrap().unwrap().epoch, epoch);
        proxy.cut();
        let answer = ledger.commit(vec![new_ending(Uuid::now_v7(), 1)]).await.unwrap();
        assert_eq!(answer, [Committed::Done]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn commits_under_falling_connections_end_each_job_once() {
    let database = Database::create().await;
    let (proxy, ledger) = database.proxied().await;
    ledger.migrate().await.unwrap();
    let ledger = Arc::new(ledger);
    let stop = Arc::new(AtomicBool::new(false));
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let (ledger, stop) = (ledger.clone(), stop.clone());
            tokio::spawn(async move {
                let mut ended = 0;
                while !stop.load(Ordering::Relaxed) {
                    let batch: Vec<_> = (0..8).map(|_| new_ending(Uuid::now_v7(), 1)).collect();
                    // As a worker does: again and again until it is final.
                    let answers = loop {
                        match ledger.commit(batch.clone()).await {
                            Ok(answers) => break answers,
                            Err(e) => assert!(e.is_transient(), "{e}"),
                        }
                    };
                    for (answer, ending) in answers.iter().zip(&batch) {
                        let same = Committed::Already(ending.outcome.clone());
                        assert!(*answer == Committed::Done || *answer == same, "{answer:?}");
                    }
                    ended += 8;
                }
                ended
            })
        })
        .collect();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(103)).await;
        proxy.cut();
    }
    stop.store(true, Ordering::Relaxed);
    let mut ended = 0;
    for task in tasks {
        ended += task.await.unwrap();
    }
    assert!(ended > 0);
    let client = database.client().await;
    assert_eq!(number(&client, "SELECT count(*) FROM llm_requests").await, ended);
    assert_eq!(number(&client, "SELECT count(*) FROM llm_jobs WHERE state = 'done'").await, ended);
}

#[tokio::test]
async fn a_database_that_is_down_or_hangs_is_unavailable_and_comes_back() {
    let database = Database::create().await;
    let (proxy, ledger) = database.proxied().await;
    ledger.migrate().await.unwrap();
    ledger.ready().await.unwrap();
    for mode in [Mode::Refuse, Mode::Silent] {
        proxy.set(mode);
        if mode == Mode::Refuse {
            proxy.cut();
        }
        let answer = tokio::time::timeout(Duration::from_secs(60), ledger.ready()).await;
        assert!(answer.expect("it gives up").unwrap_err().is_transient());
        let answer =
            tokio::time::timeout(Duration::from_secs(60), ledger.accept(&new_job(Uuid::now_v7(), "h"))).await;
        assert!(answer.expect("it gives up").unwrap_err().is_transient());
        proxy.set(Mode::Pass);
        ledger.ready().await.unwrap();
        assert_eq!(ledger.commit(vec![new_ending(Uuid::now_v7(), 1)]).await.unwrap(), [Committed::Done]);
    }
}

#[tokio::test]
async fn a_session_that_may_not_write_is_left() {
    let database = Database::create().await;
    let ledger = database.ledger().await;
    ledger.migrate().await.unwrap();
    let client = database.client().await;
    // The session that takes the next job can't write from then on, as if its server had been demoted.
    client
        .batch_execute(
            "CREATE FUNCTION demote() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN PERFORM set_config('default_transaction_read_only', 'on', false); RETURN NEW; END $$;
             CREATE TRIGGER demote BEFORE INSERT ON llm_jobs FOR EACH ROW EXECUTE FUNCTION demote()",
        )
        .await
        .unwrap();
    ledger.accept(&new_job(Uuid::now_v7(), "h")).await.unwrap();
    client.batch_execute("DROP TRIGGER demote ON llm_jobs").await.unwrap();
    ledger.accept(&new_job(Uuid::now_v7(), "h")).await.unwrap();

    // Where no session may write, none is made.
    let sessions_may_write = async |may: bool| {
        let value = if may { "off" } else { "on" };
        let name = &database.name;
        let sql = format!("ALTER DATABASE {name} SET default_transaction_read_only = {value}");
        client.batch_execute(&sql).await.unwrap();
    };
    sessions_may_write(false).await;
    let newcomer = database.ledger().await;
    assert!(newcomer.ready().await.unwrap_err().is_transient());
    assert!(newcomer.commit(vec![new_ending(Uuid::now_v7(), 1)]).await.unwrap_err().is_transient());
    sessions_may_write(true).await;
    assert_eq!(newcomer.commit(vec![new_ending(Uuid::now_v7(), 1)]).await.unwrap(), [Committed::Done]);
}

#[tokio::test]
async fn a_table_changed_under_prepared_statements_costs_nothing() {
    let database = Database::create().await;
    let ledger = database.ledger().await;
    ledger.migrate().await.unwrap();
    let job = new_job(Uuid::now_v7(), "hash");
    ledger.accept(&job).await.unwrap();
    ledger.find(job.key).await.unwrap().unwrap();
    let client = database.client().await;
    client.batch_execute("ALTER TABLE llm_jobs ALTER COLUMN owner TYPE VARCHAR(500)").await.unwrap();
    assert_eq!(ledger.find(job.key).await.unwrap().unwrap().body, Some(job.body));
}

#[tokio::test]
async fn urls_are_checked_and_missing_servers_are_not() {
    for bad in ["nonsense://x", "postgres://host:notaport/db", "postgres://localhost/db?sslmode=require"] {
        let services = Services { postgres_url: bad.into(), ..Services::default() };
        assert!(PostgresLedger::connect(&services).await.is_err(), "{bad}");
    }
    let nobody = connect("postgres://postgres@127.0.0.1:1/none").await;
    assert!(nobody.ready().await.unwrap_err().is_transient());
    assert!(nobody.migrate().await.unwrap_err().is_transient());
    assert!(nobody.commit(vec![new_ending(Uuid::now_v7(), 1)]).await.unwrap_err().is_transient());
}
