//! The environment's part of a configuration.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Config;
use super::error::{ConfigError, expected};
use super::load::Known;

/// Names that the integration guide's services use, and others that go without our prefix.
const COMMON: [(&str, &str); 6] = [
    ("REDIS_URL", "services.redis_url"),
    ("POSTGRES_URL", "services.postgres_url"),
    ("AMQP_URL", "services.amqp_url"),
    ("ALLOWED_ORIGINS", "http.allowed_origins"),
    ("LLM_MODELS", "coordinator.models"),
    ("LLM_STRATEGY", "coordinator.strategy"),
];
/// What our own variables start with.
pub(super) const PREFIX: &str = "STOKER_";

/// Variables that commands read themselves: which file to load, where a coordinator is, and which instruction set the CPU's
/// kernels use.
const OF_COMMANDS: [&str; 3] = ["STOKER_CONFIG", "STOKER_URL", "STOKER_CPU_ISA"];

/// This process's variables, without those that are not Unicode: none of ours is.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// The variables that may concern us.
pub(super) struct Variables {
    set: BTreeMap<String, String>,
    /// Names of those that Kubernetes has set for a Service.
    links: Vec<String>,
}

impl Variables {
    pub(super) fn new(env: impl IntoIterator<Item = (String, String)>) -> Self {
        let filled = env.into_iter().filter(|(_, value)| !value.trim().is_empty());
        let (links, set): (BTreeMap<_, _>, BTreeMap<_, _>) =
            filled.partition(|(name, value)| is_service_link(name, value));
        Self { set, links: links.into_keys().collect() }
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.set.get(name).map(|value| value.trim())
    }

    /// For the log, at start.
    pub(super) fn warnings(&self) -> Vec<String> {
        if self.links.is_empty() {
            return Vec::new();
        }
        vec![format!(
            "ignoring {}: Kubernetes sets such variables for a Service whose name starts with `stoker`; \
             set `enableServiceLinks: false` in the pod's spec",
            self.links.join(", ")
        )]
    }
}

/// Whether Kubernetes set it for a Service: `…_SERVICE_HOST`, `…_SERVICE_PORT`, `…_SERVICE_PORT_<NAME>`,
/// `…_PORT=tcp://…`, `…_PORT_<N>_TCP`, and of the last `…_PROTO`, `…_PORT`, `…_ADDR`.
fn is_service_link(name: &str, value: &str) -> bool {
    if !name.starts_with(PREFIX) {
        return false;
    }
    if name.ends_with("_SERVICE_HOST") || name.ends_with("_SERVICE_PORT") || name.contains("_SERVICE_PORT_") {
        return true;
    }
    if name.ends_with("_PORT") && value.contains("://") {
        return true;
    }
    name.match_indices("_PORT_").any(|(at, found)| {
        let mut words = name[at + found.len()..].split('_');
        let number = words.next().is_some_and(|w| !w.is_empty() && w.bytes().all(|b| b.is_ascii_digit()));
        let protocol = matches!(words.next(), Some("TCP" | "UDP" | "SCTP"));
        let rest = matches!(words.next(), None | Some("PROTO" | "PORT" | "ADDR"));
        number && protocol && rest
    })
}

/// Lays the environment over a configuration.
pub(super) fn apply(base: Config, variables: &Variables, known: &Known) -> Result<Config, ConfigError> {
    let mut config = Overlay { config: base };
    if let Some(value) = variables.get("PORT") {
        if value.contains("://") {
            return Err(ConfigError::ServicePort { value: value.into() });
        }
        config.set("PORT", value, "http.port")?;
    }
    for (name, key) in COMMON {
        if let Some(value) = variables.get(name) {
            config.set(name, value, key)?;
        }
    }
    // As the guide reads it: one word turns it off, any other leaves it on.
    if let Some(value) = variables.get("LLM_CACHING") {
        config.config.coordinator.caching = !value.eq_ignore_ascii_case("false");
    }
    let mut ours: BTreeMap<String, &str> =
        known.keys.iter().map(|key| (Known::variable(key), key.as_str())).collect();
    ours.insert("STOKER_LOG".into(), "log.filter");
    for (name, value) in &variables.set {
        match ours.get(name) {
            Some(key) => config.set(name, value.trim(), key)?,
            None if OF_COMMANDS.contains(&name.as_str()) || !name.starts_with(PREFIX) => {}
            None => {
                let names = ours.keys().map(String::as_str).chain(OF_COMMANDS).chain(["PORT"]);
                let nearest = names.min_by_key(|known| strsim::osa_distance(name, known));
                let nearest = nearest.unwrap_or_default().to_owned();
                return Err(ConfigError::UnknownVariable { name: name.clone(), nearest });
            }
        }
    }
    Ok(config.config)
}

struct Overlay {
    config: Config,
}

impl Overlay {
    /// Sets one key. What type it has, the configuration's own deserializer decides: the text is offered as a string,
    /// then as what else it could be.
    fn set(&mut self, name: &str, text: &str, key: &str) -> Result<(), ConfigError> {
        let mut tree = serde_json::to_value(&self.config).unwrap_or_default();
        let pointer = format!("/{}", key.replace('.', "/"));
        let mut complaint = None;
        for candidate in candidates(text) {
            let is_number = candidate.is_number();
            if let Some(place) = tree.pointer_mut(&pointer) {
                *place = candidate;
            }
            match serde_json::from_value(tree.clone()) {
                Ok(config) => {
                    self.config = config;
                    return Ok(());
                }
                // Of a number, the number's complaint says more (its range), otherwise the string's.
                Err(e) if complaint.is_none() || is_number => complaint = Some(e),
                Err(_) => {}
            }
        }
        let expected = complaint.map(|e| expected(&e.to_string())).unwrap_or_default();
        Err(ConfigError::Variable { name: name.into(), value: text.into(), expected })
    }
}

/// What a variable's text may mean.
fn candidates(text: &str) -> Vec<Value> {
    let mut all = vec![Value::from(text)];
    all.extend(text.parse::<i64>().map(Value::from));
    all.extend(text.parse::<u64>().map(Value::from));
    all.extend(text.parse::<f64>().map(Value::from));
    all.extend(text.parse::<bool>().map(Value::from));
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    all.push(items.map(Value::from).collect());
    all
}
