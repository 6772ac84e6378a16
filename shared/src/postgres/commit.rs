//! The end of jobs on Postgres: a batch is one transaction of at most five statements, whatever its size.
//!
//! Locks are taken in one order everywhere (jobs by key, then cached answers by key), so that concurrent batches wait
//! for each other but never in a circle. A batch that Postgres refuses is split until what it refuses stands alone, and
//! that job ends with a minimal row.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use bytes::Bytes;
use deadpool_postgres::{Object, Transaction};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::columns::{CacheColumns, INSERT_CACHE, INSERT_JOBS, INSERT_REQUESTS, JobColumns, RequestColumns};
use super::connection::{BATCH_LIMIT, Connections, Failure, unavailable};
use super::rows::{DeadColumns, INSERT_DEAD, state};
use crate::ports::{Committed, DeadLetter, Ending, JobState, PortError, PortResult};

/// A transaction holds at most so many endings, and about so many bytes (Postgres takes a gigabyte in one message).
const BATCH_ROWS: usize = 512;
const BATCH_BYTES: usize = 32 << 20;
/// How often a batch is tried when its connection breaks or it collides with another.
const ATTEMPTS: usize = 4;

/// Makes endings final; answers in their order.
pub async fn commit(connections: &Connections, endings: &[Ending]) -> PortResult<Vec<Committed>> {
    let mut answers = Vec::with_capacity(endings.len());
    // Ranges still to do, the next one last.
    let mut todo = batches(endings);
    todo.reverse();
    while let Some(range) = todo.pop() {
        match commit_batch(connections, &endings[range.clone()]).await {
            Ok(batch) => answers.extend(batch),
            Err(PortError::Refused { .. }) if range.len() > 1 => {
                let middle = range.start + range.len() / 2;
                todo.push(middle..range.end);
                todo.push(range.start..middle);
            }
            Err(PortError::Refused { message, .. }) => {
                let ending = &endings[range.start];
                tracing::error!(job = %ending.job_id, key = %ending.key, error = %message,
                    "Postgres refuses a job's rows; storing minimal ones");
                answers.extend(commit_batch(connections, &[minimal(ending)]).await?);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(answers)
}

/// Cuts endings into transactions.
fn batches(endings: &[Ending]) -> Vec<Range<usize>> {
    let (mut all, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (i, ending) in endings.iter().enumerate() {
        let size = size(ending);
        if i > start && (i - start == BATCH_ROWS || bytes + size > BATCH_BYTES) {
            all.push(start..i);
            (start, bytes) = (i, 0);
        }
        bytes += size;
    }
    if start < endings.len() {
        all.push(start..endings.len());
    }
    all
}

fn size(ending: &Ending) -> usize {
    ending.outcome.len()
        + ending.request.prompt.len()
        + ending.request.response.len()
        + ending.cache.as_ref().map_or(0, |c| c.response.len())
        + ending.dead.as_ref().map_or(0, |d| d.body.len())
}

/// An ending whose rows hold only what Postgres can't refuse.
fn minimal(ending: &Ending) -> Ending {
    Ending {
        request: ending.request.minimal(),
        cache: None,
        dead: ending.dead.as_ref().map(|letter| DeadLetter { body: Bytes::new(), ..letter.clone() }),
        ..ending.clone()
    }
}

async fn commit_batch(connections: &Connections, batch: &[Ending]) -> PortResult<Vec<Committed>> {
    let mut attempt = 1;
    loop {
        let result =
            connections.run(BATCH_LIMIT, async |client: &mut Object| transact(client, batch).await).await;
        match result {
            Ok(answers) => return Ok(answers),
            Err(failure) if failure.again && attempt < ATTEMPTS => attempt += 1,
            Err(failure) => return Err(failure.error),
        }
    }
}

async fn transact(client: &mut Object, batch: &[Ending]) -> Result<Vec<Committed>, Failure> {
    let transaction = client.transaction().await?;
    let mut answers = vec![None; batch.len()];
    // A statement can't meet the same key twice: repetitions go into rounds of their own, in order.
    let mut left: Vec<usize> = (0..batch.len()).collect();
    while !left.is_empty() {
        let mut first = HashMap::new();
        left.retain(|&i| *first.entry(batch[i].key).or_insert(i) != i);
        let mut round: Vec<usize> = first.into_values().collect();
        round.sort_unstable_by_key(|&i| batch[i].key);
        let endings: Vec<&Ending> = round.iter().map(|&i| &batch[i]).collect();
        for (i, answer) in round.iter().zip(finish(&transaction, &endings).await?) {
            answers[*i] = Some(answer);
        }
    }
    transaction.commit().await?;
    Ok(answers.into_iter().flatten().collect())
}

/// One round: endings of different jobs, ordered by key.
async fn finish(db: &Transaction<'_>, endings: &[&Ending]) -> Result<Vec<Committed>, Failure> {
    let rows = query(db, INSERT_JOBS, &JobColumns::new(endings).params()).await?;
    let done: HashSet<Uuid> = rows.iter().map(|row| row.get(0)).collect();
    let (ended, others): (Vec<&Ending>, Vec<&Ending>) = endings.iter().partition(|e| done.contains(&e.key));
    if !ended.is_empty() {
        query(db, INSERT_REQUESTS, &RequestColumns::new(&ended).params()).await?;
        let cache = CacheColumns::new(&ended);
        if !cache.is_empty() {
            query(db, INSERT_CACHE, &cache.params()).await?;
        }
        let letters: Vec<_> = ended.iter().filter_map(|e| e.dead.as_ref()).collect();
        if !letters.is_empty() {
            query(db, INSERT_DEAD, &DeadColumns::new(&letters).params()).await?;
        }
    }
    let standing = if others.is_empty() { HashMap::new() } else { standing(db, &others).await? };
    endings
        .iter()
        .map(|ending| match standing.get(&ending.key) {
            _ if done.contains(&ending.key) => Ok(Committed::Done),
            Some(answer) => Ok(answer.clone()),
            // Purged between two statements.
            None => {
                Err(Failure { error: unavailable("a job's row has just gone"), broken: false, again: true })
            }
        })
        .collect()
}

/// How the jobs stand that could not be ended.
async fn standing(db: &Transaction<'_>, endings: &[&Ending]) -> Result<HashMap<Uuid, Committed>, Failure> {
    let keys: Vec<Uuid> = endings.iter().map(|e| e.key).collect();
    let rows = query(
        db,
        "SELECT job_key, state, CASE WHEN state = 'done' THEN outcome END FROM llm_jobs WHERE job_key = ANY($1)",
        &[&keys],
    )
    .await?;
    let answer = |row: &tokio_postgres::Row| match state(row.get(1)) {
        JobState::Done => {
            Committed::Already(row.get::<_, Option<Vec<u8>>>(2).map(Bytes::from).unwrap_or_default())
        }
        _ => Committed::Superseded,
    };
    Ok(rows.iter().map(|row| (row.get(0), answer(row))).collect())
}

async fn query(
    db: &Transaction<'_>,
    sql: &str,
    params: &[&(dyn ToSql + Sync)],
) -> Result<Vec<tokio_postgres::Row>, Failure> {
    let statement = db.prepare_cached(sql).await?;
    Ok(db.query(&statement, params).await?)
}
