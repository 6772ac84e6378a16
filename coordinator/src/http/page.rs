//! What people see who open the coordinator in a browser: a small playground, and the API's own description.

use axum::http::header::CONTENT_TYPE;
use axum::response::{Html, IntoResponse, Response};

/// `GET /`.
pub async fn playground() -> Html<&'static str> {
    Html(include_str!("page.html"))
}

/// `GET /openapi.json`.
pub async fn openapi() -> Response {
    ([(CONTENT_TYPE, "application/json")], include_str!("openapi.json")).into_response()
}
