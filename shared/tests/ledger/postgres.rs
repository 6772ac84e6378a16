//! The suite on Postgres, each test in a database of its own, and what only Postgres can show.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use stoker_shared::config::Services;
use stoker_shared::ports::{Claimed, Committed, JobState, Ledger};
use stoker_shared::postgres::PostgresLedger;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

use crate::proxy::{Mode, Proxy};
use crate::suite::{self, new_answer, new_claim, new_ending, new_job};

crate::suite_tests!(|| async {
    let database = Database::create().await;
    let ledger = database.ledger().await;
    ledger.migrate().await.unwrap();
    (Arc::new(ledger), database)
});

/// What the integration guide's PostgreSQLIntegration class runs when it starts.
const GUIDE_SCHEMA: [&str; 2] = [
    "CREATE TABLE IF NOT EXISTS llm_requests (
        id SERIAL PRIMARY KEY,
        user_id VARCHAR(255),
        prompt TEXT NOT NULL,
        response TEXT,
        model VARCHAR(100),
        tokens INTEGER,
        execution_time INTEGER,
        created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
        metadata JSONB
    );
    CREATE INDEX IF NOT EXISTS idx_llm_requests_user_id ON llm_requests(user_id);
    CREATE INDEX IF NOT EXISTS idx_llm_requests_created_at ON llm_requests(created_at);
    CREATE INDEX IF NOT EXISTS idx_llm_requests_model ON llm_requests(model);",
    "CREATE TABLE IF NOT EXISTS llm_cache (
        id SERIAL PRIMARY KEY,
        cache_key VARCHAR(255) UNIQUE NOT NULL,
        prompt_hash VARCHAR(255) NOT NULL,
        response TEXT NOT NULL,
        model VARCHAR(100),
        created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
        expires_at TIMESTAMP,
        hit_count INTEGER DEFAULT 0,
        metadata JSONB
    );
    CREATE INDEX IF NOT EXISTS idx_llm_cache_key ON llm_cache(cache_key);
    CREATE INDEX IF NOT EXISTS idx_llm_cache_hash ON llm_cache(prompt_hash);
    CREATE INDEX IF NOT EXISTS idx_llm_cache_expires ON llm_cache(expires_at);",
];

/// A database that goes away with the test.
pub struct Database {
    name: String,
    url: String,
}

impl Database {
    async fn create() -> Self {
        let name = format!("stoker_test_{}", Uuid::new_v4().simple());
        let server = server_url();
        let admin = client(&server).await;
        admin.batch_execute(&format!("CREATE DATABASE {name} TEMPLATE template0")).await.unwrap();
        Self { url: with_path(&server, &name), name }
    }

    async fn ledger(&self) -> PostgresLedger {
        connect(&self.url).await
    }

    async fn client(&self) -> Client {
        client(&self.url).await
    }

    /// The database through a proxy.
    async fn proxied(&self) -> (Proxy, PostgresLedger) {
        let config: tokio_postgres::Config = self.url.parse().unwrap();
        let host = match &config.get_hosts()[0] {
            tokio_postgres::config::Host::Tcp(host) => host.clone(),
            other => panic!("{other:?} can't be proxied"),
        };
        let port = config.get_ports().first().copied().unwrap_or(5432);
        let proxy = Proxy::start(format!("{host}:{port}"), Mode::Pass).await;
        let authority = self.url.split("://").nth(1).unwrap().split('/').next().unwrap();
        let user = authority.rsplit_once('@').map_or("postgres", |(user, _)| user);
        let url = format!("postgres://{user}@127.0.0.1:{}/{}", proxy.port(), self.name);
        let ledger = connect(&url).await;
        (proxy, ledger)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // Dropping is not async, and the test's runtime may be ending: a thread with a runtime of its own.
        let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { client(&server_url()).await.batch_execute(&sql).await })
        });
        if let Err(e) = dropped.join().unwrap() {
            eprintln!("{} stays behind: {e}", self.name);
        }
    }
}

