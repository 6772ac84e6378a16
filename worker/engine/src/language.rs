//! The part of a model that deals in text: tokenizer, chat template, and grammars over its tokens.

use std::sync::OnceLock;

use crate::guide::Grammars;
use crate::sequence::Sequence;
use crate::{ChatTemplate, Prompt, Request, RequestError, RequestErrorKind, Tokenizer};

/// What turns a request into tokens, and tokens into text.
pub(crate) struct Language {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Conversations to text.
    template: ChatTemplate,
    /// Made for the first request with a constraint: it takes longer than all else here.
    grammars: OnceLock<Grammars>,
}

impl Language {
    /// Puts the parts together.
    pub fn new(tokenizer: Tokenizer, template: ChatTemplate) -> Self {
        Self { tokenizer, template, grammars: OnceLock::new() }
    }

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
        let grammars = || self.grammars.get_or_init(|| Grammars::new(&self.tokenizer));
        let guide = request.constraint.as_ref().map(|constraint| grammars().guide(constraint)).transpose()?;
        Ok(Sequence::new(request, prompt, guide, &self.tokenizer, context))
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
    use std::sync::Arc;

    use super::*;
    use crate::weights::Checkpoint;

    /// The default model's.
    pub(crate) fn smollm2() -> Arc<Language> {
        static LANGUAGE: OnceLock<Arc<Language>> = OnceLock::new();
        let load = || {
            let checkpoint = Checkpoint::open(&crate::common::smollm2()).unwrap();
            Arc::new(Language::new(checkpoint.tokenizer().unwrap(), checkpoint.template().unwrap()))
        };
        LANGUAGE.get_or_init(load).clone()
    }
}
