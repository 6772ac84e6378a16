//! Who is there.
//!
//! A process is gone when its presence has expired, or, for a worker, when nobody listens to its control channel any
//! more: Redis drops a dead process's subscriptions at once, so a kill is known in milliseconds. Redis counts the
//! listeners of a channel without sending them anything.
//!
//! Redis itself may lose both: it comes back empty, or was away for longer than presences live, or was replaced by
//! another server. Then nothing is known for as long as a presence lives, by which time everybody has come back. It shows
//! in two ways: the record of continuity (see `announce.lua`) is young, for those who have lost their presence; and
//! this process's own connection is young, for those who may yet have to subscribe again.

use serde::de::DeserializeOwned;
use tracing::warn;

use super::connection::Link;
use super::log::millis;
use super::names::Names;
use super::pool::ReadPool;
use super::script::{ANNOUNCE, Call, LIVENESS, WORKERS};
use crate::ports::{Liveness, PRESENCE_PERIOD, PortResult, ServedModel, WorkerPresence};

/// [`crate::ports::Bus::announce_worker`].
pub(super) async fn announce_worker(link: &Link, names: &Names, presence: &WorkerPresence) -> PortResult<()> {
    let keys = [names.worker(&presence.id), names.continuity(), names.workers(), names.models()];
    let mut args = vec![millis(PRESENCE_PERIOD), json(presence), presence.id.clone()];
    for model in &presence.models {
        args.push(model.name.clone());
        args.push(json(&ServedModel { active: 0, ..model.clone() }));
    }
    let mut call = Call::new(&ANNOUNCE);
    call.keys(&keys).args(&args);
    link.call(&call).await
}

/// [`crate::ports::Bus::announce_coordinator`].
pub(super) async fn announce_coordinator(link: &Link, names: &Names, id: &str) -> PortResult<()> {
    let (presence, continuity, life) = (names.coordinator(id), names.continuity(), millis(PRESENCE_PERIOD));
    let mut call = Call::new(&ANNOUNCE);
    call.key(&presence).key(&continuity).arg(&life).arg("1");
    link.call(&call).await
}

/// [`crate::ports::Bus::retire`].
pub(super) async fn retire(link: &Link, names: &Names, id: &str) -> PortResult<()> {
    let mut pipeline = redis::pipe();
    pipeline.cmd("DEL").arg(names.worker(id)).arg(names.coordinator(id));
    pipeline.cmd("SREM").arg(names.workers()).arg(id);
    link.pipeline(&pipeline).await
}

/// [`crate::ports::Bus::workers`].
pub(super) async fn workers(pool: &ReadPool, names: &Names) -> PortResult<Vec<WorkerPresence>> {
    let (registry, prefix) = (names.workers(), names.workers_prefix());
    let mut call = Call::new(&WORKERS);
    call.key(&registry).arg(&prefix);
    let mut workers: Vec<WorkerPresence> = parse(pool.call(&call).await?);
    workers.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(workers)
}

/// [`crate::ports::Bus::known_models`].
pub(super) async fn known_models(pool: &ReadPool, names: &Names) -> PortResult<Vec<ServedModel>> {
    let mut models: Vec<ServedModel> = parse(pool.query(redis::cmd("HVALS").arg(names.models())).await?);
    models.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(models)
}

/// [`crate::ports::Bus::worker_liveness`].
pub(super) async fn worker_liveness(link: &Link, names: &Names, id: &str) -> PortResult<Liveness> {
    let seen = look(link, names, &names.worker(id), Some(&names.control_of(id))).await?;
    Ok(match seen {
        Seen { present: true, listeners: 1.., .. } => Liveness::Alive,
        _ if !link.has_stood_for(PRESENCE_PERIOD) => Liveness::Unknown,
        Seen { present: false, young: true, .. } => Liveness::Unknown,
        _ => Liveness::Gone,
    })
}

/// [`crate::ports::Bus::coordinator_liveness`].
pub(super) async fn coordinator_liveness(link: &Link, names: &Names, id: &str) -> PortResult<Liveness> {
    let seen = look(link, names, &names.coordinator(id), None).await?;
    Ok(match seen {
        Seen { present: true, .. } => Liveness::Alive,
        Seen { young: true, .. } => Liveness::Unknown,
        _ => Liveness::Gone,
    })
}

struct Seen {
    present: bool,
    listeners: u64,
    /// Presences have been renewed here for less than a presence's life.
    young: bool,
}

async fn look(link: &Link, names: &Names, presence: &str, control: Option<&String>) -> PortResult<Seen> {
    let (continuity, life) = (names.continuity(), millis(PRESENCE_PERIOD));
    let mut call = Call::new(&LIVENESS);
    call.key(presence).key(&continuity).arg(&life);
    call.args(control);
    let (present, listeners, young) = link.call(&call).await?;
    Ok(Seen { present, listeners, young })
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("presences have string keys only")
}

fn parse<T: DeserializeOwned>(values: Vec<Vec<u8>>) -> Vec<T> {
    let parse = |value: Vec<u8>| match serde_json::from_slice(&value) {
        Ok(parsed) => Some(parsed),
        Err(error) => {
            warn!(%error, "a presence that can't be read is skipped");
            None
        }
    };
    values.into_iter().filter_map(parse).collect()
}
