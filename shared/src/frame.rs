//! Frames: the pieces in which a text travels, and how a reader puts them together.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::outcome::{FinishReason, JobError, Usage};

/// The version of the wire formats that this build writes.
pub const VERSION: u32 = 1;

/// A piece of a job's text, as published to token channels and kept in the replay log.
///
/// The log's records are frames too: `ids` holds the token ids that a successor needs to go on, including those whose
/// text is still held back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Frame {
    /// Version of the format.
    #[serde(default = "one")]
    pub v: u32,
    /// The job's id, as its submitter gave it.
    pub id: String,
    /// The job's key, where it is not the id itself: two tenants may have chosen the same id, and a reader must not mix
    /// their texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Uuid>,
    /// Epoch of the attempt that speaks; a reader drops frames of an older one.
    pub epoch: u64,
    /// Index of the frame's first token in the whole output.
    pub seq: u32,
    /// Offset of `text` in the whole text, UTF-8 bytes.
    pub at: usize,
    /// Whole characters only; may be empty.
    pub text: String,
    /// How many tokens the frame stands for.
    pub tokens: u32,
    /// Which of several alternatives; only 0 so far.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub choice: u32,
    /// Token ids, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<u32>,
    /// On the last frame: why the text ends.
    #[serde(rename = "finishReason", default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<FinishReason>,
    /// On the last frame: what it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// On the last frame: what went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<JobError>,
}

impl Frame {
    /// The job's key: `key`, or the id where that is the key. `None` if it is neither.
    pub fn job_key(&self) -> Option<Uuid> {
        self.key.or_else(|| self.id.parse().ok())
    }

    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        self.finish_reason.is_some()
    }
}

fn one() -> u32 {
    1
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// What [`Assembly::push`] made of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// New text, or the end.
    Advanced,
    /// Nothing new: a repetition, or a frame of an older epoch.
    Nothing,
    /// Text is missing before it: read the log.
    Gap,
}

/// A text being put together from frames that may be lost, repeated, or sent by several attempts.
///
/// A reader needs one number, the bytes it has: `at` below it, skip the overlap; equal, append; above, a gap. Whatever
/// is lost or repeated, the text is always a prefix of the job's final text.
#[derive(Clone, Debug, Default)]
pub struct Assembly {
    /// Newest epoch that the text has something of.
    pub epoch: u64,
    /// Offset of `text` in the whole text, bytes: above 0 once [`Assembly::forget`] was called.
    pub start: usize,
    /// The text so far, from `start` on.
    pub text: String,
    /// Tokens so far.
    pub tokens: u32,
    /// The last frame, once it came.
    pub last: Option<Frame>,
}

impl Assembly {
    /// Bytes of the whole text that have come so far.
    pub fn end(&self) -> usize {
        self.start + self.text.len()
    }

    /// Lets go of the first bytes that are still held, at least `bytes` of them (to the next whole character), so that
    /// a long text does not fill memory; the log still has them.
    pub fn forget(&mut self, bytes: usize) {
        let cut =
            (bytes..=self.text.len()).find(|&i| self.text.is_char_boundary(i)).unwrap_or(self.text.len());
        self.text.drain(..cut);
        self.start += cut;
    }

    /// Takes in a frame.
    pub fn push(&mut self, frame: &Frame) -> Pushed {
        if frame.epoch < self.epoch || self.last.is_some() {
            return Pushed::Nothing;
        }
        let have = self.end();
        if frame.at > have {
            // Its epoch does not count yet: what fills the gap may have been said by an older attempt.
            return Pushed::Gap;
        }
        self.epoch = frame.epoch;
        let mut advanced = false;
        if let Some(new) = frame.text.get(have - frame.at..).filter(|new| !new.is_empty()) {
            self.text.push_str(new);
            advanced = true;
        }
        self.tokens = self.tokens.max(frame.seq + frame.tokens);
        if frame.is_last() {
            self.last = Some(frame.clone());
            advanced = true;
        }
        if advanced { Pushed::Advanced } else { Pushed::Nothing }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(epoch: u64, at: usize, text: &str) -> Frame {
        Frame { v: 1, id: "j".into(), epoch, at, text: text.into(), tokens: 1, ..Frame::default() }
    }

    #[test]
    fn overlaps_are_skipped_gaps_are_told_and_old_epochs_are_dropped() {
        let mut a = Assembly::default();
        assert_eq!(a.push(&frame(1, 0, "Hello")), Pushed::Advanced);
        assert_eq!(a.push(&frame(1, 0, "Hello")), Pushed::Nothing);
        assert_eq!(a.push(&frame(1, 3, "lo, wor")), Pushed::Advanced);
        assert_eq!(a.push(&frame(1, 12, "!")), Pushed::Gap);
        assert_eq!(a.push(&frame(2, 10, "ld")), Pushed::Advanced);
        assert_eq!(a.push(&frame(1, 12, "XX")), Pushed::Nothing);
        assert_eq!(a.text, "Hello, world");
    }

    #[test]
    fn what_an_older_attempt_said_fills_the_gap_before_a_newer_one() {
        let mut a = Assembly::default();
        assert_eq!(a.push(&frame(2, 5, ", world")), Pushed::Gap);
        assert_eq!(a.push(&frame(1, 0, "Hello")), Pushed::Advanced);
        assert_eq!(a.push(&frame(2, 5, ", world")), Pushed::Advanced);
        assert_eq!((a.text.as_str(), a.epoch), ("Hello, world", 2));
    }

    #[test]
    fn what_was_forgotten_still_counts() {
        let mut a = Assembly::default();
        a.push(&frame(1, 0, "Hé"));
        a.push(&frame(1, 3, "llo"));
        a.forget(2);
        assert_eq!((a.start, a.text.as_str(), a.end()), (3, "llo", 6));
        assert_eq!(a.push(&frame(1, 3, "llo, world")), Pushed::Advanced);
        assert_eq!(a.push(&frame(1, 14, "!")), Pushed::Gap);
        assert_eq!(a.text, "llo, world");
    }

    #[test]
    fn nothing_comes_after_the_last_frame() {
        let mut a = Assembly::default();
        let last = Frame { finish_reason: Some(FinishReason::Stop), ..frame(1, 0, "Hi") };
        assert_eq!(a.push(&last), Pushed::Advanced);
        assert_eq!(a.push(&frame(2, 2, "more")), Pushed::Nothing);
        assert_eq!(a.text, "Hi");
        assert_eq!(a.last.unwrap().finish_reason, Some(FinishReason::Stop));
    }

    #[test]
    fn a_frame_reads_back_and_unknown_fields_are_ignored() {
        let f = Frame { ids: vec![5], ..frame(3, 7, "é") };
        let back: Frame = serde_json::from_str(&serde_json::to_string(&f).unwrap()).unwrap();
        assert_eq!(f, back);
        let newer = r#"{"v":2,"id":"j","epoch":1,"seq":0,"at":0,"text":"a","tokens":1,"sparkle":true}"#;
        assert_eq!(serde_json::from_str::<Frame>(newer).unwrap().text, "a");
    }
}
