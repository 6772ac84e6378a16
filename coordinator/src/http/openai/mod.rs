//! OpenAI's routes: their SDKs work unchanged.

mod reply;
mod request;

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use stoker_shared::outcome::{JobError, code};

pub use request::in_their_words;

use super::error::{Family, Segment};
use super::{App, body, label, sse, traceparent};
use crate::prepare::{Defaults, Intent};
use crate::routing::Model;
use reply::{Chunks, Route, whole};
use request::Asked;

/// `POST /v1/chat/completions`.
pub async fn chat(State(app): State<Arc<App>>, request: Request) -> Response {
    Family::OpenAi.answer(generate(&app, request, Route::Chat).await)
}

/// `POST /v1/completions`.
pub async fn completions(State(app): State<Arc<App>>, request: Request) -> Response {
    Family::OpenAi.answer(generate(&app, request, Route::Completion).await)
}

async fn generate(app: &App, request: Request, route: Route) -> Result<Response, JobError> {
    let accepted = Instant::now();
    let (parts, body) = request.into_parts();
    let caller = app.admission.over_http(&parts.headers)?;
    let body = body::read(&parts, body).await?;
    let Asked { job, stream, include_usage, newer } = match route {
        Route::Chat => request::chat(&body)?,
        Route::Completion => request::completion(&body)?,
    };
    let defaults = Defaults::openai(route == Route::Chat);
    let intent = Intent { job, caller, defaults, accepted, traceparent: traceparent(&parts.headers) };
    let submitted = app.dispatch.connect(intent, !stream).await;
    let mut ticket = submitted.map_err(|e| in_their_words(e, newer))?;
    let model = ticket.model.name.clone();
    let response = if stream {
        let chunks = Chunks::new(route, &ticket, include_usage);
        sse::respond(ticket, chunks, Family::OpenAi).await
    } else {
        let (text, end) = ticket.whole().await?;
        axum::Json(whole(route, &ticket, &text, &end)).into_response()
    };
    Ok(label(response, model))
}

/// `GET /v1/models`.
pub async fn models(State(app): State<Arc<App>>) -> Response {
    let snapshot = app.dispatch.router.registry.snapshot();
    let data: Vec<Value> = snapshot.in_order().filter(|m| m.takes_jobs()).map(object).collect();
    axum::Json(json!({ "object": "list", "data": data })).into_response()
}

/// `GET /v1/models/{id}`.
pub async fn model(State(app): State<Arc<App>>, Segment(id): Segment) -> Response {
    let snapshot = app.dispatch.router.registry.snapshot();
    match snapshot.models.get(id.as_str()).filter(|m| m.takes_jobs()) {
        Some(model) => axum::Json(object(model)).into_response(),
        None => {
            let message = format!("the model {id:?} does not exist; see GET /v1/models");
            Family::OpenAi.refuse(&JobError::field(code::MODEL_NOT_FOUND, "model", message))
        }
    }
}

fn object(model: &Model) -> Value {
    json!({ "id": &*model.name, "object": "model", "created": model.created, "owned_by": "stoker" })
}
