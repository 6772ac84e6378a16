//! The default model's file, as the engine sees it.

mod common;

use stoker_engine::weights::{Checkpoint, DType, RopeStyle};

#[test]
fn the_default_model_is_what_it_is() {
    let checkpoint = Checkpoint::open(&common::smollm2()).unwrap();
    let c = checkpoint.config();
    assert_eq!((c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim), (30, 576, 9, 3, 64));
    assert_eq!((c.ffn, c.vocab, c.context), (1536, 49152, 8192));
    assert_eq!((c.rope_base, c.rope_style, c.norm_eps), (100_000.0, RopeStyle::Interleaved, 1e-5));
    assert!(c.tied_embeddings && !c.qkv_bias && !c.qk_norm && c.rope_factors.is_none());
    assert_eq!(c.attention_scale, 0.125);

    let q = checkpoint.tensor("blk.0.attn_k.weight").unwrap();
    assert_eq!((q.dtype, q.shape.as_slice()), (DType::Q4_1, [192, 576].as_slice()));
    assert!(!checkpoint.has("output.weight"));
    assert_eq!(checkpoint.tensor_names().count(), 272);

    let all = q.dequantize();
    let mut row = vec![0.0; 576];
    q.dequantize_row(191, &mut row);
    assert_eq!(row, all[191 * 576..]);
    assert!(all.iter().all(|x| x.abs() < 10.0));

    assert_eq!(
        (checkpoint.name(), checkpoint.format()),
        ("SmolLM2-135M-Instruct".to_owned(), "Q4_1".to_owned())
    );
    // Written into caches and logs of running jobs: it must not change from one version to the next.
    assert_eq!(checkpoint.revision(), "cca35740346cff6a39348d724ed3853e");
}
