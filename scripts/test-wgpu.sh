#!/usr/bin/env bash
# The GPU kernels and the default model on wgpu, held against the CPU's: on the Vulkan devices that are there, else on Mesa's
# software device (lavapipe), which this installs where it may. Not part of scripts/test.sh, which would build for twice as
# long; like all tests it needs `make model` once. Arguments go to the tests.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! compgen -G '/usr/share/vulkan/icd.d/*.json' >/dev/null && ! compgen -G '/etc/vulkan/icd.d/*.json' >/dev/null; then
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "there is no Vulkan device: install a driver, or Mesa's software device (Debian: mesa-vulkan-drivers libvulkan1)" >&2
    exit 1
  fi
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers libvulkan1 >&2
fi
exec cargo test -p stoker-engine --features wgpu --lib --test wgpu -- wgpus "$@"
