//! The engine with a model that is none: its logits are a digest of what it finds in the cache.
//!
//! So a wrong block, a wrong position or a token too few changes everything that follows, and thousands of schedules can
//! be played through in a second.

mod schedules;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::{Constraint, Priority, Prompt, Resume, Sampling};

const VOCABULARY: usize = 128;
const CONTEXT: usize = 200;
/// A model that gets this token panics; it stands for a text that no other test has.
const BOOM: u32 = 49151;

/// Remembers digests instead of keys and values: of a token, and of all that was before it as the cache had it.
struct Toy {
    memory: Vec<[u64; BLOCK]>,
    /// Whether it draws tokens itself.
    samples: bool,
    /// Most sequences in a step; with more it panics.
    company: usize,
    /// How many passes there were, and of which ones it panics for no reason.
    passes: usize,
    fails: fn(usize) -> bool,
}

impl Toy {
    fn new(blocks: usize) -> Self {
        let memory = vec![[u64::MAX; BLOCK]; blocks];
        Self { memory, samples: true, company: usize::MAX, passes: 0, fails: |_| false }
    }
}

impl Model for Toy {
    fn forward(&mut self, batch: &Batch) -> Vec<f32> {
        self.passes += 1;
        assert!(!batch.tokens.contains(&BOOM) && batch.spans.len() <= self.company, "boom");
        assert!(!(self.fails)(self.passes), "boom");
        let mut logits = Vec::new();
        let mut outputs = batch.outputs.iter().map(|row| *row as usize).peekable();
        for span in &batch.spans {
            let blocks = batch.blocks(span);
            let cached = (0..span.start).map(|i| self.memory[blocks[i / BLOCK] as usize][i % BLOCK]);
            let mut seen = cached.fold(17, digest);
            for row in span.rows.clone() {
                let position = batch.positions[row] as usize;
                assert_eq!(position, span.start + row - span.rows.start);
                let cell = digest(seen, u64::from(batch.tokens[row]));
                self.memory[blocks[position / BLOCK] as usize][position % BLOCK] = cell;
                seen = digest(seen, cell);
                if outputs.next_if_eq(&row).is_some() {
                    logits.extend(toy_logits(seen, batch.tokens[row]));
                }
            }
        }
        logits
    }

    fn recycle(&mut self, _: Vec<f32>) {}

    fn samples(&self) -> bool {
        self.samples
    }

    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn parallel(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }

    fn cost(&self) -> crate::model::Cost {
        Default::default()
    }

    fn limits(&self) -> Option<crate::kernels::Limits> {
        None
    }

    fn reset(&mut self) {
        self.memory.fill([u64::MAX; BLOCK]);
    }
}

fn boom() -> String {
    String::from_utf8(crate::language::tests::smollm2().tokenizer.token_bytes(BOOM).to_vec()).unwrap()
}

