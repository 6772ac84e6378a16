//! The front door for services that enqueue by themselves: drains `llm.requests`, always, because the broker drops the
//! oldest messages of a long queue without a word.
//!
//! A message is settled only when its job is on a work queue (confirmed), in the ledger, or a dead letter there; until
//! then it is held. What a queue does not take now (it is full, the broker is away) is left to the ledger, so that it holds
//! up nobody else's; so is what may wait for ever, because no worker serves its model. What must wait all the same (a fleet
//! that nobody has joined yet, all services down) waits with growing pauses and keeps its delivery: giving it back would
//! bring it again within a millisecond. A message that comes twice is harmless, because workers claim jobs with ids that
//! others chose in the ledger.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use serde_json::Value;
use stoker_shared::job::{self, Job, MAX_ID_BYTES};
use stoker_shared::outcome::{JobError, code};
use stoker_shared::ports::{Accepted, Consumer, Delivery, JobRow, Message, PublishError, Source};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use crate::BACKOFF;
use crate::admission::{Admission, Caller};
use crate::closing::{self, Closed, Closing};
use crate::dispatch::{Dispatch, id_taken};
use crate::inbox::{End, deadline_passed};
use crate::letters;
use crate::outcome::{Story, outcome};
use crate::prepare::{Defaults, Intent, Prepared, Travel, prepare, remaining};
use crate::routing::{Model, Patience};
use crate::stored;

/// Messages that are handled side by side, those that wait included.
const HELD: u16 = 512;
/// Largest message, bytes; the same as over HTTP.
const LARGEST: usize = 10 << 20;
/// The broker has so long for a confirm, over what the adapter itself allows it.
const PUBLISH_LIMIT: std::time::Duration = std::time::Duration::from_secs(15);

/// Drains the front door until told to stop.
pub async fn run(dispatch: Arc<Dispatch>, admission: Arc<Admission>, stop: CancellationToken) {
    let mut backoff = BACKOFF;
    while !stop.is_cancelled() {
        match dispatch.ports.queue.consume(&Source::FrontDoor, HELD).await {
            Ok(consumer) => {
                backoff.reset();
                drain(&dispatch, &admission, consumer, &stop).await;
            }
            Err(e) => tracing::warn!("can't open the front door yet: {e}"),
        }
        backoff.pause().await;
    }
}

/// Handles deliveries until the consumer ends. Messages that are still held then go back to the queue with it.
async fn drain(
    dispatch: &Arc<Dispatch>,
    admission: &Admission,
    consumer: Consumer,
    stop: &CancellationToken,
) {
    let deliveries = stream::unfold(consumer, |mut consumer| async move {
        let delivery = consumer.deliveries.recv().await?;
        Some((delivery, consumer))
    });
    let handled =
        deliveries.for_each_concurrent(usize::from(HELD), |delivery| handle(dispatch, admission, delivery));
    tokio::select! {
        () = handled => {}
        () = stop.cancelled() => {}
    }
}

/// Sees one message to a work queue or to the dead letters, then settles it.
async fn handle(dispatch: &Arc<Dispatch>, admission: &Admission, delivery: Delivery) {
    let message = &delivery.message;
    let caller = admission.over_amqp(message.user_id.as_deref());
    let admitted = match read(dispatch, message) {
        Ok(job) => admit(dispatch, message, job, &caller).await,
        Err(error) => Err(error),
    };
    match admitted {
        Ok(prepared) => pass_on(dispatch, message, &caller, prepared).await,
        // What was accepted once stays so, even if it would be refused now.
        Err(_) if answer_known(dispatch, message, &caller).await => {}
        Err(error) => refuse(dispatch, message, &caller, &error).await,
    }
    if let Err(e) = delivery.receipt.ack().await {
        // It will be delivered again; the claim in the ledger makes that harmless.
        tracing::debug!(job = message.id, "a front-door message was not settled: {e}");
    }
}

/// The job that a message carries, checked.
fn read(dispatch: &Dispatch, message: &Message) -> Result<Job, JobError> {
    if message.body.len() > LARGEST {
        return Err(JobError::new(code::INVALID_REQUEST, "the message is over 10 MB"));
    }
    let job = Job::parse(&message.body, &dispatch.config.limits)?;
    let prefix = &dispatch.config.services.prefix;
    if let Some(name) = message.reply_to.as_deref().filter(|name| is_ours(name, prefix)) {
        let message = format!("reply_to must not name a queue of the fleet; it is {name:?}");
        return Err(JobError::field(code::INVALID_REQUEST, "reply_to", message));
    }
    Ok(job)
}

fn is_ours(queue: &str, prefix: &str) -> bool {
    queue.starts_with(stoker_shared::config::DEFAULT_PREFIX)
        || (!prefix.is_empty() && queue.starts_with(prefix))
}

