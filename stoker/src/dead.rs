//! `stoker job dead`: what was given up, and why.

use anyhow::Result;
use serde_json::json;
use stoker_shared::config::Config;
use stoker_shared::ports::{DeadLetter, Ledger};
use stoker_shared::postgres::PostgresLedger;

/// Prints the newest dead letters.
pub async fn list(config: &Config, limit: u32, as_json: bool) -> Result<()> {
    let ledger = PostgresLedger::connect(&config.services).await?;
    for letter in ledger.dead_letters(limit).await? {
        if as_json {
            println!("{}", object(&letter));
        } else {
            println!(
                "{:<28} {:<22} attempts {}  {}",
                letter.job_id.as_deref().unwrap_or("(no id)"),
                letter.code,
                letter.attempts,
                letter.reason
            );
        }
    }
    Ok(())
}

fn object(letter: &DeadLetter) -> serde_json::Value {
    json!({
        "id": letter.job_id, "key": letter.key, "tenant": letter.tenant, "code": letter.code, "reason": letter.reason,
        "attempts": letter.attempts, "worker": letter.worker, "body": String::from_utf8_lossy(&letter.body),
    })
}
