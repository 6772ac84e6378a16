//! Stop strings: where a text ends although the model would go on.
//!
//! A stop string may begin in one token and end in another, so text that could still become one is held back, exactly
//! so much and no more. The text ends with the stop string that is complete first, reading character by character (of
//! two complete at the same character, the longer one): so it does not matter how the text was cut into tokens.

/// Looks for stop strings in a growing text.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    matched: bool,
}

impl StopMatcher {
    /// Looks for these; empty ones never match.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self { stops, held: String::new(), matched: false }
    }

    /// Takes more text; gives what can be released, and whether a stop string was found. The stop string and what comes
    /// after it are not released, now or later.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.matched {
            return (String::new(), true);
        }
        if self.stops.is_empty() {
            return (text.to_owned(), false);
        }
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        if let Some((_, start)) = found.min() {
            self.matched = true;
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The end of the text: what was held back and became no stop string.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string was found.
    pub fn matched(&self) -> bool {
        self.matched
    }
}

/// Length of the longest end of `text` that `stop` begins with, bytes.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|n| stop.as_bytes().starts_with(&text.as_bytes()[text.len() - n..])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held_back() {
        let mut m = matcher(&["\n\nUser:", "END"]);
        assert_eq!(m.push("Hello\n"), ("Hello".into(), false));
        assert_eq!(m.push("World\n\nUs"), ("\nWorld".into(), false));
        assert_eq!(m.push("ual E"), ("\n\nUsual ".into(), false));
        assert_eq!(m.push("NEN"), ("EN".into(), false));
        assert_eq!(m.push("D of it"), (String::new(), true));
        assert_eq!(m.push("more"), (String::new(), true));
        assert_eq!(m.flush(), "");
    }

    #[test]
    fn held_text_is_released_at_the_end() {
        let mut m = matcher(&["stop"]);
        assert_eq!(m.push("don't sto"), ("don't ".into(), false));
        assert_eq!(m.flush(), "sto");
    }

    #[test]
    fn empty_stop_strings_never_match() {
        assert_eq!(matcher(&[""]).push("text"), ("text".into(), false));
    }

    /// What the matcher must do, said in another way: read characters until some stop string is the text's end.
    fn whole(text: &str, stops: &[&str]) -> (String, bool) {
        let mut seen = String::new();
        for c in text.chars() {
            seen.push(c);
            let found = stops.iter().filter(|s| seen.ends_with(*s)).map(|s| s.len()).max();
            if let Some(len) = found {
                seen.truncate(seen.len() - len);
                return (seen, true);
            }
        }
        (seen, false)
    }

    #[test]
    fn any_split_ends_where_the_whole_text_does() {
        const STOPS: [&str; 8] = ["ab", "aab", "bé", "éé", "abab", "c", "é€", "xaabé"];
        let mut rng = StdRng::seed_from_u64(11);
        for _ in 0..20_000 {
            let stops: Vec<_> = (0..rng.random_range(0..4)).map(|_| STOPS[rng.random_range(0..8)]).collect();
            let text: Vec<char> = (0..rng.random_range(0..14))
                .map(|_| ['a', 'a', 'b', 'é', '€', 'x'][rng.random_range(0..6)])
                .collect();
            let (want, ends) = whole(&text.iter().collect::<String>(), &stops);
            let mut m = matcher(&stops);
            let (mut released, mut rest) = (String::new(), text.as_slice());
            while !rest.is_empty() && !m.matched() {
                let (token, after) = rest.split_at(rng.random_range(1..=rest.len().min(4)));
                let seen: String = text[..text.len() - after.len()].iter().collect();
                released.push_str(&m.push(&token.iter().collect::<String>()).0);
                rest = after;
                if !m.matched() {
                    // Held back is what is the beginning of a stop string, and nothing before it.
                    let held = &seen[released.len()..];
                    let longest = seen
                        .char_indices()
                        .map(|(i, _)| &seen[i..])
                        .find(|tail| stops.iter().any(|s| s.starts_with(tail)));
                    assert_eq!(held, longest.unwrap_or(""), "of {seen:?} with {stops:?}");
                }
            }
            assert_eq!(m.matched(), ends);
            released.push_str(&m.flush());
            assert_eq!(released, want, "{text:?} with {stops:?}");
        }
    }
}
