//! The coordinator: a thin HTTP ingress and a dispatcher. It knows nothing of models and runs none; it sees the
//! services only through the ports of [`stoker_shared::ports`].
//!
//! A request flows one way: [`http`] turns JSON into a job, [`admission`] lets its caller in, [`routing`] gives it a
//! model, [`dispatch`] asks the cache, joins an identical job or publishes it, and the [`inbox`] hands the worker's
//! frames to whoever waits. Beside that, [`front_door`] takes jobs from services that enqueue by themselves, [`dead`]
//! those that the broker gave up, and [`sweeper`] publishes again what was accepted and never confirmed, and ends what
//! nobody ran in time.

mod admission;
mod billing;
mod closing;
mod dead;
mod dispatch;
mod front_door;
mod http;
mod inbox;
mod letters;
mod outcome;
mod prepare;
mod presence;
mod routing;
mod stored;
mod sweeper;
mod ticket;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt;
use metrics_exporter_prometheus::PrometheusHandle;
use stoker_shared::backoff::Backoff;
use stoker_shared::config::Config;
use stoker_shared::ports::{Ledger, Ports, bring_up_schema};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use crate::admission::Admission;
use crate::billing::Billing;
use crate::dispatch::Dispatch;
use crate::http::App;
use crate::inbox::Inbox;
use crate::routing::{Registry, Router};

/// Port that a coordinator listens on unless configured.
pub const DEFAULT_PORT: u16 = 8080;
/// What the services get to be there at start; then the coordinator serves all the same, and says what is missing.
const START_LIMIT: Duration = Duration::from_secs(5);
/// Pauses between attempts while a service is away.
const BACKOFF: Backoff = Backoff::new().longest(Duration::from_secs(5));
/// Streams that are running when the process is told to end may go on for so long.
const GOODBYE: Duration = Duration::from_secs(25);
/// Rows that nobody waits for have so long at the end.
const LAST_ROWS: Duration = Duration::from_secs(5);
/// How often recorded metrics are folded together.
const UPKEEP: Duration = Duration::from_secs(5);

