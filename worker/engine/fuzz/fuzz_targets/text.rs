//! Tokens of any bytes through detokenizer and stop matcher: however they are cut, the text is the whole text's.
//!
//! The input's first byte says how many stop strings follow (up to 3, each led by its length); the rest are tokens, each led
//! by its length.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stoker_engine::{Detokenizer, StopMatcher};

/// Takes a piece that its first byte gives the length of, at most `most`.
fn piece<'a>(bytes: &mut &'a [u8], most: usize) -> &'a [u8] {
    let Some((len, rest)) = bytes.split_first() else { return &[] };
    let (piece, rest) = rest.split_at(rest.len().min(usize::from(*len) % (most + 1)));
    *bytes = rest;
    piece
}

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    let count = piece(&mut rest, 3).len();
    let stops: Vec<String> =
        (0..count).map(|_| String::from_utf8_lossy(piece(&mut rest, 8)).into_owned()).collect();
    let mut tokens = Vec::new();
    while !rest.is_empty() {
        tokens.push(piece(&mut rest, 6));
    }

    let (mut detokenizer, mut matcher) = (Detokenizer::new(), StopMatcher::new(&stops));
    let mut streamed = String::new();
    for token in &tokens {
        streamed.push_str(&matcher.push(&detokenizer.push(token)).0);
    }
    streamed.push_str(&matcher.push(&detokenizer.flush()).0);
    streamed.push_str(&matcher.flush());

    let mut whole = StopMatcher::new(&stops);
    let mut text = whole.push(&String::from_utf8_lossy(&tokens.concat())).0;
    text.push_str(&whole.flush());
    assert_eq!(streamed, text);
    assert!(stops.iter().all(|s| s.is_empty() || !streamed.contains(s.as_str())));
});
