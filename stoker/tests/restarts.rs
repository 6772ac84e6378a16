//! A fleet whose services are killed and started again under it: nothing of ours is restarted, no stream breaks.
//!
//! The services are private instances (see `scripts/services.sh`), because those that others use are not to be killed.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::services::configured;
use common::{Fleet, Streaming, echo, eventually};
use serde_json::json;
use stoker_shared::config::Services;

const PORTS: &str = "15690";
const WORDS: &str = "nothing is lost and nothing comes twice";

struct Private {
    folder: PathBuf,
}

impl Private {
    fn script(&self, args: &[&str]) -> String {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/services.sh");
        let output = Command::new(script)
            .args(args)
            .env("SERVICES", "private")
            .env("SERVICES_DIR", &self.folder)
            .env("SERVICES_PORTS", PORTS)
            .output()
            .expect("scripts/services.sh runs");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    fn start() -> (Self, Services) {
        // Always the same, as the ports are: so what a run left behind that was killed is found.
        let private = Self { folder: PathBuf::from(format!("/var/tmp/stoker-restarts-{PORTS}")) };
        private.clear();
        let exports = private.script(&["start"]);
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
        (private, services)
    }

    fn clear(&self) {
        self.script(&["stop"]);
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        self.clear();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_each_service_is_survived() {
    let (private, services) = Private::start();
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
