//! A subscriber's end of a token channel: bounded, never blocking the sender, and honest about what it dropped.
//!
//! Whoever delivers messages (the reader of a socket, or a worker's step) must not wait for a slow subscriber, and a
//! slow subscriber must learn that it missed something without another message having to arrive first. So the last
//! place of the channel is kept for [`Notice::Interrupted`].

use tokio::sync::mpsc;

use crate::frame::Frame;
use crate::ports::Notice;

/// Messages that a subscriber may lag behind. Places are allocated only as they fill.
const CAPACITY: usize = 1024;

/// The delivering side.
#[derive(Debug)]
pub(crate) struct Mailbox {
    notices: mpsc::Sender<Notice>,
    /// The last place holds an `Interrupted` that nothing was delivered after.
    interrupted: bool,
}

impl Mailbox {
    /// A mailbox, and what its subscriber reads from.
    pub fn new() -> (Self, mpsc::Receiver<Notice>) {
        let (notices, receiver) = mpsc::channel(CAPACITY + 1);
        (Self { notices, interrupted: false }, receiver)
    }

    /// Whether the subscriber is gone.
    pub fn is_closed(&self) -> bool {
        self.notices.is_closed()
    }

    /// Resolves once the subscriber is gone.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let notices = self.notices.clone();
        async move { notices.closed().await }
    }

    /// Delivers frames, or notes that they were dropped.
    pub fn deliver(&mut self, frames: Vec<Frame>) {
        if frames.is_empty() {
            return;
        }
        if self.notices.capacity() > 1 {
            self.interrupted = false;
            let _ = self.notices.try_send(Notice::Frames(frames));
        } else {
            self.interrupt();
        }
    }

    /// Tells the subscriber that frames may be missing. Whatever is dropped before it hears so is covered: it reads the
    /// logs afterwards, and records are in the logs before they are delivered.
    pub fn interrupt(&mut self) {
        if !self.interrupted {
            self.interrupted = self.notices.capacity() <= 1;
            let _ = self.notices.try_send(Notice::Interrupted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(n: u32) -> Vec<Frame> {
        vec![Frame { seq: n, ..Frame::default() }]
    }

    #[test]
    fn a_full_mailbox_ends_with_an_interruption_and_then_goes_on() {
        let (mut mailbox, mut receiver) = Mailbox::new();
        for n in 0..2 * CAPACITY as u32 {
            mailbox.deliver(frames(n));
        }
        for n in 0..CAPACITY as u32 {
            assert_eq!(receiver.try_recv().unwrap(), Notice::Frames(frames(n)));
        }
        assert_eq!(receiver.try_recv().unwrap(), Notice::Interrupted);
        receiver.try_recv().unwrap_err();
        mailbox.deliver(frames(7));
        assert_eq!(receiver.try_recv().unwrap(), Notice::Frames(frames(7)));
    }

    #[test]
    fn what_is_dropped_after_a_first_interruption_is_told_again() {
        let (mut mailbox, mut receiver) = Mailbox::new();
        (0..=CAPACITY as u32).for_each(|n| mailbox.deliver(frames(n)));
        receiver.try_recv().unwrap();
        mailbox.deliver(frames(8)); // Dropped: the place just freed is kept for an interruption.
        receiver.try_recv().unwrap();
        mailbox.deliver(frames(9));
        mailbox.deliver(frames(10)); // Dropped.
        let told: Vec<_> = std::iter::from_fn(|| receiver.try_recv().ok()).skip(CAPACITY - 2).collect();
        assert_eq!(told, [Notice::Interrupted, Notice::Frames(frames(9)), Notice::Interrupted]);
    }
}
