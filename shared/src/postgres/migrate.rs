//! Brings the schema up to date from the numbered SQL files in `migrations/`, which are compiled in.

use std::time::Duration;

use refinery::Target;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls};

use super::connection::{Failure, explain, find_cause, refused, unavailable};
use crate::ports::{PortError, PortResult};

mod embedded {
    refinery::embed_migrations!("../migrations");
}

/// Where it is written down what was applied; a name of our own, because other programs may keep theirs here.
const HISTORY: &str = "stoker_schema_history";
/// Key of the advisory lock under which one process at a time looks and migrates ("stoker" in ASCII).
const LOCK: i64 = 0x7374_6f6b_6572;
/// How long to wait for another process's migration, and for the locks on tables in use.
const LOCK_LIMIT: &str = "SET lock_timeout = '60s'; SET statement_timeout = 0";
/// The first version with `gen_random_uuid`.
const OLDEST: i32 = 13;
/// How often to try again when another program creates the same tables at the same moment.
const ATTEMPTS: usize = 5;

/// Applies what is missing, on a connection of its own.
pub async fn migrate(config: &Config) -> PortResult<()> {
    let mut attempt = 1;
    loop {
        match migrate_once(config).await {
            Ok(()) => return Ok(()),
            Err((_, true)) if attempt < ATTEMPTS => {
                attempt += 1;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err((error, _)) => return Err(error),
        }
    }
}

/// Gives with an error whether it comes from a collision that will not happen again.
async fn migrate_once(config: &Config) -> Result<(), (PortError, bool)> {
    let plain = |e: tokio_postgres::Error| (Failure::from(e).error, false);
    let (mut client, connection) = config.connect(NoTls).await.map_err(plain)?;
    let driver = tokio::spawn(connection);
    client.batch_execute(LOCK_LIMIT).await.map_err(plain)?;
    let version =
        client.query_one("SELECT current_setting('server_version_num')::int", &[]).await.map_err(plain)?;
    let version = version.get::<_, i32>(0) / 10_000;
    if version < OLDEST {
        return Err((refused(format!("PostgreSQL {OLDEST} or later is needed; this is {version}")), false));
    }
    client.execute("SELECT pg_advisory_lock($1)", &[&LOCK]).await.map_err(plain)?;
    let result = apply(&mut client).await;
    // The session ends, and with it the lock.
    drop(client);
    let _ = driver.await;
    result
}

async fn apply(client: &mut Client) -> Result<(), (PortError, bool)> {
    let mut runner = embedded::migrations::runner()
        .set_target(Target::Latest)
        // A newer version beside this one may have gone further: that is no error, its changes suit this one too.
        .set_abort_missing(false);
    runner.set_migration_table_name(HISTORY);
    match runner.run_async(client).await {
        Ok(report) => {
            for migration in report.applied_migrations() {
                tracing::info!(%migration, "the database's schema was brought up to date");
            }
            Ok(())
        }
        Err(e) => {
            let Some(cause) = find_cause(&e) else { return Err((unavailable(&e), false)) };
            let collided = [
                SqlState::UNIQUE_VIOLATION,
                SqlState::DUPLICATE_TABLE,
                SqlState::DUPLICATE_OBJECT,
                SqlState::DUPLICATE_COLUMN,
                SqlState::T_R_DEADLOCK_DETECTED,
            ];
            let again = cause.code().is_some_and(|state| collided.contains(state));
            Err((unavailable(explain(cause)), again))
        }
    }
}
