#!/usr/bin/env bash
# The CPU kernels' tests as 64-bit Arm code, run by an emulator; not part of scripts/test.sh. Needs, on Debian, the packages
# g++-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user-static, and `rustup target add aarch64-unknown-linux-gnu`.
# Arguments are Cargo's.
set -euo pipefail
cd "$(dirname "$0")/.."
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
export CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -cpu max -L /usr/aarch64-linux-gnu"
exec cargo test --target aarch64-unknown-linux-gnu -p stoker-engine --lib "$@" kernels::
