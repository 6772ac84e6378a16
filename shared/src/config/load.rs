//! Puts a configuration together: defaults, then the file, then the environment.
//!
//! What can be set is read off [`Config::default`] itself, so that a new field has its key and its variable without
//! further ado.

use std::path::{Path, PathBuf};

use serde_json::Value;
use toml::de::{DeTable, DeValue};

use super::Config;
use super::environment::{self, PREFIX, Variables};
use super::error::{ConfigError, expected};

impl Config {
    /// Loads a configuration: defaults, then `file` (or the one that `STOKER_CONFIG` names), then `env`. Variables:
    /// the integration guide's names (`PORT`, `REDIS_URL`, …), `AMQP_URL`, and `STOKER_<SECTION>_<FIELD>` for
    /// everything, which goes before the former. Empty variables count as absent. Lists are separated by commas.
    ///
    /// # Errors
    /// Names the place, what stands there, and what is expected or was probably meant.
    pub fn load(
        file: Option<&Path>,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let known = Known::new();
        let variables = Variables::new(env);
        let file = file.map(Path::to_owned).or_else(|| variables.get("STOKER_CONFIG").map(PathBuf::from));
        let base = match file {
            Some(file) => read(&file, &known)?,
            None => Self::default(),
        };
        let mut config = environment::apply(base, &variables, &known)?;
        config.warnings = variables.warnings();
        config.check()?;
        Ok(config)
    }

    /// What types can't say.
    fn check(&self) -> Result<(), ConfigError> {
        let unfit = |key: &'static str, value: String, expected: &str| {
            let variable = Known::variable(key);
            Err(ConfigError::Unfit { key, variable, value, expected: expected.into() })
        };
        let prefix = &self.services.prefix;
        let word = |c: char| c.is_ascii_graphic() && !matches!(c, '*' | '#' | ',');
        if prefix.is_empty() || prefix.len() > 64 || !prefix.chars().all(word) {
            let expected = "1 to 64 visible ASCII characters without `*`, `#` and `,`";
            return unfit("services.prefix", format!("{prefix:?}"), expected);
        }
        let worker = &self.worker;
        for (key, value) in [
            ("worker.slots", worker.slots.map(u64::from)),
            ("worker.threads", worker.threads.map(u64::from)),
            ("worker.context", worker.context.map(u64::from)),
            ("worker.kv_positions", worker.kv_positions),
        ] {
            if value == Some(0) {
                return unfit(key, "0".into(), "1 or more");
            }
        }
        if self.limits.max_tokens == 0 {
            return unfit("limits.max_tokens", "0".into(), "1 or more");
        }
        if self.limits.default_max_tokens == 0 || self.limits.default_max_tokens > self.limits.max_tokens {
            let expected = format!("1 to `limits.max_tokens`, which is {}", self.limits.max_tokens);
            return unfit("limits.default_max_tokens", self.limits.default_max_tokens.to_string(), &expected);
        }
        if let Err(e) = tracing_subscriber::EnvFilter::try_new(&self.log.filter) {
            let expected = format!("a filter such as `info` or `info,stoker_worker=debug` ({e})");
            return unfit("log.filter", format!("{:?}", self.log.filter), &expected);
        }
        Ok(())
    }
}

/// The keys that there are, with their sections (`worker.slots`).
pub(super) struct Known {
    /// All that hold a value.
    pub keys: Vec<String>,
    sections: Vec<String>,
}

impl Known {
    pub(super) fn new() -> Self {
        let mut known = Self { keys: Vec::new(), sections: Vec::new() };
        let defaults = serde_json::to_value(Config::default()).unwrap_or_default();
        for (name, value) in defaults.as_object().into_iter().flatten() {
            match value {
                Value::Object(fields) => {
                    known.keys.extend(fields.keys().map(|field| format!("{name}.{field}")));
                    known.sections.push(name.clone());
                }
                _ => known.keys.push(name.clone()),
            }
        }
        known
    }

    /// The variable that sets a key.
    pub(super) fn variable(key: &str) -> String {
        format!("{PREFIX}{}", key.replace('.', "_").to_uppercase())
    }

    /// The key or section that is most like an unknown one. A known name in the wrong section counts as near.
    fn nearest(&self, unknown: &str) -> String {
        let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
        let all = self.keys.iter().chain(&self.sections);
        all.min_by_key(|key| {
            let whole = strsim::osa_distance(unknown, key);
            whole.min(strsim::osa_distance(&last(unknown), &last(key)) + 2)
        })
        .cloned()
        .unwrap_or_default()
    }
}

fn read(file: &Path, known: &Known) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| ConfigError::Unreadable { file: file.to_owned(), error })?;
    let line = |at: usize| text.as_bytes().iter().take(at).filter(|b| **b == b'\n').count() + 1;
    let syntax = |e: toml::de::Error| ConfigError::Syntax {
        file: file.to_owned(),
        line: line(e.span().map_or(0, |span| span.start)),
        message: e.message().to_owned(),
    };
    let table = DeTable::parse(&text).map_err(syntax)?;
    if let Some((key, at)) = unknown_key(table.get_ref(), known) {
        let nearest = known.nearest(&key);
        return Err(ConfigError::UnknownKey { file: file.to_owned(), line: line(at), key, nearest });
    }
    let deserializer = toml::Deserializer::parse(&text).map_err(syntax)?;
    serde_path_to_error::deserialize(deserializer).map_err(|e| {
        let key = e.path().to_string();
        let e = e.into_inner();
        let span = e.span().unwrap_or_default();
        let value = text.get(span.clone()).unwrap_or_default().trim().to_owned();
        ConfigError::Value {
            file: file.to_owned(),
            line: line(span.start),
            key,
            value,
            expected: expected(e.message()),
        }
    })
}

/// The first key that is not known, with its section, and where it stands.
fn unknown_key(table: &DeTable<'_>, known: &Known) -> Option<(String, usize)> {
    for (name, value) in table {
        let at = name.span().start;
        let name = name.get_ref().as_ref();
        if known.keys.iter().any(|key| key == name) {
            continue;
        }
        if !known.sections.iter().any(|section| section == name) {
            return Some((name.to_owned(), at));
        }
        // A section that is no table is a matter of types.
        let DeValue::Table(fields) = value.get_ref() else { continue };
        for field in fields.keys() {
            let key = format!("{name}.{}", field.get_ref());
            if !known.keys.contains(&key) {
                return Some((key, field.span().start));
            }
        }
    }
    None
}
