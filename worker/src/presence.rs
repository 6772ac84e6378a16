//! Says each second that the worker is there, and listens to what it is told.
//!
//! Others take a worker for dead when nobody listens to its control channel or its presence has expired, and take its
//! jobs over; so it listens and has announced itself before it takes its first job.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_shared::backoff::Backoff;
use stoker_shared::ports::{Control, Liveness, PRESENCE_PERIOD, ServedModel, WorkerPresence};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{info, warn};

use crate::attempt::Attempt;
use crate::shared::Shared;
use crate::{handover, outbox};

const PERIOD: Duration = Duration::from_secs(1);
/// How long a coordinator must be gone before its clients' jobs are cancelled.
const COORDINATOR_GONE: Duration = Duration::from_secs(5);

/// Runs as long as the worker lives.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut backoff = Backoff::new();
    let control = loop {
        match shared.ports.bus.control(&shared.id).await {
            Ok(control) => break control,
            Err(error) => warn!(%error, "can't listen to the control channel yet"),
        }
        backoff.pause().await;
    };
    shared.spawn(look_after(shared.clone()));
    tokio::join!(announce(&shared), listen(&shared, control));
}

async fn listen(shared: &Arc<Shared>, mut control: mpsc::Receiver<Control>) {
    while let Some(word) = control.recv().await {
        match word {
            Control::Cancel(key) => outbox::cancel_key(shared, key),
            Control::Drain => {
                info!(worker = %shared.id, "told to drain");
                shared.told_to_drain.cancel();
            }
            Control::Ping => {}
        }
    }
}

async fn announce(shared: &Arc<Shared>) {
    let mut speed = Speed::new();
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // At once, so that nobody counts on it any more.
            () = shared.draining.cancelled(), if !speed.drained => speed.drained = true,
        }
        let presence = presence(shared, &mut speed);
        if presence.models.is_empty() {
            // Loading still. Soon, so that it does not idle once it has loaded.
            ticks.reset_after(Duration::from_millis(10));
            continue;
        }
        match timeout(PRESENCE_PERIOD / 2, shared.ports.bus.announce_worker(&presence)).await {
            Ok(Ok(())) => drop(shared.announced.send_replace(true)),
            Ok(Err(error)) => warn!(%error, "can't announce the worker"),
            Err(_) => warn!("announcing the worker takes too long"),
        }
    }
}

/// Withdraws the presence at a clean end.
pub(crate) async fn retire(shared: &Shared) {
    let _ = timeout(PRESENCE_PERIOD, shared.ports.bus.retire(&shared.id)).await;
}

/// Tokens a second, smoothed over a few seconds.
struct Speed {
    tokens: u64,
    at: Instant,
    per_second: f64,
    drained: bool,
}

impl Speed {
    fn new() -> Self {
        Self { tokens: 0, at: Instant::now(), per_second: 0.0, drained: false }
    }

    fn update(&mut self, tokens: u64) -> f64 {
        let elapsed = self.at.elapsed().as_secs_f64();
        let lately = tokens.saturating_sub(self.tokens) as f64 / elapsed.max(1e-3);
        let weight = elapsed.min(1.0) / 3.0;
        self.per_second += weight * (lately - self.per_second);
        (self.tokens, self.at) = (tokens, Instant::now());
        self.per_second
    }
}

fn presence(shared: &Shared, speed: &mut Speed) -> WorkerPresence {
    let served = shared.served();
    let mut models = Vec::with_capacity(served.len());
    let mut tokens = 0;
    for served in &served {
        let (info, stats) = (served.info(), served.engine.stats());
        served.meter.observe(&stats);
        tokens += stats.tokens;
        models.push(ServedModel {
            name: info.name.clone(),
            revision: info.revision.clone(),
            context: info.context,
            architecture: info.architecture.clone(),
            format: info.format.clone(),
            slots: info.slots,
            active: stats.active,
        });
    }
    let first = served.first().map(|s| s.info());
    WorkerPresence {
        id: shared.id.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        backend: first.map(|i| i.backend.clone()).unwrap_or_default(),
        device: first.map(|i| i.device.clone()).unwrap_or_default(),
        slots: models.iter().map(|m| m.slots).sum(),
        active: models.iter().map(|m| m.active).sum(),
        models,
        tokens_per_second: speed.update(tokens),
        draining: shared.draining.is_cancelled(),
    }
}

/// Looks after the jobs here, each second: those whose client is gone, and those that have been here for too long.
async fn look_after(shared: Arc<Shared>) {
    let mut gone = HashMap::new();
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let is_old = |a: &Attempt| a.delivered.elapsed() > handover::LONGEST_ATTEMPT;
        handover::begin(&shared, is_old);
        cancel_unheard(&shared, &mut gone).await;
    }
}

/// Cancels jobs whose coordinator has been gone for a while: their clients went with it.
async fn cancel_unheard(shared: &Arc<Shared>, gone: &mut HashMap<String, Instant>) {
    let unheard: HashSet<String> = {
        let mut table = shared.table();
        let attempts = table.iter_mut().filter(|(_, a)| a.unheard);
        attempts.filter_map(|(_, a)| a.ticket.envelope.coordinator.clone()).collect()
    };
    gone.retain(|coordinator, _| unheard.contains(coordinator));
    for coordinator in unheard {
        match shared.ports.bus.coordinator_liveness(&coordinator).await {
            Ok(Liveness::Gone) => {
                let since = *gone.entry(coordinator.clone()).or_insert_with(Instant::now);
                if since.elapsed() >= COORDINATOR_GONE {
                    info!(%coordinator, "the coordinator is gone; its clients' jobs are cancelled");
                    let mut table = shared.table();
                    let of_it = |a: &Attempt| a.ticket.envelope.coordinator.as_ref() == Some(&coordinator);
                    table
                        .iter_mut()
                        .filter(|(_, a)| a.unheard && of_it(a))
                        .for_each(|(number, a)| outbox::cancel(shared, a, number));
                }
            }
            Ok(Liveness::Alive | Liveness::Unknown) | Err(_) => drop(gone.remove(&coordinator)),
        }
    }
}
