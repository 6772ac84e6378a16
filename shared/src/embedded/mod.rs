//! The three ports inside one process.
