//! Reads a replay log: what an earlier attempt said, without what was recorded twice or follows a hole.

use stoker_shared::frame::Frame;

/// What of a text is known from its log.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Replay {
    /// Token ids from the first on.
    pub ids: Vec<u32>,
    /// The text that was released with them.
    pub text: String,
    /// The last frame, if the text is whole.
    pub last: Option<Frame>,
}

impl Replay {
    /// Puts records together. A record may repeat others (a step whose answer was lost is written again) and records may
    /// be missing (the service lost its newest ones): what does not follow on what is there is left out; it will be
    /// generated again, and be the same.
    pub fn of(frames: Vec<Frame>) -> Self {
        let mut replay = Self::default();
        for frame in frames {
            let (tokens, bytes) = (frame.seq as usize, frame.at);
            // A last one needs no ids: nothing is generated behind it. A coordinator that answers from the cache has none.
            let is_whole = frame.is_last() || frame.ids.len() == frame.tokens as usize;
            if !is_whole || tokens > replay.ids.len() || bytes > replay.text.len() {
                continue;
            }
            if let Some(new) = frame.ids.get(replay.ids.len() - tokens..) {
                replay.ids.extend_from_slice(new);
            }
            if let Some(new) = frame.text.get(replay.text.len() - bytes..) {
                replay.text.push_str(new);
            }
            if frame.is_last() {
                replay.last = Some(frame);
                break;
            }
        }
        replay
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stoker_shared::outcome::FinishReason;

    fn frame(seq: u32, at: usize, text: &str, ids: &[u32]) -> Frame {
        Frame { seq, at, text: text.into(), tokens: ids.len() as u32, ids: ids.to_vec(), ..Frame::default() }
    }

    #[test]
    fn repetitions_are_skipped_and_nothing_follows_a_hole() {
        let log = vec![
            frame(0, 0, "a", &[1]),
            frame(0, 0, "a b", &[1, 2]),
            frame(1, 1, " b", &[2]),
            frame(2, 3, "", &[3]),
            frame(3, 3, " c d", &[4]),
            frame(5, 9, " f", &[6]),
            Frame { finish_reason: Some(FinishReason::Stop), ..frame(6, 11, "", &[]) },
        ];
        let replay = Replay::of(log);
        assert_eq!(replay, Replay { ids: vec![1, 2, 3, 4], text: "a b c d".into(), last: None });
    }

    #[test]
    fn a_coordinators_answer_from_the_cache_is_whole() {
        let last = Frame { finish_reason: Some(FinishReason::Stop), tokens: 3, ..frame(0, 0, "a b c", &[]) };
        let replay = Replay::of(vec![last.clone()]);
        assert_eq!(replay, Replay { ids: vec![], text: "a b c".into(), last: Some(last) });
    }

    #[test]
    fn a_hole_is_closed_by_a_later_record_that_holds_everything() {
        let last = Frame { finish_reason: Some(FinishReason::Stop), ..frame(3, 5, "", &[]) };
        let log = vec![frame(2, 3, " c", &[3]), frame(0, 0, "a b c", &[1, 2, 3]), last.clone()];
        let replay = Replay::of(log);
        assert_eq!(replay, Replay { ids: vec![1, 2, 3], text: "a b c".into(), last: Some(last) });
    }
}
