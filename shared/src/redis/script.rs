//! Lua scripts: each is one atomic decision inside Redis and one round trip.
//!
//! A script is called by its hash; only a server that does not know it yet (it was restarted, or replaced) is sent the
//! text, which it then remembers.

use std::sync::LazyLock;

use redis::aio::MultiplexedConnection;
use redis::{Cmd, ErrorKind, FromRedisValue, RedisResult, ServerErrorKind};

use super::connection::query;

/// A script's text, and the hash by which Redis knows it.
pub(super) struct Script {
    code: &'static str,
    hash: String,
}

macro_rules! scripts {
    ($($(#[$doc:meta])* $name:ident = $file:literal;)*) => {
        $($(#[$doc])* pub(super) static $name: LazyLock<Script> = LazyLock::new(|| {
            let code = include_str!(concat!("scripts/", $file));
            Script { code, hash: redis::Script::new(code).get_hash().to_owned() }
        });)*
    };
}

scripts! {
    /// Takes logs over.
    OPEN = "open.lua";
    /// Records and publishes a step.
    APPEND = "append.lua";
    /// Leaves a cancellation.
    CANCEL = "cancel.lua";
    /// Renews a presence.
    ANNOUNCE = "announce.lua";
    /// Lists workers.
    WORKERS = "workers.lua";
    /// Looks for one process.
    LIVENESS = "liveness.lua";
}

/// A script with its keys and arguments.
pub(super) struct Call<'a> {
    script: &'a Script,
    keys: Vec<&'a [u8]>,
    args: Vec<&'a [u8]>,
}

impl<'a> Call<'a> {
    pub fn new(script: &'a Script) -> Self {
        Self { script, keys: Vec::new(), args: Vec::new() }
    }

    pub fn key(&mut self, key: &'a (impl AsRef<[u8]> + ?Sized)) -> &mut Self {
        self.keys.push(key.as_ref());
        self
    }

    pub fn arg(&mut self, arg: &'a (impl AsRef<[u8]> + ?Sized)) -> &mut Self {
        self.args.push(arg.as_ref());
        self
    }

    pub fn keys(&mut self, keys: impl IntoIterator<Item = &'a String>) -> &mut Self {
        self.keys.extend(keys.into_iter().map(String::as_bytes));
        self
    }

    pub fn args(&mut self, args: impl IntoIterator<Item = &'a String>) -> &mut Self {
        self.args.extend(args.into_iter().map(String::as_bytes));
        self
    }

    /// Runs it on a connection.
    pub async fn run<T: FromRedisValue>(&self, connection: &mut MultiplexedConnection) -> RedisResult<T> {
        let by_hash = self.command("EVALSHA", &self.script.hash);
        match query(connection, &by_hash).await {
            Err(e) if e.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                query(connection, &self.command("EVAL", self.script.code)).await
            }
            result => result,
        }
    }

    fn command(&self, name: &str, script: &str) -> Cmd {
        let mut command = redis::cmd(name);
        command.arg(script).arg(self.keys.len());
        self.keys.iter().chain(&self.args).for_each(|a| {
            command.arg(*a);
        });
        command
    }
}
