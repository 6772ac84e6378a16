//! The fleet's side of a worker: takes jobs from the queue, has an engine run them, carries their tokens to the bus and
//! their ends to the ledger, and only then lets the queue forget them.
//!
//! A job's way through it, a module each: `intake` (deliveries arrive), `claim` (may it run here?), `opening` (its log
//! is opened, the engine gets it), `outbox` (its tokens are written and published), `commit` (its end is made final),
//! `settle` (its outcome is published, its deliveries are acknowledged). `presence` says that the worker is there and
//! listens to what it is told; `handover` gives jobs to other workers; `attempt` is a job while it is here.

mod attempt;
mod claim;
mod commit;
mod dead;
mod handover;
mod http;
mod intake;
mod meter;
mod opening;
mod outbox;
mod outcome;
mod presence;
mod replay;
mod settle;
mod shared;
mod tasks;
#[cfg(test)]
mod tests;
mod ticket;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use stoker_engine::{EchoOptions, Engine, LoadError, LoadOptions, Sink};
use stoker_shared::config::Config;
use stoker_shared::job::Lane;
use stoker_shared::ports::Ports;
use tracing::info;

use shared::{Served, Shared};

/// How long running jobs that were stopped may take to be handed over, at the end of a drain.
const HANDOVER_LIMIT: Duration = Duration::from_secs(10);

/// How long answers and acknowledgements may take after that.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// How often is looked for jobs that have become running meanwhile, and must be handed over too.
const HANDOVER_PERIOD: Duration = Duration::from_millis(200);

/// How to make an engine.
pub enum Model {
    /// A model's files, run by Burn.
    Burn(LoadOptions),
    /// No model: gives prompts back.
    Echo(EchoOptions),
}

