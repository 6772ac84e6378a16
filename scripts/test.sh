#!/usr/bin/env bash
# All tests: makes sure that services and model are there, then runs Rust's and the clients'.
set -euo pipefail
cd "$(dirname "$0")/.."

services=$(scripts/services.sh start)
eval "$services"
# Always the whole workspace: with a part of it, Cargo chooses other features and builds every dependency anew.
cargo build --workspace
"${CARGO_TARGET_DIR:-target}/debug/stoker" model pull
cargo test --workspace --no-fail-fast
clients/tests/run.sh
