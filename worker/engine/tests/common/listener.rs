//! An engine with somebody who listens to it.

use std::collections::HashMap;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use stoker_engine::*;

/// The default model on the CPU, with a small cache.
pub fn options() -> LoadOptions {
    LoadOptions {
        backend: Some(BackendKind::Cpu),
        slots: Some(8),
        kv_positions: Some(8192),
        ..LoadOptions::new(super::smollm2())
    }
}

/// What came of a request.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Ids, in order.
    pub tokens: Vec<u32>,
    /// Text, put together.
    pub text: String,
    /// The last event's.
    pub finish: Option<Finish>,
}

/// An engine and what it says.
pub struct Listener {
    /// The engine.
    pub engine: Box<dyn Engine>,
    events: Receiver<Vec<Event>>,
}

impl Listener {
    /// Starts an engine.
    pub fn load(options: LoadOptions) -> Self {
        let (sender, events) = mpsc::channel();
        let engine = load(options, Box::new(move |events| drop(sender.send(events)))).unwrap();
        Self { engine, events }
    }

    /// Runs requests to their ends, together.
    pub fn run(&self, requests: Vec<Request>) -> Vec<Heard> {
        let ids: Vec<_> = requests.iter().map(|request| request.id).collect();
        requests.into_iter().for_each(|request| self.engine.submit(request));
        self.hear(&ids)
    }

    /// Listens until these have ended, and none else runs.
    pub fn hear(&self, ids: &[SequenceId]) -> Vec<Heard> {
        let mut heard: HashMap<SequenceId, Heard> = HashMap::new();
        while heard.values().filter(|heard| heard.finish.is_some()).count() < ids.len() {
            for event in self.events.recv_timeout(Duration::from_secs(300)).expect("the engine goes on") {
                let heard = heard.entry(event.id).or_default();
                heard.tokens.extend(event.tokens);
                heard.text.push_str(&event.text);
                heard.finish = event.finish;
            }
        }
        ids.iter().map(|id| heard.remove(id).unwrap()).collect()
    }

    /// Runs one to its end.
    pub fn run_one(&self, request: Request) -> Heard {
        self.run(vec![request]).remove(0)
    }
}
