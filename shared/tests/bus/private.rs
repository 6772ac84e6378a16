//! A Redis of a test's own, which it may kill, freeze and start again, empty.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use stoker_shared::config::Services;
use uuid::Uuid;

use crate::fixture::{eventually, plain_connection};

pub struct PrivateRedis {
    pub services: Services,
    port: u16,
    directory: PathBuf,
    process: Option<Child>,
}

impl PrivateRedis {
    pub async fn start() -> Self {
        // The port is free again by the time Redis binds it; nobody else is likely to be given it in between.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let services = Services { redis_url: format!("redis://127.0.0.1:{port}"), ..Services::default() };
        let directory = std::env::temp_dir().join(format!("stoker-redis-{}", Uuid::new_v4()));
        std::fs::create_dir(&directory).unwrap();
        let mut this = Self { services, port, directory, process: None };
        this.restart().await;
        this
    }

    /// Host and port.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Starts it, without any data, and waits until it answers.
    pub async fn restart(&mut self) {
        let mut command = Command::new("redis-server");
        command.args([
            "--port",
            &self.port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]);
        command.arg("--dir").arg(&self.directory).stdout(Stdio::null());
        self.process = Some(command.spawn().expect("redis-server is installed"));
        let client = redis::Client::open(self.services.redis_url.as_str()).unwrap();
        eventually("Redis starts", async || client.get_multiplexed_async_connection().await.is_ok()).await;
    }

    /// kill -9.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Stops it from running (`-STOP`), or lets it run on (`-CONT`).
    pub fn signal(&self, signal: &str) {
        let pid = self.process.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// Runs a plain command on it.
    pub async fn command(&self, words: &[&str]) {
        let mut connection = plain_connection(&self.services).await;
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        let () = command.query_async(&mut connection).await.unwrap();
    }
}

impl Drop for PrivateRedis {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
