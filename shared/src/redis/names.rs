//! The names of keys and channels, under the configured prefix.

use std::fmt::Display;

use uuid::Uuid;

use crate::config::{Services, prefixed};

/// The names of keys and channels.
#[derive(Clone)]
pub(super) struct Names {
    prefix: String,
}

impl Names {
    pub fn new(services: &Services) -> Self {
        Self { prefix: services.prefix.clone() }
    }

    fn name(&self, rest: impl Display) -> String {
        format!("{}{rest}", self.prefix)
    }

    /// A job's replay log: a list of epoch, header, records.
    pub fn log(&self, key: Uuid) -> String {
        self.name(format_args!("job.{key}"))
    }

    /// A job's cancellation: it is there or not.
    pub fn cancellation(&self, key: Uuid) -> String {
        self.name(format_args!("cancel.{key}"))
    }

    /// All cancellations: job keys, sorted by when they expire.
    pub fn cancellations(&self) -> String {
        self.name("cancellations")
    }

    /// What the names of workers' presences start with.
    pub fn workers_prefix(&self) -> String {
        self.name("worker.")
    }

    /// A worker's presence: JSON.
    pub fn worker(&self, id: &str) -> String {
        self.name(format_args!("worker.{id}"))
    }

    /// A coordinator's presence.
    pub fn coordinator(&self, id: &str) -> String {
        self.name(format_args!("coordinator.{id}"))
    }

    /// The set of workers that were announced and not yet found gone.
    pub fn workers(&self) -> String {
        self.name("workers")
    }

    /// Every model that was ever announced: a hash of JSON by name.
    pub fn models(&self) -> String {
        self.name("models")
    }

    /// Since when presences have been renewed without a pause, Unix milliseconds.
    pub fn continuity(&self) -> String {
        self.name("continuity")
    }

    /// The channel that all workers listen to.
    pub fn control(&self) -> String {
        self.name("control")
    }

    /// The channel that one worker listens to.
    pub fn control_of(&self, worker: &str) -> String {
        self.name(format_args!("control.{worker}"))
    }

    /// A token channel as named in a job.
    pub fn tokens(&self, channel: &str) -> String {
        prefixed(&self.prefix, channel)
    }
}
