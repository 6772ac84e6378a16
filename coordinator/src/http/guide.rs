//! The integration guide's routes, under `/api` and `/api/llm`: its React hooks, Kong plugin and nginx file work
//! unchanged.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use stoker_shared::job::Job;
use stoker_shared::outcome::{JobError, code};
use time::OffsetDateTime;

use super::error::Family;
use super::sse::{Events, json_event, json_string};
use super::{App, body, label, sse, traceparent};
use crate::inbox::End;
use crate::prepare::{Defaults, Intent, rfc3339};
use crate::ticket::Ticket;

/// `POST /api/generate`.
pub async fn generate(State(app): State<Arc<App>>, request: Request) -> Response {
    let result = async {
        let mut ticket = submit(&app, request, true).await?;
        let (text, end) = ticket.whole().await?;
        let model = ticket.model.name.clone();
        Ok(label(axum::Json(reply(&ticket, &text, &end)).into_response(), model))
    };
    Family::Guide.answer(result.await)
}

/// `POST /api/stream`.
pub async fn stream(State(app): State<Arc<App>>, request: Request) -> Response {
    let result = async {
        let ticket = submit(&app, request, false).await?;
        let model = ticket.model.name.clone();
        Ok(label(sse::respond(ticket, Tokens, Family::Guide).await, model))
    };
    Family::Guide.answer(result.await)
}

async fn submit(app: &App, request: Request, only_end: bool) -> Result<Ticket, JobError> {
    let accepted = Instant::now();
    let (parts, body) = request.into_parts();
    let caller = app.admission.over_http(&parts.headers)?;
    let body = body::read(&parts, body).await?;
    let limits = &app.dispatch.config.limits;
    let job = Job::parse(&body, limits)?;
    let defaults = Defaults::guide(limits);
    let intent = Intent { job, caller, defaults, accepted, traceparent: traceparent(&parts.headers) };
    app.dispatch.connect(intent, only_end).await
}

/// One object for both of the guide's readers.
fn reply(ticket: &Ticket, text: &str, end: &End) -> Value {
    let model = &*ticket.model.name;
    let elapsed = ticket.elapsed_ms();
    let tokens = end.usage.completion_tokens;
    json!({
        "success": true,
        "id": ticket.key,
        "text": text,
        "tokens": tokens,
        "finishReason": end.reason,
        "usage": end.usage,
        "metadata": {
            "model": model,
            "executionTime": elapsed,
            "timeToFirstToken": ticket.first_token_ms(),
            "cached": ticket.cached,
        },
        "result": { "text": text, "tokens": tokens, "model": model, "executionTime": elapsed },
    })
}

/// The guide's events.
struct Tokens;

impl Events for Tokens {
    fn text(&mut self, text: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: {\"token\":");
        json_string(text, out);
        out.extend_from_slice(b"}\n\n");
    }

    fn done(&mut self, _end: &End, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn failed(&mut self, error: &JobError, out: &mut Vec<u8>) {
        json_event(&json!({ "error": error.message, "code": error.code }), out);
    }
}

/// `GET /api/models`.
pub async fn models(State(app): State<Arc<App>>) -> Response {
    let snapshot = app.dispatch.router.registry.snapshot();
    let models: Vec<Value> = snapshot
        .in_order()
        .map(|m| {
            json!({
                "name": &*m.name,
                "capabilities": {
                    "chat": true, "completion": true, "streaming": true,
                    "contextLength": m.context, "architecture": m.architecture, "format": m.format,
                },
                "status": if m.served { "ready" } else { "unavailable" },
            })
        })
        .collect();
    axum::Json(json!({ "success": true, "models": models })).into_response()
}

/// What `GET /api/usage` may ask.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct UsageQuery {
    /// Of this label only.
    user_id: Option<String>,
    /// `1h`, `24h`, `7d`, `2w`.
    timeframe: Option<String>,
}

/// `GET /api/usage`.
pub async fn usage(
    State(app): State<Arc<App>>,
    query: Result<Query<UsageQuery>, QueryRejection>,
    headers: axum::http::HeaderMap,
) -> Response {
    let result = async {
        let caller = app.admission.over_http(&headers)?;
        let Query(query) = query.map_err(|e| JobError::new(code::INVALID_REQUEST, e.body_text()))?;
        let timeframe = query.timeframe.as_deref().unwrap_or("24h");
        let seconds = seconds(timeframe).ok_or_else(|| {
            let message = "timeframe must be a number of h, d or w, such as 24h";
            JobError::field(code::INVALID_REQUEST, "timeframe", message)
        })?;
        let user = query.user_id.clone().or(caller.user);
        let usage = app.usage(&caller.tenant, user.as_deref(), seconds).await?;
        Ok(axum::Json(json!({ "success": true, "timeframe": timeframe, "userId": user, "usage": usage })))
    };
    Family::Guide.answer(result.await.map(IntoResponse::into_response))
}

/// `GET /api/metrics`: the last hour, and who is there now.
pub async fn metrics(State(app): State<Arc<App>>, headers: axum::http::HeaderMap) -> Response {
    let result = async {
        let caller = app.admission.over_http(&headers)?;
        let usage = app.usage(&caller.tenant, None, 3600).await?;
        let snapshot = app.dispatch.router.registry.snapshot();
        Ok(axum::Json(json!({
            "success": true,
            "metrics": {
                "timeframe": "1h",
                "totalRequests": usage.request_count,
                "totalTokens": usage.total_tokens,
                "promptTokens": usage.prompt_tokens,
                "avgExecutionTime": usage.avg_execution_time,
                "models": usage.models_used,
                "waiting": app.dispatch.inbox.waiting(),
                "workers": snapshot.workers,
            },
        })))
    };
    Family::Guide.answer(result.await.map(IntoResponse::into_response))
}

/// `GET /health`: always 200.
pub async fn health(State(app): State<Arc<App>>) -> Response {
    let snapshot = app.dispatch.router.registry.snapshot();
    let connected = app.dispatch.inbox.listening() && !snapshot.is_stale();
    let served = snapshot.models.values().any(|m| m.served);
    axum::Json(json!({
        "status": if connected && served { "healthy" } else { "degraded" },
        "timestamp": rfc3339(OffsetDateTime::now_utc()),
        "router": connected,
        "models": snapshot.models.values().filter(|m| m.served).count(),
        "workers": snapshot.workers.len(),
    }))
    .into_response()
}

/// Seconds of the guide's notation.
fn seconds(timeframe: &str) -> Option<u64> {
    let (number, unit) = timeframe.split_at_checked(timeframe.len().checked_sub(1)?)?;
    let unit = match unit {
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return None,
    };
    number.parse::<u64>().ok().filter(|n| (1..=10_000).contains(n)).map(|n| n * unit)
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn timeframes_are_the_guides() {
        assert_eq!(seconds("24h"), Some(86_400));
        assert_eq!(seconds("2w"), Some(1_209_600));
        for wrong in ["", "h", "1", "-1h", "1y", "é", "99999999999999999999h", "0h"] {
            assert_eq!(seconds(wrong), None, "{wrong}");
        }
    }
}
