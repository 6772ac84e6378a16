//! Tells the fleet that this coordinator is there, and watches the queues' depths (for Prometheus, and as an event on
//! `llm.metrics`).

use std::sync::Arc;
use std::time::Duration;

use metrics::gauge;
use serde_json::{Map, json};
use stoker_shared::job::Lane;
use stoker_shared::ports::{Destination, Message, Source};
use stoker_shared::telemetry::metric;
use time::OffsetDateTime;

use crate::dispatch::Dispatch;
use crate::prepare::rfc3339;

/// How often presence is renewed.
const RENEW: Duration = Duration::from_secs(1);
/// How often depths are read.
const DEPTHS: Duration = Duration::from_secs(5);
/// The front door drops messages past 10,000; half of that is worth a word.
const DEEP: u64 = 5_000;

/// Renews presence until dropped.
pub async fn run(dispatch: Arc<Dispatch>) {
    let mut ticks = tokio::time::interval(RENEW);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        announce(&dispatch).await;
    }
}

/// Renews presence once.
pub async fn announce(dispatch: &Dispatch) {
    if let Err(e) = dispatch.ports.bus.announce_coordinator(&dispatch.id).await {
        tracing::debug!("can't announce this coordinator: {e}");
    }
}

/// Reads the queues' depths until dropped.
pub async fn watch_depths(dispatch: Arc<Dispatch>) {
    let mut ticks = tokio::time::interval(DEPTHS);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let queue = &dispatch.ports.queue;
        if let Ok(Some(depth)) = queue.depth(&Source::FrontDoor).await
            && depth > DEEP
        {
            tracing::warn!(
                depth,
                "llm.requests is deep; without a policy with overflow reject-publish-dlx the broker drops the oldest \
                 messages past 10,000 without a word"
            );
        }
        let mut depths = Map::new();
        for model in dispatch.router.registry.snapshot().models.keys() {
            for lane in Lane::ALL {
                let source = Source::Work { model: model.to_string(), lane };
                if let Ok(Some(depth)) = queue.depth(&source).await {
                    let gauge =
                        gauge!(metric::QUEUE_DEPTH, "model" => model.clone(), "lane" => lane.as_str());
                    // Exact up to 2^53 messages.
                    #[allow(clippy::cast_precision_loss)]
                    gauge.set(depth as f64);
                    depths.insert(format!("{model}.{}", lane.as_str()), depth.into());
                }
            }
        }
        let event = json!({
            "type": "coordinator",
            "id": dispatch.id,
            "timestamp": rfc3339(OffsetDateTime::now_utc()),
            "waiting": dispatch.inbox.waiting(),
            "depths": depths,
        });
        let message = Message { body: event.to_string().into(), ..Message::default() };
        if let Err(e) = queue.publish(&Destination::Metrics, message).await {
            tracing::debug!("an event did not reach llm.metrics: {e}");
        }
    }
}
