//! Who joins, who steps, who leaves.
//!
//! Continuous batching: before every step the scheduler looks again at who is there. Running sequences get their row; what is
//! left of the step's budget goes to prompts, in chunks, so that a long prompt does not hold up the streams beside it.
//! Sequences are let in while there are slots and blocks for all their tokens; within a lane, that of the user who has had
//! least. When a running one needs a block and there is none, the least important one is preempted: it gives all its blocks up,
//! waits at the head of its lane, and is computed again later. The most important one always finds room, because the cache
//! holds at least one whole context. Batch sequences make room for interactive ones that wait for blocks, too, but not for ever.
//!
//! Of sequences that begin alike, one computes what they share, and the others take it over block by block.

use std::collections::{HashMap, VecDeque};

use crate::batch::Batch;
use crate::fairness::Accounts;
use crate::kernels::BLOCK;
use crate::kv::BlockPool;
use crate::pace::Pace;
use crate::sampler::Choice;
use crate::sequence::Sequence;
use crate::{Priority, SequenceId};

/// Every so-many-th slot, admission and prompt token of a step belongs to the batch lane if something waits there.
const BATCH_SHARE: usize = 10;
/// Most interactive sequences that are let in before a batch one whose turn it is, because there are not enough blocks for it
/// yet. Then they wait with it until running ones have ended, and it stays to come to an end.
const PATIENCE: usize = BATCH_SHARE * BATCH_SHARE;
/// How often a batch sequence is put out for interactive ones that wait for blocks, before it stays.
const YIELDS: u32 = 3;
/// Every so-many-th prompt token of a step is the most important sequence's, whoever has had how much.
const FIRST_SHARE: usize = 4;

/// A part of all prompts' tokens that is set aside for somebody, however small the steps' chunks are.
struct Share {
    /// One of so many tokens.
    every: usize,
    /// Tokens since the last one.
    since: usize,
}

impl Share {
    /// How many of the next `chunk` tokens.
    fn of(&mut self, chunk: usize) -> usize {
        self.since += chunk;
        let whole = self.since / self.every;
        self.since %= self.every;
        whole
    }
}

/// A sequence with a slot.
struct Running {
    sequence: Sequence,
    /// How many of its tokens the planned step computes.
    rows: usize,
}

/// The sequences of an engine, and the cache's blocks.
pub(crate) struct Scheduler {
    slots: usize,
    pool: BlockPool,
    /// Whether tokens are guessed ahead.
    speculation: bool,
    /// By [`Priority`].
    waiting: [VecDeque<Sequence>; 2],
    /// By importance: interactive before batch, earlier arrivals before later ones.
    running: Vec<Running>,
    accounts: Accounts,
    arrivals: u64,
    /// Admissions since one from the batch lane.
    since_batch: usize,
    /// Of these, those before a batch sequence whose turn it was.
    passed: usize,
    /// Prompt tokens for the most important sequence, whoever has had how much.
    first_share: Share,
    /// And for the batch lane.
    batch_share: Share,
}

impl Scheduler {
    /// At most `slots` sequences together, over `blocks` blocks of cache; `speculation`: tokens may be guessed ahead.
    pub fn new(slots: usize, blocks: usize, speculation: bool) -> Self {
        Self {
            slots,
            pool: BlockPool::new(blocks),
            speculation,
            waiting: Default::default(),
            running: Vec::new(),
            accounts: Accounts::default(),
            arrivals: 0,
            since_batch: 0,
            passed: 0,
            first_share: Share { every: FIRST_SHARE, since: 0 },
            batch_share: Share { every: BATCH_SHARE, since: 0 },
        }
    }

    /// Takes a sequence in.
    pub fn submit(&mut self, mut sequence: Sequence) {
        let user = sequence.user;
        let waits = self.all().any(|other| other.user == user && !other.decoding());
        self.accounts.enter(user, waits);
        self.arrivals += 1;
        sequence.arrival = self.arrivals;
        self.waiting[sequence.priority as usize].push_back(sequence);
    }

