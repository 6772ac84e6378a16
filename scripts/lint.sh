#!/usr/bin/env bash
# Formatting, lints, and that the GPU backends still build.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fmt --all --check
cargo clippy --workspace --all-targets -- -D warnings
cargo check --workspace --features stoker/wgpu,stoker/cuda
