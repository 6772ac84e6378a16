//! Which job is whose: feeds by job key, and by what equal requests have in common.
//!
//! One mutex for both, held for look-ups only: never while a frame is pushed or a reader is woken.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stoker_shared::frame::Frame;
use uuid::Uuid;

use super::Feed;

/// Feeds that somebody waits for.
#[derive(Default)]
pub struct Table {
    maps: Mutex<Maps>,
}

#[derive(Default)]
struct Maps {
    by_key: HashMap<Uuid, Arc<Feed>>,
    by_identity: HashMap<String, Arc<Feed>>,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.lock().by_key.len()
    }

    /// Adds one, unless there is one of the same job, or one that means the same, and `enter` finds a place in it: then
    /// that one.
    pub fn insert_or_join(
        &self,
        feed: Arc<Feed>,
        enter: impl FnOnce(&Feed) -> Option<usize>,
    ) -> Option<(Arc<Feed>, usize)> {
        let mut maps = self.lock();
        let same_job = maps.by_key.get(&feed.key);
        let same = same_job.or_else(|| maps.by_identity.get(feed.identity.as_ref()?));
        if let Some(same) = same
            && let Some(slot) = enter(same)
        {
            return Some((same.clone(), slot));
        }
        if let Some(identity) = &feed.identity {
            maps.by_identity.insert(identity.clone(), feed.clone());
        }
        maps.by_key.insert(feed.key, feed);
        None
    }

    /// Forgets one. Another feed that has taken its place meanwhile stays.
    pub fn remove(&self, feed: &Arc<Feed>) {
        let mut maps = self.lock();
        if maps.by_key.get(&feed.key).is_some_and(|f| Arc::ptr_eq(f, feed)) {
            maps.by_key.remove(&feed.key);
        }
        if let Some(identity) = &feed.identity
            && maps.by_identity.get(identity).is_some_and(|f| Arc::ptr_eq(f, feed))
        {
            maps.by_identity.remove(identity);
        }
    }

    /// Joins the job that means the same, if `enter` finds a place in it.
    pub fn join(
        &self,
        identity: &str,
        enter: impl FnOnce(&Feed) -> Option<usize>,
    ) -> Option<(Arc<Feed>, usize)> {
        let feed = self.lock().by_identity.get(identity)?.clone();
        let slot = enter(&feed)?;
        Some((feed, slot))
    }

    /// Joins a job by its key, if `enter` finds a place in it.
    pub fn join_key(
        &self,
        key: Uuid,
        enter: impl FnOnce(&Feed) -> Option<usize>,
    ) -> Option<(Arc<Feed>, usize)> {
        let feed = self.lock().by_key.get(&key)?.clone();
        let slot = enter(&feed)?;
        Some((feed, slot))
    }

    /// Whose frames these are; frames that nobody waits for are left out.
    pub fn find<'a>(&self, frames: &'a [Frame]) -> Vec<(Arc<Feed>, &'a Frame)> {
        let maps = self.lock();
        let mine = |frame: &'a Frame| Some((maps.by_key.get(&frame.job_key()?)?.clone(), frame));
        frames.iter().filter_map(mine).collect()
    }

    /// All of them, as they are now.
    pub fn all(&self) -> Vec<Arc<Feed>> {
        self.lock().by_key.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn two_who_come_to_a_job_at_the_same_moment_share_its_feed() {
        let (table, key) = (Table::default(), Uuid::now_v7());
        let feed = || Feed::new(key, None, Instant::now() + Duration::from_secs(60), false);
        let first = feed();
        let place = first.join(false);
        assert!(table.insert_or_join(first.clone(), |same| same.join(false)).is_none());
        let (shared, second) = table.insert_or_join(feed(), |same| same.join(false)).unwrap();
        assert!(Arc::ptr_eq(&shared, &first) && Some(second) != place);
        assert_eq!(table.len(), 1);
    }
}
