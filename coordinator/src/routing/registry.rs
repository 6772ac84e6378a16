//! What the fleet has: models by configuration and by workers' presence, as of the last second.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use stoker_shared::job::Lane;
use stoker_shared::ports::{PRESENCE_PERIOD, PortResult, Ports, ServedModel, Source, WorkerPresence};

/// How often the snapshot is renewed.
const REFRESH: Duration = Duration::from_secs(1);
/// The bus has so long to say who is there.
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// The broker has so long to declare a model's queues.
const DECLARE_LIMIT: Duration = Duration::from_secs(2);
/// A snapshot that could not be renewed for so long says nothing about who is there.
const STALE: Duration = Duration::from_secs(5);

/// A model of the fleet.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Name.
    pub name: Arc<str>,
    /// The configuration names it: its queue takes jobs whether or not a worker is there.
    pub configured: bool,
    /// A worker that is not draining serves it now.
    pub served: bool,
    /// Weights revision, if all workers that serve it agree.
    pub revision: Option<String>,
    /// Stands for the revision in OpenAI's replies.
    pub fingerprint: Option<String>,
    /// Largest context, tokens; 0 if unknown.
    pub context: u32,
    /// Architecture, for people.
    pub architecture: String,
    /// Number format, for people.
    pub format: String,
    /// Most jobs that run together, all workers.
    pub slots: u32,
    /// Jobs that run.
    pub active: u32,
    /// Lately, all its workers.
    pub tokens_per_second: f64,
    /// When this coordinator first heard of it, Unix seconds.
    pub created: i64,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            name: "".into(),
            configured: false,
            served: false,
            revision: None,
            fingerprint: None,
            context: 0,
            architecture: String::new(),
            format: String::new(),
            slots: 0,
            active: 0,
            tokens_per_second: 0.0,
            created: 0,
        }
    }
}

impl Model {
    /// Whether a connected client's job may be queued for it.
    pub fn takes_jobs(&self) -> bool {
        self.served || self.configured
    }
}

/// What is known, as of one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// By name.
    pub models: BTreeMap<Arc<str>, Arc<Model>>,
    /// Names in configured order.
    configured: Vec<Arc<str>>,
    /// Who is there.
    pub workers: Vec<WorkerPresence>,
    /// When the bus last answered.
    renewed: Option<Instant>,
    /// When it last named a worker.
    peopled: Option<Instant>,
}

impl Snapshot {
    /// All models: the configured ones first, in their order, then the others by name.
    pub fn in_order(&self) -> impl Iterator<Item = &Model> {
        let first = self.configured.iter().filter_map(|name| self.models.get(name));
        first.chain(self.models.values().filter(|m| !m.configured)).map(Arc::as_ref)
    }

    /// Whether the bus has not answered for so long that this says nothing any more.
    pub fn is_stale(&self) -> bool {
        self.renewed.is_none_or(|at| at.elapsed() > STALE)
    }
}

/// Keeps the snapshot, and declares the work queues of the models in it.
pub struct Registry {
    ports: Ports,
    configured: Vec<Arc<str>>,
    snapshot: RwLock<Arc<Snapshot>>,
    refreshing: tokio::sync::Mutex<()>,
    declared: Mutex<HashSet<Arc<str>>>,
}

impl Registry {
    /// A registry that knows the configured models.
    pub fn new(ports: Ports, configured: &[String]) -> Arc<Self> {
        let configured: Vec<Arc<str>> = configured.iter().map(|m| m.as_str().into()).collect();
        let snapshot = Snapshot { renewed: None, ..merge(&configured, &[], &[], &Snapshot::default()) };
        Arc::new(Self {
            ports,
            configured,
            snapshot: RwLock::new(Arc::new(snapshot)),
            refreshing: tokio::sync::Mutex::new(()),
            declared: Mutex::default(),
        })
    }

