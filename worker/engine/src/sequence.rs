//! One request on its way: its tokens, its place in the cache, and the text that has come of it.
//!
//! A sequence is its tokens; what the cache holds of them is only a means. Whatever is not computed yet, be it a fresh
//! prompt, the tokens of an earlier attempt, or everything after a preemption, is computed the same way, and a token is
//! only sampled behind the last one. So nothing is ever emitted twice.

use std::ops::Range;
use std::time::Instant;

use crate::guide::Guide;
use crate::kv::{Key, Table};
use crate::pace::Pace;
use crate::sampler::Choice;
use crate::speculation::{Chance, Drafter};
use crate::{
    Detokenizer, Event, Finish, FinishReason, Priority, Request, RequestError, Sampling, SequenceId,
    StopMatcher, TokenCounts, Tokenizer, Usage, sample,
};

/// A request that has been understood.
pub(crate) struct Sequence {
    /// The caller's name for it.
    pub id: SequenceId,
    /// Who goes first.
    pub priority: Priority,
    /// Whose it is.
    pub user: u64,
    /// When it ends at the latest.
    pub deadline: Option<Instant>,
    /// Ends at nothing but its length; for benchmarks.
    pub endless: bool,
    /// Its place in the order of arrivals.
    pub arrival: u64,
    /// Its blocks of the cache.
    pub table: Table,
    /// How many of its tokens are in the cache.
    pub computed: usize,
    /// What the planned step guesses of the tokens behind.
    pub draft: Draft,
    /// How often it has made room for an interactive one, or counts as having done so.
    pub yielded: u32,
    /// Those of its tokens that were in steps that failed, and have not been computed since.
    pub suspect: Option<Range<usize>>,
    /// In how many steps that failed it was since anybody turned out to be the reason, or one in company went well.
    pub strikes: u32,
    /// Why it is over; set once.
    pub ended: Option<FinishReason>,
    /// Prompt, resumed and new tokens.
    tokens: Vec<u32>,
    /// How many of the tokens are the prompt.
    prompt: usize,
    /// At so many tokens it ends.
    limit: usize,
    sampling: Sampling,
    /// How often each token was generated, for the penalties.
    counts: TokenCounts,
    /// Keeps the new tokens within a grammar.
    guide: Option<Guide>,
    text: TextStream,
    /// What the running step adds to its event.
    step: Output,
    /// How much of the prompt others had put into the cache; `None` until it is first let in.
    cached_prompt: Option<u32>,
    /// Whether all that it computed was lost once.
    restarted: bool,
    drafter: Drafter,
}

/// Tokens that are guessed to come next.
#[derive(Default)]
pub(crate) struct Draft {
    /// In order.
    pub tokens: Vec<u32>,
    /// Where they come from.
    chance: Option<Chance>,
}

/// What a step did for one sequence.
#[derive(Default)]
struct Output {
    tokens: Vec<u32>,
    text: String,
}

impl Sequence {
    /// Takes over a request whose prompt is `prompt`: at least one token, and fewer than `context`, the most tokens that a
    /// sequence may have. `guide`: that of the request's constraint, at its beginning.
    pub fn new(
        request: Request,
        prompt: Vec<u32>,
        guide: Option<Guide>,
        tokenizer: &Tokenizer,
        context: usize,
    ) -> Self {
        let most = request.max_tokens.map_or(usize::MAX, |most| most as usize);
        let mut sequence = Self {
            id: request.id,
            priority: request.priority,
            user: request.user,
            deadline: request.deadline,
            endless: false,
            arrival: 0,
            table: Table::default(),
            computed: 0,
            draft: Draft::default(),
            yielded: 0,
            suspect: None,
            strikes: 0,
            ended: None,
            prompt: prompt.len(),
            limit: prompt.len().saturating_add(most).min(context),
            tokens: prompt,
            sampling: request.sampling,
            counts: TokenCounts::new(),
            guide,
            text: TextStream::new(&request.stop),
            step: Output::default(),
            cached_prompt: None,
            restarted: false,
            drafter: Drafter::default(),
        };
        sequence.resume(&request.resume.tokens, tokenizer);
        sequence
    }

    /// Goes again through what an earlier attempt generated. All its text is out already: what is released for tokens, and
    /// with an end that they reach, depends on them alone.
    fn resume(&mut self, tokens: &[u32], tokenizer: &Tokenizer) {
        if self.tokens.len() >= self.limit {
            self.ended = Some(FinishReason::Length);
        }
        for &token in tokens {
            if self.ended.is_some() {
                break;
            }
            self.push(token, tokenizer);
        }
        self.step = Output::default();
    }

