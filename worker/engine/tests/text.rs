//! The default model's tokenizer and chat template.

mod common;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use stoker_engine::weights::Checkpoint;
use stoker_engine::{ChatMessage, Detokenizer, StopMatcher, Tokenizer};

/// Cases made by another engine: messages, the prompt, its tokens, and the greedy answer's tokens and text.
fn reference_cases() -> Vec<Value> {
    let bytes = std::fs::read(common::data("smollm2_greedy_f32.json")).unwrap();
    let mut json: Value = serde_json::from_slice(&bytes).unwrap();
    serde_json::from_value(json["cases"].take()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn messages(value: &Value) -> Vec<ChatMessage> {
    let text = |m: &Value, key: &str| m[key].as_str().unwrap().to_owned();
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|m| ChatMessage { role: text(m, "role"), content: text(m, "content") })
        .collect()
}

fn text_of(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut detokenizer = Detokenizer::new();
    let mut text: String = ids.iter().map(|id| detokenizer.push(tokenizer.token_bytes(*id))).collect();
    text.push_str(&detokenizer.flush());
    text
}

#[test]
fn prompts_are_the_references() {
    let checkpoint = Checkpoint::open(&common::smollm2()).unwrap();
    let (tokenizer, template) = (checkpoint.tokenizer().unwrap(), checkpoint.template().unwrap());
    let cases = reference_cases();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let prompt = case["prompt"].as_str().unwrap();
        if !case["messages"].is_null() {
            assert_eq!(template.render(&messages(&case["messages"])).unwrap(), prompt);
        }
        assert_eq!(tokenizer.encode(prompt, true, true), ids(&case["prompt_tokens"]), "{prompt}");
        let answer = ids(&case["tokens"]);
        assert_eq!(text_of(&tokenizer, &answer), case["text"]);
        let ends = answer.iter().position(|id| tokenizer.is_eog(*id));
        assert_eq!(ends, (case["stop"] == "eos").then(|| answer.len() - 1), "{answer:?}");
    }
}

#[test]
fn special_tokens_end_texts_and_are_parsed_only_when_asked() {
    let tokenizer = Checkpoint::open(&common::smollm2()).unwrap().tokenizer().unwrap();
    assert_eq!(tokenizer.eog_tokens().collect::<Vec<_>>(), [0, 2]);
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!(tokenizer.token_bytes(2), b"");
    assert_eq!(tokenizer.token_bytes(49152), b"");

    let text = "a<|im_end|>b";
    assert_eq!(tokenizer.encode(text, true, false).iter().filter(|id| **id == 2).count(), 1);
    let literal = tokenizer.encode(text, false, false);
    assert!(!literal.contains(&2));
    assert_eq!(text_of(&tokenizer, &literal), text);
}

#[test]
fn long_runs_are_encoded_whole() {
    let tokenizer = Checkpoint::open(&common::smollm2()).unwrap().tokenizer().unwrap();
    for part in [" ", "\n", "a", "1", "\u{3000}", "é", "🙂"] {
        let text = part.repeat(200_000 / part.len());
        let ids = tokenizer.encode(&text, true, false);
        assert!(ids.len() >= tokenizer.least_tokens(text.len()));
        assert!(text_of(&tokenizer, &ids) == text, "{part:?}");
    }
}

/// The texts released after each token, and at the end; nothing after a stop string.
fn stream(tokenizer: &Tokenizer, tokens: &[u32], stops: &[String]) -> Vec<String> {
    let (mut detokenizer, mut matcher) = (Detokenizer::new(), StopMatcher::new(stops));
    let mut released = Vec::new();
    for id in tokens {
        released.push(matcher.push(&detokenizer.push(tokenizer.token_bytes(*id))).0);
    }
    let mut last = matcher.push(&detokenizer.flush()).0;
    last.push_str(&matcher.flush());
    released.push(last);
    released
}

#[test]
fn streamed_texts_are_whole_texts_and_depend_on_what_came_before_alone() {
    let tokenizer = Checkpoint::open(&common::smollm2()).unwrap().tokenizer().unwrap();
    let mut rng = StdRng::seed_from_u64(23);
    for _ in 0..300 {
        // Half of the tokens are single bytes: most characters are put together from several, or never become whole.
        let token = |rng: &mut StdRng| {
            if rng.random() { rng.random_range(100..260) } else { rng.random_range(0..49152) }
        };
        let tokens: Vec<u32> = (0..rng.random_range(1..40)).map(|_| token(&mut rng)).collect();
        let bytes: Vec<u8> = tokens.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
        let whole = String::from_utf8_lossy(&bytes);
        let chars: Vec<char> = whole.chars().collect();
        let stops: Vec<String> = (0..rng.random_range(0..3))
            .map(|_| {
                let at = rng.random_range(0..=chars.len());
                chars[at..].iter().take(rng.random_range(1..4)).collect()
            })
            .collect();
        // Each stop string that occurs ends somewhere; the text goes up to the one that ends first.
        let ends =
            stops.iter().filter(|s| !s.is_empty()).filter_map(|s| Some((whole.find(s)? + s.len(), s.len())));
        let want = ends
            .min_by_key(|(end, len)| (*end, usize::MAX - len))
            .map_or(&*whole, |(end, len)| &whole[..end - len]);

        let released = stream(&tokenizer, &tokens, &stops);
        assert_eq!(released.concat(), want, "{whole:?} with {stops:?}");
        let n = rng.random_range(0..tokens.len());
        assert_eq!(stream(&tokenizer, &tokens[..n], &stops)[..n], released[..n]);
    }
}
