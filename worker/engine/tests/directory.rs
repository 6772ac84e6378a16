//! Hugging Face directories: a small random Llama, in each number format, in one file and in shards.

mod common;

use std::collections::BTreeMap;

use common::TempDir;
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};
use serde_json::{Value, json};
use stoker_engine::weights::{Checkpoint, DType, RopeStyle};
use stoker_engine::{ChatMessage, LoadError};

/// Tensors by Hugging Face's names.
type Model = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

const VOCAB: usize = 264;

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "eos_token_id": 258,
    })
}

fn model() -> Model {
    let mut rng = StdRng::seed_from_u64(1);
    let mut model = Model::new();
    let mut add = |name: String, shape: &[usize]| {
        let values = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
        model.insert(name, (shape.to_vec(), values));
    };
    add("model.embed_tokens.weight".into(), &[VOCAB, 16]);
    add("model.norm.weight".into(), &[16]);
    add("lm_head.weight".into(), &[VOCAB, 16]);
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", &[16][..]),
            ("self_attn.q_proj", &[16, 16]),
            ("self_attn.k_proj", &[8, 16]),
            ("self_attn.v_proj", &[8, 16]),
            ("self_attn.o_proj", &[16, 16]),
            ("post_attention_layernorm", &[16]),
            ("mlp.gate_proj", &[24, 16]),
            ("mlp.up_proj", &[24, 16]),
            ("mlp.down_proj", &[16, 24]),
        ] {
            add(format!("model.layers.{layer}.{name}.weight"), shape);
        }
    }
    model
}

fn stored(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// A safetensors file.
fn safetensors<'a>(
    tensors: impl Iterator<Item = (&'a String, &'a (Vec<usize>, Vec<f32>))>,
    dtype: Dtype,
) -> Vec<u8> {
    let all: Vec<_> = tensors.map(|(name, (shape, x))| (name, shape.clone(), stored(dtype, x))).collect();
    let views = all.iter().map(|(name, shape, x)| (name, TensorView::new(dtype, shape.clone(), x).unwrap()));
    serialize(views, None).unwrap()
}