    /// Tokens that are not in the cache yet.
    pub fn pending(&self) -> &[u32] {
        &self.tokens[self.computed..]
    }

    /// All its tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How many of its tokens may be computed beside other sequences now.
    pub fn pending_in_company(&self) -> usize {
        let end = self.suspect.as_ref().map_or(self.tokens.len(), |suspect| suspect.start);
        end.saturating_sub(self.computed)
    }

    /// How many of its tokens are to be computed with nobody beside it now: all before them are in the cache.
    pub fn pending_alone(&self) -> usize {
        let suspect = self.suspect.as_ref().filter(|suspect| suspect.contains(&self.computed));
        suspect.map_or(0, |suspect| suspect.end - self.computed)
    }

    /// Notes that a step failed with the next `rows` of its tokens in it.
    pub fn strike(&mut self, rows: usize) {
        let failed = self.computed..self.computed + rows;
        self.suspect = Some(match self.suspect.take() {
            Some(before) => before.start.min(failed.start)..before.end.max(failed.end),
            None => failed,
        });
        self.strikes += 1;
    }

    /// Notes that the cache holds `rows` more of its tokens.
    pub fn passed(&mut self, rows: usize) {
        self.computed += rows;
        self.suspect.take_if(|suspect| suspect.end <= self.computed);
    }

    /// Whether only its newest token has to be computed before the next can be sampled.
    pub fn decoding(&self) -> bool {
        self.pending().len() == 1 && self.tokens.len() > self.prompt
    }

    /// See [`Table::next_key`].
    pub fn next_key(&mut self) -> Option<Key> {
        self.table.next_key(&self.tokens)
    }

    /// Whether it has been let in before.
    pub fn was_admitted(&self) -> bool {
        self.cached_prompt.is_some()
    }

    /// Notes that the cache holds the first `positions` of its tokens, those that it has computed among them.
    pub fn found_in_cache(&mut self, positions: usize) {
        let cached = self.cached_prompt.get_or_insert(0);
        // Once it has restarted, it may find what it computed itself.
        if !self.restarted {
            *cached += (positions.min(self.prompt) - self.computed.min(self.prompt)) as u32;
        }
        self.passed(positions - self.computed);
    }

    /// Forgets all that is computed, and gives its blocks back: it is to be computed again.
    pub fn restart(&mut self) -> Table {
        self.computed = 0;
        self.draft = Draft::default();
        self.restarted = true;
        self.table.take_blocks()
    }

    /// Whether tokens may be guessed ahead for it.
    fn may_speculate(&self) -> bool {
        self.decoding() && self.guide.is_none()
    }

    /// Guesses what comes next, where that is likely to save time, and says how many tokens: at most `room`, in a step of `rows`
    /// rows so far.
    pub fn speculate(&mut self, room: usize, rows: usize, pace: &Pace) -> usize {
        self.draft = Draft::default();
        // The token that is sampled behind the guesses must be within the limit too.
        let most = room.min(self.limit.saturating_sub(self.tokens.len() + 1));
        if !self.may_speculate() || most == 0 {
            return 0;
        }
        let Some(chance) = self.drafter.find(&self.tokens) else { return 0 };
        let length = self.drafter.length(chance, most, rows, pace);
        self.draft = Draft { tokens: chance.guess(&self.tokens, length), chance: Some(chance) };
        length
    }

    /// Takes the next token, `choose(0)`, and as long as it is what was guessed, another one, behind row 1 and so on of what
    /// was computed. Ends the sequence if a choice fails. Gives back how many guesses were right; the keys and values of the
    /// others count as not computed.
    pub fn advance(
        &mut self,
        tokenizer: &Tokenizer,
        mut choose: impl FnMut(&Self, usize) -> Result<u32, RequestError>,
    ) -> usize {
        let draft = std::mem::take(&mut self.draft);
        let mut right = 0;
        for row in 0..=draft.tokens.len() {
            let token = match choose(self, row) {
                Ok(token) => token,
                Err(error) => {
                    self.end(FinishReason::Error(error));
                    break;
                }
            };
            self.step.tokens.push(token);
            self.push(token, tokenizer);
            if draft.tokens.get(row) != Some(&token) {
                break;
            }
            right += 1;
            self.computed += 1;
            if self.ended.is_some() {
                break;
            }
        }
        if let Some(chance) = draft.chance {
            self.drafter.learn(chance, draft.tokens.len(), right);
        }
        right
    }

