//! What the fleet says to itself about a job, beside the job: headers of the message on a work queue.

use std::collections::BTreeMap;

use uuid::Uuid;

/// Namespace of job keys made from other people's ids: UUIDv5(this, tenant NUL id).
const KEY_NAMESPACE: Uuid = Uuid::from_bytes([
    0x2f, 0x5b, 0x1d, 0x8e, 0x61, 0x0c, 0x4a, 0x0b, 0x9d, 0x3e, 0x77, 0x4f, 0x0a, 0x6c, 0x52, 0x91,
]);

/// The key of a job whose id its submitter chose.
pub fn key_of(tenant: &str, id: &str) -> Uuid {
    let mut name = Vec::with_capacity(tenant.len() + id.len() + 1);
    name.extend_from_slice(tenant.as_bytes());
    name.push(0);
    name.extend_from_slice(id.as_bytes());
    Uuid::new_v5(&KEY_NAMESPACE, &name)
}

/// The headers of a message on a work queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Names the job everywhere: log, cancel key, rows.
    pub key: Uuid,
    /// Who pays.
    pub tenant: String,
    /// The message will never be published again and its id was minted here: its first delivery may start at once.
    pub once: bool,
    /// It came through `llm.requests`: its outcome goes to `llm.responses`.
    pub front_door: bool,
    /// Hex SHA-256 of the body as its submitter meant it (see [`crate::job::Job::body_hash`]); empty in a message marked
    /// `once`, whose id nobody else can have chosen.
    pub body_hash: String,
    /// When the coordinator accepted it, Unix milliseconds.
    pub accepted_ms: u64,
    /// Under which `llm_cache` key the answer is to be kept; absent: nowhere.
    pub cache_key: Option<String>,
    /// The weights revision that `cache_key` was made for; a worker with another one must not keep the answer.
    pub revision: Option<String>,
    /// The coordinator whose client waits for it; absent for asynchronous jobs.
    pub coordinator: Option<String>,
}

impl Envelope {
    /// As message headers.
    pub fn to_headers(&self) -> BTreeMap<String, String> {
        let mut h = BTreeMap::new();
        let mut put = |name: &str, value: String| h.insert(format!("x-stoker-{name}"), value);
        put("key", self.key.to_string());
        put("tenant", self.tenant.clone());
        if self.once {
            put("once", "1".into());
        }
        if self.front_door {
            put("front-door", "1".into());
        }
        put("body-hash", self.body_hash.clone());
        put("accepted", self.accepted_ms.to_string());
        if let Some(k) = &self.cache_key {
            put("cache-key", k.clone());
        }
        if let Some(r) = &self.revision {
            put("revision", r.clone());
        }
        if let Some(c) = &self.coordinator {
            put("coordinator", c.clone());
        }
        h
    }

    /// From message headers; `None` if it was not published by a coordinator.
    pub fn from_headers(h: &BTreeMap<String, String>) -> Option<Self> {
        let get = |name: &str| h.get(&format!("x-stoker-{name}"));
        Some(Self {
            key: get("key")?.parse().ok()?,
            tenant: get("tenant")?.clone(),
            once: get("once").is_some(),
            front_door: get("front-door").is_some(),
            body_hash: get("body-hash")?.clone(),
            accepted_ms: get("accepted")?.parse().ok()?,
            cache_key: get("cache-key").cloned(),
            revision: get("revision").cloned(),
            coordinator: get("coordinator").cloned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_read_back() {
        let e = Envelope {
            key: key_of("t", "a"),
            tenant: "t".into(),
            once: true,
            front_door: false,
            body_hash: "00".into(),
            accepted_ms: 17,
            cache_key: Some("k".into()),
            revision: Some("r".into()),
            coordinator: None,
        };
        assert_eq!(Envelope::from_headers(&e.to_headers()), Some(e));
        assert_eq!(Envelope::from_headers(&BTreeMap::new()), None);
    }

    #[test]
    fn keys_tell_tenants_apart() {
        assert_eq!(key_of("a", "1"), key_of("a", "1"));
        assert_ne!(key_of("a", "1"), key_of("b", "1"));
        assert_ne!(key_of("a", "b1"), key_of("ab", "1"));
    }
}
