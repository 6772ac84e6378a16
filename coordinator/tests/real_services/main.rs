//! The coordinator's suite once more, on RabbitMQ, Redis and Postgres.

#[path = "../coordinator/faults.rs"]
mod faults;
#[path = "../coordinator/fleet.rs"]
mod fleet;
mod ground;
#[path = "../../../shared/tests/common/services.rs"]
mod services;
#[path = "../coordinator/worker.rs"]
mod worker;

#[path = "../coordinator/front_door.rs"]
mod front_door;
#[path = "../coordinator/guide.rs"]
mod guide;
#[path = "../coordinator/jobs.rs"]
mod jobs;
#[path = "../coordinator/openai.rs"]
mod openai;
#[path = "../coordinator/ops.rs"]
mod ops;
#[path = "../coordinator/sharing.rs"]
mod sharing;
#[path = "../coordinator/streams.rs"]
mod streams;
#[path = "../coordinator/troubles.rs"]
mod troubles;