    /// Whether there is nobody.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting_count() == 0
    }

    /// How many wait.
    pub fn waiting_count(&self) -> usize {
        self.waiting.iter().map(VecDeque::len).sum()
    }

    /// How many have a slot.
    pub fn running_count(&self) -> usize {
        self.running.len()
    }

    /// How many sequences wait for nothing but their next token.
    pub fn decoding_count(&self) -> usize {
        self.running.iter().filter(|running| running.sequence.decoding()).count()
    }

    /// Blocks that sequences hold, and blocks in all.
    pub fn blocks(&self) -> (usize, usize) {
        (self.pool.total() - self.pool.available(), self.pool.total())
    }

    /// The sequence of that name, wherever it is.
    pub fn find(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.all().find(|sequence| sequence.id == id)
    }

    /// All sequences.
    pub fn all(&mut self) -> impl Iterator<Item = &mut Sequence> {
        let running = self.running.iter_mut().map(|running| &mut running.sequence);
        running.chain(self.waiting.iter_mut().flatten())
    }

    /// Fills `batch` with the next step: all that decode, with guesses where they pay, and a chunk of prompts.
    pub fn plan(&mut self, batch: &mut Batch, pace: &Pace) {
        batch.clear();
        self.share();
        if self.make_room() {
            self.admit();
        }
        let alone = self.running.iter().position(|running| running.sequence.pending_alone() > 0);
        let prompt = match alone {
            Some(suspect) => self.plan_alone(suspect, pace.chunk(0)),
            None => self.plan_rows(pace.chunk(self.decoding_count())),
        };
        // A chunk lengthens the streams' pauses enough.
        if self.speculation && prompt == 0 {
            self.speculate(pace);
        }
        for Running { sequence, rows } in self.running.iter().filter(|running| running.rows > 0) {
            let pending = sequence.pending();
            let outputs = usize::from(*rows == pending.len());
            batch.push(&pending[..*rows], sequence.computed, sequence.table.blocks(), outputs);
            batch.extend(&sequence.draft.tokens);
        }
    }

    /// Lets prompts take over blocks that others have computed since they were let in.
    fn share(&mut self) {
        for Running { sequence, .. } in self.running.iter_mut().filter(|running| !running.sequence.decoding())
        {
            let mut table = std::mem::take(&mut sequence.table);
            let full = self.pool.reuse(&mut table, sequence.tokens());
            sequence.table = table;
            if full > sequence.computed {
                sequence.found_in_cache(full);
            }
        }
    }

    /// Decides how many tokens of each sequence the step computes: one of those that decode, and up to `chunk` of prompts, those
    /// of the least served users first. Says how many of prompts.
    fn plan_rows(&mut self, chunk: usize) -> usize {
        let mut prompts = Vec::new();
        for (index, Running { sequence, rows }) in self.running.iter_mut().enumerate() {
            *rows = sequence.decoding().into();
            if !sequence.decoding() {
                prompts.push((sequence.priority, self.accounts.served(sequence.user), index));
            }
        }
        let mut left = chunk;
        let mut computing = HashMap::new();
        let mut give = |index: usize, most: usize| {
            // Where another computes the same block already, that gets the turn, and this one the block in the next step.
            let index = match self.running[index].sequence.next_key() {
                Some(key) => *computing.entry(key).or_insert(index),
                None => index,
            };
            let Running { sequence, rows } = &mut self.running[index];
            let more = (sequence.pending_in_company() - *rows).min(most).min(left);
            *rows += more;
            left -= more;
        };
        if let Some((.., first)) = prompts.first() {
            give(*first, self.first_share.of(chunk));
        }
        if let Some((.., first)) = prompts.iter().find(|(priority, ..)| *priority == Priority::Batch) {
            give(*first, self.batch_share.of(chunk));
        }
        prompts.sort_unstable();
        prompts.iter().for_each(|(.., index)| give(*index, chunk));
        chunk - left
    }

    /// Leaves the step to one sequence, that may be what makes steps fail, and says how many tokens of it are computed.
    fn plan_alone(&mut self, index: usize, chunk: usize) -> usize {
        self.running.iter_mut().for_each(|running| running.rows = 0);
        let Running { sequence, rows } = &mut self.running[index];
        *rows = sequence.pending_alone().min(chunk);
        *rows
    }

    /// Adds guesses to the step, in blocks that nobody needs now.
    fn speculate(&mut self, pace: &Pace) {
        let mut rows = self.decoding_count();
        for Running { sequence, .. } in &mut self.running {
            let blocks = sequence.table.blocks().len() + self.pool.available();
            let room = blocks * BLOCK - sequence.tokens().len();
            let guessed = sequence.speculate(room, rows, pace);
            let positions = sequence.tokens().len() + guessed;
            let granted = self.pool.grow(&mut sequence.table, positions);
            debug_assert!(granted, "there is room");
            rows += guessed;
        }
    }

    /// Gives every running sequence the blocks it needs, by importance, and preempts where there are none. Whether nobody had
    /// to go.
    fn make_room(&mut self) -> bool {
        for Running { sequence, .. } in &mut self.running {
            // Room for guesses that were wrong.
            let positions = sequence.tokens().len();
            self.pool.shrink(&mut sequence.table, positions);
        }
        let before = self.running.len();
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index].sequence;
            let positions = sequence.tokens().len();
            if self.pool.grow(&mut sequence.table, positions) {
                index += 1;
                continue;
            }
            // One batch sequence that is to come to an end stays: it has given way to more important ones often enough.
            let stays = self.running.iter().position(|running| running.sequence.yielded >= YIELDS);
            let last = self.running.len() - 1;
            let victim = if stays == Some(last) { last.saturating_sub(1) } else { last };
            self.preempt(victim);
            // Those behind it have moved up.
            index -= usize::from(victim < index);
        }
        self.running.len() == before
    }

    /// Sends a running sequence back to the head of its lane.
    fn preempt(&mut self, index: usize) {
        let mut sequence = self.running.remove(index).sequence;
        tracing::debug!(sequence = sequence.id.0, tokens = sequence.tokens().len(), "preempted");
        self.pool.release(sequence.restart());
        self.waiting[sequence.priority as usize].push_front(sequence);
    }

    /// Lets sequences in while there are slots, and blocks for all their tokens.
    fn admit(&mut self) {
        if !self.waits(Priority::Batch) {
            self.passed = 0;
        }
        while self.running.len() < self.slots {
            let Some(lane) = self.next_lane() else { return };
            if self.admit_from(lane) {
                continue;
            }
            // Somebody is waiting for the tokens of those that may pass; what runs ends, and leaves its blocks.
            let may_pass = lane == Priority::Batch && self.passed < PATIENCE;
            if !may_pass || !self.waits(Priority::Interactive) || !self.admit_from(Priority::Interactive) {
                return;
            }
            self.passed += 1;
        }
    }

    /// Lets in whose turn it is in a lane, if there are blocks, and says whether there were.
    fn admit_from(&mut self, lane: Priority) -> bool {
        let place = self.next_place(lane);
        let sequence = &mut self.waiting[lane as usize][place];
        let positions = sequence.tokens().len();
        let mut table = std::mem::take(&mut sequence.table);
        let found = self.pool.reuse(&mut table, sequence.tokens());
        let needed = positions.div_ceil(BLOCK) - table.blocks().len();
        if lane == Priority::Interactive {
            self.make_way(needed);
        }
        if !self.has_room(needed) || !self.pool.grow(&mut table, positions) {
            self.pool.release(table.take_blocks());
            self.waiting[lane as usize][place].table = table;
            return false;
        }
        let mut sequence = self.waiting[lane as usize].remove(place).expect("it was there");
        sequence.table = table;
        sequence.found_in_cache(found);
        self.insert(sequence);
        true
    }

    /// Whether a newcomer can have so many blocks. One for each that runs stays free, or the newcomer would soon push somebody
    /// out.
    fn has_room(&self, needed: usize) -> bool {
        needed + self.running.len() <= self.pool.available()
    }

    /// Puts batch sequences out, the least important first, until an interactive newcomer can have so many blocks; none if all of
    /// them were not enough.
    fn make_way(&mut self, needed: usize) {
        let yields = |running: &Running| {
            running.sequence.priority == Priority::Batch && running.sequence.yielded < YIELDS
        };
        let yielding = self.running.iter().filter(|running| yields(running));
        // With its blocks, each leaves the one that is kept free for it.
        let gain: usize = yielding.map(|running| self.pool.held_alone(&running.sequence.table) + 1).sum();
        if needed + self.running.len() > self.pool.available() + gain {
            return;
        }
        while !self.has_room(needed)
            && let Some(last) = self.running.iter().rposition(yields)
        {
            self.running[last].sequence.yielded += 1;
            self.preempt(last);
        }
    }

    /// Whose turn it is: the interactive lane's, unless the batch lane has waited for its share.
    fn next_lane(&self) -> Option<Priority> {
        let running =
            self.running.iter().filter(|running| running.sequence.priority == Priority::Batch).count();
        let owed = running < self.slots / BATCH_SHARE || self.since_batch + 1 >= BATCH_SHARE;
        match (self.waits(Priority::Interactive), self.waits(Priority::Batch)) {
            (true, true) if owed => Some(Priority::Batch),
            (true, _) => Some(Priority::Interactive),
            (false, true) => Some(Priority::Batch),
            (false, false) => None,
        }
    }

    /// Whether somebody waits in a lane.
    fn waits(&self, lane: Priority) -> bool {
        !self.waiting[lane as usize].is_empty()
    }

    /// Whose turn it is within a lane: that of one who was in already, then that of the user who has had least, what has
    /// been let in counted.
    fn next_place(&self, lane: Priority) -> usize {
        let promised = |user| {
            let running = self.running.iter().filter(move |running| running.sequence.user == user);
            running.map(|running| running.sequence.pending().len() as u64).sum::<u64>()
        };
        let order = |sequence: &Sequence| match sequence.was_admitted() {
            true => None,
            false => Some(self.accounts.served(sequence.user) + promised(sequence.user)),
        };
        let lane = &self.waiting[lane as usize];
        (0..lane.len()).min_by_key(|place| order(&lane[*place])).unwrap_or(0)
    }

    fn insert(&mut self, mut sequence: Sequence) {
        match sequence.priority {
            Priority::Interactive => self.since_batch += 1,
            Priority::Batch => {
                if self.passed >= PATIENCE {
                    sequence.yielded = YIELDS;
                }
                (self.since_batch, self.passed) = (0, 0);
            }
        }
        let importance = |sequence: &Sequence| (sequence.priority, sequence.arrival);
        let place = self.running.partition_point(|other| importance(&other.sequence) < importance(&sequence));
        self.running.insert(place, Running { sequence, rows: 0 });
    }

    /// Rows of the planned step that belong to sequences that decode, guesses included.
    pub fn stream_rows(&self) -> usize {
        let decoding = self.running.iter().filter(|running| running.sequence.decoding());
        decoding.map(|running| running.rows + running.sequence.draft.tokens.len()).sum()
    }

    /// Sequences that take part in the planned step, in the batch's order.
    pub fn stepped(&mut self) -> impl Iterator<Item = &mut Sequence> {
        let stepped = self.running.iter_mut().filter(|running| running.rows > 0);
        stepped.map(|running| &mut running.sequence)
    }

    /// How the planned step's outputs are chosen, in the batch's order; `None` if one of its sequences takes its logits on the
    /// host.
    pub fn choices(&self) -> Option<Vec<Choice>> {
        let mut choices = Vec::new();
        for Running { sequence, rows } in self.running.iter().filter(|running| running.rows > 0) {
            let own = sequence.choices()?;
            if *rows == sequence.pending().len() {
                choices.extend(own);
            }
        }
        Some(choices)
    }

    /// Those of them that wait for a token.
    pub fn due(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.stepped().filter(|sequence| sequence.pending().is_empty())
    }

    /// Notes that the planned rows are in the cache now, all but those of guesses.
    pub fn computed(&mut self) {
        for running in &mut self.running {
            let sequence = &mut running.sequence;
            self.accounts.charge(sequence.user, running.rows + sequence.draft.tokens.len());
            sequence.passed(running.rows);
            let mut table = std::mem::take(&mut sequence.table);
            self.pool.publish(&mut table, sequence.tokens(), sequence.computed);
            sequence.table = table;
        }
        // What failed may have been due to nobody, or to all together; now they are together again, and it goes well.
        if self.stepped().count() > 1 && self.all().all(|sequence| sequence.suspect.is_none()) {
            self.stepped().for_each(|sequence| sequence.strikes = 0);
        }
    }

    /// Notes that the planned step has failed.
    pub fn strike(&mut self) {
        for Running { sequence, rows } in self.running.iter_mut().filter(|running| running.rows > 0) {
            sequence.strike(*rows);
        }
    }

    /// Takes out all that have ended, from wherever they are.
    pub fn take_ended(&mut self) -> Vec<Sequence> {
        let mut ended = Vec::new();
        for lane in &mut self.waiting {
            while let Some(place) = lane.iter().position(|sequence| sequence.ended.is_some()) {
                ended.extend(lane.remove(place));
            }
        }
        let leaving = self.running.extract_if(.., |running| running.sequence.ended.is_some());
        for Running { mut sequence, .. } in leaving {
            self.pool.release(std::mem::take(&mut sequence.table));
            ended.push(sequence);
        }
        ended.iter().for_each(|sequence| self.accounts.leave(sequence.user));
        ended
    }

    /// Forgets everything that is cached, because the model has lost it; running sequences are computed again.
    pub fn forget_cache(&mut self) {
        self.pool = BlockPool::new(self.pool.total());
        for Running { mut sequence, .. } in self.running.drain(..).rev() {
            sequence.restart();
            self.waiting[sequence.priority as usize].push_front(sequence);
        }
    }

    /// Hands out all sequences, and is as new.
    pub fn dissolve(&mut self) -> Vec<Sequence> {
        self.forget_cache();
        self.accounts = Accounts::default();
        self.waiting.iter_mut().flat_map(|lane| lane.drain(..)).collect()
    }
}
