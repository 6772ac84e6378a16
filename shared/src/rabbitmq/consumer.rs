//! A subscription that outlives connections and channels.
//!
//! Each has a channel of its own. When that goes, the broker gives everything unsettled back to the queue, the old
//! receipts are stale, and the subscription is made anew as soon as it can be.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use lapin::Channel;
use lapin::message::Delivery as RawDelivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions};
use lapin::types::FieldTable;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::control::Control;
use super::link::{BACKOFF, Link};
use super::message::from_delivery;
use super::topology::{self, Names};
use super::{port_error, unavailable};
use crate::ports::{Consumer, Delivery, PortError, PortResult, Receipt, Source};

/// What a subscription is made of, again and again.
pub struct Subscription {
    link: Arc<Link<()>>,
    control: Arc<Control>,
    names: Arc<Names>,
    source: Source,
    prefetch: u16,
    limit: Duration,
    deliveries: mpsc::Sender<Delivery>,
    /// No more deliveries are wanted.
    stop: CancellationToken,
    /// Nobody holds the consumer.
    gone: CancellationToken,
}

/// Why deliveries no longer come.
enum End {
    Gone,
    Stopped,
    Lost(String),
}

impl Subscription {
    /// Subscribes; hands back the consumer once the subscription stands.
    pub async fn start(
        link: Arc<Link<()>>,
        control: Arc<Control>,
        names: Arc<Names>,
        source: Source,
        prefetch: u16,
        limit: Duration,
    ) -> PortResult<Consumer> {
        let (sender, deliveries) = mpsc::channel(usize::from(prefetch));
        let (stop, gone) = (CancellationToken::new(), CancellationToken::new());
        let consumer = Consumer { deliveries, stop: stop.clone(), guard: gone.clone().drop_guard() };
        let this = Self { link, control, names, source, prefetch, limit, deliveries: sender, stop, gone };
        let (stands, standing) = oneshot::channel();
        tokio::spawn(this.run(stands));
        standing.await.unwrap_or_else(|_| Err(unavailable("the subscription's task ended")))?;
        Ok(consumer)
    }

    async fn run(self, stands: oneshot::Sender<PortResult<()>>) {
        let mut stands = Some(stands);
        let mut backoff = BACKOFF;
        loop {
            let subscribed = tokio::select! {
                biased;
                () = self.gone.cancelled() => return,
                () = self.stop.cancelled() => break,
                subscribed = self.subscribe() => subscribed,
            };
            let reason = match subscribed {
                Ok((channel, mut consumer)) => {
                    if let Some(stands) = stands.take() {
                        let _ = stands.send(Ok(()));
                    }
                    backoff.reset();
                    match self.forward(&mut consumer).await {
                        End::Gone => return close(&channel, self.limit).await,
                        End::Stopped => return self.finish(channel, consumer).await,
                        End::Lost(reason) => {
                            close(&channel, self.limit).await;
                            reason
                        }
                    }
                }
                Err(error) => match stands.take() {
                    Some(stands) => return drop(stands.send(Err(error))),
                    None => error.to_string(),
                },
            };
            tracing::warn!(source = ?self.source, reason, "lost the subscription; subscribing again");
            tokio::select! {
                () = self.gone.cancelled() => return,
                () = self.stop.cancelled() => break,
                () = backoff.pause() => {}
            }
        }
    }

    async fn subscribe(&self) -> PortResult<(Channel, lapin::Consumer)> {
        let live = self.link.live(self.limit).await?;
        self.control.declare(live.host, &self.names, &self.source).await?;
        super::within(self.limit, async {
            let channel =
                topology::consuming_channel(&live.connection, self.prefetch).await.map_err(port_error)?;
            let (queue, options) = (self.names.queue(&self.source)?, BasicConsumeOptions::default());
            let consumer = channel
                .basic_consume(queue, Default::default(), options, FieldTable::default())
                .await
                .map_err(port_error)?;
            Ok((channel, consumer))
        })
        .await
    }

    async fn forward(&self, consumer: &mut lapin::Consumer) -> End {
        loop {
            let delivery = tokio::select! {
                biased;
                () = self.gone.cancelled() => return End::Gone,
                () = self.stop.cancelled() => return End::Stopped,
                next = consumer.next() => match next {
                    Some(Ok(delivery)) => delivery,
                    Some(Err(error)) => return End::Lost(error.to_string()),
                    None => return End::Lost("the broker cancelled the subscription".into()),
                },
            };
            let acker = delivery.acker.clone();
            // There is no room while deliveries of a lost channel are yet to be taken.
            tokio::select! {
                biased;
                () = self.gone.cancelled() => return End::Gone,
                () = self.stop.cancelled() => {
                    requeue(&acker).await;
                    return End::Stopped;
                }
                _ = self.deliveries.send(hand_over(delivery)) => {}
            }
        }
    }

    /// Takes no more, but keeps the channel for the receipts that are out.
    async fn finish(self, channel: Channel, mut consumer: lapin::Consumer) {
        let cancelled = channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
        let _ = tokio::time::timeout(self.limit, cancelled).await;
        // What came between the wish and its fulfilment is for others.
        while let Ok(Some(Ok(delivery))) = tokio::time::timeout(self.limit, consumer.next()).await {
            requeue(&delivery.acker).await;
        }
        let (gone, limit) = (self.gone.clone(), self.limit);
        drop(self);
        gone.cancelled().await;
        close(&channel, limit).await;
    }
}

async fn requeue(acker: &lapin::Acker) {
    let _ = acker.nack(BasicNackOptions { requeue: true, ..Default::default() }).await;
}

/// Whatever is unsettled goes back to the queue.
async fn close(channel: &Channel, limit: Duration) {
    if channel.status().connected() {
        let _ = tokio::time::timeout(limit, channel.close(200, "done".into())).await;
    }
}

fn hand_over(mut delivery: RawDelivery) -> Delivery {
    let (message, redelivered) = from_delivery(&mut delivery);
    Delivery { message, redelivered, receipt: Arc::new(RabbitReceipt { acker: delivery.acker }) }
}

struct RabbitReceipt {
    acker: lapin::Acker,
}

impl RabbitReceipt {
    /// lapin says `false` to a second settlement, which changes nothing, and to one whose channel is gone.
    fn settled(&self, outcome: lapin::Result<bool>) -> PortResult<()> {
        match outcome {
            Ok(true) => Ok(()),
            Ok(false) if !self.is_stale() => Ok(()),
            Ok(false) | Err(_) => Err(PortError::Stale),
        }
    }
}

#[async_trait]
impl Receipt for RabbitReceipt {
    async fn ack(&self) -> PortResult<()> {
        self.settled(self.acker.ack(BasicAckOptions::default()).await)
    }

    async fn nack(&self, requeue: bool) -> PortResult<()> {
        let options = BasicNackOptions { requeue, ..Default::default() };
        self.settled(self.acker.nack(options).await)
    }

    fn is_stale(&self) -> bool {
        self.acker.poisoned()
    }
}
