//! Requests come, wait, are let in, put out, cancelled and too late, in thousands of orders; what comes of them is always the same.

use std::sync::atomic::AtomicUsize;

use super::*;

const SCHEDULES: u64 = 10_000;

/// What a schedule made happen.
#[derive(Default)]
struct Seen {
    accepted: AtomicUsize,
    preempted: AtomicUsize,
    cached: AtomicUsize,
    resumed: AtomicUsize,
    cut: AtomicUsize,
    yielded: AtomicUsize,
    recovered: AtomicUsize,
}

#[test]
fn texts_are_the_same_in_whatever_company() {
    let (next, seen) = (AtomicU64::new(0), Seen::default());
    let play_all = || {
        loop {
            match next.fetch_add(1, Relaxed) {
                SCHEDULES.. => return,
                seed => play(seed, &seen),
            }
        }
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        (0..threads).for_each(|_| drop(scope.spawn(play_all)));
    });
    let Seen { accepted, preempted, cached, resumed, cut, yielded, recovered } = seen;
    let counts = [accepted, preempted, cached, resumed, cut, yielded, recovered].map(AtomicUsize::into_inner);
    println!("right guesses, preemptions, cached tokens, resumed, cut, made room, recovered: {counts:?}");
    assert!(counts.iter().all(|count| *count > SCHEDULES as usize / 50), "{counts:?}");
}

/// A request, and what it yields alone: behind what an earlier attempt has had, if there was one.
fn any_attempt(random: &mut StdRng, id: u64) -> (Request, Heard) {
    let mut request = any_request(random, id);
    let mut expected = alone(&request);
    if random.random_bool(0.2) {
        let cut = random.random_range(0..expected.tokens.len());
        let released = released_for(&request, &expected.tokens[..cut]);
        expected.text.drain(..released.len());
        request.resume = Resume { tokens: expected.tokens.drain(..cut).collect(), text: released };
    }
    (request, expected)
}

/// A request that makes the model panic.
fn any_poison(random: &mut StdRng, id: u64) -> (Request, Heard) {
    let mut request = request(id, &("7".repeat(random.random_range(0..60)) + &boom()));
    if random.random_bool(0.5) {
        request.priority = Priority::Batch;
    }
    let expected = alone(&request);
    assert!(matches!(reason(&expected), FinishReason::Error(_)));
    (request, expected)
}

fn play(seed: u64, seen: &Seen) {
    let mut random = StdRng::seed_from_u64(seed);
    let random = &mut random;
    let slots = random.random_range(1..8);
    let blocks = CONTEXT.div_ceil(BLOCK) + random.random_range(0..4);
    let (mut runner, ears) = runner(slots, blocks);
    runner.pace.fixed = Some(random.random_range(1..80));
    runner.pace.fixed_draft = Some(random.random_range(0..8));
    let mut attempts: Vec<_> = (0..random.random_range(2..9)).map(|id| any_attempt(random, id)).collect();
    if random.random_bool(0.04) {
        let poison = any_poison(random, attempts.len() as u64);
        attempts.insert(random.random_range(0..=attempts.len()), poison);
    }
    let mut cut = Vec::new();
    let mut next = attempts.iter();
    while next.len() > 0 || !runner.scheduler.is_idle() {
        if random.random_bool(0.4) {
            next.next().into_iter().for_each(|(request, _)| runner.submit(request.clone()));
        }
        if random.random_bool(0.02) {
            let id = random.random_range(0..attempts.len()) as u64;
            cut.push(id);
            cut_off(&mut runner, SequenceId(id), random.random());
        }
        let running = runner.scheduler.running_count() as i64;
        let waiting = runner.scheduler.waiting_count() as i64;
        runner.turn();
        let put_out = runner.scheduler.waiting_count() as i64 > waiting;
        seen.preempted.fetch_add((put_out && running > 0).into(), Relaxed);
        let yielded = runner.scheduler.all().any(|sequence| sequence.yielded > 0);
        seen.yielded.fetch_add(yielded.into(), Relaxed);
    }
    assert_eq!(runner.scheduler.blocks(), (0, blocks), "seed {seed}: blocks are lost");
    seen.accepted.fetch_add(runner.gauges.accepted.load(Relaxed) as usize, Relaxed);
    for (request, expected) in &attempts {
        let heard = ears.of(request.id.0);
        let usage = heard.finish.as_ref().map(|finish| finish.usage).unwrap();
        seen.cached.fetch_add(usage.cached_prompt_tokens as usize, Relaxed);
        seen.resumed.fetch_add((!request.resume.tokens.is_empty()).into(), Relaxed);
        seen.recovered.fetch_add(matches!(reason(&heard), FinishReason::Error(_)).into(), Relaxed);
        let early = matches!(reason(&heard), FinishReason::Cancelled | FinishReason::Deadline);
        if early && cut.contains(&request.id.0) {
            seen.cut.fetch_add(1, Relaxed);
            assert!(expected.tokens.starts_with(&heard.tokens), "seed {seed}: {request:?}");
            assert!(expected.text.starts_with(&heard.text), "seed {seed}: {request:?}");
            continue;
        }
        assert_eq!(
            (&heard.tokens, &heard.text, reason(&heard), usage.completion_tokens),
            (
                &expected.tokens,
                &expected.text,
                reason(expected),
                expected.finish.as_ref().unwrap().usage.completion_tokens
            ),
            "seed {seed}: {request:?}"
        );
    }
}

/// Cancels a request, or makes it too late.
fn cut_off(runner: &mut Runner, id: SequenceId, late: bool) {
    match runner.scheduler.find(id) {
        Some(sequence) if late => sequence.deadline = Some(Instant::now()),
        _ => runner.obey(Command::Cancel(id)),
    }
}
