//! A GGUF file of any bytes: opened, and everything used that it promises. It must neither panic nor ask for much memory
//! (libFuzzer's limit on single allocations is `-malloc_limit_mb`).
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/common/use_all.rs"]
mod use_all;

fuzz_target!(|bytes: &[u8]| {
    let path = std::env::temp_dir().join(format!("stoker-fuzz-{}.gguf", std::process::id()));
    std::fs::write(&path, bytes).expect("a temporary file");
    let _ = use_all::use_all(&path);
});
