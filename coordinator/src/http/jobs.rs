//! Asynchronous jobs: submit, ask, attach from any coordinator, cancel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, LOCATION};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use stoker_shared::job::{Job, MAX_ID_BYTES, path_segment, token_channel};
use stoker_shared::outcome::{JobError, Outcome, code};
use stoker_shared::ports::{JobRow, JobState, StoredJob};
use time::OffsetDateTime;

use super::error::{Family, JOB_NOT_FOUND, Segment};
use super::sse::{self, Events, json_event, json_string};
use super::{App, body, traceparent};
use crate::closing::{self, Closed};
use crate::inbox::End;
use crate::prepare::{Defaults, Intent};
use crate::stored;

/// The answer of a job's own worker may come so much later than its deadline.
const GRACE: Duration = Duration::from_secs(10);
/// How long a stream is followed whose job does not say its deadline.
const UNKNOWN_DEADLINE: Duration = Duration::from_secs(86_400);

/// `POST /v1/jobs`.
pub async fn submit(State(app): State<Arc<App>>, request: Request) -> Response {
    Family::OpenAi.answer(submitted(&app, request).await)
}

async fn submitted(app: &App, request: Request) -> Result<Response, JobError> {
    let accepted = Instant::now();
    let (parts, body) = request.into_parts();
    let caller = app.admission.over_http(&parts.headers)?;
    let body = body::read(&parts, body).await?;
    let job: Job = stoker_shared::job::parse_json(&body)?;
    job.check()?;
    let id = chosen_id(&parts.headers, job.id.as_deref())?;
    let defaults = Defaults::openai(job.messages.is_some());
    let intent = Intent { job, caller, defaults, accepted, traceparent: traceparent(&parts.headers) };
    let queued = app.dispatch.enqueue(intent, id).await?;
    let location = HeaderValue::from_str(&format!("/v1/jobs/{}", path_segment(&queued.id)));
    let reply = json!({ "id": queued.id, "object": "job", "status": word(queued.state) });
    let mut response = (StatusCode::ACCEPTED, axum::Json(reply)).into_response();
    if let Ok(location) = location {
        response.headers_mut().insert(LOCATION, location);
    }
    Ok(response)
}

/// The id that the submitter chose: in the body, or as an idempotency key.
fn chosen_id(headers: &HeaderMap, in_body: Option<&str>) -> Result<Option<String>, JobError> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(in_body.map(str::to_owned)) };
    let key = key.to_str().ok().filter(|k| (1..=MAX_ID_BYTES).contains(&k.len())).ok_or_else(|| {
        let message = format!("Idempotency-Key must be 1 to {MAX_ID_BYTES} printable characters");
        JobError::field(code::INVALID_REQUEST, "Idempotency-Key", message)
    })?;
    match in_body {
        Some(id) if id != key => {
            let message = "id and Idempotency-Key differ; give one of them";
            Err(JobError::field(code::INVALID_REQUEST, "id", message))
        }
        _ => Ok(Some(key.to_owned())),
    }
}

/// `GET /v1/jobs/{id}`.
pub async fn show(State(app): State<Arc<App>>, Segment(id): Segment, headers: HeaderMap) -> Response {
    Family::OpenAi.answer(find(&app, &headers, &id).await.map(|row| shown(&row)))
}

async fn find(app: &App, headers: &HeaderMap, id: &str) -> Result<JobRow, JobError> {
    let caller = app.admission.over_http(headers)?;
    let row = app.dispatch.find(&caller.tenant, id).await?;
    row.ok_or_else(|| JobError::field(JOB_NOT_FOUND, "id", format!("there is no job {id:?}")))
}

/// A job's state; once it is done, its outcome's own bytes follow.
fn shown(row: &JobRow) -> Response {
    let outcome = row.outcome.as_deref().filter(|_| row.state == JobState::Done);
    let Some(fields) = outcome.and_then(|bytes| bytes.strip_prefix(b"{")) else {
        let reply = json!({
            "id": row.job_id, "object": "job", "status": word(row.state), "attempts": attempts(row),
        });
        return axum::Json(reply).into_response();
    };
    let mut body = b"{\"object\":\"job\",\"status\":\"done\",".to_vec();
    body.extend_from_slice(fields);
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

fn attempts(row: &JobRow) -> u32 {
    row.interruptions + u32::from(row.state == JobState::Running && row.owner.is_some())
}

fn word(state: JobState) -> &'static str {
    match state {
        JobState::Waiting => "waiting",
        JobState::Running => "running",
        JobState::Done => "done",
    }
}

/// `DELETE /v1/jobs/{id}`. A job that nobody has started ends at once; a running one within a step.
pub async fn cancel(State(app): State<Arc<App>>, Segment(id): Segment, headers: HeaderMap) -> Response {
    Family::OpenAi.answer(cancelled(&app, &headers, &id).await)
}

