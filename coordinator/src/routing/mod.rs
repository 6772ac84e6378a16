//! Which model serves a job: what the fleet has (configuration and workers' presence), and the strategy for jobs that
//! name no model.
//!
//! What is known is a snapshot, refreshed each second by one task, so that routing a job asks nobody; and at once when
//! a job names a model that the snapshot lacks, because its worker may have come a moment ago.

mod registry;
mod strategy;

use std::sync::Arc;

use stoker_shared::config;
use stoker_shared::outcome::{JobError, code};

pub use registry::{Model, Registry, Snapshot};
use strategy::Strategy;

/// Chooses models.
pub struct Router {
    /// What the fleet has.
    pub registry: Arc<Registry>,
    strategy: Box<dyn Strategy>,
}

/// Whether a job can wait for a worker to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Someone is connected: a model that nothing serves is refused, unless the configuration promises it.
    Connected,
    /// The job waits in the queue of any model that ever was.
    Queued,
}

impl Router {
    /// A router over a registry.
    pub fn new(registry: Arc<Registry>, strategy: config::Strategy) -> Self {
        Self { registry, strategy: strategy::strategy(strategy) }
    }

    /// The model that serves a job.
    ///
    /// # Errors
    /// `model_not_found` for a model that nobody knows; `model_unavailable` for one that nothing serves, or when no
    /// model at all is known yet; `service_unavailable` while the bus, which knows the workers, or the
    /// broker, which knows the queues, can't be reached.
    pub async fn route(&self, name: Option<&str>, patience: Patience) -> Result<Arc<Model>, JobError> {
        let mut found = self.find(&self.registry.snapshot(), name, patience);
        if found.as_ref().is_err_and(|e| e.code != code::SERVICE_UNAVAILABLE) {
            // Someone may have come since.
            self.registry.refresh().await;
            found = self.find(&self.registry.snapshot(), name, patience);
        }
        match (found, name) {
            // What the bus has forgotten, the broker may still know.
            (Err(e), Some(name)) if e.code == code::MODEL_NOT_FOUND && patience == Patience::Queued => {
                let queue = self.registry.queue_of(name).await;
                queue.map_err(|_| JobError::out_of_reach("broker"))?.ok_or(e)
            }
            (found, _) => found,
        }
    }

    fn find(
        &self,
        snapshot: &Snapshot,
        name: Option<&str>,
        patience: Patience,
    ) -> Result<Arc<Model>, JobError> {
        if patience == Patience::Connected && snapshot.is_stale() {
            return Err(JobError::out_of_reach("bus"));
        }
        let Some(name) = name else { return self.choose(snapshot) };
        match snapshot.models.get(name) {
            Some(m) if m.takes_jobs() || patience == Patience::Queued => Ok(m.clone()),
            Some(_) => Err(unavailable(format!("no worker serves the model {name:?} now"))),
            None if snapshot.is_stale() => Err(JobError::out_of_reach("bus")),
            None if snapshot.models.is_empty() => Err(unavailable("no model is registered yet".into())),
            None => {
                let message = format!("the model {name:?} does not exist; see GET /v1/models");
                Err(JobError::field(code::MODEL_NOT_FOUND, "model", message))
            }
        }
    }

    /// The strategy's choice: among the models that are served; else among those that the configuration promises. Not
    /// among all that ever were: nobody may come to serve the one that is chosen.
    fn choose(&self, snapshot: &Snapshot) -> Result<Arc<Model>, JobError> {
        let pick = |wanted: &dyn Fn(&Model) -> bool| {
            let candidates: Vec<&Model> = snapshot.in_order().filter(|m| wanted(m)).collect();
            self.strategy.choose(&candidates).and_then(|m| snapshot.models.get(&m.name)).cloned()
        };
        pick(&|m| m.served)
            .or_else(|| pick(&|m| m.configured))
            .ok_or_else(|| unavailable("no worker serves any model now".into()))
    }
}

fn unavailable(message: String) -> JobError {
    JobError::field(code::MODEL_UNAVAILABLE, "model", message)
}
