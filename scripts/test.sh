#!/usr/bin/env bash
# All tests: makes sure that services and model are there, then runs Rust's and the clients'.
set -euo pipefail
cd "$(dirname "$0")/.."

services=$(scripts/services.sh start)
eval "$services"
cargo build --workspace
cargo run -q -p stoker -- model pull
cargo test --workspace --no-fail-fast
clients/tests/run.sh
