//! Threads that wait for work by spinning, because a decoding step hands out work some two hundred times and waking a
//! sleeping thread costs more than most of those pieces.
//!
//! Work is a number of tasks that threads claim one by one, and a region is over when every task is done, not when
//! every thread has taken part. So a thread that the system has put aside holds nothing up unless it holds a task: on a
//! busy machine the others, at worst the caller alone, do all the work. Spinning is bounded: after a short while
//! without work a thread gives its time slice away between looks, then it sleeps.
//!
//! Each thread begins with an equal share of the tasks, the same one whenever there are as many, and then helps the others.
//! So where tasks stand for rows in order, a thread finds in its own cache what it wrote in the region before: fetching
//! that from another's takes longer than most of what is done with it.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::isa::Isa;
use super::memory::Arena;

/// How long an idle thread spins with the processor to itself.
const SPIN: Duration = Duration::from_micros(30);
/// How long an idle thread stays awake in all before it sleeps.
const AWAKE: Duration = Duration::from_micros(300);
/// Looks between two readings of the clock.
const LOOKS: u32 = 32;

/// A team of threads, the calling one among them, with the instruction set they use and the memory of the weights
/// they work on.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a region runs. A second caller, or a task that starts a region, does its tasks alone.
    busy: Mutex<()>,
    isa: Isa,
    pub(super) arena: Arena,
}

/// On a cache line pair of its own, so that threads that spin on it disturb nothing else.
#[repr(align(128))]
struct Alone<T>(T);

struct Shared {
    /// Counts regions.
    regions: Alone<AtomicUsize>,
    /// Per thread, the caller first: tasks of its share of the current region that nobody has claimed.
    unclaimed: Vec<Alone<AtomicUsize>>,
    /// Tasks of the current region that are done.
    done: Alone<AtomicUsize>,
    /// The current region; valid for whoever holds a claimed task that is not done.
    region: AtomicPtr<Region<'static>>,
    sleeping: Vec<AtomicBool>,
    stop: AtomicBool,
    /// The first panic of the current region.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

struct Region<'a> {
    tasks: usize,
    run: &'a (dyn Fn(usize) + Sync),
}

impl Pool {
    /// A pool of `threads` threads (at least one, which is the caller's) on the best instruction set there is.
    pub fn new(threads: usize) -> Pool {
        Pool::with_isa(threads, Isa::best())
    }

    /// A pool whose kernels use `isa`.
    ///
    /// # Panics
    /// If this processor lacks it.
    pub fn with_isa(threads: usize, isa: Isa) -> Pool {
        assert!(isa.supported(), "this processor has no {isa}");
        let helpers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            regions: Alone(AtomicUsize::new(0)),
            unclaimed: (0..=helpers).map(|_| Alone(AtomicUsize::new(0))).collect(),
            done: Alone(AtomicUsize::new(0)),
            region: AtomicPtr::new(ptr::null_mut()),
            sleeping: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        // A system that grants fewer threads than asked for leaves a smaller team, not a broken one.
        let workers = (0..helpers)
            .map_while(|index| {
                let shared = shared.clone();
                thread::Builder::new()
                    .name(format!("kernel-{}", index + 1))
                    .spawn(move || shared.work(index + 1))
                    .ok()
            })
            .collect();
        Pool { shared, workers, busy: Mutex::new(()), isa, arena: Arena::default() }
    }

