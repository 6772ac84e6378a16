#!/usr/bin/env bash
# All tests: makes sure that services and model are there, then runs Rust's and the clients'.
set -euo pipefail
cd "$(dirname "$0")/.."

services=$(scripts/services.sh start)
eval "$services"
# Always the whole workspace: with a part of it, Cargo chooses other features and builds every dependency anew.
cargo build --workspace
model=$("${CARGO_TARGET_DIR:-target}/debug/stoker" model pull)
# The engine's tests know nothing of the configuration that says where the model is.
STOKER_DATA_DIR=$(cd "$(dirname "$model")/.." && pwd)
export STOKER_DATA_DIR
cargo test --workspace --no-fail-fast
clients/tests/run.sh
