//! The part of a model that deals in text: tokenizer and chat template.

use crate::sequence::Sequence;
use crate::{Prompt, Request, RequestError, RequestErrorKind, Tokenizer};

/// What turns a request into tokens, and tokens into text.
pub(crate) struct Language {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
}

impl Language {
    /// Makes a sequence of a request, in a context of `context` tokens.
    pub fn prepare(&self, request: Request, context: usize) -> Result<Sequence, RequestError> {
        let prompt = self.encode(&request.prompt)?;
        Sequence::new(request, prompt, &self.tokenizer, context)
    }

    fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>, RequestError> {
        let invalid = |message| RequestError { kind: RequestErrorKind::Invalid, message };
        match prompt {
            Prompt::Text(text) => Ok(self.tokenizer.encode(text, false, true)),
            // Until templates are here.
            Prompt::Chat(_) => Err(invalid("the model has no chat template; send a plain prompt".into())),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::{Arc, OnceLock};

    use super::*;
    use crate::weights::Checkpoint;

    /// The default model's.
    pub(crate) fn smollm2() -> Arc<Language> {
        static LANGUAGE: OnceLock<Arc<Language>> = OnceLock::new();
        let load = || {
            let tokenizer = Checkpoint::open(&crate::common::smollm2()).unwrap().tokenizer().unwrap();
            Arc::new(Language { tokenizer })
        };
        LANGUAGE.get_or_init(load).clone()
    }
}