/// A byte-level `tokenizer.json` of the 256 bytes, `he`, and special tokens: begin, end, and one beyond the embedding.
fn tokenizer_json() -> Value {
    // GPT-2's alphabet.
    let plain = |b: &u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let shifted: Vec<u32> = (0..256).filter(|b| !plain(b)).collect();
    let letter = |b: u32| match shifted.iter().position(|s| *s == b) {
        Some(n) => char::from_u32(256 + n as u32).unwrap().to_string(),
        None => char::from_u32(b).unwrap().to_string(),
    };
    let mut vocab: BTreeMap<String, u32> = (0..256).map(|b| (letter(b), b)).collect();
    vocab.insert("he".into(), 256);
    let special = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false})
    };
    json!({
        "version": "1.0", "truncation": {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
        "padding": null, "normalizer": null,
        "added_tokens": [special(257, "<s>", true), special(258, "</s>", true), special(259, "<|im_end|>", true),
                         special(260, "<tool>", false), special(261, "<|user|>", false), special(300, "<image>", true)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [
            {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": [["h", "e"]]},
    })
}

fn write_json(directory: &TempDir, name: &str, json: &Value) {
    directory.write(name, json.to_string().as_bytes());
}

/// A directory with configuration and tokenizer, but no weights.
fn directory() -> TempDir {
    let directory = TempDir::new();
    write_json(&directory, "config.json", &config());
    write_json(&directory, "tokenizer.json", &tokenizer_json());
    let tokenizer_config = json!({
        "bos_token": {"content": "<s>"}, "eos_token": "</s>",
        "chat_template": [{"name": "tool_use", "template": "no"},
                          {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}],
    });
    write_json(&directory, "tokenizer_config.json", &tokenizer_config);
    directory
}

/// The same, with all weights in one file.
fn whole(dtype: Dtype) -> TempDir {
    let directory = directory();
    directory.write("model.safetensors", &safetensors(model().iter(), dtype));
    directory
}

/// Writes the weights in two shards.
fn write_shards(directory: &TempDir, model: &Model) {
    let mut map = serde_json::Map::new();
    for shard in 0..2 {
        let name = format!("model-0000{}-of-00002.safetensors", shard + 1);
        let part = || model.iter().enumerate().filter(move |(i, _)| i % 2 == shard).map(|(_, t)| t);
        directory.write(&name, &safetensors(part(), Dtype::F32));
        map.extend(part().map(|(tensor, _)| (tensor.clone(), name.clone().into())));
    }
    write_json(directory, "model.safetensors.index.json", &json!({"metadata": {}, "weight_map": map}));
}

fn open(directory: &TempDir) -> Result<Checkpoint, LoadError> {
    Checkpoint::open(&directory.0)
}

/// Holds every tensor against the model's.
fn check(checkpoint: &Checkpoint, dtype: DType, round: fn(f32) -> f32) {
    let ours = |name: &str| {
        name.replace("model.layers.", "blk.")
            .replace("model.embed_tokens", "token_embd")
            .replace("model.norm", "output_norm")
            .replace("lm_head", "output")
            .replace("input_layernorm", "attn_norm")
            .replace("post_attention_layernorm", "ffn_norm")
            .replace("self_attn.o_proj", "attn_output")
            .replace("self_attn.", "attn_")
            .replace("mlp.", "ffn_")
            .replace("_proj", "")
    };
    let model = model();
    assert_eq!(checkpoint.tensor_names().count(), model.len());
    for (name, (shape, values)) in &model {
        let tensor = checkpoint.tensor(&ours(name)).unwrap();
        assert_eq!((tensor.dtype, &tensor.shape), (dtype, shape), "{name}");
        let want: Vec<f32> = values.iter().map(|x| round(*x)).collect();
        assert_eq!(tensor.dequantize(), want, "{name}");
    }
}

#[test]
fn every_format_and_division_loads_to_the_same_tensors() {
    check(&open(&whole(Dtype::F32)).unwrap(), DType::F32, |x| x);
    check(&open(&whole(Dtype::F16)).unwrap(), DType::F16, |x| f16::from_f32(x).to_f32());
    check(&open(&whole(Dtype::BF16)).unwrap(), DType::BF16, |x| bf16::from_f32(x).to_f32());
    let sharded = directory();
    write_shards(&sharded, &model());
    check(&open(&sharded).unwrap(), DType::F32, |x| x);
}

#[test]
fn the_configuration_is_read() {
    let checkpoint = open(&whole(Dtype::BF16)).unwrap();
    let c = checkpoint.config();
    assert_eq!((c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.ffn), (2, 16, 4, 2, 4, 24));
    assert_eq!((c.vocab, c.context, c.rope_style, c.tied_embeddings), (VOCAB, 64, RopeStyle::Half, false));
    assert_eq!((checkpoint.format(), checkpoint.data_bytes()), ("BF16".into(), 2 * 12_368));
}

#[test]
fn a_tied_head_is_the_embedding() {
    let tied = whole(Dtype::F32);
    let mut json = config();
    json["tie_word_embeddings"] = true.into();
    write_json(&tied, "config.json", &json);
    let checkpoint = open(&tied).unwrap();
    assert!(checkpoint.config().tied_embeddings && !checkpoint.has("output.weight"));
}

#[test]
fn the_revision_tells_weights_and_words_apart() {
    let one = open(&whole(Dtype::F32)).unwrap().revision();
    assert_eq!(one, open(&whole(Dtype::F32)).unwrap().revision());
    assert_ne!(one, open(&whole(Dtype::F16)).unwrap().revision());
    let other = directory();
    let mut changed = model();
    changed.values_mut().for_each(|(_, x)| x.iter_mut().for_each(|x| *x *= 1.01));
    other.write("model.safetensors", &safetensors(changed.iter(), Dtype::F32));
    assert_ne!(one, open(&other).unwrap().revision());
    let other = whole(Dtype::F32);
    other.write("chat_template.jinja", b"x");
    assert_ne!(one, open(&other).unwrap().revision());
}

#[test]
fn tokenizer_and_template_come_with_it() {
    let directory = whole(Dtype::F32);
    let checkpoint = open(&directory).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    assert_eq!(tokenizer.encode("he h", true, true), [257, 256, 32, 104]);
    assert_eq!(tokenizer.encode("<s>he<tool></s>", true, true), [257, 256, 260, 258]);
    let literal = tokenizer.encode("</s><image>", false, false);
    assert_eq!(literal, "</s><image>".bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(tokenizer.encode("<image>", true, false).len(), 7);
    assert_eq!(tokenizer.eog_tokens().collect::<Vec<_>>(), [258, 259]);
    let bytes = [32, 256, 260, 258, 0xC3, 261].map(|id| tokenizer.token_bytes(id));
    assert_eq!(bytes, [&b" "[..], b"he", b"<tool>", b"", &[0xC3], b""]);
    assert_eq!(tokenizer.encode("<|user|>", true, false), [261]);
    assert_eq!(tokenizer.encode("<|user|>", false, false).len(), 8);

    let message = [ChatMessage { role: "user".into(), content: "Hi".into() }];
    assert_eq!(checkpoint.template().unwrap().render(&message).unwrap(), "<s>Hi</s>");
    directory.write("chat_template.jinja", b"[{{ messages[0].content }}]");
    assert_eq!(open(&directory).unwrap().template().unwrap().render(&message).unwrap(), "[Hi]");
}

#[test]
fn a_character_that_has_no_token_costs_no_other() {
    let directory = whole(Dtype::F32);
    let mut json = tokenizer_json();
    json["model"]["unk_token"] = "nowhere".into();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    let id = vocab.remove("z").unwrap();
    vocab.insert("not to be reached".into(), id);
    write_json(&directory, "tokenizer.json", &json);
    let tokenizer = open(&directory).unwrap().tokenizer().unwrap();
    let ids = tokenizer.encode("he zzz he", true, false);
    let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), "he  he");
}

#[test]
fn gemma_norms_are_stored_less_one() {
    let gemma = directory();
    let mut json = config();
    for (key, value) in [
        ("model_type", json!("gemma3_text")),
        ("hidden_act", json!(null)),
        ("head_dim", json!(4)),
        ("tie_word_embeddings", json!(null)),
        ("sliding_window", json!(8)),
        ("sliding_window_pattern", json!(2)),
    ] {
        json[key] = value;
    }
    write_json(&gemma, "config.json", &json);
    let mut model = model();
    model.remove("lm_head.weight");
    for layer in 0..2 {
        for (name, len) in [
            ("self_attn.q_norm", 4),
            ("self_attn.k_norm", 4),
            ("pre_feedforward_layernorm", 16),
            ("post_feedforward_layernorm", 16),
        ] {
            model.insert(format!("model.layers.{layer}.{name}.weight"), (vec![len], vec![0.25; len]));
        }
    }
    gemma.write("model.safetensors", &safetensors(model.iter(), Dtype::BF16));
    let checkpoint = open(&gemma).unwrap();
    let c = checkpoint.config();
    assert!(c.qk_norm && c.post_norms && c.tied_embeddings && c.is_local(0) && !c.is_local(1));
    for name in ["attn_q_norm", "ffn_norm", "post_ffw_norm"] {
        let norm = checkpoint.tensor(&format!("blk.1.{name}.weight")).unwrap();
        assert!(norm.dequantize().iter().all(|x| *x == 1.25), "{name}");
    }
    assert_eq!(checkpoint.tensor("blk.1.attn_q.weight").unwrap().dtype, DType::BF16);
}

#[test]
fn what_is_wrong_is_named() {
    type Break = fn(&TempDir);
    let cases: [(Break, &str); 14] = [
        (|d| std::fs::remove_file(d.0.join("config.json")).unwrap(), "config.json is missing"),
        (|d| drop(d.write("config.json", b"{")), "config.json"),
        (|d| std::fs::remove_file(d.0.join("model.safetensors")).unwrap(), "neither model.safetensors"),
        (|d| drop(d.write("model.safetensors", &[0xFF; 64])), "eader"),
        (|d| drop(d.write("model.safetensors", b"")), "eader"),
        (
            |d| {
                let bytes = std::fs::read(d.0.join("model.safetensors")).unwrap();
                d.write("model.safetensors", &bytes[..bytes.len() - 1]);
            },
            "model.safetensors",
        ),
        (
            |d| {
                let mut short = model();
                short.remove("model.layers.1.mlp.up_proj.weight");
                d.write("model.safetensors", &safetensors(short.iter(), Dtype::F32));
            },
            "blk.1.ffn_up.weight is missing",
        ),
        (
            |d| {
                let mut more = model();
                more.insert("model.layers.1.self_attn.o_proj.bias".into(), (vec![16], vec![0.0; 16]));
                d.write("model.safetensors", &safetensors(more.iter(), Dtype::F32));
            },
            "o_proj.bias does not belong",
        ),
        (
            |d| {
                let x = [0u8; 8];
                let view = TensorView::new(Dtype::I64, vec![1], &x).unwrap();
                d.write("model.safetensors", &serialize([("a", view)], None).unwrap());
            },
            "format I64",
        ),
        (
            |d| {
                let view = TensorView::new(Dtype::F32, vec![0, 16], &[]).unwrap();
                d.write("model.safetensors", &serialize([("a", view)], None).unwrap());
            },
            "is empty",
        ),
        (
            |d| {
                write_json(
                    d,
                    "model.safetensors.index.json",
                    &json!({"weight_map": {"a": "../x.safetensors"}}),
                )
            },
            "no safetensors file in this directory",
        ),
        (
            |d| write_json(d, "model.safetensors.index.json", &json!({"weight_map": {"a": "x.safetensors"}})),
            "x.safetensors",
        ),
        (|d| write_json(d, "model.safetensors.index.json", &json!([])), "no weight_map"),
        (
            |d| {
                d.write("other.safetensors", &safetensors(model().iter(), Dtype::F32));
                let map = json!({"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}});
                write_json(d, "model.safetensors.index.json", &map);
            },
            "there twice",
        ),
    ];
    for (harm, message) in cases {
        let directory = whole(Dtype::F32);
        harm(&directory);
        let error = open(&directory).expect_err(message).to_string();
        assert!(
            error.contains(message) && error.contains(directory.0.to_str().unwrap()),
            "{message}: {error}"
        );
    }
}

#[test]
fn wrong_tokenizers_are_refused() {
    let error = |change: &dyn Fn(&mut Value)| {
        let directory = whole(Dtype::F32);
        let mut json = tokenizer_json();
        change(&mut json);
        write_json(&directory, "tokenizer.json", &json);
        open(&directory).unwrap().tokenizer().unwrap_err().to_string()
    };
    assert!(error(&|j| j["model"]["vocab"]["far"] = 5000.into()).contains("beyond the model's embedding"));
    assert!(error(&|j| j["model"]["merges"] = json!([["h", "zz"]])).contains("tokenizer.json"));
    let doubled = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aa" });
    let doubled = json!({ "type": "Sequence", "normalizers": vec![doubled; 40] });
    assert!(error(&|j| j["normalizer"] = doubled.clone()).contains("much longer"));
    let many = json!({
        "type": "TemplateProcessing", "pair": [],
        "single": vec![json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } }); 1000],
        "special_tokens": { "<s>": { "id": "<s>", "ids": vec![257; 1000], "tokens": vec!["<s>"; 1000] } },
    });
    assert!(error(&|j| j["post_processor"] = many.clone()).contains("very many tokens"));
    assert!(error(&|j| j["model"]["continuing_subword_prefix"] = "##".into()).contains("prefix"));
    assert!(error(&|j| *j = json!(7)).contains("tokenizer.json"));
    assert!(error(&|j| j["post_processor"]["special_tokens"] = json!({})).contains("do not fit together"));
    let directory = whole(Dtype::F32);
    std::fs::remove_file(directory.0.join("tokenizer.json")).unwrap();
    let missing = open(&directory).unwrap().tokenizer().unwrap_err();
    assert!(matches!(&missing, LoadError::Io { path, .. } if path.ends_with("tokenizer.json")), "{missing}");
}
