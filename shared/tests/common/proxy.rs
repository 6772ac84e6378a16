//! A stretch of network between an adapter and its service that can be cut or go silent, so that no test has to touch the
//! service itself.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the proxy does with connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Passes everything on.
    Pass,
    /// Passes nothing on, and says nothing.
    Silent,
    /// Closes new connections at once.
    Refuse,
}

/// A TCP proxy on a port of its own.
pub struct Proxy {
    port: u16,
    mode: watch::Sender<Mode>,
    cuts: Arc<watch::Sender<u64>>,
}

impl Proxy {
    pub async fn start(target: String, mode: Mode) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mode, modes) = watch::channel(mode);
        let cuts = Arc::new(watch::channel(0).0);
        let all_cuts = cuts.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if *modes.borrow() == Mode::Refuse {
                    continue;
                }
                let (modes, mut cut, target) = (modes.clone(), all_cuts.subscribe(), target.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        _ = cut.changed() => {}
                        () = pass(client, target, modes) => {}
                    }
                });
            }
        });
        Self { port, mode, cuts }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Closes all connections.
    pub fn cut(&self) {
        self.cuts.send_modify(|count| *count += 1);
    }
}

async fn pass(client: TcpStream, target: String, modes: watch::Receiver<Mode>) {
    let Ok(server) = TcpStream::connect(target).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    tokio::select! {
        () = copy(&mut from_client, &mut to_server, modes.clone()) => {}
        () = copy(&mut from_server, &mut to_client, modes) => {}
    }
}

async fn copy(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    mut modes: watch::Receiver<Mode>,
) {
    let mut buffer = vec![0; 65536];
    while let Ok(count) = from.read(&mut buffer).await {
        if count == 0 || modes.wait_for(|mode| *mode != Mode::Silent).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
