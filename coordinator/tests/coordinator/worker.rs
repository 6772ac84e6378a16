//! A worker without a model: takes jobs from the queue and says what its script has for them, as the protocol wants it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Map, json};
use stoker_shared::envelope::Envelope;
use stoker_shared::frame::Frame;
use stoker_shared::job::{Job, Lane};
use stoker_shared::outcome::{FinishReason, JobError, Outcome, Usage, code};
use stoker_shared::ports::{
    Append, CacheRow, Control, Delivery, Destination, Ending, LogHeader, Message, Opened, Opening, Ports,
    RequestRow, ServedModel, Source, WorkerPresence,
};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use uuid::Uuid;

/// What to say about a job.
#[derive(Clone, Default)]
pub struct Script {
    /// Pieces of text, one frame each.
    pub pieces: Vec<String>,
    /// Before each piece.
    pub pause: Duration,
    /// Instead of a good end.
    pub error: Option<JobError>,
    /// Waits for this before the last frame.
    pub gate: Option<Arc<Notify>>,
    /// Says nothing at all, and keeps the delivery.
    pub mute: bool,
}

/// Decides what is said about a job.
pub type Author = Arc<dyn Fn(&Job) -> Script + Send + Sync>;

/// The words of the prompt, each with its leading space, round and round for `maxTokens` tokens.
pub fn echo(job: &Job) -> Script {
    let prompt = job.prompt.clone().unwrap_or_else(|| {
        let messages = job.messages.iter().flatten();
        messages.last().map(|m| m.content.text()).unwrap_or_default()
    });
    let words: Vec<String> = prompt.split_whitespace().map(|w| format!(" {w}")).collect();
    let tokens = usize::try_from(job.options.max_tokens.unwrap_or(8)).unwrap();
    let pieces = words.iter().cycle().take(tokens).cloned().collect();
    Script { pieces, ..Script::default() }
}

/// A worker that runs.
pub struct TestWorker {
    /// Its id.
    pub id: String,
    /// Jobs begun.
    pub started: Arc<AtomicU32>,
    /// Jobs that it was told to end.
    pub cancelled: Arc<Mutex<Vec<Uuid>>>,
    /// Messages as they came.
    pub seen: Arc<Mutex<Vec<Message>>>,
    _tasks: JoinSet<()>,
}