fn digest(before: u64, value: u64) -> u64 {
    (before ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
}

/// Mostly goes in circles of four tokens, so that there is something to guess.
fn toy_logits(seen: u64, token: u32) -> impl Iterator<Item = f32> {
    let likely = (!seen.is_multiple_of(5)).then_some(token / 4 * 4 + (token + 1) % 4);
    (0..VOCABULARY as u32).scan(seen, move |random, id| {
        *random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let noise = (*random >> 40) as f32 / (1 << 24) as f32;
        Some(5.0 * noise + if likely == Some(id) { 10.0 } else { 0.0 })
    })
}

/// What has been heard of a request.
#[derive(Clone, Debug, Default, PartialEq)]
struct Heard {
    tokens: Vec<u32>,
    text: String,
    finish: Option<Finish>,
}

#[derive(Clone, Default)]
struct Ears(Arc<Mutex<HashMap<SequenceId, Heard>>>);

impl Ears {
    fn sink(&self) -> Sink {
        let heard = self.0.clone();
        Box::new(move |events| {
            let mut heard = heard.lock().unwrap();
            let mut touched = Vec::new();
            for event in events {
                assert!(!touched.contains(&event.id), "two events of one request in one step");
                touched.push(event.id);
                let heard = heard.entry(event.id).or_default();
                assert!(heard.finish.is_none(), "an event behind the last one");
                heard.tokens.extend(event.tokens);
                heard.text.push_str(&event.text);
                heard.finish = event.finish;
            }
        })
    }

    fn of(&self, id: u64) -> Heard {
        self.0.lock().unwrap().get(&SequenceId(id)).cloned().unwrap_or_default()
    }
}

fn info(slots: u32) -> ModelInfo {
    ModelInfo {
        name: "toy".into(),
        revision: String::new(),
        architecture: String::new(),
        format: String::new(),
        context: CONTEXT as u32,
        backend: "toy".into(),
        device: String::new(),
        slots,
    }
}

fn runner(slots: u32, blocks: usize) -> (Runner, Ears) {
    runner_of(Toy::new(blocks), slots)
}

fn runner_of(model: Toy, slots: u32) -> (Runner, Ears) {
    let ears = Ears::default();
    let (blocks, model) = (model.memory.len(), Box::new(model));
    let language = crate::language::tests::smollm2();
    let ready = Ready { model, language, info: info(slots), blocks, speculation: true };
    (Runner::new(ready, Arc::default(), ears.sink()), ears)
}

fn request(id: u64, prompt: &str) -> Request {
    Request {
        id: SequenceId(id),
        prompt: Prompt::Text(prompt.into()),
        sampling: Sampling::default(),
        max_tokens: Some(20),
        stop: Vec::new(),
        constraint: None,
        resume: Resume::default(),
        priority: Priority::Interactive,
        deadline: None,
        user: 0,
    }
}

impl Runner {
    fn submit(&mut self, request: Request) {
        let id = request.id;
        let command = match self.language.prepare(request, CONTEXT) {
            Ok(sequence) => Command::Submit(Box::new(sequence)),
            Err(error) => Command::Refuse(id, error),
        };
        self.obey(command);
    }

    fn finish(&mut self) {
        for _ in 0..100_000 {
            if self.scheduler.is_idle() {
                return self.report();
            }
            self.turn();
        }
        panic!("does not come to an end");
    }
}

/// What a request yields in an engine of its own with room for everything, token by token, each drawn on the host.
fn alone(request: &Request) -> Heard {
    let model = Toy { samples: false, ..Toy::new(CONTEXT.div_ceil(BLOCK)) };
    let (mut runner, ears) = runner_of(model, 1);
    runner.pace.fixed_draft = Some(0);
    runner.submit(request.clone());
    runner.finish();
    ears.of(request.id.0)
}

fn reason(heard: &Heard) -> &FinishReason {
    &heard.finish.as_ref().expect("it has ended").reason
}

fn any_request(random: &mut StdRng, id: u64) -> Request {
    let shared = "0123456789".repeat(if random.random_bool(0.2) { 11 } else { 4 });
    let letter = |random: &mut StdRng| char::from(random.random_range(b'a'..=b'z'));
    let mut prompt: String = if random.random_bool(0.5) { shared } else { String::new() };
    prompt.extend((0..random.random_range(1..60)).map(|_| letter(random)));
    let mut request = request(id, &prompt);
    request.max_tokens = if random.random_bool(0.1) { None } else { Some(random.random_range(1..100)) };
    if random.random_bool(0.5) {
        request.sampling.temperature = 1.0;
        request.sampling.seed = random.random();
    }
    if random.random_bool(0.3) {
        request.stop = vec![(0..random.random_range(1..3)).map(|_| letter(random)).collect()];
    }
    request.user = random.random_range(0..3);
    if random.random_bool(0.3) {
        request.priority = Priority::Batch;
    }
    if random.random_bool(0.2) {
        request.constraint =
            Some(Constraint::Regex(format!("[a-m]+[n-z]{{1,{}}}", random.random_range(2..20))));
    }
    request
}

#[test]
fn a_resumed_request_goes_on_where_it_was() {
    let mut random = StdRng::seed_from_u64(7);
    for id in 0..60 {
        let request = any_request(&mut random, id);
        let whole = alone(&request);
        let cut = random.random_range(0..whole.tokens.len());
        let mut resumed = request.clone();
        let released = released_for(&request, &whole.tokens[..cut]);
        resumed.resume = Resume { tokens: whole.tokens[..cut].to_vec(), text: released.clone() };
        let rest = alone(&resumed);
        assert_eq!(rest.tokens, whole.tokens[cut..], "{request:?}");
        assert_eq!(reason(&rest), reason(&whole));
        let usage = |heard: &Heard| heard.finish.as_ref().map(|finish| finish.usage.completion_tokens);
        assert_eq!(usage(&rest), usage(&whole));
        assert_eq!(released + &rest.text, whole.text, "{request:?}");
    }
}

/// Text that the first tokens of a request release while it goes on.
fn released_for(request: &Request, tokens: &[u32]) -> String {
    let language = crate::language::tests::smollm2();
    let mut detokenizer = crate::Detokenizer::new();
    let mut stop = crate::StopMatcher::new(&request.stop);
    let release = |token: &u32| stop.push(&detokenizer.push(language.tokenizer.token_bytes(*token))).0;
    tokens.iter().map(release).collect()
}

#[test]
fn preemption_happens_and_goes_unnoticed() {
    let (mut runner, ears) = runner(8, 8);
    let requests: Vec<_> = (0..6)
        .map(|id| Request { max_tokens: Some(120), ..request(id, &format!("{id} {}", "7".repeat(BLOCK))) })
        .collect();
    requests.iter().for_each(|request| runner.submit(request.clone()));
    let mut most = 0;
    let mut preempted = false;
    while !runner.scheduler.is_idle() {
        runner.turn();
        most = most.max(runner.scheduler.running_count());
        preempted |= runner.scheduler.running_count() < most && runner.scheduler.waiting_count() > 0;
    }
    assert!(preempted);
    for request in &requests {
        let heard = ears.of(request.id.0);
        assert_eq!(heard.tokens, alone(request).tokens);
        let usage = heard.finish.unwrap().usage;
        assert_eq!(usage.cached_prompt_tokens, 0, "what a request finds of its own is not counted");
    }
}

#[test]
fn right_guesses_save_steps_and_change_nothing() {
    let request = Request { max_tokens: Some(120), ..request(1, "01230123") };
    let expected = alone(&request);
    let (mut runner, ears) = runner(1, 20);
    runner.pace.fixed_draft = Some(4);
    runner.submit(request);
    runner.finish();
    assert_eq!(ears.of(1), expected);
    let count = |gauge: &AtomicU64| gauge.load(Relaxed) as usize;
    let gauges = &runner.gauges;
    let (steps, drafted, accepted) = (count(&gauges.steps), count(&gauges.drafted), count(&gauges.accepted));
    assert_eq!(steps + accepted, expected.tokens.len(), "each step chooses a token, and confirms guesses");
    assert!(accepted > 40 && accepted < drafted, "{accepted} of {drafted}");
}

#[test]
fn a_shared_prefix_is_counted_as_cached() {
    let (mut runner, ears) = runner(4, 20);
    let prompt = "7".repeat(2 * BLOCK + 10);
    runner.submit(request(1, &prompt));
    runner.finish();
    runner.submit(request(2, &prompt));
    runner.submit(request(3, "something else"));
    runner.finish();
    let cached = |id| ears.of(id).finish.unwrap().usage.cached_prompt_tokens;
    assert_eq!((cached(1), cached(2), cached(3)), (0, 2 * BLOCK as u32, 0));
    assert_eq!(ears.of(1).tokens, ears.of(2).tokens);
}

#[test]
fn ends_are_told_with_their_reasons() {
    let (mut runner, ears) = runner(4, 20);
    let past = Instant::now() - Duration::from_millis(1);
    runner.submit(Request { deadline: Some(past), ..request(1, "late") });
    runner.submit(Request { prompt: Prompt::Text("7".repeat(CONTEXT)), ..request(2, "") });
    runner.submit(request(3, ""));
    runner.submit(Request { max_tokens: None, ..request(4, "on and on") });
    runner.submit(Request { max_tokens: Some(0), ..request(5, "nothing") });
    runner.submit(request(6, "gone"));
    runner.obey(Command::Cancel(SequenceId(6)));
    runner.obey(Command::Cancel(SequenceId(99)));
    runner.finish();
    let error = |id| match reason(&ears.of(id)).clone() {
        FinishReason::Error(error) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(*reason(&ears.of(1)), FinishReason::Deadline);
    assert_eq!(error(2).kind, RequestErrorKind::ContextLength);
    assert_eq!(error(2).message.matches("200").count(), 2, "{}", error(2).message);
    assert_eq!(error(3).kind, RequestErrorKind::Invalid);
    let full = ears.of(4);
    assert!(matches!(reason(&full), FinishReason::Length | FinishReason::Stop));
    let usage = full.finish.unwrap().usage;
    assert!(usage.prompt_tokens + usage.completion_tokens <= CONTEXT as u32);
    assert_eq!(*reason(&ears.of(5)), FinishReason::Length);
    assert_eq!(*reason(&ears.of(6)), FinishReason::Cancelled);
}

#[test]
fn a_panic_ends_only_who_makes_the_model_panic_alone() {
    let (mut runner, ears) = runner(4, 20);
    let bystander = Request { max_tokens: Some(100), ..request(1, "waits its turn") };
    runner.submit(Request { priority: Priority::Batch, ..bystander.clone() });
    // More than once, and one of several.
    for id in [2, 4] {
        runner.turn();
        (id..id + 2).for_each(|id| runner.submit(request(id, &boom())));
        runner.turn();
        assert!(ears.of(1).finish.is_none());
    }
    runner.submit(request(6, "comes later"));
    runner.finish();
    for id in 2..6 {
        let heard = ears.of(id);
        let FinishReason::Error(error) = reason(&heard) else { panic!("{heard:?}") };
        assert_eq!((error.kind, heard.tokens.len()), (RequestErrorKind::Internal, 0));
    }
    assert_eq!(ears.of(6).tokens, alone(&request(6, "comes later")).tokens);
    assert_eq!(ears.of(1), alone(&bystander));
}

#[test]
fn a_panic_that_comes_of_nobody_alone_ends_those_in_the_next() {
    let (mut runner, ears) = runner_of(Toy { company: 1, ..Toy::new(20) }, 2);
    runner.submit(request(1, "one"));
    runner.turn();
    runner.submit(request(2, "other"));
    runner.finish();
    for id in [1, 2] {
        assert!(matches!(reason(&ears.of(id)), FinishReason::Error(_)));
        let heard = ears.of(id).tokens;
        assert!(
            !heard.is_empty()
                && alone(&request(id, ["one", "other"][id as usize - 1])).tokens.starts_with(&heard)
        );
    }
    runner.submit(request(3, "later"));
    runner.finish();
    assert_eq!(ears.of(3).tokens, alone(&request(3, "later")).tokens);
}

#[test]
fn after_a_panic_only_what_failed_is_computed_alone() {
    let (mut runner, ears) = runner(8, 60);
    runner.pace.fixed = Some(8);
    runner.pace.fixed_draft = Some(0);
    let streams: Vec<_> =
        (1..=4).map(|id| Request { max_tokens: Some(100), ..request(id, &format!("{id}")) }).collect();
    streams.iter().for_each(|request| runner.submit(request.clone()));
    (0..60).for_each(|_| runner.turn());
    runner.submit(request(5, &boom()));
    runner.turn();
    runner.submit(Request { user: 1, ..request(6, "new") });
    let mut steps = 0;
    while ears.of(6).tokens.is_empty() {
        runner.turn();
        steps += 1;
    }
    assert!(steps < 5, "{steps} steps");
    runner.finish();
    assert!(matches!(reason(&ears.of(5)), FinishReason::Error(_)));
    streams.iter().for_each(|request| assert_eq!(ears.of(request.id.0), alone(request)));
}

#[test]
fn panics_for_no_reason_end_nobody_as_long_as_steps_go_well_between() {
    let (mut runner, ears) = runner_of(Toy { fails: |pass| pass % 30 == 29, ..Toy::new(20) }, 2);
    runner.pace.fixed_draft = Some(0);
    let requests = [1, 2].map(|id| Request { max_tokens: Some(100), ..request(id, &format!("{id}")) });
    requests.iter().for_each(|request| runner.submit(request.clone()));
    runner.finish();
    requests.iter().for_each(|request| assert_eq!(ears.of(request.id.0), alone(request)));
}

#[test]
fn a_broken_model_ends_the_thread_and_no_request() {
    let (ears, (alive, gone)) = (Ears::default(), mpsc::channel::<()>());
    let load = || {
        let (runner, _) = runner_of(Toy { fails: |pass| pass > 5, ..Toy::new(20) }, 4);
        let Runner { model, language, .. } = runner;
        Ok::<_, ()>(Ready { model, language, info: info(4), blocks: 20, speculation: false })
    };
    let mut hear = ears.sink();
    let sink = move |events| {
        let _alive = &alive;
        hear(events);
    };
    let handle = start(load, Box::new(sink)).unwrap();
    (1..4).for_each(|id| handle.submit(Request { max_tokens: None, ..request(id, &format!("{id}")) }));
    let dropped = Err(mpsc::RecvTimeoutError::Disconnected);
    assert_eq!(gone.recv_timeout(Duration::from_secs(60)), dropped, "the sink is gone");
    assert!((1..4).all(|id| ears.of(id).finish.is_none()));
    handle.submit(request(4, "too late"));
}

#[test]
fn starting_over_ends_everything_and_serves_again() {
    let (mut runner, ears) = runner(1, 20);
    runner.submit(request(1, "runs"));
    runner.turn();
    runner.submit(request(2, "waits"));
    let error = RequestError { kind: RequestErrorKind::Internal, message: "lost".into() };
    runner.start_over(error.clone());
    assert_eq!(*reason(&ears.of(1)), FinishReason::Error(error.clone()));
    assert_eq!(*reason(&ears.of(2)), FinishReason::Error(error));
    runner.submit(request(3, "runs"));
    runner.finish();
    assert_eq!(ears.of(3).tokens, alone(&request(1, "runs")).tokens);
}

#[test]
fn batch_waits_for_interactive_but_not_for_ever() {
    let (mut runner, ears) = runner(1, 20);
    runner.submit(Request { priority: Priority::Batch, ..request(0, "batch") });
    for id in 1..30 {
        runner.submit(request(id, &format!("interactive {id}")));
    }
    let mut before = 0;
    while ears.of(0).finish.is_none() {
        runner.turn();
        before = (1..30).filter(|id| ears.of(*id).finish.is_some()).count();
    }
    assert!((1..=10).contains(&before), "{before} interactive requests went first");
}

/// A request with a prompt of `length` tokens that begins like no other's.
fn long(id: u64, length: usize) -> Request {
    request(id, &format!("{id:03}{}", "7".repeat(length - 3)))
}

#[test]
fn interactive_requests_pass_a_batch_one_that_waits_for_blocks() {
    let (mut runner, ears) = runner(10, 10);
    runner.submit(Request { max_tokens: Some(60), ..long(1, 4 * BLOCK - 8) });
    runner.turn();
    let batch = Request { priority: Priority::Batch, ..long(2, 6 * BLOCK - 8) };
    runner.submit(batch.clone());
    (3..8).for_each(|id| runner.submit(request(id, &format!("interactive {id}"))));
    while ears.of(1).finish.is_none() {
        assert!(ears.of(2).tokens.is_empty(), "there is no room for it");
        runner.turn();
    }
    assert!(ears.of(1).tokens.len() > 40 && (3..8).all(|id| ears.of(id).finish.is_some()));
    runner.finish();
    assert_eq!(ears.of(2), alone(&batch));
}

#[test]
fn a_batch_request_that_needs_most_blocks_comes_to_its_turn_among_many_small_ones() {
    let (mut runner, ears) = runner(10, 8);
    runner.pace.fixed = Some(64);
    runner.pace.fixed_draft = Some(0);
    let mut small = (1..).map(|id| Request { max_tokens: Some(27), ..request(id, &format!("{id}")) });
    // They end one after another, so that there is never room for it by chance.
    for _ in 0..4 {
        runner.submit(small.next().unwrap());
        (0..7).for_each(|_| runner.turn());
    }
    let ended = |ears: &Ears| (1..1000).filter(|id| ears.of(*id).finish.is_some()).count();
    let batch = Request { priority: Priority::Batch, ..long(0, 6 * BLOCK - 8) };
    // Those that passed one that has gone do not count for the next.
    runner.submit(Request { id: SequenceId(5000), ..batch.clone() });
    while ended(&ears) < 50 {
        runner.submit(small.next().unwrap());
        runner.turn();
    }
    runner.obey(Command::Cancel(SequenceId(5000)));
    runner.turn();
    let earlier = ended(&ears);
    runner.submit(batch.clone());
    for _ in 0..2000 {
        runner.submit(small.next().unwrap());
        runner.turn();
        if !ears.of(0).tokens.is_empty() {
            break;
        }
    }
    let before = ended(&ears) - earlier;
    assert!((100..120).contains(&before), "{before} passed");
    runner.finish();
    assert_eq!(ears.of(0), alone(&batch));
}

#[test]
fn batch_requests_make_room_for_interactive_ones_so_many_times() {
    let (mut runner, ears) = runner(4, 7);
    let batch = Request { priority: Priority::Batch, max_tokens: Some(40), ..long(0, 5 * BLOCK - 4) };
    runner.submit(batch.clone());
    let mut at_once = 0;
    for id in 1.. {
        (0..2).for_each(|_| runner.turn());
        if ears.of(0).finish.is_some() {
            break;
        }
        let interactive = Request { max_tokens: Some(2), ..long(id, 3 * BLOCK - 8) };
        runner.submit(interactive.clone());
        runner.turn();
        at_once += usize::from(!ears.of(id).tokens.is_empty());
        while ears.of(id).finish.is_none() {
            runner.turn();
        }
        assert_eq!(ears.of(id).tokens, alone(&interactive).tokens);
    }
    assert_eq!(at_once, 3);
    assert_eq!(ears.of(0), alone(&batch));
}

#[test]
fn a_batch_request_that_has_made_room_often_enough_stays() {
    let (mut runner, ears) = runner(4, 7);
    let batch = Request { priority: Priority::Batch, max_tokens: Some(40), ..long(0, 5 * BLOCK - 4) };
    let interactive = Request { max_tokens: Some(60), ..long(1, BLOCK - 8) };
    runner.submit(batch.clone());
    runner.scheduler.find(batch.id).unwrap().yielded = 3;
    runner.turn();
    runner.submit(interactive.clone());
    let mut put_out = false;
    while !runner.scheduler.is_idle() {
        runner.turn();
        assert!(runner.scheduler.find(batch.id).is_none_or(|batch| batch.computed > 0));
        put_out |= runner.scheduler.waiting_count() > 0;
    }
    assert!(put_out, "the other one");
    assert_eq!(ears.of(0), alone(&batch));
    assert_eq!(ears.of(1).tokens, alone(&interactive).tokens);
}

#[test]
fn a_batch_prompt_gets_on_while_interactive_ones_keep_coming() {
    let (mut runner, ears) = runner(4, 40);
    runner.pace.fixed = Some(16);
    runner.submit(Request { priority: Priority::Batch, ..long(0, 100) });
    runner.turn();
    for id in 1..60 {
        runner.submit(Request { max_tokens: Some(1), ..long(id, 30) });
        runner.turn();
    }
    assert!(!ears.of(0).tokens.is_empty());
}

#[test]
fn a_long_prompt_does_not_stop_running_streams() {
    let (mut runner, ears) = runner(2, 20);
    runner.pace.fixed = Some(8);
    runner.submit(Request { max_tokens: Some(100), ..request(1, "stream") });
    runner.turn();
    runner.turn();
    runner.submit(request(2, &"7".repeat(150)));
    while ears.of(2).tokens.is_empty() {
        let before = ears.of(1).tokens.len();
        runner.turn();
        assert!(ears.of(1).tokens.len() > before || ears.of(1).finish.is_some());
    }
}

#[test]
fn a_crowd_of_one_user_delays_another_by_one_slot() {
    let (mut runner, ears) = runner(2, 20);
    runner.pace.fixed_draft = Some(0);
    let crowd = 1..=100;
    // Their ends are apart.
    let of_crowd = |id| Request { user: 1, max_tokens: Some(10 + id as u32), ..request(id, "one of many") };
    crowd.clone().for_each(|id| runner.submit(of_crowd(id)));
    (0..5).for_each(|_| runner.turn());
    runner.submit(Request { user: 2, ..request(200, "alone") });
    let heard = |ids: std::ops::RangeInclusive<u64>| ids.filter(|id| !ears.of(*id).tokens.is_empty()).count();
    let before = heard(crowd.clone());
    assert_eq!(before, 2);
    while ears.of(200).tokens.is_empty() {
        runner.turn();
    }
    assert_eq!(heard(crowd), before, "nobody of the crowd went before");
}

#[test]
fn long_prompts_of_one_user_do_not_hold_up_a_short_one_of_another_nor_the_reverse() {
    let (mut runner, ears) = runner(4, 30);
    runner.pace.fixed = Some(16);
    for id in [1, 2] {
        runner.submit(Request { user: 1, ..request(id, &format!("{id}{}", "7".repeat(160))) });
    }
    runner.turn();
    runner.submit(Request { user: 2, ..request(3, "0123456789") });
    (0..2).for_each(|_| runner.turn());
    assert!(!ears.of(3).tokens.is_empty());
    assert!(ears.of(1).tokens.is_empty());
    // Others with short prompts keep coming, and the long one gets on.
    for id in 10..50 {
        runner.submit(Request { user: id, max_tokens: Some(1), ..request(id, &"01234567".repeat(3)) });
        runner.turn();
    }
    assert!(!ears.of(1).tokens.is_empty());
}

#[test]
fn where_chunks_are_of_two_tokens_the_least_served_user_still_gets_most_of_them() {
    let (mut runner, ears) = runner(4, 40);
    runner.pace.fixed = Some(2);
    runner.submit(Request { user: 1, ..request(1, &format!("1{}", "7".repeat(160))) });
    runner.submit(Request { user: 2, priority: Priority::Batch, ..long(2, 100) });
    (0..10).for_each(|_| runner.turn());
    runner.submit(Request { user: 3, ..request(3, "0123456789") });
    (0..12).for_each(|_| runner.turn());
    assert!(!ears.of(3).tokens.is_empty());
    // And the batch lane its tenth.
    let computed = runner.scheduler.find(SequenceId(2)).map(|sequence| sequence.computed);
    assert_eq!(computed, Some(2 * 22 / 10));
}

#[test]
fn beside_streams_a_prompt_of_4000_tokens_comes_in_bounded_chunks() {
    const LONG: usize = 4000;
    let (mut runner, ears) = runner(9, 200);
    runner.pace.fixed = Some(24);
    (1..=8).for_each(|id| runner.submit(Request { max_tokens: None, ..request(id, &format!("{id}")) }));
    (0..2).for_each(|_| runner.turn());
    runner.pace.fixed_draft = Some(0);
    let long = runner.language.prepare(request(9, &"7".repeat(LONG)), LONG + 100).unwrap();
    runner.obey(Command::Submit(Box::new(long)));
    let mut steps = 0;
    while ears.of(9).tokens.is_empty() {
        let streams = |ears: &Ears| (1..=8).map(|id| ears.of(id).tokens.len()).sum::<usize>();
        let (before, decoding) = (streams(&ears), runner.scheduler.decoding_count());
        runner.turn();
        steps += 1;
        assert!(runner.batch.rows() <= decoding + 24);
        assert_eq!(streams(&ears), before + decoding, "each stream gets its token in every step");
    }
    assert_eq!(steps, LONG.div_ceil(24));
}

#[test]
fn a_shared_system_prompt_is_computed_once() {
    let (mut runner, ears) = runner(1, 40);
    let mut rows = |id: u64| {
        let prompt = format!("{}{id}{id}", "7".repeat(500));
        let sequence = runner.language.prepare(Request { max_tokens: Some(1), ..request(id, &prompt) }, 600);
        runner.obey(Command::Submit(Box::new(sequence.unwrap())));
        let mut rows = 0;
        while ears.of(id).tokens.is_empty() {
            runner.turn();
            rows += runner.batch.rows();
        }
        rows
    };
    let (first, second) = (rows(1), rows(2));
    assert!(first >= 500 && second < first / 4, "{second} rows, {first} at first");
}

#[test]
fn requests_that_come_together_compute_what_they_share_once() {
    const SHARED: usize = 500;
    // Alone, beside a stream, and where another user's long prompt has most of each step.
    for (streams, others) in [(0, 0), (1, 0), (0, 1)] {
        let (mut runner, ears) = runner(12, 300);
        runner.pace.fixed = Some(48);
        runner.pace.fixed_draft = Some(0);
        (0..streams).for_each(|id| runner.submit(Request { max_tokens: None, ..request(id, "stream") }));
        (0..2).for_each(|_| runner.turn());
        let mut submit = |request| {
            let sequence = runner.language.prepare(request, 1000).unwrap();
            runner.obey(Command::Submit(Box::new(sequence)));
        };
        for id in 10..18 {
            let prompt = format!("{}{id}", "7".repeat(SHARED));
            submit(Request { max_tokens: Some(1), user: id % 3, ..request(id, &prompt) });
        }
        (100..100 + others)
            .for_each(|id| submit(Request { user: 100, max_tokens: Some(1), ..long(id, 900) }));
        let mut rows = 0;
        while (10..18).any(|id| ears.of(id).tokens.is_empty()) {
            let streams = runner.scheduler.decoding_count();
            runner.turn();
            rows += runner.batch.rows() - streams;
        }
        let own = 8 * (SHARED % BLOCK + 2);
        let shared = SHARED - SHARED % BLOCK;
        assert!((shared + own..=shared + own + others as usize * 900).contains(&rows), "{rows} rows");
        let cached = (10..18).map(|id| ears.of(id).finish.unwrap().usage.cached_prompt_tokens as usize);
        assert_eq!(cached.sum::<usize>(), 7 * shared);
    }
}

#[test]
fn a_thread_serves_and_ends_with_its_handle() {
    let ears = Ears::default();
    let load = || {
        let (runner, _) = runner(4, 20);
        let Runner { model, language, .. } = runner;
        Ok::<_, ()>(Ready { model, language, info: info(4), blocks: 20, speculation: true })
    };
    let handle = start(load, ears.sink()).unwrap();
    handle.submit(request(1, "one"));
    handle.submit(request(2, ""));
    while ears.of(1).finish.is_none() || ears.of(2).finish.is_none() {
        std::thread::yield_now();
    }
    assert_eq!(ears.of(1).tokens, alone(&request(1, "one")).tokens);
    assert_eq!(handle.stats().tokens, ears.of(1).tokens.len() as u64);
    handle.submit(Request { max_tokens: None, ..request(3, "dropped") });
    drop(handle);
}

#[test]
fn a_failed_start_says_why() {
    assert_eq!(start(|| Err("no model"), Ears::default().sink()).err(), Some("no model"));
}
