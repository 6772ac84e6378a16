//! Loading: what wins, and what each mistake is told.

use std::path::{Path, PathBuf};

use super::*;

fn env(variables: &[(&str, &str)]) -> Result<Config, String> {
    let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string()));
    Config::load(None, variables).map_err(|e| e.to_string())
}

/// A file that goes away with the test.
struct File(PathBuf);

impl File {
    fn new(text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("stoker-{}.toml", uuid::Uuid::new_v4()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn load(&self, variables: &[(&str, &str)]) -> Result<Config, String> {
        let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        Config::load(Some(&self.0), variables).map_err(|e| e.to_string())
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The error of a file, without the directory that it is in.
fn file_error(text: &str) -> String {
    let file = File::new(text);
    let error = file.load(&[]).expect_err(text);
    error.replace(&file.0.display().to_string(), "FILE")
}

#[test]
fn nothing_gives_the_defaults() {
    assert_eq!(env(&[]).unwrap(), Config::default());
    assert_eq!(env(&[("PATH", "/bin"), ("HOME", "/"), ("STOKERS", "x")]).unwrap(), Config::default());
    assert_eq!(File::new("# nothing\n").load(&[]).unwrap(), Config::default());
}

#[test]
fn the_guides_names_are_understood() {
    let config = env(&[
        ("PORT", "3000"),
        ("REDIS_URL", "redis://r:6379"),
        ("POSTGRES_URL", "postgres://p/db"),
        ("AMQP_URL", "amqp://a,amqp://b"),
        ("ALLOWED_ORIGINS", "https://a.example, https://b.example,"),
        ("LLM_MODELS", "small,large"),
        ("LLM_STRATEGY", "quality-first"),
        ("LLM_CACHING", "false"),
    ])
    .unwrap();
    assert_eq!(config.http.port, Some(3000));
    assert_eq!(config.http.allowed_origins, ["https://a.example", "https://b.example"]);
    assert_eq!(config.services.redis_url, "redis://r:6379");
    assert_eq!(config.services.postgres_url, "postgres://p/db");
    assert_eq!(config.services.amqp_url, "amqp://a,amqp://b");
    assert_eq!(config.coordinator.models, ["small", "large"]);
    assert_eq!(config.coordinator.strategy, Strategy::QualityFirst);
    assert!(!config.coordinator.caching);
    assert!(env(&[("LLM_CACHING", "true")]).unwrap().coordinator.caching);
    assert!(env(&[("LLM_CACHING", "")]).unwrap().coordinator.caching);
}

#[test]
fn every_field_has_a_variable() {
    let config = env(&[
        ("STOKER_HTTP_HOST", "127.0.0.1"),
        ("STOKER_HTTP_PORT", "0"),
        ("STOKER_SERVICES_PREFIX", "1234"),
        ("STOKER_COORDINATOR_CACHING", "false"),
        ("STOKER_COORDINATOR_CACHE_TTL_S", "18446744073709551615"),
        ("STOKER_LIMITS_MAX_TOKENS", "2000"),
        ("STOKER_WORKER_SLOTS", " 4 "),
        ("STOKER_WORKER_BACKEND", "cuda"),
        ("STOKER_WORKER_ENGINE", "echo"),
        ("STOKER_WORKER_MODELS", "/a b.gguf,c"),
        ("STOKER_WORKER_CONTEXT", "4096"),
        ("STOKER_WORKER_KV_POSITIONS", "65536"),
        ("STOKER_DATA_DIR", "/data"),
        ("STOKER_LOG", "debug,hyper=warn"),
        ("STOKER_LOG_FORMAT", "json"),
    ])
    .unwrap();
    assert_eq!((config.http.host.as_str(), config.http.port), ("127.0.0.1", Some(0)));
    assert_eq!(config.services.prefix, "1234", "text stays text");
    assert_eq!((config.coordinator.caching, config.coordinator.cache_ttl_s), (false, u64::MAX));
    assert_eq!(config.limits.max_tokens, 2000);
    assert_eq!(config.worker.slots, Some(4));
    assert_eq!(config.worker.backend, Some(BackendChoice::Cuda));
    assert_eq!(config.worker.engine, EngineChoice::Echo);
    assert_eq!(config.worker.models, ["/a b.gguf", "c"]);
    assert_eq!((config.worker.context, config.worker.kv_positions), (Some(4096), Some(65536)));
    assert_eq!(config.data_dir, Some("/data".into()));
    assert_eq!((config.log.filter.as_str(), config.log.format), ("debug,hyper=warn", LogFormat::Json));
}

#[test]
fn the_environment_wins_over_the_file_and_ours_over_the_guides() {
    let file = File::new(
        "data_dir = \"/data\"\n[http]\nport = 1\n[worker]\nslots = 2\nbackend = \"wgpu\"\n[coordinator]\nmodels = [\"a\"]\n",
    );
    let config = file.load(&[("PORT", "2"), ("STOKER_HTTP_PORT", "3"), ("LLM_MODELS", "b")]).unwrap();
    assert_eq!((config.http.port, config.worker.slots), (Some(3), Some(2)));
    assert_eq!((config.worker.backend, config.data_dir), (Some(BackendChoice::Wgpu), Some("/data".into())));
    assert_eq!(config.coordinator.models, ["b"]);
    assert_eq!(file.load(&[("PORT", "2")]).unwrap().http.port, Some(2));
    assert_eq!(file.load(&[("PORT", "")]).unwrap().http.port, Some(1));
}

#[test]
fn a_variable_can_name_the_file() {
    let file = File::new("[worker]\nslots = 2\n");
    let name = file.0.display().to_string();
    assert_eq!(env(&[("STOKER_CONFIG", &name)]).unwrap().worker.slots, Some(2));
    let other = File::new("[worker]\nslots = 3\n");
    assert_eq!(other.load(&[("STOKER_CONFIG", &name)]).unwrap().worker.slots, Some(3), "an argument wins");
    let missing = env(&[("STOKER_CONFIG", "/not/there.toml")]).unwrap_err();
    assert!(missing.starts_with("/not/there.toml: "), "{missing}");
}

#[test]
fn unknown_keys_are_told_where_and_what_was_meant() {
    for (text, told) in [
        ("[worker]\nslot = 4\n", "FILE:2: unknown key `worker.slot`; did you mean `worker.slots`?"),
        ("\n\nslots = 4\n", "FILE:3: unknown key `slots`; did you mean `worker.slots`?"),
        ("[wroker]\nslots = 4\n", "FILE:1: unknown key `wroker`; did you mean `worker`?"),
        ("worker.thraeds = 1\n", "FILE:1: unknown key `worker.thraeds`; did you mean `worker.threads`?"),
        ("[log]\nlevel = 1\n", "FILE:2: unknown key `log.level`; did you mean `log.filter`?"),
    ] {
        assert_eq!(file_error(text), told);
    }
    // Not something to set.
    assert!(file_error("warnings = []\n").contains("unknown key `warnings`"));
}

#[test]
fn wrong_values_in_the_file_are_told_where_and_what_is_expected() {
    for (text, told) in [
        (
            "[worker]\n\nslots = \"four\"\n",
            "FILE:3: `worker.slots` is \"four\"; expected a whole number from 0 to 4294967295",
        ),
        ("[http]\nport = 70000\n", "FILE:2: `http.port` is 70000; expected a whole number from 0 to 65535"),
        (
            "[coordinator]\ncaching = \"no\"\n",
            "FILE:2: `coordinator.caching` is \"no\"; expected true or false",
        ),
        ("worker = 3\n", "FILE:1: `worker` is 3; expected a table"),
        (
            "[worker]\nbackend = \"gpu\"\n",
            "FILE:2: `worker.backend` is \"gpu\"; expected one of `cpu`, `wgpu`, `cuda`",
        ),
        ("[http]\nallowed_origins = \"*\"\n", "FILE:2: `http.allowed_origins` is \"*\"; expected a list"),
    ] {
        assert_eq!(file_error(text), told);
    }
    let syntax = file_error("[worker]\nslots = \n");
    assert!(syntax.starts_with("FILE:2: "), "{syntax}");
}

#[test]
fn wrong_variables_are_told_what_is_expected() {
    for (name, value, expected) in [
        ("STOKER_WORKER_SLOTS", "four", "a whole number from 0 to 4294967295"),
        ("STOKER_WORKER_SLOTS", "-1", "a whole number from 0 to 4294967295"),
        ("STOKER_WORKER_SLOTS", "1.5", "a whole number from 0 to 4294967295"),
        ("PORT", "70000", "a whole number from 0 to 65535"),
        ("PORT", "http", "a whole number from 0 to 65535"),
        ("STOKER_COORDINATOR_CACHING", "no", "true or false"),
        ("STOKER_WORKER_DRAIN_S", "99999999999999999999", "a whole number, 0 or more"),
        ("STOKER_LOG_FORMAT", "xml", "`human` or `json`"),
        ("STOKER_WORKER_BACKEND", "gpu", "one of `cpu`, `wgpu`, `cuda`"),
    ] {
        assert_eq!(env(&[(name, value)]).unwrap_err(), format!("{name} is {value:?}; expected {expected}"));
    }
    let strategy = env(&[("LLM_STRATEGY", "fastest")]).unwrap_err();
    assert!(strategy.starts_with("LLM_STRATEGY is \"fastest\"; expected one of `balanced`, "), "{strategy}");
}

#[test]
fn unknown_variables_of_ours_are_told_what_was_meant() {
    for (name, nearest) in [
        ("STOKER_WORKER_SLOT", "STOKER_WORKER_SLOTS"),
        ("STOKER_DATADIR", "STOKER_DATA_DIR"),
        ("STOKER_CONF", "STOKER_CONFIG"),
        ("STOKER_CPU_IAS", "STOKER_CPU_ISA"),
        ("STOKER_WARNINGS", "STOKER_"),
    ] {
        let error = env(&[(name, "1")]).unwrap_err();
        assert!(error.starts_with(&format!("unknown variable {name}; did you mean {nearest}")), "{error}");
    }
}

#[test]
fn variables_of_commands_are_none_of_the_configurations() {
    for name in ["STOKER_URL", "STOKER_CPU_ISA"] {
        assert_eq!(env(&[(name, "avx2")]).unwrap(), env(&[]).unwrap());
    }
}

#[test]
fn service_links_are_recognised_and_explained() {
    let config = env(&[
        ("STOKER_PORT", "tcp://10.0.0.1:8080"),
        ("STOKER_SERVICE_HOST", "10.0.0.1"),
        ("STOKER_SERVICE_PORT", "8080"),
        ("STOKER_SERVICE_PORT_HTTP", "8080"),
        ("STOKER_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
        ("STOKER_PORT_8080_TCP_PROTO", "tcp"),
        ("STOKER_PORT_8080_TCP_PORT", "8080"),
        ("STOKER_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("STOKER_COORDINATOR_SERVICE_HOST", "10.0.0.2"),
        ("STOKER_COORDINATOR_PORT_8080_TCP_ADDR", "10.0.0.2"),
        ("STOKER_HTTP_PORT", "tcp://10.0.0.3:80"),
        ("STOKER_WORKER_SLOTS", "2"),
    ])
    .unwrap();
    assert_eq!((config.http.port, config.worker.slots), (None, Some(2)));
    assert_eq!(config.warnings.len(), 1);
    let warning = &config.warnings[0];
    assert!(warning.contains("enableServiceLinks: false"), "{warning}");
    assert!(warning.contains("STOKER_PORT,") && warning.contains("STOKER_HTTP_PORT"), "{warning}");
    assert!(!warning.contains("SLOTS"), "{warning}");

    let port = env(&[("PORT", "tcp://10.0.0.1:8080")]).unwrap_err();
    assert!(
        port.contains("PORT is \"tcp://10.0.0.1:8080\"") && port.contains("enableServiceLinks"),
        "{port}"
    );
    assert!(env(&[("STOKER_PORT", "8080")]).unwrap_err().contains("unknown variable STOKER_PORT"));
}

#[test]
fn values_must_fit_their_purpose() {
    for (variable, value, told) in [
        ("STOKER_SERVICES_PREFIX", "a b", "`services.prefix` (STOKER_SERVICES_PREFIX) is \"a b\""),
        ("STOKER_SERVICES_PREFIX", "a*", "`services.prefix`"),
        ("STOKER_WORKER_SLOTS", "0", "`worker.slots` (STOKER_WORKER_SLOTS) is 0; expected 1 or more"),
        ("STOKER_WORKER_THREADS", "0", "`worker.threads`"),
        ("STOKER_WORKER_CONTEXT", "0", "`worker.context`"),
        ("STOKER_WORKER_KV_POSITIONS", "0", "`worker.kv_positions`"),
        ("STOKER_LIMITS_MAX_TOKENS", "0", "`limits.max_tokens`"),
        ("STOKER_LIMITS_MAX_TOKENS", "50", "`limits.default_max_tokens`"),
        ("STOKER_LIMITS_DEFAULT_MAX_TOKENS", "0", "`limits.default_max_tokens`"),
        ("STOKER_LOG", "a=b=c", "`log.filter`"),
    ] {
        let error = env(&[(variable, value)]).unwrap_err();
        assert!(error.starts_with(told), "{error}");
    }
}

#[test]
fn a_whole_configuration_reads_back() {
    let mut config = Config::default();
    config.http.port = Some(1);
    config.worker.models = vec!["a".into()];
    config.worker.backend = Some(BackendChoice::Cpu);
    config.data_dir = Some(Path::new("/d").to_owned());
    let file = File::new(&toml::to_string(&config).unwrap());
    assert_eq!(file.load(&[]).unwrap(), config);
}
