//! The worker's own HTTP: probes for an orchestrator, metrics for Prometheus.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use stoker_shared::config::Http;
use stoker_shared::ports::PortResult;
use tokio::net::TcpListener;
use tracing::error;

use crate::Error;
use crate::shared::Shared;

/// Where it listens unless configured otherwise.
const DEFAULT_PORT: u16 = 8081;
/// How long a service may take to say that it is ready.
const PATIENCE: Duration = Duration::from_secs(2);
const FOLD_PERIOD: Duration = Duration::from_secs(5);

/// Binds the listener: the configured port, else the default one, else (it is taken) any.
pub(crate) async fn bind(http: &Http) -> Result<(TcpListener, SocketAddr), Error> {
    let listen = async |port: u16| {
        let listener = TcpListener::bind((http.host.as_str(), port)).await?;
        let addr = listener.local_addr()?;
        Ok((listener, addr))
    };
    let port = http.port.unwrap_or(DEFAULT_PORT);
    let bound = match listen(port).await {
        Err(_) if http.port.is_none() => listen(0).await,
        bound => bound,
    };
    bound.map_err(|source| Error::Listen { address: format!("{}:{port}", http.host), source })
}

#[derive(Clone)]
struct Context {
    shared: Arc<Shared>,
    metrics: Option<PrometheusHandle>,
}

/// Serves as long as the worker lives.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>, metrics: Option<PrometheusHandle>) {
    if let Some(metrics) = metrics.clone() {
        shared.spawn(fold(metrics));
    }
    let router = Router::new()
        .route("/healthz/live", get(live))
        .route("/healthz/ready", get(ready))
        .route("/metrics", get(render))
        .with_state(Context { shared, metrics });
    if let Err(error) = axum::serve(listener, router).await {
        error!(%error, "the HTTP listener ended");
    }
}

/// Folds recorded values together from time to time, so that they don't pile up while nobody asks for them.
async fn fold(metrics: PrometheusHandle) {
    let mut ticks = tokio::time::interval(FOLD_PERIOD);
    loop {
        ticks.tick().await;
        metrics.run_upkeep();
    }
}

/// The process answers; it is not asked for more, since restarting it would not bring a service back.
async fn live() -> &'static str {
    "live\n"
}

/// Whether it takes jobs.
async fn ready(State(context): State<Context>) -> Response {
    let shared = &context.shared;
    let mut missing = Vec::new();
    if shared.draining.is_cancelled() {
        missing.push("draining".to_owned());
    }
    if shared.served().is_empty() {
        missing.push("no model is loaded yet".into());
    } else if !*shared.announced.borrow() {
        missing.push("not announced yet".into());
    }
    let ports = &shared.ports;
    let (queue, bus, ledger) =
        tokio::join!(patient(ports.queue.ready()), patient(ports.bus.ready()), patient(ports.ledger.ready()));
    missing.extend([queue, bus, ledger].into_iter().flatten());
    match missing.is_empty() {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, missing.join("\n") + "\n").into_response(),
    }
}

/// What a service lacks.
async fn patient(ready: impl Future<Output = PortResult<()>>) -> Option<String> {
    match tokio::time::timeout(PATIENCE, ready).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some("a service does not answer in time".into()),
    }
}

async fn render(State(context): State<Context>) -> Response {
    match &context.metrics {
        Some(metrics) => {
            let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
            (kind, metrics.render()).into_response()
        }
        None => (StatusCode::NOT_FOUND, "metrics are not recorded in this process\n").into_response(),
    }
}