    /// Its guide, if it has one.
    pub fn guide(&mut self) -> Option<&mut Guide> {
        self.guide.as_mut()
    }

    /// How the next token is chosen, and one behind each guess; `None` if penalties or a grammar must change its logits first.
    pub fn choices(&self) -> Option<impl Iterator<Item = Choice>> {
        let Sampling { presence_penalty, frequency_penalty, .. } = self.sampling;
        if self.guide.is_some() || presence_penalty != 0.0 || frequency_penalty != 0.0 {
            return None;
        }
        let next = self.position();
        let positions = next..=next + self.draft.tokens.len() as u64;
        Some(positions.map(|position| Choice::new(&self.sampling, position)))
    }

    /// Chooses the next token from the logits behind the last one; they are overwritten.
    ///
    /// # Errors
    /// The request's, if its grammar can't be followed any further.
    pub fn choose(&self, logits: &mut [f32]) -> Result<u32, RequestError> {
        if let Some(guide) = &self.guide {
            guide.mask(logits)?;
        }
        Ok(sample(logits, &self.sampling, &self.counts, self.position()))
    }

    /// Index of the next token in the generated text.
    fn position(&self) -> u64 {
        (self.tokens.len() - self.prompt) as u64
    }

    /// Puts a token behind the others and looks what it means for the text.
    fn push(&mut self, token: u32, tokenizer: &Tokenizer) {
        self.tokens.push(token);
        self.counts.add(token);
        if tokenizer.is_eog(token) && !self.endless {
            self.end(FinishReason::Stop);
            return;
        }
        let (text, stopped) = self.text.push(tokenizer.token_bytes(token));
        self.step.text.push_str(&text);
        if stopped {
            self.ended = Some(FinishReason::Stop);
            return;
        }
        match self.guide.as_mut().map_or(Ok(false), |guide| guide.accept(token)) {
            Err(error) => self.end(FinishReason::Error(error)),
            Ok(true) => self.end(FinishReason::Stop),
            Ok(false) if self.tokens.len() >= self.limit => self.end(FinishReason::Length),
            Ok(false) => {}
        }
    }

    /// Ends it, and releases the text that was held back.
    pub fn end(&mut self, reason: FinishReason) {
        if self.ended.is_some() {
            return;
        }
        let (text, stopped) = self.text.finish();
        self.step.text.push_str(&text);
        // The last, incomplete characters may complete a stop string; only a stop outranks the length.
        let stopped = stopped && reason == FinishReason::Length;
        self.ended = Some(if stopped { FinishReason::Stop } else { reason });
    }

    /// How many tokens this step has chosen.
    pub fn new_tokens(&self) -> usize {
        self.step.tokens.len()
    }

    /// What this step did for it, if anything.
    pub fn take_event(&mut self) -> Option<Event> {
        let Output { tokens, text } = std::mem::take(&mut self.step);
        let finish = self.ended.clone().map(|reason| Finish { reason, usage: self.usage() });
        if tokens.is_empty() && text.is_empty() && finish.is_none() {
            return None;
        }
        Some(Event { id: self.id, tokens, text, finish })
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt as u32,
            completion_tokens: (self.tokens.len() - self.prompt) as u32,
            cached_prompt_tokens: self.cached_prompt.unwrap_or(0),
        }
    }
}

/// From tokens to text that may be shown: whole characters only, and nothing that could still become a stop string.
struct TextStream {
    detokenizer: Detokenizer,
    stop: StopMatcher,
}

impl TextStream {
    fn new(stop: &[String]) -> Self {
        Self { detokenizer: Detokenizer::new(), stop: StopMatcher::new(stop) }
    }

    /// Text that a token's bytes release, and whether a stop string is complete.
    fn push(&mut self, bytes: &[u8]) -> (String, bool) {
        let text = self.detokenizer.push(bytes);
        self.stop.push(&text)
    }

    /// All that is still held back, and whether its end completes a stop string.
    fn finish(&mut self) -> (String, bool) {
        let tail = self.detokenizer.flush();
        let (mut text, stopped) = self.stop.push(&tail);
        if !stopped {
            text.push_str(&self.stop.flush());
        }
        (text, stopped)
    }
}