/// Completes a job; waits for as long as nobody can say whether its model exists, until its deadline. A job for any model that
/// finds none gets one later.
async fn admit(
    dispatch: &Arc<Dispatch>,
    message: &Message,
    job: Job,
    caller: &Caller,
) -> Result<Prepared, JobError> {
    let given = id_of(&job, message);
    let settings = &dispatch.config.coordinator;
    let accepted = Instant::now();
    let deadline = accepted + remaining(&job, OffsetDateTime::now_utc(), settings)?;
    let mut backoff = BACKOFF;
    let model = loop {
        match dispatch.router.route(job.model_name(), Patience::Queued).await {
            Ok(model) => break model,
            Err(e) if e.code == code::MODEL_NOT_FOUND => return Err(e),
            Err(e) if e.code == code::MODEL_UNAVAILABLE && job.model_name().is_none() => {
                break Arc::new(Model::default());
            }
            Err(_) if Instant::now() >= deadline => return Err(deadline_passed()),
            Err(e) => tracing::debug!(job = given, "a front-door job waits: {e}"),
        }
        backoff.pause().await;
    };
    let intent = Intent {
        job,
        caller: caller.clone(),
        defaults: Defaults::guide(&dispatch.config.limits),
        accepted,
        traceparent: message.headers.get("traceparent").cloned(),
    };
    let travel = Travel::Queued { id: given, front_door: true };
    prepare(intent, model, travel, settings)
}

/// Sees to it that a message whose job was accepted before is answered with its outcome; whether it was.
async fn answer_known(dispatch: &Dispatch, message: &Message, caller: &Caller) -> bool {
    let Ok(job) = read(dispatch, message) else { return false };
    let Some(id) = id_of(&job, message) else { return false };
    let mut backoff = BACKOFF;
    loop {
        match dispatch.known(&caller.tenant, &id, &job.body_hash()).await {
            Ok(Some(JobRow { outcome: Some(outcome), .. })) => {
                answer(dispatch, message, &id, outcome).await;
                return true;
            }
            Ok(Some(row)) if stored::answers(&row.headers, message) => return true,
            Ok(Some(_)) => tracing::debug!(job = id, "a repeated message waits for the job's outcome"),
            Ok(None) => return false,
            Err(e) => tracing::debug!(job = id, "can't ask yet whether a job is known: {e}"),
        }
        backoff.pause().await;
    }
}

async fn answer(dispatch: &Dispatch, message: &Message, id: &str, outcome: Bytes) {
    let (reply_to, correlation_id) = (message.reply_to.as_deref(), message.correlation_id.as_deref());
    closing::announce(&dispatch.ports, id, outcome, true, reply_to, correlation_id).await;
}

/// Sees a job to its work queue or into the ledger, however long that takes; after its deadline, ends it instead.
async fn pass_on(dispatch: &Arc<Dispatch>, origin: &Message, caller: &Caller, prepared: Prepared) {
    let reply_to = origin.reply_to.as_deref();
    let correlation_id = origin.correlation_id.as_deref();
    let Some(mut message) = prepared.message().ok() else { return };
    message.reply_to = reply_to.map(str::to_owned);
    message.correlation_id = correlation_id.map(str::to_owned);
    let Prepared { job, envelope, model, deadline, .. } = &prepared;
    if let Some((text, end)) = dispatch.cached(&prepared).await {
        let closing = Closing { job, envelope, reply_to, correlation_id, text: Some(text), end, dead: None };
        match closing::close(dispatch, closing).await {
            Ok(Closed::Done { .. }) => return,
            // A worker knows what to do about an id that is in use.
            Ok(_) => {}
            Err(e) => tracing::debug!(job = job.id, "the cached answer can't be made final, so it runs: {e}"),
        }
    }
    let publish = async || {
        let published = dispatch.publish(model, job.lane, message.clone(), PUBLISH_LIMIT).await;
        published.inspect_err(|e| note(e, job, model)).is_ok()
    };
    // Nobody may come for it before its deadline, so that it has to be in the ledger first.
    let publish_kept = async || !model.served && !model.name.is_empty() && publish().await;
    let mut backoff = BACKOFF;
    loop {
        if model.served && publish().await {
            return;
        }
        match keep(dispatch, caller, &prepared, &message).await {
            Kept::Now => {
                if publish_kept().await {
                    dispatch.confirm(envelope.key);
                }
                return;
            }
            Kept::Before => return,
            // Whoever runs it notes who else waits.
            Kept::ForAnother if publish_kept().await => return,
            Kept::ForAnother => {}
            Kept::Not if Instant::now() < *deadline => {}
            Kept::Not => {
                let end = End::failed(deadline_passed());
                let closing =
                    Closing { job, envelope, reply_to, correlation_id, text: None, end, dead: None };
                match closing::close(dispatch, closing).await {
                    Ok(Closed::Done { .. }) => return,
                    // It has a row all the same.
                    Ok(Closed::Already | Closed::Running) => {}
                    Err(e) => tracing::warn!(job = job.id, "can't end a job whose time is up yet: {e}"),
                }
            }
        }
        backoff.pause().await;
    }
}

