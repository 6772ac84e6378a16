//! What the engine's tests share: where the model is.
#![allow(dead_code)] // each test program uses a part of it

use std::path::PathBuf;

/// The default model's file. Tests need it; they are not skipped without it.
///
/// # Panics
/// If it is not there, saying how to get it.
pub fn smollm2() -> PathBuf {
    let data = std::env::var_os("STOKER_DATA_DIR").map(PathBuf::from).unwrap_or_else(|| {
        let home = std::env::home_dir().expect("a home directory, or STOKER_DATA_DIR");
        home.join(".local/share/stoker")
    });
    let path = data.join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{} is missing: run `make model`", path.display());
    path
}

/// A file of `tests/data`.
pub fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}
