//! How a model is chosen for a job that names none: one small type per strategy.

use std::cmp::Ordering;
use std::sync::atomic::{AtomicUsize, Ordering as Memory};

use stoker_shared::config::Strategy as Choice;

use super::Model;

/// Chooses among models; those that nothing serves are left out before, unless there are no others.
pub trait Strategy: Send + Sync {
    /// One of `models` (in configured order, then by name); `None` only if there are none.
    fn choose<'a>(&self, models: &[&'a Model]) -> Option<&'a Model>;
}

/// The strategy that the configuration names.
pub fn strategy(choice: Choice) -> Box<dyn Strategy> {
    match choice {
        Choice::Balanced => Box::new(Balanced),
        Choice::QualityFirst => Box::new(QualityFirst),
        Choice::CostOptimized => Box::new(CostOptimized),
        Choice::SpeedPriority => Box::new(SpeedPriority),
        Choice::RoundRobin => Box::new(RoundRobin::default()),
        Choice::LeastLoaded => Box::new(LeastLoaded),
        Choice::Random => Box::new(Random),
    }
}

/// Most free slots in proportion to all, then the larger context.
struct Balanced;
/// The first of the configured models.
struct QualityFirst;
/// The last of the configured models.
struct CostOptimized;
/// The most tokens a second.
struct SpeedPriority;
/// Each in turn.
#[derive(Default)]
struct RoundRobin {
    turn: AtomicUsize,
}
/// Fewest running jobs.
struct LeastLoaded;
/// Any.
struct Random;

/// The best by an order; the first of equals.
fn best<'a>(models: &[&'a Model], better: impl Fn(&Model, &Model) -> Ordering) -> Option<&'a Model> {
    models.iter().copied().reduce(|a, b| if better(b, a) == Ordering::Greater { b } else { a })
}

impl Strategy for Balanced {
    fn choose<'a>(&self, models: &[&'a Model]) -> Option<&'a Model> {
        let free = |m: &Model| 1.0 - f64::from(m.active) / f64::from(m.slots.max(1));
        best(models, |a, b| free(a).total_cmp(&free(b)).then(a.context.cmp(&b.context)))
    }
}

impl Strategy for QualityFirst {
    fn choose<'a>(&self, models: &[&'a Model]) -> Option<&'a Model> {
        models.first().copied()
    }
}

impl Strategy for CostOptimized {
    fn choose<'a>(&self, models: &[&'a Model]) -> Option<&'a Model> {
        models.iter().rev().find(|m| m.configured).or(models.last()).copied()
    }
}

impl Strategy for SpeedPriority {
    fn choose<'a>(&self, models: &[&'a Model]) -> Option<&'a Model> {
        best(models, |a, b| a.tokens_per_second.total_cmp(&b.tokens_per_second))
    }
}

impl Strategy for RoundRobin {
    fn choose<'a>(&self, models: &[&'a Model]) -> Option<&'a Model> {
        let turn = self.turn.fetch_add(1, Memory::Relaxed);
        models.get(turn % models.len().max(1)).copied()
    }
}

impl Strategy for LeastLoaded {
    fn choose<'a>(&self, models: &[&'a Model]) -> Option<&'a Model> {
        best(models, |a, b| b.active.cmp(&a.active))
    }
}

impl Strategy for Random {
    fn choose<'a>(&self, models: &[&'a Model]) -> Option<&'a Model> {
        (!models.is_empty()).then(|| models[rand::random_range(0..models.len())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str, active: u32, slots: u32, context: u32, speed: f64, configured: bool) -> Model {
        Model {
            name: name.into(),
            active,
            slots,
            context,
            tokens_per_second: speed,
            configured,
            ..Model::default()
        }
    }

    #[test]
    fn each_strategy_chooses_what_it_is_named_for() {
        let a = model("a", 8, 16, 8192, 50.0, true);
        let b = model("b", 1, 2, 32768, 400.0, true);
        let c = model("c", 3, 4, 2048, 90.0, false);
        let all = [&a, &b, &c];
        for (choice, expected) in [
            (Choice::Balanced, "b"),
            (Choice::QualityFirst, "a"),
            (Choice::CostOptimized, "b"),
            (Choice::SpeedPriority, "b"),
            (Choice::LeastLoaded, "b"),
        ] {
            assert_eq!(strategy(choice).choose(&all).unwrap().name.as_ref(), expected, "{choice:?}");
            assert!(strategy(choice).choose(&[]).is_none(), "{choice:?}");
        }
    }

    #[test]
    fn round_robin_and_random_leave_nobody_out() {
        let (a, b) = (model("a", 0, 1, 1, 1.0, true), model("b", 0, 1, 1, 1.0, true));
        let names = |choice| {
            let strategy = strategy(choice);
            (0..64).map(|_| strategy.choose(&[&a, &b]).unwrap().name.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(Choice::RoundRobin)[..4], ["a", "b", "a", "b"]);
        let random = names(Choice::Random);
        assert!(random.iter().any(|n| n == "a") && random.iter().any(|n| n == "b"));
        assert!(strategy(Choice::Random).choose(&[]).is_none());
        assert!(strategy(Choice::RoundRobin).choose(&[]).is_none());
    }
}
