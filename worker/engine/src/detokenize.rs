//! From a growing list of tokens to text: whole characters only, as early as they are whole.
//!
//! A token is a piece of bytes, and may end in the middle of a character. What is not whole waits for the next token;
//! what can't become whole any more is replaced by U+FFFD, exactly as [`String::from_utf8_lossy`] would in the whole text.
//! Text released for some tokens depends on these tokens alone, so a successor that replays them stands where its
//! predecessor stood.

/// Turns tokens' bytes into text as they come.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    /// The beginning of a character; at most three bytes.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a token's bytes ([`crate::Tokenizer::token_bytes`]) and gives the text that is whole now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut out = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (whole, after) = rest.split_at(e.valid_up_to());
                    out.push_str(std::str::from_utf8(whole).unwrap_or_default());
                    rest = after;
                    let Some(bad) = e.error_len() else { break };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[bad..];
                }
            }
        }
        self.pending.drain(..self.pending.len() - rest.len());
        out
    }

    /// The end of the text: U+FFFD if it broke off inside a character.
    pub fn flush(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    #[test]
    fn a_character_waits_until_it_is_whole() {
        let mut d = Detokenizer::new();
        assert_eq!(d.push(b"a\xF0\x9F"), "a");
        assert_eq!(d.push(b"\x98"), "");
        assert_eq!(d.push(b"\x80!"), "😀!");
        assert_eq!(d.push(b"\xC3"), "");
        assert_eq!(d.push(b"("), "\u{FFFD}(");
        assert_eq!(d.push(b"\xE2\x82"), "");
        assert_eq!(d.flush(), "\u{FFFD}");
        assert_eq!(d.flush(), "");
    }

    #[test]
    fn any_split_of_any_bytes_gives_the_lossy_text() {
        let mut rng = StdRng::seed_from_u64(7);
        for _ in 0..5000 {
            let mut bytes = Vec::new();
            for _ in 0..rng.random_range(0..12) {
                match rng.random_range(0..4) {
                    0 => bytes.push(rng.random()),
                    1 => bytes.extend_from_slice("aé€😀".as_bytes()),
                    2 => bytes.push([0xC3, 0xE2, 0x82, 0xF0, 0x9F, 0xED, 0xA0, 0x80][rng.random_range(0..8)]),
                    _ => bytes.extend_from_slice(rng.random::<char>().to_string().as_bytes()),
                }
            }
            let whole = String::from_utf8_lossy(&bytes);
            let mut d = Detokenizer::new();
            let mut text = String::new();
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let (token, after) = rest.split_at(rng.random_range(1..=rest.len().min(5)));
                text.push_str(&d.push(token));
                assert!(whole.starts_with(&text), "released {text:?}, which {whole:?} does not start with");
                rest = after;
            }
            text.push_str(&d.flush());
            assert_eq!(text, whole, "{bytes:x?}");
        }
    }
}
