//! A text is the same whatever else the engine does, however often its request starts anew. On the real model, where
//! different orders of summation would show.

mod common;

use common::listener::{Heard, Listener, options};
use stoker_engine::*;

const SUBJECTS: [&str; 6] =
    ["the sea", "a small robot", "tea", "Paris in winter", "prime numbers", "an old clock"];

/// Six short stories, half of them drawn at temperature 1.
fn requests() -> Vec<Request> {
    let request = |(subject, id): (&&str, u64)| Request {
        id: SequenceId(id),
        prompt: Prompt::Chat(vec![ChatMessage {
            role: "user".into(),
            content: format!("Write about {subject}."),
        }]),
        sampling: Sampling { temperature: (id % 2) as f32, seed: 1000 + id, ..Sampling::default() },
        max_tokens: Some(40),
        stop: Vec::new(),
        constraint: None,
        resume: Resume::default(),
        priority: if id == 3 { Priority::Batch } else { Priority::Interactive },
        deadline: None,
        user: 0,
    };
    SUBJECTS.iter().zip(0..).map(request).collect()
}

fn alone(listener: &Listener) -> Vec<Heard> {
    requests().into_iter().map(|request| listener.run_one(request)).collect()
}

fn assert_same(one: &[Heard], other: &[Heard]) {
    for (one, other) in one.iter().zip(other) {
        assert_eq!((&one.tokens, &one.text), (&other.tokens, &other.text));
        assert_eq!(one.finish.as_ref().unwrap().reason, other.finish.as_ref().unwrap().reason);
    }
}

/// Two copies of what was said, one of them drawn, beside texts in which there is little to guess.
fn repetitive() -> Vec<Request> {
    let said = "The quick brown fox jumps over the lazy dog, and the old clock strikes seven in the small town by the sea.";
    let copy = |request: Request| Request {
        prompt: Prompt::Text(format!("{said}\n{said}\n{said}\n{said}\n")),
        max_tokens: Some(80),
        ..request
    };
    requests().into_iter().enumerate().map(|(i, r)| if i < 2 { copy(r) } else { r }).collect()
}

#[test]
fn guessed_tokens_change_no_text() {
    let plain = Listener::load(LoadOptions { speculation: Some(false), ..options() });
    let expected: Vec<_> = repetitive().into_iter().map(|request| plain.run_one(request)).collect();
    assert_eq!(plain.engine.stats().accepted, 0);
    let listener = Listener::load(options());
    let got: Vec<_> = repetitive().into_iter().map(|request| listener.run_one(request)).collect();
    assert_same(&expected, &got);
    assert!(listener.engine.stats().accepted > 20, "{:?}", listener.engine.stats());
    assert_same(&expected, &listener.run(repetitive()));
}

#[test]
fn texts_are_the_same_together_preempted_and_beside_a_long_prompt() {
    let listener = Listener::load(options());
    let expected = alone(&listener);
    let seeded: Vec<_> = expected.iter().filter(|heard| heard.tokens.len() > 10).collect();
    assert!(seeded.len() >= 4, "most are stories");
    assert_same(&expected, &listener.run(requests()));

    // Seven blocks of cache, where two of these sequences need ten in the end.
    let longer = || requests().into_iter().take(3).map(|request| Request { max_tokens: Some(90), ..request });
    let expected_longer: Vec<_> = longer().map(|request| listener.run_one(request)).collect();
    let cramped = LoadOptions { kv_positions: Some(224), context: Some(160), ..options() };
    assert_same(&expected_longer, &Listener::load(cramped).run(longer().collect()));

    let listener = Listener::load(LoadOptions { threads: Some(1), ..options() });
    let long = "one two three four five six seven eight nine ten ".repeat(60);
    let long = Request { id: SequenceId(77), prompt: Prompt::Text(long), ..requests().remove(0) };
    let mut all = requests();
    all.insert(2, Request { max_tokens: Some(5), ..long.clone() });
    let mut heard = listener.run(all);
    let beside = heard.remove(2);
    assert_same(&expected, &heard);
    let again = listener.run_one(Request { max_tokens: Some(5), ..long });
    assert_eq!(beside.tokens, again.tokens);
    let usage = again.finish.unwrap().usage;
    assert!(usage.prompt_tokens > 600 && usage.cached_prompt_tokens > usage.prompt_tokens - 64);
}

#[test]
fn a_resumed_request_goes_on_as_if_never_interrupted() {
    let listener = Listener::load(options());
    for request in requests() {
        let whole = listener.run_one(request.clone());
        for cut in [1, 7, whole.tokens.len() - 1] {
            let resumed = |text: &str| {
                let resume = Resume { tokens: whole.tokens[..cut].to_vec(), text: text.into() };
                listener.run_one(Request { resume, ..request.clone() })
            };
            let rest = resumed("");
            assert_eq!(rest.tokens, whole.tokens[cut..]);
            let released = whole.text.strip_suffix(rest.text.as_str()).unwrap();
            assert_same(&[resumed(released)], std::slice::from_ref(&rest));
            let usage = |heard: &Heard| heard.finish.as_ref().unwrap().usage.completion_tokens;
            assert_eq!(usage(&rest), usage(&whole));
        }
    }
}

#[test]
fn stop_strings_end_a_text_before_them() {
    let listener = Listener::load(options());
    let request = requests().remove(0);
    let whole = listener.run_one(request.clone());
    let stop = whole.text.split_inclusive(' ').skip(5).take(2).collect::<String>();
    let stopped = listener.run_one(Request { stop: vec![stop.clone()], ..request });
    assert_eq!(stopped.finish.unwrap().reason, FinishReason::Stop);
    assert_eq!(stopped.text, whole.text.split(&stop).next().unwrap());
    assert!(stopped.tokens.len() < whole.tokens.len());
}

#[test]
fn a_cancelled_request_ends_and_the_engine_sleeps() {
    let listener = Listener::load(options());
    let request = Request { max_tokens: None, ..requests().remove(1) };
    listener.engine.submit(Request { prompt: Prompt::Text("Once upon a time".into()), ..request.clone() });
    listener.engine.cancel(request.id);
    let heard = listener.hear(&[request.id]);
    assert_eq!(heard[0].finish.as_ref().unwrap().reason, FinishReason::Cancelled);
    let stats = listener.engine.stats();
    assert_eq!((stats.active, stats.waiting), (0, 0));
}