    /// Threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// The instruction set that its kernels use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs `task(0)` to `task(tasks - 1)`, each once, on whichever thread is free, and returns when all are done.
    /// A panic of a task is raised again here once the others are done.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        let alone = || (0..tasks).for_each(&task);
        if tasks <= 1 || self.workers.is_empty() {
            return alone();
        }
        // A poisoned lock only says that an earlier region panicked; it guards no data.
        let _busy = match self.busy.try_lock() {
            Ok(guard) => guard,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => return alone(),
        };
        let region = Region { tasks, run: &task };
        self.publish(&region);
        while self.shared.take_task(0) {}
        self.shared.wait(tasks);
        let panicked = self.shared.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(payload) = panicked {
            resume_unwind(payload);
        }
    }

    /// Runs `task` over `0..items` in ranges of at least `least` items, a few ranges per thread.
    pub fn split(&self, items: usize, least: usize, task: impl Fn(Range<usize>) + Sync) {
        let threads = self.threads();
        let tasks = match items / least.max(1) {
            _ if threads == 1 => 1,
            few if few < 2 * threads => few.clamp(1, threads),
            _ => 2 * threads,
        };
        self.run(tasks, |index| task(share(items, tasks, index)));
    }

    /// A task for each of `0..tasks`: the same for each thread, but its last one first.
    pub fn backwards(&self, tasks: usize, task: usize) -> usize {
        let mut shares = (0..self.threads()).map(|thread| share(tasks, self.threads(), thread));
        let own = shares.find(|share| share.contains(&task)).expect("each task is in a share");
        own.start + own.end - 1 - task
    }

    fn publish(&self, region: &Region<'_>) {
        let shared = &self.shared;
        shared.done.0.store(0, Ordering::Relaxed);
        // The lifetime is erased: a thread dereferences the pointer only while it holds a task that is not done, and
        // `run` returns only when all are.
        shared.region.store(ptr::from_ref(region).cast_mut().cast(), Ordering::Relaxed);
        for (index, unclaimed) in shared.unclaimed.iter().enumerate() {
            unclaimed.0.store(shared.share(region.tasks, index).len(), Ordering::Release);
        }
        shared.regions.0.fetch_add(1, Ordering::Release);
        // Pairs with the fence in `sleep`: either we see that it sleeps, or it sees the region.
        fence(Ordering::SeqCst);
        for (asleep, worker) in shared.sleeping.iter().zip(&self.workers) {
            if asleep.load(Ordering::Relaxed) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks, so this cannot fail.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The tasks that thread `index` begins with.
    fn share(&self, tasks: usize, index: usize) -> Range<usize> {
        share(tasks, self.unclaimed.len(), index)
    }

    /// Claims and runs one task, of thread `index`'s share if there is one, then of the others'; false if none is left.
    fn take_task(&self, index: usize) -> bool {
        let threads = self.unclaimed.len();
        (0..threads).any(|other| self.take_task_of((index + other) % threads))
    }

    /// Claims and runs one task of thread `index`'s share; false if none is left.
    fn take_task_of(&self, index: usize) -> bool {
        let unclaimed = &self.unclaimed[index].0;
        let mut left = unclaimed.load(Ordering::Acquire);
        loop {
            if left == 0 {
                return false;
            }
            match unclaimed.compare_exchange_weak(left, left - 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => left = now,
            }
        }
        // SAFETY: we hold a task of the current region, so its caller waits in `run` and the region is alive; the
        // successful exchange read what `publish` stored, so the pointer is this region's.
        let region = unsafe { &*self.region.load(Ordering::Relaxed) };
        let task = self.share(region.tasks, index).end - left;
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (region.run)(task))) {
            self.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(payload);
        }
        self.done.0.fetch_add(1, Ordering::Release);
        true
    }

    /// Waits until all tasks are done. Those left are running on other threads, and one of these may have been put
    /// aside by the system: so spin a little, then make way, then sleep between looks.
    fn wait(&self, tasks: usize) {
        let mut looks = 0u32;
        while self.done.0.load(Ordering::Acquire) != tasks {
            looks = looks.saturating_add(1);
            match looks {
                0..2_000 => std::hint::spin_loop(),
                2_000..6_000 => thread::yield_now(),
                _ => thread::sleep(Duration::from_micros(50)),
            }
        }
    }

    fn work(&self, index: usize) {
        while !self.stop.load(Ordering::Acquire) {
            let seen = self.regions.0.load(Ordering::Acquire);
            while self.take_task(index) {}
            if !self.watch(seen) {
                self.sleep(index - 1, seen);
            }
        }
    }

    /// Whether there is something to do for a thread that has seen so many regions.
    fn called(&self, seen: usize) -> bool {
        self.regions.0.load(Ordering::Relaxed) != seen || self.stop.load(Ordering::Relaxed)
    }

    /// Looks out for a new region for a while; false if there was none.
    fn watch(&self, seen: usize) -> bool {
        let start = Instant::now();
        let mut waited = Duration::ZERO;
        while waited < AWAKE {
            for _ in 0..LOOKS {
                if self.called(seen) {
                    return true;
                }
                std::hint::spin_loop();
            }
            waited = start.elapsed();
            if waited > SPIN {
                thread::yield_now();
            }
        }
        false
    }

    fn sleep(&self, helper: usize, seen: usize) {
        self.sleeping[helper].store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !self.called(seen) {
            // May return early; then the loop in `work` looks around and comes back.
            thread::park();
        }
        self.sleeping[helper].store(false, Ordering::Relaxed);
    }
}

/// The `index`th of `parts` nearly equal shares of `0..items`.
pub(super) fn share(items: usize, parts: usize, index: usize) -> Range<usize> {
    items * index / parts..items * (index + 1) / parts
}

/// Ranges that make up `items`, of at least `least`, each the `parts`th part of what is left: few to claim, and yet threads
/// that help one another with the last end at about the same time.
pub(super) fn shrinking(
    items: Range<usize>,
    least: usize,
    parts: usize,
) -> impl Iterator<Item = Range<usize>> {
    let mut start = items.start;
    std::iter::from_fn(move || {
        let left = items.end - start;
        let size = (left / parts).max(least).max(1).min(left);
        start += size;
        (size > 0).then(|| start - size..start)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        for threads in [1, 2, 4, 7] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 3, 17, 400] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn many_regions_with_sleeps_between_lose_nothing() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        for round in 0..3_000 {
            pool.run(5, |i| {
                sum.fetch_add(i + 1, Ordering::Relaxed);
            });
            if round % 500 == 0 {
                thread::sleep(AWAKE * 3);
            }
        }
        assert_eq!(sum.into_inner(), 3_000 * 15);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(2);
        for bad in [0, 7] {
            let ran = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, |i| {
                    ran.fetch_add(1, Ordering::Relaxed);
                    assert!(i != bad, "task {i}");
                })
            }));
            let payload = result.expect_err("the panic was lost");
            assert_eq!(
                payload.downcast_ref::<String>().map(String::as_str),
                Some(format!("task {bad}").as_str())
            );
            assert_eq!(ran.into_inner(), 8);
        }
        let ran = AtomicUsize::new(0);
        pool.run(8, |_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 8);
    }

    #[test]
    fn a_region_within_a_region_and_two_callers_at_once_work() {
        let pool = Pool::new(2);
        let ran = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(4, |_| {
                            pool.run(3, |_| {
                                ran.fetch_add(1, Ordering::Relaxed);
                            })
                        });
                    }
                });
            }
        });
        assert_eq!(ran.into_inner(), 2 * 200 * 12);
    }

    #[test]
    fn shares_cover_everything() {
        for items in [0, 1, 5, 36, 100] {
            for parts in [1, 2, 3, 8] {
                let all: Vec<usize> = (0..parts).flat_map(|i| share(items, parts, i)).collect();
                assert_eq!(all, (0..items).collect::<Vec<_>>());
                for least in [0, 1, 7] {
                    let all: Vec<usize> = shrinking(0..items, least, parts).flatten().collect();
                    assert_eq!(all, (0..items).collect::<Vec<_>>());
                }
            }
        }
    }
}
