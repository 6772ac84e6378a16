//! Takes jobs from the queue: reads them, and sends each where it belongs.
//!
//! The first delivery of a message that is marked once starts at once; everything else must be claimed first. A job that
//! is here already only gets one more delivery to acknowledge: its broker connection was cut, or it was published twice.

use std::sync::Arc;

use stoker_shared::backoff::Backoff;
use stoker_shared::job::Lane;
use stoker_shared::ports::{Consumer, Delivery, Source};
use tracing::{debug, warn};

use crate::attempt::{Attempt, Phase};
use crate::shared::{Served, Shared};
use crate::ticket::{Ticket, Waiter};
use crate::{claim, dead, opening};

/// Most deliveries that are looked at together.
const BATCH: usize = 256;

/// Consumes one lane of one model until the worker drains; lets go of the deliveries when the worker ends.
pub(crate) async fn run(shared: Arc<Shared>, served: Arc<Served>, lane: Lane) {
    // A job that starts before others can see its worker would be taken for a dead one's.
    let _ = shared.announced.subscribe().wait_for(|announced| *announced).await;
    let Some(mut consumer) = subscribe(&shared, &served, lane).await else { return };
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        tokio::select! {
            biased;
            () = shared.draining.cancelled() => break,
            n = consumer.deliveries.recv_many(&mut batch, BATCH) => match n {
                0 => break,
                _ => take(&shared, &served, lane, &mut batch),
            }
        }
    }
    consumer.stop();
    // Given back once no more come: before that they would come to this consumer again, as often as a message may.
    let mut late = Vec::new();
    while let Some(delivery) = consumer.deliveries.recv().await {
        late.push(delivery);
    }
    for delivery in late {
        let _ = delivery.receipt.nack(true).await;
    }
    // What was delivered can be settled as long as the consumer lives.
    std::future::pending().await
}

/// Subscribes as soon as the queue can be reached; `None` if the worker drains before.
async fn subscribe(shared: &Shared, served: &Served, lane: Lane) -> Option<Consumer> {
    let model = served.info().name.clone();
    let slots = served.info().slots.clamp(1, u32::from(u16::MAX)) as u16;
    let prefetch = match lane {
        Lane::Interactive => slots,
        Lane::Batch => (slots / 2).max(1),
    };
    let source = Source::Work { model, lane };
    let mut backoff = Backoff::new();
    while !shared.draining.is_cancelled() {
        match shared.ports.queue.consume(&source, prefetch).await {
            Ok(consumer) => return Some(consumer),
            Err(error) => warn!(%error, ?source, "can't consume yet"),
        }
        backoff.pause().await;
    }
    None
}

/// Sorts deliveries that arrived together.
fn take(shared: &Arc<Shared>, served: &Arc<Served>, lane: Lane, batch: &mut Vec<Delivery>) {
    let mut read = Vec::with_capacity(batch.len());
    for delivery in batch.drain(..) {
        match Ticket::read(&delivery.message, served, lane) {
            Some(ticket) => read.push((ticket, delivery)),
            None => dead::refuse(shared, served, delivery),
        }
    }
    let mut to_claim = Vec::new();
    let mut to_start = Vec::new();
    let mut taken = Vec::new();
    let mut table = shared.table();
    for (ticket, delivery) in read {
        let redelivered = delivery.redelivered;
        let waiter = Waiter::new(delivery, &ticket);
        let running = table.number_of(ticket.key());
        match running.and_then(|number| table.get(number)) {
            Some(attempt) if attempt.ticket.means(&ticket.envelope.body_hash) => {
                debug!(job = %ticket.id, "delivered again while it is here");
                attempt.waiters.push(waiter);
            }
            Some(_) => taken.push((ticket, waiter)),
            None => {
                let is_first = !redelivered;
                let starts = ticket.envelope.once && is_first;
                let phase = match starts {
                    true if opening::may_start_unopened(&ticket) => Phase::Running,
                    true => Phase::Opening,
                    false => Phase::Claiming,
                };
                let ticket = Arc::new(ticket);
                let number = table.insert(Attempt::new(ticket.clone(), vec![waiter], phase));
                if starts {
                    let _ = shared.to_open.send(number);
                }
                match phase {
                    Phase::Running => to_start.push((number, ticket)),
                    Phase::Claiming => to_claim.push((number, ticket, is_first)),
                    _ => {}
                }
            }
        }
    }
    drop(table);
    opening::start_unopened(shared, to_start);
    for (number, ticket, is_first) in to_claim {
        shared.spawn(claim::run(shared.clone(), number, ticket, is_first, 0));
    }
    for (ticket, waiter) in taken {
        dead::taken(shared, &ticket, waiter);
    }
}
