//! A TCP proxy in front of a service, so that a test can break connections to it without touching the service.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the proxy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Passes everything on.
    Forward,
    /// Closes new connections at once, as if the service were down.
    Refuse,
    /// Accepts connections and passes nothing on, as if the service hung.
    Freeze,
}

#[derive(Clone, Copy)]
struct State {
    mode: Mode,
    /// Connections of an older generation are cut.
    generation: u64,
}

/// The proxy. Dropping it cuts everything.
pub struct Proxy {
    addr: SocketAddr,
    state: Arc<watch::Sender<State>>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port of this machine for connections to `target` (`host:port`).
    pub async fn start(target: impl Into<String>) -> Self {
        let target = target.into();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state = Arc::new(watch::Sender::new(State { mode: Mode::Forward, generation: 0 }));
        let states = state.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if states.borrow().mode != Mode::Refuse {
                    tokio::spawn(serve(client, target.clone(), states.subscribe()));
                }
            }
        });
        Self { addr, state, accepting }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Cuts all connections that there are now.
    pub fn cut(&self) {
        self.state.send_modify(|state| state.generation += 1);
    }

    /// Changes what it does, also with the connections that there are.
    pub fn set(&self, mode: Mode) {
        self.state.send_modify(|state| state.mode = mode);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn serve(client: TcpStream, target: String, mut states: watch::Receiver<State>) {
    let Ok(server) = TcpStream::connect(&target).await else { return };
    let (_, _) = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_in, client_out) = client.into_split();
    let (server_in, server_out) = server.into_split();
    let generation = states.borrow_and_update().generation;
    let up = pass(client_in, server_out, states.clone());
    let down = pass(server_in, client_out, states.clone());
    tokio::select! {
        _ = states.wait_for(|state| state.generation != generation) => {}
        _ = up => {}
        _ = down => {}
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut states: watch::Receiver<State>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                if states.wait_for(|state| state.mode != Mode::Freeze).await.is_err()
                    || to.write_all(&buffer[..n]).await.is_err()
                {
                    return;
                }
            }
        }
    }
}