impl TestWorker {
    /// Announces the model and starts taking its jobs.
    pub async fn start(ports: &Ports, model: &str, author: Author) -> Self {
        let id = format!("w-{}", Uuid::new_v4());
        let served = ServedModel {
            name: model.into(),
            revision: "r1".into(),
            context: 4096,
            slots: 8,
            ..ServedModel::default()
        };
        let presence =
            WorkerPresence { id: id.clone(), models: vec![served], slots: 8, ..WorkerPresence::default() };
        ports.queue.declare_work(model).await.unwrap();
        ports.bus.announce_worker(&presence).await.unwrap();
        let (started, cancelled, seen) = (
            Arc::<AtomicU32>::default(),
            Arc::<Mutex<Vec<Uuid>>>::default(),
            Arc::<Mutex<Vec<Message>>>::default(),
        );
        let mut control = ports.bus.control(&id).await.unwrap();
        let mut tasks = JoinSet::new();
        let bus = ports.bus.clone();
        tasks.spawn(async move {
            loop {
                bus.announce_worker(&presence).await.ok();
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
        let log = cancelled.clone();
        tasks.spawn(async move {
            while let Some(said) = control.recv().await {
                if let Control::Cancel(key) = said {
                    log.lock().unwrap().push(key);
                }
            }
        });
        for lane in Lane::ALL {
            let source = Source::Work { model: model.into(), lane };
            let consumer = ports.queue.consume(&source, 64).await.unwrap();
            let run = Run {
                ports: ports.clone(),
                author: author.clone(),
                worker: id.clone(),
                cancelled: cancelled.clone(),
                seen: seen.clone(),
                started: started.clone(),
            };
            tasks.spawn(async move {
                // All of it: a block that only names a field takes only the field along.
                let mut consumer = consumer;
                let mut jobs = JoinSet::new();
                while let Some(delivery) = consumer.deliveries.recv().await {
                    let run = run.clone();
                    jobs.spawn(async move { run.job(delivery).await });
                }
            });
        }
        Self { id, started, cancelled, seen, _tasks: tasks }
    }

    /// Jobs begun so far.
    pub fn started(&self) -> u32 {
        self.started.load(Ordering::SeqCst)
    }
}

#[derive(Clone)]
struct Run {
    ports: Ports,
    author: Author,
    worker: String,
    cancelled: Arc<Mutex<Vec<Uuid>>>,
    seen: Arc<Mutex<Vec<Message>>>,
    started: Arc<AtomicU32>,
}

impl Run {
    async fn job(&self, delivery: Delivery) {
        self.seen.lock().unwrap().push(delivery.message.clone());
        let envelope = Envelope::from_headers(&delivery.message.headers).expect("published by a coordinator");
        let job: Job = serde_json::from_slice(&delivery.message.body).expect("a job");
        let script = (self.author)(&job);
        self.started.fetch_add(1, Ordering::SeqCst);
        if script.mute {
            std::future::pending::<()>().await;
        }
        let header = LogHeader {
            epoch: 1,
            worker: self.worker.clone(),
            seed: 0,
            revision: "r1".into(),
            channel: job.stream_to.clone().unwrap(),
        };
        let opening = Opening { key: envelope.key, header, ttl: Duration::from_secs(600) };
        let opened = self.ports.bus.open(&[opening]).await.unwrap().remove(0);
        let Opened::Started { cancelled, .. } = opened else {
            delivery.receipt.ack().await.unwrap();
            return;
        };
        let mut text = String::new();
        let mut said = 0;
        let mut ended = cancelled;
        for piece in &script.pieces {
            tokio::time::sleep(script.pause).await;
            ended = ended || self.cancelled.lock().unwrap().contains(&envelope.key);
            if ended {
                break;
            }
            self.say(&job, &envelope, frame(said, text.len(), piece)).await;
            text.push_str(piece);
            said += 1;
        }
        if let Some(gate) = &script.gate {
            gate.notified().await;
        }
        let cancelled = ended.then(|| JobError::new(code::CANCELLED, "cancelled"));
        let error = cancelled.or(script.error);
        let reason = match &error {
            None => FinishReason::Length,
            Some(e) if e.code == code::CANCELLED => FinishReason::Cancelled,
            Some(_) => FinishReason::Error,
        };
        let usage = Usage { prompt_tokens: 3, completion_tokens: said, cached_prompt_tokens: 0 };
        let mut last = frame(said, text.len(), "");
        last.tokens = 0;
        last.finish_reason = Some(reason);
        last.usage = Some(usage);
        last.error = error.clone();
        self.say(&job, &envelope, last).await;
        self.finish(&job, &envelope, &delivery, Ended { text, usage, reason, error }).await;
    }

    async fn say(&self, job: &Job, envelope: &Envelope, frame: Frame) {
        let id = job.id.clone().unwrap();
        let key = (id.parse() != Ok(envelope.key)).then_some(envelope.key);
        let frame = Frame { id, key, ..frame };
        let append = Append {
            key: envelope.key,
            epoch: 1,
            channel: job.stream_to.clone().unwrap(),
            record: serde_json::to_vec(&frame).unwrap().into(),
            opening: None,
        };
        self.ports.bus.append(&[append]).await.unwrap();
    }

    async fn finish(&self, job: &Job, envelope: &Envelope, delivery: &Delivery, ended: Ended) {
        let Ended { text, usage, reason, error } = ended;
        let outcome = Outcome {
            v: 1,
            id: job.id.clone().unwrap(),
            success: error.is_none(),
            text: text.clone(),
            tokens: usage.completion_tokens,
            usage,
            finish_reason: reason,
            model: job.model.clone().unwrap(),
            user_id: job.user_id.clone(),
            metadata: Map::new(),
            error: error.clone(),
            timestamp: "2026-01-01T00:00:00Z".into(),
        };
        let bytes: Bytes = serde_json::to_vec(&outcome).unwrap().into();
        let cache = envelope.cache_key.clone().filter(|_| error.is_none()).map(|cache_key| CacheRow {
            cache_key,
            prompt_hash: job.prompt_hash(),
            response: text.clone(),
            model: outcome.model.clone(),
            metadata: json!({ "usage": usage, "finishReason": reason }),
            expires_in_s: 3600,
        });
        let request = RequestRow {
            user_id: job.user_id.clone(),
            response: text,
            model: outcome.model,
            tokens: usage.completion_tokens,
            finish_reason: reason.as_str().into(),
            ..RequestRow::default()
        };
        let ending = Ending {
            key: envelope.key,
            tenant: envelope.tenant.clone(),
            job_id: outcome.id.clone(),
            body_hash: envelope.body_hash.clone(),
            epoch: 1,
            outcome: bytes.clone(),
            request,
            cache,
            dead: None,
            expires_in_s: 3600,
        };
        self.ports.ledger.commit(vec![ending]).await.unwrap();
        if envelope.front_door {
            let message = Message { id: outcome.id, body: bytes, ..Message::default() };
            self.ports.queue.publish(&Destination::Responses, message).await.unwrap();
        }
        delivery.receipt.ack().await.unwrap();
    }
}

struct Ended {
    text: String,
    usage: Usage,
    reason: FinishReason,
    error: Option<JobError>,
}

fn frame(seq: u32, at: usize, text: &str) -> Frame {
    Frame { v: 1, epoch: 1, seq, at, text: text.into(), tokens: 1, ids: vec![seq], ..Frame::default() }
}
