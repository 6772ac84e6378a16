//! What coordinators and workers say to each other: the contract's types, the three ports, and their adapters.
//!
//! [`ports`] are the only way to a broker, a bus or a database; [`rabbitmq`], [`redis`] and [`postgres`] are the ports
//! on real services, [`embedded`] the same ports inside one process.

pub mod config;
pub mod embedded;
pub mod envelope;
pub mod frame;
pub mod job;
mod mailbox;
pub mod outcome;
pub mod ports;
pub mod postgres;
pub mod rabbitmq;
pub mod redis;
pub mod telemetry;
