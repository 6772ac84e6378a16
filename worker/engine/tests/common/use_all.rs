//! Uses everything that a model's files promise, for tests that feed it damaged ones.

use std::path::Path;

use stoker_engine::weights::Checkpoint;
use stoker_engine::{ChatMessage, LoadError};

/// Opens a file, and reads all tensors, renders the template and tokenizes.
pub fn use_all(path: &Path) -> Result<(), LoadError> {
    let checkpoint = Checkpoint::open(path)?;
    let mut names: Vec<_> = checkpoint.tensor_names().map(str::to_owned).collect();
    names.sort();
    for name in names {
        checkpoint.tensor(&name)?.dequantize();
    }
    let _ = (checkpoint.revision(), checkpoint.name(), checkpoint.format());
    let template = checkpoint.template()?;
    let _ = template.render(&[ChatMessage { role: "user".into(), content: "Hi".into() }]);
    let tokenizer = checkpoint.tokenizer()?;
    for text in ["Hello, world <s>", "\u{0}é🙂  \n"] {
        for parse_special in [true, false] {
            let ids = tokenizer.encode(text, parse_special, true);
            assert!(ids.iter().all(|id| (*id as usize) < checkpoint.config().vocab));
            ids.iter().for_each(|id| _ = tokenizer.token_bytes(*id));
        }
    }
    Ok(())
}