async fn cancelled(app: &App, headers: &HeaderMap, id: &str) -> Result<Response, JobError> {
    let row = find(app, headers, id).await?;
    let status = match row.state {
        JobState::Done => "done",
        JobState::Waiting if ended_here(app, &row).await => "done",
        JobState::Waiting | JobState::Running => {
            let ttl = deadline(&row).saturating_duration_since(Instant::now()) + GRACE;
            app.dispatch.ports.bus.cancel(row.key, ttl).await.map_err(|e| {
                tracing::warn!(job = %row.key, "can't cancel: {e}");
                JobError::out_of_reach("bus")
            })?;
            "cancelling"
        }
    };
    let code = if status == "done" { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((code, axum::Json(json!({ "id": row.job_id, "object": "job", "status": status }))).into_response())
}

/// Ends a job that nobody has started; false if somebody has, meanwhile.
async fn ended_here(app: &App, row: &JobRow) -> bool {
    let Some(body) = row.body.clone() else { return false };
    let stored = StoredJob { key: row.key, body, headers: row.headers.clone() };
    let cancelled = JobError::new(code::CANCELLED, "the job was cancelled before it began");
    let Some(restored) = stored::restore(stored) else { return false };
    let dispatch = app.dispatch.clone();
    let closing = async move { closing::give_up(&dispatch, &restored, cancelled).await };
    // To its end, even if the client does not wait for it.
    match tokio::spawn(closing).await {
        Ok(Ok(Closed::Done { .. } | Closed::Already)) => true,
        Ok(Ok(Closed::Running)) | Err(_) => false,
        Ok(Err(e)) => {
            tracing::warn!(job = %row.key, "can't end a waiting job: {e}");
            false
        }
    }
}

fn body_of(row: &JobRow) -> Option<Job> {
    serde_json::from_slice(row.body.as_deref()?).ok()
}

/// When a job must be done; far away if its row does not say.
fn deadline(row: &JobRow) -> Instant {
    let left = body_of(row).and_then(|job| job.deadline_at()).map(|at| at - OffsetDateTime::now_utc());
    let left = left.map_or(UNKNOWN_DEADLINE, |left| left.try_into().unwrap_or_default());
    Instant::now() + left
}

/// `GET /v1/jobs/{id}/stream`: from the beginning, or from the byte that `Last-Event-ID` names.
pub async fn stream(State(app): State<Arc<App>>, Segment(id): Segment, headers: HeaderMap) -> Response {
    Family::OpenAi.answer(attached(&app, &headers, &id).await)
}

async fn attached(app: &App, headers: &HeaderMap, id: &str) -> Result<Response, JobError> {
    let at = match headers.get("last-event-id") {
        None => 0,
        Some(value) => value.to_str().ok().and_then(|v| v.parse().ok()).ok_or_else(|| {
            let message = "Last-Event-ID must be an offset in bytes, as the events' ids are";
            JobError::field(code::INVALID_REQUEST, "Last-Event-ID", message)
        })?,
    };
    let row = find(app, headers, id).await?;
    let inbox = &app.dispatch.inbox;
    let done = row.outcome.as_deref().filter(|_| row.state == JobState::Done);
    let outcome: Option<Outcome> = done.and_then(|bytes| serde_json::from_slice(bytes).ok());
    let mut reader = match outcome {
        Some(Outcome { text, finish_reason, usage, error, .. }) => {
            inbox.finished(row.key, text, End::new(finish_reason, usage, error))
        }
        None => {
            // The row of a job that came by the front door has no body; the log says where its worker speaks.
            let channel = match body_of(&row) {
                Some(job) => job.stream_to,
                None => app
                    .dispatch
                    .ports
                    .bus
                    .read_log(row.key)
                    .await
                    .ok()
                    .flatten()
                    .map(|log| log.header.channel),
            };
            let channel = channel.filter(|channel| !channel.is_empty());
            let channel = channel.unwrap_or_else(|| token_channel(&row.job_id));
            inbox.attach(row.key, channel, deadline(&row) + GRACE, at)
        }
    };
    reader.start_at(at);
    Ok(sse::respond_now(reader, Offsets { at }))
}

/// Events whose ids are offsets in the whole text, so that a client that was cut off goes on where it was.
struct Offsets {
    at: usize,
}

impl Offsets {
    fn id(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("id: {}\n", self.at).as_bytes());
    }
}

impl Events for Offsets {
    fn text(&mut self, text: &str, out: &mut Vec<u8>) {
        self.at += text.len();
        self.id(out);
        out.extend_from_slice(b"data: {\"text\":");
        json_string(text, out);
        out.extend_from_slice(b"}\n\n");
    }

    fn done(&mut self, end: &End, out: &mut Vec<u8>) {
        self.id(out);
        json_event(&json!({ "finishReason": end.reason, "usage": end.usage }), out);
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn failed(&mut self, error: &JobError, out: &mut Vec<u8>) {
        self.id(out);
        let body: Value = Family::OpenAi.body(error);
        json_event(&body, out);
    }
}
