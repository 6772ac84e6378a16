//! The HTTP interface: shapes in, shapes out. What is decided about a request is decided in
//! [`admission`](crate::admission), [`routing`](crate::routing) and [`dispatch`](crate::dispatch).

mod body;
mod error;
mod guide;
mod jobs;
mod openai;
mod ops;
mod page;
mod sse;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{MatchedPath, Request};
use axum::http::header::{LOCATION, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use metrics::counter;
use metrics_exporter_prometheus::PrometheusHandle;
use stoker_shared::outcome::JobError;
use stoker_shared::ports::UsageSummary;
use stoker_shared::telemetry::metric;
use tokio_util::sync::CancellationToken;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use uuid::Uuid;

use self::error::SHOULD_RETRY;
use crate::admission::Admission;
use crate::dispatch::Dispatch;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The ledger has so long to sum usage up.
const USAGE_LIMIT: Duration = Duration::from_secs(10);

/// What handlers need.
pub struct App {
    /// Submits jobs.
    pub dispatch: Arc<Dispatch>,
    /// Lets callers in.
    pub admission: Arc<Admission>,
    /// The process's metrics.
    pub metrics: Option<PrometheusHandle>,
    /// Cancelled when the process is about to end.
    pub stop: CancellationToken,
}

impl App {
    /// Whether the process is about to end.
    fn stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    async fn usage(&self, tenant: &str, user: Option<&str>, seconds: u64) -> Result<UsageSummary, JobError> {
        let asked = self.dispatch.ports.ledger.usage(tenant, user, seconds);
        match tokio::time::timeout(USAGE_LIMIT, asked).await {
            Ok(Ok(usage)) => Ok(usage),
            failed => {
                tracing::warn!("usage can't be summed up: {failed:?}");
                Err(JobError::out_of_reach("database"))
            }
        }
    }
}

/// All routes.
pub fn router(app: Arc<App>, allowed_origins: &[String]) -> Router {
    let guide = Router::new()
        .route("/generate", post(guide::generate))
        .route("/stream", post(guide::stream))
        .route("/models", get(guide::models))
        .route("/metrics", get(guide::metrics))
        .route("/usage", get(guide::usage))
        .route("/health", get(guide::health));
    Router::new()
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*id}", get(openai::model))
        .route("/v1/jobs", post(jobs::submit))
        .route("/v1/jobs/{id}", get(jobs::show).delete(jobs::cancel))
        .route("/v1/jobs/{id}/stream", get(jobs::stream))
        .nest("/api", guide.clone())
        .nest("/api/llm", guide)
        .route("/health", get(guide::health))
        .route("/healthz/live", get(ops::live))
        .route("/healthz/ready", get(ops::ready))
        .route("/metrics", get(ops::metrics))
        .route("/openapi.json", get(page::openapi))
        .route("/", get(page::playground))
        .fallback(|request: Request| async move {
            error::not_found(request.method().as_str(), request.uri().path())
        })
        .method_not_allowed_fallback(|request: Request| async move {
            error::method_not_allowed(request.method().as_str(), request.uri().path(), None)
        })
        .layer(cors(allowed_origins))
        .layer(middleware::from_fn(accompany))
        .with_state(app)
}

/// Gives every response its `x-request-id`, and counts it.
async fn accompany(request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = request_id(request.headers());
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut response = next.run(request).await;
    let status = response.status();
    let model = response.extensions_mut().remove::<ModelLabel>().map_or_else(|| "".into(), |label| label.0);
    let route = route.as_ref().map_or("other", MatchedPath::as_str).to_owned();
    tracing::debug!(request = ?id, %method, route, status = status.as_u16(), elapsed = ?begun.elapsed(), "answered");
    let status = status_text(status.as_u16());
    counter!(metric::REQUESTS, "route" => route, "model" => model, "status" => status).increment(1);
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The client's own id, if it sent a fit one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(&REQUEST_ID).filter(|v| (1..=128).contains(&v.len()) && v.to_str().is_ok());
    given.cloned().unwrap_or_else(|| {
        let mut text = Uuid::encode_buffer();
        HeaderValue::from_str(Uuid::now_v7().hyphenated().encode_lower(&mut text))
            .unwrap_or(HeaderValue::from_static("unknown"))
    })
}

/// Statuses without an allocation each.
fn status_text(status: u16) -> std::borrow::Cow<'static, str> {
    match status {
        200 => "200".into(),
        202 => "202".into(),
        other => other.to_string().into(),
    }
}

/// The model that answered, for the count of requests.
#[derive(Clone)]
struct ModelLabel(Arc<str>);

/// Notes which model answered.
fn label(mut response: Response, model: Arc<str>) -> Response {
    response.extensions_mut().insert(ModelLabel(model));
    response
}

/// A W3C trace context, if it has the right form.
fn traceparent(headers: &HeaderMap) -> Option<String> {
    let value = headers.get("traceparent")?.to_str().ok()?;
    let digits = |part: &str, n: usize| part.len() == n && part.bytes().all(|b| b.is_ascii_hexdigit());
    let mut parts = value.split('-');
    let fits = digits(parts.next()?, 2)
        && digits(parts.next()?, 32)
        && digits(parts.next()?, 16)
        && digits(parts.next()?, 2)
        && parts.next().is_none();
    fits.then(|| value.to_owned())
}

/// Who may call from a browser, set in this one place.
fn cors(allowed: &[String]) -> CorsLayer {
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .expose_headers([REQUEST_ID, RETRY_AFTER, LOCATION, SHOULD_RETRY])
        .max_age(Duration::from_secs(3600));
    // SDKs send headers of their own, so whatever a browser asks for is allowed.
    let layer = layer.allow_headers(AllowHeaders::mirror_request());
    if allowed.iter().any(|origin| origin == "*") {
        return layer.allow_origin(AllowOrigin::any());
    }
    let origins =
        allowed.iter().filter_map(|origin| HeaderValue::from_str(origin.trim_end_matches('/')).ok());
    layer.allow_origin(AllowOrigin::list(origins)).allow_credentials(true)
}
