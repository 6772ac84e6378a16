//! Work on a deep stack, for libraries that descend into what strangers wrote as deep as it goes.

use std::thread::{self, Builder};

/// Bytes of stack; only what is used becomes memory. Callers bound the text so that a part of it is enough.
const STACK: usize = 1 << 30;
/// Longest text of a template, a schema, an expression or a grammar, bytes.
pub(crate) const LONGEST_TEXT: usize = 64 << 10;

/// Does `work` on a thread of its own and waits for it; an error is its panic.
pub(crate) fn on_deep_stack<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> thread::Result<T> {
    thread::scope(|scope| {
        let thread = Builder::new().name(name.into()).stack_size(STACK).spawn_scoped(scope, work);
        thread.expect("the system can start a thread").join()
    })
}
