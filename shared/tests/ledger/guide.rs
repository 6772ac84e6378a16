//! The integration guide's PostgreSQLIntegration class beside ours: its statements, whoever came first.

use stoker_shared::ports::{CacheRow, Committed, Ledger, Retention};
use stoker_shared::postgres::PostgresLedger;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::database::{Database, number};
use crate::samples::{new_answer, new_ending};

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
    ending.cache = Some(CacheRow { expires_in_s: 3600, ..new_answer("our-key", "Hello") });
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
    assert_eq!(ledger.purge(Retention::default()).await.unwrap(), 1);
}
