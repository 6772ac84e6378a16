//! Makes values fit Postgres: text without NUL, cut to its column; numbers and times within their types.

use std::borrow::Cow;

use serde_json::Value;

/// Characters that `user_id` holds.
pub const USER_ID_CHARS: usize = 255;
/// Characters that `model` holds.
pub const MODEL_CHARS: usize = 100;
/// Characters that `cache_key` and `prompt_hash` hold.
pub const HASH_CHARS: usize = 255;
/// A hundred years: longer times are cut to it.
const MAX_SECONDS: f64 = 100.0 * 365.25 * 86_400.0;

/// Text without NUL, which Postgres can't hold.
pub fn text(s: &str) -> Cow<'_, str> {
    if s.contains('\0') { Cow::Owned(s.replace('\0', "")) } else { Cow::Borrowed(s) }
}

/// Text without NUL, of at most so many characters.
pub fn short(s: &str, chars: usize) -> Cow<'_, str> {
    match text(s) {
        Cow::Borrowed(s) => Cow::Borrowed(cut(s, chars)),
        Cow::Owned(s) => Cow::Owned(cut(&s, chars).to_owned()),
    }
}

fn cut(s: &str, chars: usize) -> &str {
    // Few strings are long: bytes are at least as many as characters.
    if s.len() <= chars {
        return s;
    }
    s.char_indices().nth(chars).map_or(s, |(end, _)| &s[..end])
}

/// Whether the text would read back as it is.
pub fn fits(s: &str, chars: usize) -> bool {
    !s.contains('\0') && cut(s, chars).len() == s.len()
}

/// JSON text that JSONB takes: without NUL in any string.
pub fn json(value: &Value) -> String {
    let text = value.to_string();
    // Also finds an escaped backslash before "u0000"; cleaning that one changes nothing.
    if text.contains("\\u0000") { clean(value).to_string() } else { text }
}

fn clean(value: &Value) -> Value {
    match value {
        Value::String(s) => Value::String(text(s).into_owned()),
        Value::Array(items) => items.iter().map(clean).collect(),
        Value::Object(map) => map.iter().map(|(k, v)| (text(k).into_owned(), clean(v))).collect(),
        other => other.clone(),
    }
}

/// A count as INTEGER.
pub fn count(n: u32) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

/// An epoch as BIGINT.
pub fn epoch(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Seconds, for `make_interval`.
pub fn seconds(n: u64) -> f64 {
    (n as f64).min(MAX_SECONDS)
}

/// Milliseconds as seconds, for `make_interval`.
pub fn ms(n: u64) -> f64 {
    (n as f64 / 1000.0).min(MAX_SECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn text_is_cut_between_characters_and_loses_nul_only() {
        assert_eq!(text("plain"), "plain");
        assert_eq!(text("\0a\0b\0"), "ab");
        assert_eq!(short("🦀🦀🦀", 2), "🦀🦀");
        assert_eq!(short("🦀🦀", 2), "🦀🦀");
        assert_eq!(short("a\0bc", 2), "ab");
        assert_eq!(short("é", 1), "é");
        assert_eq!(short("", 0), "");
        assert!(fits("🦀🦀", 2) && !fits("🦀🦀🦀", 2) && !fits("\0", 2));
    }

    #[test]
    fn json_loses_nul_only() {
        let hostile = json!({"a\u{0}": ["\u{0}", {"b": "x\u{0}y"}], "literal": "\\u0000", "n": 1.5});
        assert_eq!(json(&hostile), r#"{"a":["",{"b":"xy"}],"literal":"\\u0000","n":1.5}"#);
        let plain = json!({"literal": "\\u0000"});
        assert_eq!(serde_json::from_str::<Value>(&json(&plain)).unwrap(), plain);
    }
}