/// Why a coordinator could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address can't be listened on; choose another with `PORT`, or stop what uses it.
    #[error("can't listen on {address}: {source}")]
    Listen {
        /// Address.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A running coordinator.
pub struct Coordinator {
    id: String,
    addr: SocketAddr,
    dispatch: Arc<Dispatch>,
    /// Stops taking in: connections, front door.
    stop: CancellationToken,
    server: JoinHandle<()>,
    tasks: JoinSet<()>,
    billing: JoinHandle<()>,
    /// No more rows are handed in.
    last_call: CancellationToken,
    /// A coordinator that is dropped without a shutdown takes nothing more in, either.
    _stop: DropGuard,
}

impl Coordinator {
    /// Starts listening, and everything that goes on beside. Services that are down do not keep it from starting: it
    /// answers 503 until they are there.
    pub async fn start(
        config: Config,
        ports: Ports,
        metrics: Option<PrometheusHandle>,
    ) -> Result<Self, Error> {
        let id = format!("c-{}", Uuid::new_v4());
        let address = format!("{}:{}", config.http.host, config.http.port.unwrap_or(DEFAULT_PORT));
        let listen = |source| Error::Listen { address: address.clone(), source };
        let listener = TcpListener::bind(&address).await.map_err(listen)?;
        let addr = listener.local_addr().map_err(listen)?;

        let mut tasks = JoinSet::new();
        start_on_schema(&ports.ledger, &mut tasks).await;
        let (inbox, inbox_tasks) = Inbox::new(&id, ports.clone());
        tasks.spawn(inbox_tasks.run());
        let registry = Registry::new(ports.clone(), &config.coordinator.models);
        registry.refresh().await;
        registry.declare_new().await;
        tasks.spawn(registry.clone().run());
        let (billing, rows) = Billing::new();
        let last_call = CancellationToken::new();
        let store_prompts = config.coordinator.store_prompts;
        let rows = tokio::spawn(billing::run(ports.clone(), store_prompts, rows, last_call.clone()));
        let router = Router::new(registry, config.coordinator.strategy);
        let origins = config.http.allowed_origins.clone();
        let admission = Arc::new(Admission::new(&config.coordinator.default_tenant));
        let dispatch = Arc::new(Dispatch { id: id.clone(), config, ports, inbox, router, billing });

        let stop = CancellationToken::new();
        tasks.spawn(presence::run(dispatch.clone()));
        tasks.spawn(presence::watch_depths(dispatch.clone()));
        tasks.spawn(sweeper::run(dispatch.clone()));
        tasks.spawn(front_door::run(dispatch.clone(), admission.clone(), stop.clone()));
        tasks.spawn(dead::run(dispatch.clone(), stop.clone()));
        if let Some(handle) = metrics.clone() {
            tasks.spawn(upkeep(handle));
        }
        join_fleet(&dispatch).await;
        let app = App { dispatch: dispatch.clone(), admission, metrics, stop: stop.clone() };
        let server = tokio::spawn(serve(listener, http::router(Arc::new(app), &origins), stop.clone()));
        tracing::info!(coordinator = id, %addr, "listening");
        let on_drop = stop.clone().drop_guard();
        Ok(Self { id, addr, dispatch, stop, server, tasks, billing: rows, last_call, _stop: on_drop })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its name in the fleet, new at every start.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Takes nothing more in, lets running streams end (for a while), and leaves the fleet.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        if tokio::time::timeout(GOODBYE, &mut self.server).await.is_err() {
            tracing::warn!("streams are cut off, they took too long to end");
            self.server.abort();
        }
        self.tasks.shutdown().await;
        if let Err(e) = self.dispatch.ports.bus.retire(&self.id).await {
            tracing::debug!("can't withdraw this coordinator's presence, it will expire: {e}");
        }
        self.last_call.cancel();
        if tokio::time::timeout(LAST_ROWS, &mut self.billing).await.is_err() {
            tracing::error!("rows of requests that no worker ran for are lost, the ledger did not take them");
            self.billing.abort();
        }
    }
}

/// Brings the schema up to date: now if the ledger is there, else as soon as it is.
async fn start_on_schema(ledger: &Arc<dyn Ledger>, tasks: &mut JoinSet<()>) {
    let ledger = ledger.clone();
    let (done, is_done) = tokio::sync::oneshot::channel();
    tasks.spawn(async move {
        bring_up_schema(&*ledger).await;
        let _ = done.send(());
    });
    if tokio::time::timeout(START_LIMIT, is_done).await.is_err() {
        tracing::warn!("the ledger is not there yet; its schema is brought up to date when it is");
    }
}

/// Waits until this coordinator is known and its subscription for tokens stands, but not for ever.
async fn join_fleet(dispatch: &Dispatch) {
    let joined = async {
        presence::announce(dispatch).await;
        while !dispatch.inbox.listening() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if tokio::time::timeout(START_LIMIT, joined).await.is_err() {
        tracing::warn!("the bus is not there yet: requests are answered 503 until it is");
    }
}

/// Serves until told to stop, then until the last connection is done.
async fn serve(listener: TcpListener, router: axum::Router, stop: CancellationToken) {
    // An event must not wait for the acknowledgement of the one before.
    let listener = listener.tap_io(|connection| {
        if let Err(e) = connection.set_nodelay(true) {
            tracing::debug!("TCP_NODELAY can't be set: {e}");
        }
    });
    let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await;
    if let Err(e) = served {
        tracing::error!("the HTTP server ended: {e}");
    }
}

/// Folds recorded values together, which nobody else does.
async fn upkeep(handle: PrometheusHandle) {
    let mut ticks = tokio::time::interval(UPKEEP);
    loop {
        ticks.tick().await;
        handle.run_upkeep();
    }
}
