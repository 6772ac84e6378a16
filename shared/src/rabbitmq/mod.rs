//! The port on the real service.