fn server_url() -> String {
    std::env::var("POSTGRES_URL").unwrap_or_else(|_| Services::default().postgres_url)
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

async fn connect(url: &str) -> PostgresLedger {
    PostgresLedger::connect(&Services { postgres_url: url.into(), ..Services::default() }).await.unwrap()
}

async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

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
    assert_eq!(number(&client, "SELECT count(*) FROM stoker_schema_history").await, 1);

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
async fn the_guides_tables_may_be_there_first() {
    let database = Database::create().await;
    let guide = database.client().await;
    // A service in a zone far from UTC, with rows of its own; so is the database.
    guide
        .batch_execute(&format!("ALTER DATABASE {} SET timezone = 'Asia/Tokyo'", database.name))
        .await
        .unwrap();
    let guide = database.client().await;
    for sql in GUIDE_SCHEMA {
        guide.batch_execute(sql).await.unwrap();
    }
    log_request(&guide, "ann").await;
    set_cached(&guide, "their-hash", "their-key", 3600).await;
    set_cached(&guide, "stale-hash", "stale-key", -60).await;

    let ledger = database.ledger().await;
    ledger.migrate().await.unwrap();
    the_guides_class_works(&guide, &ledger).await;
    let age = "SELECT extract(epoch FROM now() - min(created_at))::int8 FROM llm_requests";
    assert!(number(&guide, age).await < 600, "times were read in the zone that they were written in");
}

#[tokio::test]
async fn the_guides_class_may_come_second() {
    let database = Database::create().await;
    let ledger = database.ledger().await;
    ledger.migrate().await.unwrap();
    let guide = database.client().await;
    guide.batch_execute("SET timezone = 'America/Los_Angeles'").await.unwrap();
    for sql in GUIDE_SCHEMA {
        guide.batch_execute(sql).await.unwrap();
    }
    log_request(&guide, "ann").await;
    set_cached(&guide, "their-hash", "their-key", 3600).await;
    set_cached(&guide, "stale-hash", "stale-key", -60).await;
    the_guides_class_works(&guide, &ledger).await;
}

#[tokio::test]
async fn columns_that_a_view_depends_on_stay_as_they_are() {
    let database = Database::create().await;
    let guide = database.client().await;
    for sql in GUIDE_SCHEMA {
        guide.batch_execute(sql).await.unwrap();
    }
    guide
        .batch_execute("CREATE VIEW daily AS SELECT created_at::date, count(*) FROM llm_requests GROUP BY 1")
        .await
        .unwrap();
    log_request(&guide, "ann").await;
    set_cached(&guide, "their-hash", "their-key", 3600).await;
    set_cached(&guide, "stale-hash", "stale-key", -60).await;
    let ledger = database.ledger().await;
    ledger.migrate().await.unwrap();
    the_guides_class_works(&guide, &ledger).await;
    assert_eq!(number(&guide, "SELECT sum(count)::int8 FROM daily").await, 3);
}

/// The class's `logRequest`.
async fn log_request(guide: &Client, user: &str) -> i32 {
    let sql = "INSERT INTO llm_requests (user_id, prompt, response, model, tokens, execution_time, metadata)
        VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id";
    let metadata = serde_json::json!({});
    guide
        .query_one(sql, &[&user, &"their prompt", &"their text", &"their-model", &7_i32, &70_i32, &metadata])
        .await
        .unwrap()
        .get(0)
}

/// The class's `setCachedResponse`; node-postgres writes dates with the process's offset.
async fn set_cached(guide: &Client, hash: &str, key: &str, ttl_s: i32) {
    let sql = format!(
        "INSERT INTO llm_cache (cache_key, prompt_hash, response, model, expires_at, metadata)
         VALUES ($1, $2, $3, $4, to_char(now() + interval '{ttl_s} seconds', 'YYYY-MM-DD\"T\"HH24:MI:SS.MSTZH:TZM')::timestamptz, $5)
         ON CONFLICT (cache_key) DO UPDATE SET response = EXCLUDED.response, model = EXCLUDED.model,
             expires_at = EXCLUDED.expires_at, metadata = EXCLUDED.metadata, created_at = CURRENT_TIMESTAMP"
    );
    guide
        .execute(&sql, &[&key, &hash, &"their answer", &"their-model", &serde_json::json!({})])
        .await
        .unwrap();
}

/// The class's `getCachedResponse`.
async fn get_cached(guide: &Client, hash: &str) -> Option<String> {
    let sql = "SELECT response, model, metadata FROM llm_cache
        WHERE prompt_hash = $1 AND (expires_at IS NULL OR expires_at > CURRENT_TIMESTAMP)";
    let rows = guide.query(sql, &[&hash]).await.unwrap();
    let hit = "UPDATE llm_cache SET hit_count = hit_count + 1 WHERE prompt_hash = $1";
    guide.execute(hit, &[&hash]).await.unwrap();
    rows.first().map(|row| row.get(0))
}

/// The class's `getUserUsage`: requests and tokens.
async fn user_usage(guide: &Client, user: &str) -> (i64, i64) {
    let sql = "SELECT COUNT(*) as request_count, SUM(tokens) as total_tokens, AVG(execution_time) as avg_execution_time,
            array_agg(DISTINCT model) as models_used
        FROM llm_requests WHERE user_id = $1 AND created_at > CURRENT_TIMESTAMP - INTERVAL '1 hour'";
    let row = guide.query_one(sql, &[&user]).await.unwrap();
    (row.get(0), row.get(1))
}

/// Both sides see each other's rows: `ann` has one logged request, and two cached answers are there, one stale.
async fn the_guides_class_works(guide: &Client, ledger: &PostgresLedger) {
    for sql in GUIDE_SCHEMA {
        guide.batch_execute(sql).await.unwrap();
    }
    log_request(guide, "ann").await;
    let mut ending = new_ending(Uuid::now_v7(), 1);
    ending.cache =
        Some(stoker_shared::ports::CacheRow { expires_in_s: 3600, ..new_answer("our-key", "Hello") });
    let our_hash = ending.cache.as_ref().unwrap().prompt_hash.clone();
    assert_eq!(ledger.commit(vec![ending]).await.unwrap(), [Committed::Done]);

    assert_eq!(user_usage(guide, "ann").await, (3, 7 + 7 + 5));
    assert_eq!(get_cached(guide, "their-hash").await.as_deref(), Some("their answer"));
    assert_eq!(get_cached(guide, "stale-hash").await, None);
    assert_eq!(get_cached(guide, &our_hash).await.as_deref(), Some("Hello"));
    assert_eq!(ledger.cached("their-key").await.unwrap().unwrap().response, "their answer");
    assert_eq!(ledger.cached("stale-key").await.unwrap(), None);
    assert_eq!(number(guide, "SELECT hit_count::int8 FROM llm_cache WHERE cache_key = 'their-key'").await, 2);
    // Bills of other programs belong to no tenant of ours.
    assert_eq!(ledger.usage("acme", Some("ann"), 3600).await.unwrap().request_count, 1);
    assert_eq!(ledger.purge().await.unwrap(), 1);
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
    batch[7].dead = Some(stoker_shared::ports::DeadLetter {
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
