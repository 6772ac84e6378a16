//! A fleet whose services are killed and started again under it: nothing of ours is restarted, no stream breaks.
//!
//! The services are private instances (see `scripts/services.sh`), because those that others use are not to be killed. Where
//! Debian's packages for them are neither installed nor can be, the test says so and is skipped.

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use common::services::configured;
use common::{Fleet, Streaming, echo, eventually};
use serde_json::json;
use stoker_shared::config::Services;

const PORTS: &str = "15690";
const WORDS: &str = "nothing is lost and nothing comes twice";

/// What the script exits with where a package is missing that it can't install.
const PACKAGE_MISSING: i32 = 3;

struct Private {
    folder: PathBuf,
}

impl Private {
    fn run(&self, args: &[&str]) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/services.sh");
        Command::new(script)
            .args(args)
            .env("SERVICES", "private")
            .env("SERVICES_DIR", &self.folder)
            .env("SERVICES_PORTS", PORTS)
            .output()
            .expect("scripts/services.sh runs")
    }

    fn script(&self, args: &[&str]) {
        succeeded(&self.run(args));
    }

    /// `None` where the packages are not installed, nor can be.
    fn start() -> Option<(Self, Services)> {
        // Always the same, as the ports are: so what a run left behind that was killed is found.
        let private = Self { folder: PathBuf::from(format!("/var/tmp/stoker-restarts-{PORTS}")) };
        private.clear();
        let started = private.run(&["start"]);
        if started.status.code() == Some(PACKAGE_MISSING) {
            let why = String::from_utf8_lossy(&started.stderr);
            // Past the macros, whose output is hidden when a test passes.
            let _ = writeln!(std::io::stderr(), "SKIPPED, restarts of services are not tested: {why}");
            return None;
        }
        succeeded(&started);
        let exports = String::from_utf8_lossy(&started.stdout);
        let get = |name: &str| {
            let at = exports.find(&format!("{name}=")).expect("the script says where") + name.len() + 1;
            exports[at..].split_whitespace().next().expect("a value").replace('\\', "")
        };
        let services = Services {
            amqp_url: get("AMQP_URL"),
            redis_url: get("REDIS_URL"),
            postgres_url: get("POSTGRES_URL"),
            ..configured()
        };
        Some((private, services))
    }

    fn clear(&self) {
        self.script(&["stop"]);
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

impl Drop for Private {
    fn drop(&mut self) {
        self.clear();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_each_service_is_survived() {
    let Some((private, services)) = Private::start() else { return };
    let mut fleet = Fleet::new(services).await;
    let url = fleet.coordinator().await;
    fleet.worker(&["--engine", "echo", "--echo-delay-ms", "20"]).await;
    for service in ["redis", "postgres", "rabbitmq"] {
        let prompt = format!("{service} {WORDS}");
        let mut stream = Streaming::chat(&url, "echo", &prompt, 300).await;
        stream.read(120).await;
        private.script(&["restart", service]);
        stream.finish().await;
        assert!(stream.done, "{service}: {}\n{}", stream.error, fleet.logs());
        assert_eq!(stream.text, echo(&prompt, 300), "{service}");
        // New requests are served again, without anybody's help.
        let served = eventually(Duration::from_secs(30), async || {
            let body = json!({"model": "echo", "prompt": "again", "options": {"maxTokens": 2}});
            let answer = common::client().post(format!("{url}/api/generate")).json(&body).send().await;
            answer.is_ok_and(|r| r.status().is_success())
        });
        assert!(served.await, "{service}: nothing is served after its restart\n{}", fleet.logs());
        let sql = format!("SELECT count(*) AS rows FROM llm_requests WHERE prompt LIKE '%{service} %'");
        fleet.row_becomes(&sql, json!({"rows": 1})).await;
    }
    fleet.end().await;
}
