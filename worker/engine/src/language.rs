//! The part of a model that deals in text: tokenizer and chat template.

use crate::sequence::Sequence;
use crate::{ChatTemplate, Prompt, Request, RequestError, RequestErrorKind, Tokenizer};

/// What turns a request into tokens, and tokens into text.
pub(crate) struct Language {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Conversations to text.
    pub template: ChatTemplate,
}

impl Language {
    /// Makes a sequence of a request, in a context of `context` tokens.
    pub fn prepare(&self, request: Request, context: usize) -> Result<Sequence, RequestError> {
        let prompt = match &request.prompt {
            Prompt::Text(text) => self.encode(text, false, context),
            Prompt::Chat(messages) => self.encode(&self.template.render(messages)?, true, context),
        }?;
        if prompt.is_empty() {
            return Err(RequestError {
                kind: RequestErrorKind::Invalid,
                message: "the prompt is empty".into(),
            });
        }
        if prompt.len() >= context {
            return Err(too_long(&prompt.len().to_string(), context));
        }
        Ok(Sequence::new(request, prompt, &self.tokenizer, context))
    }

    /// Control tokens count as such only in what a template wrote.
    fn encode(&self, text: &str, templated: bool, context: usize) -> Result<Vec<u32>, RequestError> {
        let least = self.tokenizer.least_tokens(text.len());
        if least > context {
            return Err(too_long(&format!("at least {least}"), context));
        }
        Ok(self.tokenizer.encode(text, templated, true))
    }
}

fn too_long(tokens: &str, context: usize) -> RequestError {
    let message =
        format!("the prompt has {tokens} tokens, which leaves no room in the context of {context} tokens");
    RequestError { kind: RequestErrorKind::ContextLength, message }
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
            let checkpoint = Checkpoint::open(&crate::common::smollm2()).unwrap();
            Arc::new(Language {
                tokenizer: checkpoint.tokenizer().unwrap(),
                template: checkpoint.template().unwrap(),
            })
        };
        LANGUAGE.get_or_init(load).clone()
    }
}
