//! What guesses, chunks and the prefix cache are worth on a real model: `cargo run --release -p stoker-engine --example
//! latency FILE`.
//!
//! Three measurements: the speed of a text that repeats its prompt, with and without guesses; the pauses in eight streams
//! while a prompt of 4,000 tokens comes in (or half the context); and the time to the first token behind a system prompt of
//! 500 tokens that was there before, and behind one that was not.

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use stoker_engine::*;

const TEXT: &str = "The harbour was quiet in the early morning, and the boats lay side by side along the wooden pier. \
    An old fisherman sat on a crate, mending his net with slow and careful hands. Two gulls watched him from the roof of the \
    boathouse. When the sun came up over the hills, he folded the net, put it into his boat, and rowed out to sea.";

struct Running {
    engine: Box<dyn Engine>,
    events: Receiver<(Instant, Vec<Event>)>,
}

impl Running {
    fn load(path: &str, speculation: bool) -> Self {
        let (sender, events) = channel();
        let options = LoadOptions {
            slots: Some(16),
            kv_positions: Some(16384),
            speculation: Some(speculation),
            ..LoadOptions::new(path)
        };
        let sink = Box::new(move |step| drop(sender.send((Instant::now(), step))));
        Self { engine: load(options, sink).expect("the model loads"), events }
    }

    fn step(&self) -> (Instant, Vec<Event>) {
        self.events.recv_timeout(Duration::from_secs(60)).expect("the engine goes on")
    }
}

fn request(id: u64, prompt: Prompt, max_tokens: u32) -> Request {
    Request {
        id: SequenceId(id),
        prompt,
        sampling: Sampling::default(),
        max_tokens: Some(max_tokens),
        stop: Vec::new(),
        constraint: None,
        resume: Resume::default(),
        priority: Priority::Interactive,
        deadline: None,
        user: id,
    }
}

fn chat(content: String) -> Prompt {
    Prompt::Chat(vec![ChatMessage { role: "user".into(), content }])
}

fn main() {
    let path = std::env::args().nth(1).expect("a model's file");
    for speculation in [false, true] {
        repeat(&Running::load(&path, speculation), speculation);
    }
    let running = Running::load(&path, true);
    pauses(&running);
    first_tokens(&running);
}

/// Tokens a second of a text that repeats its prompt.
fn repeat(running: &Running, speculation: bool) {
    let prompt = format!("Repeat the following text word for word.\n\n{TEXT}");
    running.engine.submit(request(1, chat(prompt), 200));
    let (mut first, mut tokens) = (None, 0);
    loop {
        let (when, events) = running.step();
        let start = *first.get_or_insert(when);
        tokens += events[0].tokens.len();
        if events[0].finish.is_some() {
            let speed = (tokens - 1) as f64 / (when - start).as_secs_f64();
            let Stats { steps, drafted, accepted, .. } = running.engine.stats();
            println!(
                "repeat, speculation {speculation}: {speed:.0} tokens/s, {tokens} tokens in {steps} steps, {accepted} of {drafted} guesses right"
            );
            return;
        }
    }
}

/// Pauses of eight streams, without and beside a long prompt.
fn pauses(running: &Running) {
    for id in 1..=8 {
        let prompt = Prompt::Text(format!("Chapter {id}. Once upon a time there was a"));
        running.engine.submit(request(id, prompt, 600));
    }
    let mut last: [Option<Instant>; 9] = [None; 9];
    let (mut gaps, mut beside) = (Vec::new(), Vec::new());
    let (mut sent, mut long_done, mut ended) = (None::<Instant>, false, 0);
    while !long_done {
        let (when, events) = running.step();
        for event in events {
            let id = event.id.0 as usize;
            long_done |= id == 9;
            ended += usize::from(event.finish.is_some());
            if let Some(before) = last.get_mut(id).and_then(|last| last.replace(when)) {
                if sent.is_some() { beside.push(when - before) } else { gaps.push(when - before) }
            }
        }
        if sent.is_none() && gaps.len() > 160 {
            sent = Some(Instant::now());
            let words = 4000.min(running.engine.info().context as usize / 2);
            running.engine.submit(request(9, Prompt::Text(" tea".repeat(words)), 1));
        }
    }
    let took = sent.map_or(Duration::ZERO, |sent| sent.elapsed());
    (1..=8).for_each(|id| running.engine.cancel(SequenceId(id)));
    while ended < 9 {
        ended += running.step().1.iter().filter(|event| event.finish.is_some()).count();
    }
    gaps.sort();
    beside.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let (median, chunked) = (gaps[gaps.len() / 2], beside[beside.len() / 2]);
    println!(
        "8 streams: median gap {:.1} ms, longest {:.1} ms; beside a long prompt {:.1} ms, 99th percentile {:.1} ms, longest \
         {:.1} ms; its first token after {:.0} ms",
        ms(median),
        ms(gaps[gaps.len() - 1]),
        ms(chunked),
        ms(beside[beside.len() * 99 / 100]),
        ms(beside[beside.len() - 1]),
        ms(took)
    );
}

/// Time to the first token behind a system prompt that is new, and that is not.
fn first_tokens(running: &Running) {
    let system = (0..120).map(|n| format!(" rule{n}")).collect::<String>();
    for (id, question) in [(20, " What is tea?"), (21, " Who are you?")] {
        let start = Instant::now();
        running.engine.submit(request(id, Prompt::Text(format!("{system}{question}")), 1));
        let (when, events) = running.step();
        assert_eq!(events[0].id.0, id, "nobody else is there");
        let usage = events[0].finish.as_ref().map(|finish| finish.usage);
        println!("first token after {:.1} ms, {usage:?}", (when - start).as_secs_f64() * 1e3);
    }
}