/// Why a worker does not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It was given nothing to serve.
    #[error("a worker needs at least one model")]
    NoModel,
    /// Two of its models have the same name; they would share a queue.
    #[error("two models are named {0:?}; give one of them another name")]
    SameName(String),
    /// A model could not be loaded.
    #[error("can't load the model: {0}")]
    Load(#[from] LoadError),
    /// Its HTTP listener could not be bound.
    #[error("can't listen on {address}: {source}")]
    Listen {
        /// What it should have listened on.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// An engine's thread ended. Other workers take its jobs over; this process should end with an error, so that
    /// whoever watches it starts it anew.
    #[error("an engine died; the worker has stopped")]
    EngineDied,
}

/// A running worker. Dropping it without [`Worker::drain`] stops it as if its process had been killed.
pub struct Worker {
    shared: Arc<Shared>,
    addr: SocketAddr,
}

impl Worker {
    /// A worker that serves the models: [`Worker::open`] and [`Worker::serve`] in one.
    ///
    /// # Errors
    /// If a model can't be loaded or the HTTP port can't be bound.
    pub async fn start(
        config: Config,
        ports: Ports,
        models: Vec<Model>,
        metrics: Option<PrometheusHandle>,
    ) -> Result<Self, Error> {
        // From here on, an early return drops the worker and thereby ends what was started.
        let worker = Self::open(config, ports, metrics).await?;
        worker.serve(models).await?;
        Ok(worker)
    }

    /// A worker that serves nothing yet: its probes answer, and say so. Services that are down are waited for in the
    /// background.
    ///
    /// # Errors
    /// If the HTTP port can't be bound.
    pub async fn open(
        config: Config,
        ports: Ports,
        metrics: Option<PrometheusHandle>,
    ) -> Result<Self, Error> {
        let (listener, addr) = http::bind(&config.http).await?;
        let (shared, inboxes) = Shared::new(config, ports);
        shared.spawn(http::serve(listener, shared.clone(), metrics));
        shared.spawn(presence::run(shared.clone()));
        shared.spawn(opening::run(shared.clone(), inboxes.opening));
        shared.spawn(outbox::run(shared.clone()));
        shared.spawn(commit::run(shared.clone(), inboxes.commit));
        Ok(Self { shared, addr })
    }

    /// Loads the models and starts to take jobs.
    ///
    /// # Errors
    /// If a model can't be loaded, or has another's name. Then none is served.
    pub async fn serve(&self, models: Vec<Model>) -> Result<(), Error> {
        if models.is_empty() {
            return Err(Error::NoModel);
        }
        let shared = &self.shared;
        let mut names = HashSet::new();
        let mut all = Vec::with_capacity(models.len());
        for model in models {
            let engine = load(shared, model).await?;
            let name = engine.info().name.clone();
            if !names.insert(name.clone()) {
                return Err(Error::SameName(name));
            }
            all.push(Arc::new(Served::new(engine)));
        }
        // Only now: a model that can't be loaded ends the process, which must not count as a death of another one's jobs.
        shared.serve(all.clone());
        for served in all {
            for lane in Lane::ALL {
                shared.spawn(intake::run(shared.clone(), served.clone(), lane));
            }
        }
        info!(worker = %shared.id, addr = %self.addr, models = ?names, "worker started");
        Ok(())
    }

    /// Its id, new at every start.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// Where its HTTP listener is.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Waits until the fleet knows of it: coordinators route jobs to its models from then on.
    pub async fn announced(&self) {
        // The other end is the worker's own.
        let _ = self.shared.announced.subscribe().wait_for(|announced| *announced).await;
    }

    /// Waits until it should be drained, because the fleet told it so.
    ///
    /// # Errors
    /// If an engine died: nothing runs here any more.
    pub async fn wait(&self) -> Result<(), Error> {
        tokio::select! {
            () = self.shared.told_to_drain.cancelled() => Ok(()),
            () = self.shared.tasks.killed.cancelled() => match self.shared.has_failed() {
                true => Err(Error::EngineDied),
                false => Ok(()),
            }
        }
    }

    /// Ends it cleanly: takes no more jobs, lets those that run go on for `worker.drain_s`, hands over the rest.
    pub async fn drain(self) {
        let shared = &self.shared;
        info!(worker = %shared.id, "draining");
        shared.draining.cancel();
        // There is nothing to wait for once an engine has died: the whole worker has stopped.
        shared.tasks.killed.run_until_cancelled(finish_or_hand_over(shared)).await;
        // Ends the consumers, whose deliveries go back, and the announcements, before the presence is withdrawn.
        shared.tasks.kill().await;
        presence::retire(shared).await;
        shared.forget_all().await;
    }

    /// Stops it as kill -9 would: nothing is finished, handed over or said to anybody. Returns once nothing runs any
    /// more. For tests.
    pub async fn abort(self) {
        self.shared.tasks.kill().await;
        self.shared.forget_all().await;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.tasks.killed.cancel();
    }
}

/// Lets running jobs end for a while, hands over those that don't, and waits until all deliveries are settled.
async fn finish_or_hand_over(shared: &Arc<Shared>) {
    let patience = Duration::from_secs(shared.config.worker.drain_s);
    if tokio::time::timeout(patience, shared.idle()).await.is_err() {
        let handed_over = async {
            loop {
                handover::begin(shared, |_| true);
                if tokio::time::timeout(HANDOVER_PERIOD, shared.idle()).await.is_ok() {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(HANDOVER_LIMIT, handed_over).await;
    }
    shared.tasks.settled(SETTLE_LIMIT).await;
}

/// Loads a model on a thread where it may take its time.
async fn load(shared: &Arc<Shared>, model: Model) -> Result<Box<dyn Engine>, Error> {
    let sink: Sink = outbox::sink(shared);
    let load = move || match model {
        Model::Burn(options) => stoker_engine::load(options, sink),
        Model::Echo(options) => Ok(stoker_engine::echo(options, sink)),
    };
    match tokio::task::spawn_blocking(load).await {
        Ok(engine) => Ok(engine?),
        Err(panic) => Err(LoadError::Backend(format!("loading it panicked: {panic}")).into()),
    }
}
