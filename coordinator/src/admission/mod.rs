//! Who calls. The one place where a [`Caller`] is made, so that everything behind it (job keys, cache keys, rows) can
//! rely on the tenant. Without keys, every caller is the configured default tenant.

use std::sync::Arc;

use axum::http::HeaderMap;
use stoker_shared::outcome::JobError;

/// Who pays, and who asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Who pays, and whose jobs and cached answers can be seen.
    pub tenant: Arc<str>,
    /// Key used, if any.
    pub api_key_id: Option<String>,
    /// A label that a gateway put into `X-User-ID`; not an authority.
    pub user: Option<String>,
}

/// Lets callers in.
#[derive(Debug)]
pub struct Admission {
    default_tenant: Arc<str>,
}

impl Admission {
    /// Everybody is `default_tenant`.
    pub fn new(default_tenant: &str) -> Self {
        Self { default_tenant: default_tenant.into() }
    }

    /// Who sends an HTTP request with these headers.
    pub fn over_http(&self, headers: &HeaderMap) -> Result<Caller, JobError> {
        let user = headers.get("x-user-id").and_then(|v| v.to_str().ok()).filter(|u| !u.is_empty());
        let user = user.map(str::to_owned);
        Ok(Caller { tenant: self.default_tenant.clone(), api_key_id: None, user })
    }

    /// Who put a message on the front door: the `user_id` that the broker has checked, if there is one.
    pub fn over_amqp(&self, user_id: Option<&str>) -> Caller {
        let tenant = user_id.map_or_else(|| self.default_tenant.clone(), Arc::from);
        Caller { tenant, api_key_id: None, user: None }
    }
}
