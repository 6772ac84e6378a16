//! Errors in the shapes of the two families of routes: OpenAI's and the guide's.

use axum::extract::{FromRequestParts, Path};
use axum::http::header::{ALLOW, RETRY_AFTER};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use stoker_shared::outcome::{JobError, code};

/// Nothing has this path.
pub const NOT_FOUND: &str = "not_found";
/// The path is right, the method is not.
pub const METHOD_NOT_ALLOWED: &str = "method_not_allowed";
/// The body is over the limit.
pub const TOO_LARGE: &str = "request_too_large";
/// There is no such job.
pub const JOB_NOT_FOUND: &str = "job_not_found";

/// Tells OpenAI's SDKs not to.
pub const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Whose shapes a route speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `{"error": {"message", "type", "param", "code"}}`.
    OpenAi,
    /// `{"success": false, "error", "code"}`.
    Guide,
}

impl Family {
    /// The family that a path belongs to.
    pub fn of(path: &str) -> Self {
        if path.starts_with("/api/") || path == "/api" || path == "/health" {
            Self::Guide
        } else {
            Self::OpenAi
        }
    }

    /// An error as this family's JSON.
    pub fn body(self, error: &JobError) -> Value {
        let JobError { code, message, param } = error;
        match self {
            Self::OpenAi => {
                let kind =
                    if status(code).is_client_error() { "invalid_request_error" } else { "server_error" };
                json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
            }
            Self::Guide => json!({ "success": false, "error": message, "code": code }),
        }
    }

    /// An error as a response.
    pub fn refuse(self, error: &JobError) -> Response {
        let mut response = (status(&error.code), axum::Json(self.body(error))).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = retry_after(&error.code) {
            headers.insert(RETRY_AFTER, HeaderValue::from_static(seconds));
        }
        if !worth_retrying(&error.code) {
            // OpenAI's SDKs would run it again on their own.
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }

    /// A handler's result as a response.
    pub fn answer(self, result: Result<Response, JobError>) -> Response {
        result.unwrap_or_else(|error| self.refuse(&error))
    }
}

/// The id in a path.
pub struct Segment(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(segment)) => Ok(Self(segment)),
            Err(e) => {
                let error = JobError::new(code::INVALID_REQUEST, e.body_text());
                Err(Family::of(parts.uri.path()).refuse(&error))
            }
        }
    }
}

/// The status of an error.
pub fn status(error_code: &str) -> StatusCode {
    match error_code {
        code::INVALID_REQUEST | code::CONTEXT_LENGTH => StatusCode::BAD_REQUEST,
        code::MODEL_NOT_FOUND | JOB_NOT_FOUND | NOT_FOUND => StatusCode::NOT_FOUND,
        METHOD_NOT_ALLOWED => StatusCode::METHOD_NOT_ALLOWED,
        code::ID_TAKEN => StatusCode::CONFLICT,
        TOO_LARGE => StatusCode::PAYLOAD_TOO_LARGE,
        code::MODEL_UNAVAILABLE | code::QUEUE_FULL | code::SERVICE_UNAVAILABLE | code::CANCELLED => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        code::DEADLINE => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn retry_after(error_code: &str) -> Option<&'static str> {
    match error_code {
        code::QUEUE_FULL => Some("2"),
        code::MODEL_UNAVAILABLE => Some("5"),
        code::SERVICE_UNAVAILABLE | code::CANCELLED => Some("2"),
        _ => None,
    }
}

fn worth_retrying(error_code: &str) -> bool {
    !matches!(error_code, code::DEADLINE | code::ID_TAKEN | code::POISON)
}

/// Nothing has this path.
pub fn not_found(method: &str, path: &str) -> Response {
    Family::of(path).refuse(&JobError::new(NOT_FOUND, format!("there is no {method} {path}")))
}

/// The path is right, the method is not. `allow` names those that are.
pub fn method_not_allowed(method: &str, path: &str, allow: Option<HeaderValue>) -> Response {
    let message = format!("{path} does not take {method}");
    let mut response = Family::of(path).refuse(&JobError::new(METHOD_NOT_ALLOWED, message));
    if let Some(allow) = allow {
        response.headers_mut().insert(ALLOW, allow);
    }
    response
}
