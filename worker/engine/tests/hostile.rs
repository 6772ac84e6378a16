//! Files that are damaged or made to do harm: a clear error, no panic, no large allocation.

mod common;
#[path = "common/use_all.rs"]
mod use_all;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::TempDir;
use common::gguf::{Gguf, Value};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stoker_engine::LoadError;
use stoker_engine::weights::Checkpoint;

/// Remembers the largest allocation.
struct Watch;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Watch {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        unsafe { System.dealloc(p, layout) }
    }

    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        unsafe { System.realloc(p, layout, size) }
    }
}

#[global_allocator]
static WATCH: Watch = Watch;

/// Writes a file and uses all that it promises.
fn use_all(directory: &TempDir, bytes: &[u8]) -> Result<(), LoadError> {
    use_all::use_all(&directory.write("model.gguf", bytes))
}

/// A file that is in order, and small.
fn good() -> Gguf {
    let mut gguf = Gguf::tiny(&["H", "e", "l", "o", "He", "ll", "Ġ", "<s>", "</s>"]);
    gguf.set("tokenizer.ggml.merges", Value::Strings(vec!["H e".into(), "l l".into()]))
        .set("tokenizer.ggml.token_type", Value::I32s(vec![1, 1, 1, 1, 1, 1, 1, 3, 3]))
        .set("tokenizer.ggml.bos_token_id", Value::U32(7))
        .set("tokenizer.ggml.eos_token_id", Value::U32(8))
        .set(
            "tokenizer.chat_template",
            Value::String("{% for m in messages %}{{ m.content }}{% endfor %}".into()),
        );
    gguf
}

/// The error that a file gives.
fn error(bytes: &[u8]) -> String {
    use_all(&TempDir::new(), bytes).expect_err("the file should be refused").to_string()
}

/// The error that a change of the good file gives.
fn error_with(change: impl FnOnce(&mut Gguf)) -> String {
    let mut gguf = good();
    change(&mut gguf);
    error(&gguf.bytes())
}

#[test]
fn the_good_file_is_good() {
    use_all(&TempDir::new(), &good().bytes()).unwrap();
}

#[test]
fn a_truncated_file_is_refused_wherever_it_ends() {
    let directory = TempDir::new();
    let bytes = good().bytes();
    let ends = (0..2000.min(bytes.len())).chain((2000..bytes.len()).step_by(97)).chain([bytes.len() - 1]);
    for end in ends {
        let error = use_all(&directory, &bytes[..end]).expect_err("truncated");
        assert!(matches!(error, LoadError::Malformed { .. } | LoadError::Io { .. }), "{end}: {error}");
    }
}

#[test]
fn numbers_that_can_not_be_are_refused() {
    let bytes = good().bytes();
    let put = |at: usize, value: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        error(&bytes)
    };
    for (at, value, message) in [
        (0, 0x4c47_4755u64, "not a GGUF file"),
        (8, u64::MAX, "tensors do not fit"),
        (8, 1 << 40, "tensors do not fit"),
        (16, u64::MAX, "metadata entries do not fit"),
        (24, u64::MAX, "bytes of a string do not fit"),
        (24, 1 << 30, "bytes of a string do not fit"),
    ] {
        let error = put(at, &value.to_le_bytes());
        assert!(error.contains(message), "{error}");
    }
    for (version, message) in [(1u32, "version 1"), (4, "version 4"), (3 << 24, "big-endian")] {
        let error = put(4, &version.to_le_bytes());
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn wrong_metadata_is_refused() {
    let string = |s: &str| Value::String(s.into());
    let set = |key: &'static str, value: Value| error_with(move |g| _ = g.set(key, value));
    for (key, value, message) in [
        ("general.architecture", string("mamba"), "architecture \"mamba\""),
        ("general.architecture", Value::U32(7), "no general.architecture"),
        ("general.alignment", Value::U32(0), "general.alignment"),
        ("general.alignment", Value::U32(24), "general.alignment"),
        ("general.alignment", Value::U32(1 << 31), "general.alignment"),
        ("split.count", Value::U32(3), "split"),
        ("llama.block_count", Value::U32(u32::MAX), "layers"),
        ("llama.block_count", Value::U32(2), "blk.1.attn_norm.weight is missing"),
        ("llama.embedding_length", Value::U32(64), "shape"),
        ("llama.embedding_length", string("32"), "embedding_length"),
        ("llama.feed_forward_length", Value::U32(0), "feed_forward_length"),
        ("llama.attention.head_count", Value::U32(u32::MAX), "heads"),
        ("llama.attention.head_count_kv", Value::U32(3), "can't share"),
        ("llama.attention.key_length", Value::U32(1 << 30), "head width"),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN), "epsilon"),
        ("llama.rope.freq_base", Value::F32(-1.0), "rotary base"),
        ("llama.rope.scaling.type", string("yarn"), "yarn"),
        ("llama.expert_count", Value::U32(8), "experts"),
        ("tokenizer.ggml.model", string("bert"), "bert"),
        ("tokenizer.ggml.pre", string("unheard-of"), "unheard-of"),
        ("tokenizer.ggml.merges", Value::Strings(vec!["He".into()]), "no pair"),
        ("tokenizer.ggml.merges", Value::Strings(vec!["H zz".into()]), "tokenizer"),
        ("tokenizer.ggml.token_type", Value::I32s(vec![1]), "1 entries for 9 tokens"),
        ("tokenizer.ggml.tokens", Value::Strings(vec!["H".into(); 10]), "entries for 10 tokens"),
        ("tokenizer.ggml.tokens", Value::U32(1), "no tokenizer.ggml.tokens"),
        ("tokenizer.ggml.bos_token_id", Value::U32(9), "there are 9 tokens"),
        ("tokenizer.chat_template", string("{% if %}"), "chat template"),
    ] {
        let error = set(key, value);
        assert!(error.contains(message), "{key}: {error}");
    }
    let twice = error_with(|g| g.metadata.push(g.metadata[0].clone()));
    assert!(twice.contains("there twice"), "{twice}");
}

