//! What the engine's tests share: where the model is.
#![allow(dead_code)] // each test program uses a part of it

pub mod cases;
pub mod gguf;
pub mod listener;

use std::path::PathBuf;

/// The default model's file. Tests need it; they are not skipped without it.
///
/// # Panics
/// If it is not there, saying how to get it.
pub fn smollm2() -> PathBuf {
    let folder = |variable| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let data = folder("STOKER_DATA_DIR").unwrap_or_else(|| {
        let data = folder("XDG_DATA_HOME").or(folder("HOME").map(|home| home.join(".local/share")));
        data.expect("a home directory, or STOKER_DATA_DIR").join("stoker")
    });
    let path = data.join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{} is missing: run `make model`, or set STOKER_DATA_DIR", path.display());
    path
}

/// A file of `tests/data`.
pub fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// A directory that is removed when it is dropped.
pub struct TempDir(pub PathBuf);

impl TempDir {
    /// A new, empty one.
    pub fn new() -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("stoker-engine-test-{}-{n}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Writes a file in it, and says where.
    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        // Some file systems wait for the disk when a file is overwritten, but not for a new one.
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
