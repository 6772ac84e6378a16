//! The default model's tokenizer and chat template.

mod common;

use serde_json::Value;
use stoker_engine::weights::Checkpoint;
use stoker_engine::{ChatMessage, Detokenizer, Tokenizer};

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