/// What came of leaving a job to the ledger.
enum Kept {
    /// It is there now, and published again from there.
    Now,
    /// It was there before, or its id is taken: nothing is left to do about the message.
    Before,
    /// It was there before, and its outcome will go elsewhere.
    ForAnother,
    /// The ledger can't be asked.
    Not,
}

/// Leaves a job to the ledger.
async fn keep(dispatch: &Dispatch, caller: &Caller, prepared: &Prepared, message: &Message) -> Kept {
    match dispatch.accept(prepared, message).await {
        Ok(Accepted::New) => Kept::Now,
        Ok(Accepted::Same(row)) => match row.outcome {
            Some(outcome) => {
                answer(dispatch, message, &message.id, outcome).await;
                Kept::Before
            }
            None if stored::answers(&row.headers, message) => Kept::Before,
            None => Kept::ForAnother,
        },
        Ok(Accepted::Taken) => {
            refuse(dispatch, message, caller, &id_taken(&message.id)).await;
            Kept::Before
        }
        Err(e) => {
            tracing::debug!(job = message.id, "the ledger can't take it now: {e}");
            Kept::Not
        }
    }
}

fn note(error: &PublishError, job: &Job, model: &Model) {
    match error {
        PublishError::Full => {
            tracing::debug!(job = job.id, model = %model.name, "held, the work queue is full")
        }
        e => tracing::warn!(job = job.id, model = %model.name, "held, not published yet: {e}"),
    }
}

/// Makes a dead letter of a message, and answers it if it has an id.
async fn refuse(dispatch: &Dispatch, message: &Message, caller: &Caller, error: &JobError) {
    let job = lenient(message);
    tracing::info!(job = job.id, code = error.code, "a front-door message is refused: {error}");
    letters::bury(&dispatch.ports, &letters::refused(message, job.id.as_deref(), &caller.tenant, error))
        .await;
    let Some(id) = job.id.clone() else { return };
    let outcome = outcome(&job, String::new(), &End::failed(error.clone()), &Story::default());
    let bytes = serde_json::to_vec(&outcome).unwrap_or_default();
    let prefix = &dispatch.config.services.prefix;
    let reply_to = message.reply_to.as_deref().filter(|name| !is_ours(name, prefix));
    let correlation_id = message.correlation_id.as_deref();
    closing::announce(&dispatch.ports, &id, bytes.into(), true, reply_to, correlation_id).await;
}

/// What can be read of a message, even if it is not a job: enough to answer it.
fn lenient(message: &Message) -> Job {
    let body = if message.body.len() > LARGEST { &[] } else { &*message.body };
    if let Ok(job) = job::parse_json::<Job>(body) {
        let id = job.id.as_deref().and_then(fitting).or_else(|| fitting(&message.id));
        return Job { id, ..job };
    }
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    Job {
        id: text("/id").and_then(|id| fitting(&id)).or_else(|| fitting(&message.id)),
        model: text("/options/model").or_else(|| text("/model")),
        user_id: text("/userId"),
        metadata: value.get("metadata").and_then(Value::as_object).cloned(),
        ..Job::default()
    }
}

/// The id that the submitter chose, in the body or beside it.
fn id_of(job: &Job, message: &Message) -> Option<String> {
    job.id.clone().or_else(|| fitting(&message.id))
}

fn fitting(id: &str) -> Option<String> {
    (1..=MAX_ID_BYTES).contains(&id.len()).then(|| id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_never_go_to_the_fleets_own_queues() {
        for name in ["llm.requests", "llm.", "t1.work.m.batch"] {
            assert!(is_ours(name, "t1."), "{name}");
        }
        for name in ["amq.rabbitmq.reply-to.g1", "amq.gen-x", "llmresults", "mine"] {
            assert!(!is_ours(name, "t1.") && !is_ours(name, ""), "{name}");
        }
    }

    #[test]
    fn as_much_as_possible_is_read_of_what_is_wrong() {
        let message = |body: &'static [u8], id: &str| Message {
            body: body.into(),
            id: id.into(),
            ..Message::default()
        };
        assert_eq!(lenient(&message(b"{\"id\":\"a\",\"options\":7}", "m")).id.as_deref(), Some("a"));
        assert_eq!(lenient(&message(b"{\"id\":7}", "m")).id.as_deref(), Some("m"));
        assert_eq!(lenient(&message(b"\xff\xfe", "")).id, None);
        let body = br#"{"id":"a","prompt":"p","own":7,"options":{"model":"m","maxTokens":-1}}"#;
        assert_eq!(lenient(&message(body, "")).model.as_deref(), Some("m"));
        let body = br#"{"id":"a","prompt":"p","own":7,"options":{"model":"m","stream":true}}"#;
        let job = lenient(&message(body, ""));
        assert_eq!((job.model_name(), &job.extra["own"]), (Some("m"), &7.into()));
        let request = outcome(&job, String::new(), &End::failed(deadline_passed()), &Story::default());
        assert_eq!(
            request.metadata["request"],
            serde_json::json!({ "own": 7, "options": { "stream": true } })
        );
    }
}
