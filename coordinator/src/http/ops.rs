//! For whoever runs the fleet: probes and metrics.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use stoker_shared::ports::PortResult;

use super::App;

/// A service that takes longer is not ready.
const PATIENCE: Duration = Duration::from_secs(2);

/// `GET /healthz/live`: the process answers.
pub async fn live() -> &'static str {
    "ok\n"
}

/// `GET /healthz/ready`: all three services answer, and the subscription for tokens stands.
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    let ports = &app.dispatch.ports;
    let (queue, bus, ledger) =
        tokio::join!(check(ports.queue.ready()), check(ports.bus.ready()), check(ports.ledger.ready()));
    let listening = app.dispatch.inbox.listening() && !app.stopping();
    let ready = listening && [&queue, &bus, &ledger].iter().all(|service| *service == "ok");
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body =
        json!({ "ready": ready, "queue": queue, "bus": bus, "ledger": ledger, "listening": listening });
    (status, axum::Json(body)).into_response()
}

async fn check(ready: impl Future<Output = PortResult<()>>) -> String {
    match tokio::time::timeout(PATIENCE, ready).await {
        Ok(Ok(())) => "ok".into(),
        Ok(Err(e)) => e.to_string(),
        Err(_) => "does not answer".into(),
    }
}

/// `GET /metrics`.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    match &app.metrics {
        Some(handle) => {
            ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], handle.render()).into_response()
        }
        None => (StatusCode::SERVICE_UNAVAILABLE, "this process records no metrics\n").into_response(),
    }
}