    /// What is known.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Renews the snapshot each second, and declares the queues of models that have come new.
    pub async fn run(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(REFRESH);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.refresh().await;
            self.declare_new().await;
        }
    }

    /// Renews the snapshot now. Of those who ask at the same time, one does it for all.
    pub async fn refresh(&self) {
        let asked = Instant::now();
        let _turn = self.refreshing.lock().await;
        let before = self.snapshot();
        if before.renewed.is_some_and(|at| at > asked) {
            return;
        }
        match tokio::time::timeout(LOOK_LIMIT, self.look()).await {
            Ok(Ok((workers, known))) => {
                let next = Arc::new(merge(&self.configured, &workers, &known, &before));
                *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = next;
            }
            Ok(Err(e)) => tracing::warn!("can't ask the bus who is there: {e}"),
            Err(_) => tracing::warn!("the bus does not say who is there"),
        }
    }

    async fn look(&self) -> PortResult<(Vec<WorkerPresence>, Vec<ServedModel>)> {
        let bus = &self.ports.bus;
        tokio::try_join!(bus.workers(), bus.known_models())
    }

    /// Declares the work queues of models that have come new. A job that is faster than this finds no queue, and has it
    /// declared.
    pub async fn declare_new(&self) {
        for name in self.snapshot().models.keys() {
            let known = self.declared.lock().unwrap_or_else(PoisonError::into_inner).contains(name);
            if !known && !self.declare_now(name).await {
                // The broker is away: the others can wait, too.
                return;
            }
        }
    }

    /// A model that nobody has spoken of, but that has a work queue: workers have served it before the bus lost its memory.
    pub async fn queue_of(&self, name: &str) -> PortResult<Option<Arc<Model>>> {
        let queue = Source::Work { model: name.to_owned(), lane: Lane::Interactive };
        let depth = self.ports.queue.depth(&queue).await?;
        Ok(depth.map(|_| Arc::new(Model { name: name.into(), created: unix_seconds(), ..Model::default() })))
    }

    /// Declares one model's work queues, even if that was done before; whether it worked.
    pub async fn declare_now(&self, name: &Arc<str>) -> bool {
        let declared = tokio::time::timeout(DECLARE_LIMIT, self.ports.queue.declare_work(name)).await;
        match declared {
            Ok(Ok(())) => {
                self.declared.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
                return true;
            }
            Ok(Err(e)) => tracing::warn!(model = %name, "can't declare the work queues yet: {e}"),
            Err(_) => {
                tracing::warn!(model = %name, "the broker does not answer; work queues not declared yet")
            }
        }
        false
    }
}

/// Puts together what the configuration names, what workers say and what workers once said.
fn merge(
    configured: &[Arc<str>],
    workers: &[WorkerPresence],
    known: &[ServedModel],
    before: &Snapshot,
) -> Snapshot {
    let now = Instant::now();
    let peopled = if workers.is_empty() { before.peopled } else { Some(now) };
    let workers = still_there(workers, before);
    let mut models: BTreeMap<Arc<str>, Model> = BTreeMap::new();
    let mut revisions: HashMap<Arc<str>, Option<String>> = HashMap::new();
    let mut entry = |name: &str, change: &mut dyn FnMut(&mut Model)| {
        let name: Arc<str> = name.into();
        let old = before.models.get(&name);
        let created = old.map_or_else(unix_seconds, |m| m.created);
        change(models.entry(name.clone()).or_insert_with(|| Model { name, created, ..Model::default() }));
    };
    for name in configured {
        entry(name, &mut |m| m.configured = true);
    }
    for model in known {
        entry(&model.name, &mut |m| describe(m, model));
    }
    for worker in workers.iter().filter(|w| !w.draining) {
        for model in &worker.models {
            entry(&model.name, &mut |m| {
                describe(m, model);
                m.served = true;
                m.slots += model.slots;
                m.active += model.active;
                m.tokens_per_second += worker.tokens_per_second;
            });
            let revision = (!model.revision.is_empty()).then(|| model.revision.clone());
            let agreed = revisions.entry(model.name.as_str().into()).or_insert_with(|| revision.clone());
            if *agreed != revision {
                *agreed = None;
            }
        }
    }
    for (name, revision) in revisions {
        if let Some(model) = models.get_mut(&name) {
            model.fingerprint =
                revision.as_ref().map(|r| format!("fp_{}", &hex::encode(Sha256::digest(r))[..10]));
            model.revision = revision;
        }
    }
    // The bus may have come back empty, and not every worker be there again.
    for (name, model) in &before.models {
        models.entry(name.clone()).or_insert_with(|| Model {
            name: name.clone(),
            context: model.context,
            architecture: model.architecture.clone(),
            format: model.format.clone(),
            created: model.created,
            ..Model::default()
        });
    }
    Snapshot {
        models: models.into_iter().map(|(name, model)| (name, Arc::new(model))).collect(),
        configured: configured.to_vec(),
        workers,
        renewed: Some(now),
        peopled,
    }
}

/// Whoever is there. Where everybody is missing at once, the bus may have come back empty a moment ago: for one
/// presence period that proves nothing, and those who were there count as there.
fn still_there(workers: &[WorkerPresence], before: &Snapshot) -> Vec<WorkerPresence> {
    let recently = before.peopled.is_some_and(|at| at.elapsed() < PRESENCE_PERIOD);
    if workers.is_empty() && recently { before.workers.clone() } else { workers.to_vec() }
}

fn describe(model: &mut Model, said: &ServedModel) {
    model.context = model.context.max(said.context);
    model.architecture.clone_from(&said.architecture);
    model.format.clone_from(&said.format);
}

fn unix_seconds() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(model: &str) -> WorkerPresence {
        let model = ServedModel { name: model.into(), context: 64, ..ServedModel::default() };
        WorkerPresence { id: format!("w-{}", model.name), models: vec![model], ..WorkerPresence::default() }
    }

    #[test]
    fn a_model_stays_known_when_the_bus_has_forgotten_it() {
        let before = merge(&[], &[worker("a"), worker("b")], &[], &Snapshot::default());
        // The bus came back empty, and only one worker has announced itself again.
        let now = merge(&[], &[worker("a")], &[], &before);
        let model = |name: &str| now.models[name].as_ref();
        assert!(model("a").served);
        assert!(!model("b").served && model("b").context == 64);
    }
}
