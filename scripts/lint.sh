#!/usr/bin/env bash
# Formatting, and lints with and without the GPU backends.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fmt --all --check
cargo clippy --workspace --all-targets -- -D warnings
cargo clippy --workspace --all-targets --features stoker/wgpu,stoker/cuda -- -D warnings
