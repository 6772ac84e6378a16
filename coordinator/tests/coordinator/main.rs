//! The coordinator as its users meet it: over HTTP and through the queue, on the embedded ports, with a small worker that
//! does what it is told.

mod faults;
mod fleet;
mod ground;
mod worker;

mod front_door;
mod guide;
mod jobs;
mod openai;
mod ops;
mod sharing;
mod streams;
mod troubles;
