//! Writes GGUF files, right or wrong ones.
#![allow(dead_code)] // each test program uses a part of it

/// A metadata value.
#[derive(Clone)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// A tensor: name, shape (outermost first), type number, bytes.
pub type Tensor = (String, Vec<usize>, u32, Vec<u8>);

/// A file to be written.
#[derive(Clone, Default)]
pub struct Gguf {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<Tensor>,
}

fn put_string(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

fn put_array(out: &mut Vec<u8>, kind: u32, len: usize) {
    out.extend(9u32.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend((len as u64).to_le_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U32(n) => out.extend([4u32.to_le_bytes(), n.to_le_bytes()].concat()),
        Value::F32(x) => out.extend([6u32.to_le_bytes(), x.to_le_bytes()].concat()),
        Value::Bool(b) => out.extend([&7u32.to_le_bytes()[..], &[u8::from(*b)]].concat()),
        Value::String(s) => {
            out.extend(8u32.to_le_bytes());
            put_string(out, s);
        }
        Value::Strings(all) => {
            put_array(out, 8, all.len());
            all.iter().for_each(|s| put_string(out, s));
        }
        Value::I32s(all) => {
            put_array(out, 5, all.len());
            out.extend(all.iter().flat_map(|n| n.to_le_bytes()));
        }
        Value::F32s(all) => {
            put_array(out, 6, all.len());
            out.extend(all.iter().flat_map(|x| x.to_le_bytes()));
        }
    }
}

impl Gguf {
    /// Sets a metadata entry.
    pub fn set(&mut self, key: &str, value: Value) -> &mut Self {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.into(), value));
        self
    }

    /// Adds a tensor in `f32`.
    pub fn tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) -> &mut Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors.push((name.into(), shape.to_vec(), 0, bytes));
        self
    }

    /// A Llama of 1 layer, width 32, 2 heads, feed-forward width 64, with a byte-level tokenizer of these tokens; its
    /// weights are small numbers.
    pub fn tiny(tokens: &[&str]) -> Self {
        let mut this = Self::default();
        this.set("general.architecture", Value::String("llama".into()))
            .set("llama.block_count", Value::U32(1))
            .set("llama.embedding_length", Value::U32(32))
            .set("llama.feed_forward_length", Value::U32(64))
            .set("llama.context_length", Value::U32(128))
            .set("llama.attention.head_count", Value::U32(2))
            .set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5))
            .set("tokenizer.ggml.model", Value::String("gpt2".into()))
            .set("tokenizer.ggml.tokens", Value::Strings(tokens.iter().map(|t| t.to_string()).collect()))
            .set("tokenizer.ggml.merges", Value::Strings(vec![]));
        let sizes: [(&str, &[usize]); 11] = [
            ("token_embd.weight", &[tokens.len(), 32]),
            ("output_norm.weight", &[32]),
            ("blk.0.attn_norm.weight", &[32]),
            ("blk.0.attn_q.weight", &[32, 32]),
            ("blk.0.attn_k.weight", &[32, 32]),
            ("blk.0.attn_v.weight", &[32, 32]),
            ("blk.0.attn_output.weight", &[32, 32]),
            ("blk.0.ffn_norm.weight", &[32]),
            ("blk.0.ffn_gate.weight", &[64, 32]),
            ("blk.0.ffn_up.weight", &[64, 32]),
            ("blk.0.ffn_down.weight", &[32, 64]),
        ];
        for (name, shape) in sizes {
            let len = shape.iter().product::<usize>();
            let values: Vec<f32> = (0..len).map(|i| (i % 13) as f32 / 16.0 - 0.375).collect();
            this.tensor(name, shape, &values);
        }
        this
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut out, key);
            put_value(&mut out, value);
        }
        let mut offset = 0;
        for (name, shape, kind, bytes) in &self.tensors {
            put_string(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset = (offset + bytes.len()).next_multiple_of(32);
        }
        for (_, _, _, bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        out
    }
}
