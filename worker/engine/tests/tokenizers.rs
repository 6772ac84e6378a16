//! Tokenizers of every kind that GGUF files bring, against token ids that llama.cpp gives for the same vocabulary.
//!
//! The vocabularies of `bpe.json` and `spm.json` are small and made for this: joins cross every border at which a
//! pre-tokenizer may cut, so each cut shows; and scores come in equal pairs.

mod common;

use common::gguf::{Gguf, Value};
use serde_json::Value as Json;
use stoker_engine::Tokenizer;
use stoker_engine::weights::Checkpoint;

fn read(name: &str) -> Json {
    serde_json::from_slice(&std::fs::read(common::data(name)).unwrap()).unwrap()
}

fn parse<T: serde::de::DeserializeOwned>(json: &Json) -> T {
    serde_json::from_value(json.clone()).unwrap()
}

/// A file with the vocabulary of `json`.
fn file(json: &Json, model: &str) -> Gguf {
    let tokens: Vec<String> = parse(&json["tokens"]);
    let mut gguf = Gguf::tiny(&tokens.iter().map(String::as_str).collect::<Vec<_>>());
    gguf.set("tokenizer.ggml.model", Value::String(model.into()))
        .set("tokenizer.ggml.token_type", Value::I32s(parse(&json["types"])))
        .set("tokenizer.ggml.bos_token_id", Value::U32(parse(&json["bos"])))
        .set("tokenizer.ggml.eos_token_id", Value::U32(parse(&json["eos"])));
    gguf
}

fn open(gguf: &Gguf) -> Tokenizer {
    let directory = common::TempDir::new();
    Checkpoint::open(&directory.write("model.gguf", &gguf.bytes())).unwrap().tokenizer().unwrap()
}

/// Compares ids, and that they stand for the text wherever every byte of it has a token.
fn check(tokenizer: &Tokenizer, cases: &Json, what: &str) {
    let mut wrong = Vec::new();
    for case in cases.as_array().unwrap() {
        let (text, parse_special, ids): (String, bool, Vec<u32>) = parse(case);
        let got = tokenizer.encode(&text, parse_special, false);
        if got != ids {
            wrong.push(format!("{text:?} ({parse_special}): {got:?}, not {ids:?}"));
        }
    }
    assert!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
}

#[test]
fn byte_level_tokenizers_cut_as_their_models_do() {
    let json = read("bpe.json");
    for (name, cases) in json["cases"].as_object().unwrap() {
        let mut gguf = file(&json, "gpt2");
        gguf.set("tokenizer.ggml.pre", Value::String(name.clone()))
            .set("tokenizer.ggml.merges", Value::Strings(parse(&json["merges"])));
        check(&open(&gguf), cases, name);
    }
}

#[test]
fn sentence_piece_tokenizers_join_by_score() {
    let json = read("spm.json");
    for (prefix, cases) in json["cases"].as_object().unwrap() {
        let mut gguf = file(&json, "llama");
        gguf.set("tokenizer.ggml.scores", Value::F32s(parse(&json["scores"])))
            .set("tokenizer.ggml.unknown_token_id", Value::U32(parse(&json["unk"])))
            .set("tokenizer.ggml.add_space_prefix", Value::Bool(prefix == "true"));
        check(&open(&gguf), cases, &format!("space in front: {prefix}"));
    }
}

#[test]
fn the_default_model_cuts_as_it_does_elsewhere() {
    let tokenizer = Checkpoint::open(&common::smollm2()).unwrap().tokenizer().unwrap();
    check(&tokenizer, &read("smollm2_tokens.json")["cases"], "SmolLM2");
}

#[test]
fn a_turns_end_is_one_although_the_file_has_it_as_text() {
    let mut gguf = Gguf::tiny(&["a", "<|im_end|>", "b"]);
    gguf.set("tokenizer.ggml.token_type", Value::I32s(vec![1, 1, 1]));
    let tokenizer = open(&gguf);
    assert_eq!(tokenizer.encode("a<|im_end|>b", true, true), [0, 1, 2]);
    assert!(tokenizer.is_eog(1) && tokenizer.token_bytes(1).is_empty() && !tokenizer.is_eog(0));
}

#[test]
fn marks_are_control_tokens_although_the_file_has_them_as_user_defined() {
    let mut gguf = Gguf::tiny(&["a", "<|im_start|>", "<end_of_turn>", "<tool>", "<||>"]);
    gguf.set("tokenizer.ggml.token_type", Value::I32s(vec![1, 4, 4, 4, 4]));
    let tokenizer = open(&gguf);
    assert_eq!(tokenizer.encode("a<|im_start|><end_of_turn><tool>a<||>", true, true), [0, 1, 2, 3, 0, 4]);
    assert_eq!(tokenizer.encode("a<|im_start|><end_of_turn><tool>", false, true), [0, 0, 3]);
    let text = [1, 2, 3, 4].map(|id| tokenizer.token_bytes(id));
    assert_eq!(text, [&b""[..], b"", b"<tool>", b"<||>"]);
}

/// The library's regular expressions give up after a million steps on one match, and take the rest for one word.
#[test]
fn no_text_is_lost_after_a_run_that_is_too_long_for_the_library() {
    let json = read("bpe.json");
    for name in ["llama-bpe", "qwen2", "tekken"] {
        let mut gguf = file(&json, "gpt2");
        gguf.set("tokenizer.ggml.pre", Value::String(name.into()))
            .set("tokenizer.ggml.merges", Value::Strings(parse(&json["merges"])));
        let tokenizer = open(&gguf);
        let text = format!("{}x yz", " ".repeat(1_100_000));
        let ids = tokenizer.encode(&text, true, false);
        let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
        assert!(bytes == text.as_bytes(), "{name}");
    }
}
