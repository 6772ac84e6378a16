//! What Burn lacks: kernels of our own, each behind the engine's backend-extension trait.

pub mod cpu;