#[test]
fn wrong_tensors_are_refused() {
    let tensor = |change: fn(&mut common::gguf::Tensor)| {
        error_with(|g| change(g.tensors.iter_mut().find(|t| t.0 == "blk.0.attn_q.weight").unwrap()))
    };
    for (error, message) in [
        (tensor(|t| t.0 = "blk.0.attn_z.weight".into()), "attn_q.weight is missing"),
        (tensor(|t| t.0 = "blk.0.attn_k.weight".into()), "there twice"),
        (tensor(|t| t.1 = vec![32, 16]), "shape"),
        (tensor(|t| t.1 = vec![0, 32]), "impossible size"),
        (tensor(|t| t.1 = vec![]), "0 dimensions"),
        (tensor(|t| t.1 = vec![1; 5]), "5 dimensions"),
        (tensor(|t| t.1 = vec![usize::MAX / 2, 32]), "impossible size or place"),
        (tensor(|t| t.1 = vec![1 << 40, 1 << 40]), "impossible size or place"),
        (tensor(|t| t.1 = vec![1 << 30, 32]), "truncated"),
        (tensor(|t| t.1 = vec![64, 32]), "overlap"),
        (tensor(|t| t.2 = 10), "Q2_K"),
        (tensor(|t| t.2 = 4711), "number 4711"),
        (tensor(|t| (t.1, t.2) = (vec![32, 33], 8)), "no whole Q8_0 blocks"),
        (error_with(|g| _ = g.tensor("blk.0.attn_q.bias", &[32], &[0.0; 32])), "attn_k.bias is missing"),
        (error_with(|g| _ = g.tensor("blk.0.ffn_up_exps.weight", &[32], &[0.0; 32])), "does not belong"),
        (error_with(|g| _ = g.tensor("rope_freqs.weight", &[8], &[0.0; 8])), "rotary scaling"),
        (error_with(|g| _ = g.tensor("rope_freqs.weight", &[4], &[1.0; 4])), "rope_freqs.weight"),
        (error_with(|g| g.tensors.clear()), "token_embd.weight"),
    ] {
        assert!(error.contains(message), "{message}: {error}");
    }
}

#[test]
fn the_files_path_is_in_the_error() {
    let missing = Checkpoint::open("/nowhere/model.gguf".as_ref()).unwrap_err();
    assert!(matches!(&missing, LoadError::Io { .. }), "{missing}");
    assert!(missing.to_string().contains("/nowhere/model.gguf"), "{missing}");
}

/// Changes a file at random places: single bits, bytes, and numbers to extremes; cuts and repetitions.
fn mutate(rng: &mut StdRng, bytes: &mut Vec<u8>, header: usize) {
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..header.min(bytes.len() - 8));
        match rng.random_range(0..7) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => bytes[at..at + 4]
                .copy_from_slice(&[0, u32::MAX, 1 << 31][rng.random_range(0..3)].to_le_bytes()),
            3 => bytes[at..at + 8]
                .copy_from_slice(&[u64::MAX, 1 << 63, 1 << 32][rng.random_range(0..3)].to_le_bytes()),
            4 => bytes[at] = bytes[at].wrapping_add(1),
            5 => drop(bytes.drain(at..at + rng.random_range(1..8))),
            _ => {
                let part = bytes[at..at + 8].to_vec();
                bytes.splice(at..at, part);
            }
        }
    }
}

#[test]
fn no_change_makes_it_panic_or_ask_for_much_memory() {
    let mut sentence_piece = good();
    sentence_piece
        .set("tokenizer.ggml.model", Value::String("llama".into()))
        .set("tokenizer.ggml.scores", Value::F32s((0..9).map(|i| -(i as f32)).collect()));
    let directory = TempDir::new();
    let mut rng = StdRng::seed_from_u64(2024);
    let mut opened = 0;
    for file in [good(), sentence_piece] {
        let bytes = file.bytes();
        let header = bytes.len() - file.tensors.iter().map(|t| t.3.len()).sum::<usize>();
        for _ in 0..3000 {
            let mut changed = bytes.clone();
            mutate(&mut rng, &mut changed, header);
            opened += usize::from(use_all(&directory, &changed).is_ok());
        }
    }
    // Some changes do no harm (to a token's name, say): the changes must not all have been found in the first bytes.
    assert!(opened > 100, "{opened}");
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest < 16 << 20, "an allocation of {largest} bytes");
}

#[test]
fn the_fuzz_targets_corpus_does_no_harm() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/checkpoint");
    let mut files: Vec<_> = std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let names =
        files.iter().filter(|path| use_all::use_all(path).is_err()).filter_map(|path| path.file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["huge-counts", "magic-only", "truncated"]);
    assert!(files.len() > 10);
}
