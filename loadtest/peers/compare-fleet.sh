#!/usr/bin/env bash
# The fleet's own cost: the echo engine at zero delay behind one coordinator, against the plain FastAPI service in
# loadtest/peers/fastapi, on the same RabbitMQ and Redis, in turn, under the same load. Prints jobs/s and time to first
# token of both and the ratios, several rounds.
#
#   loadtest/peers/compare-fleet.sh [ROUNDS]
set -euo pipefail
cd "$(dirname "$0")/../.."
rounds=${1:-3}
eval "$(scripts/services.sh start)"
work=$PWD/.data/compare-fleet
mkdir -p "$work"
cargo build -q --release -p stoker -p loadtest
target=${CARGO_TARGET_DIR:-target}/release
[[ -x $work/venv/bin/pip ]] || python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check -r loadtest/peers/fastapi/requirements.txt

# Queues, keys and tables of its own.
database=stoker_compare_$$
psql -q "$POSTGRES_URL" -c "CREATE DATABASE $database"
server=$POSTGRES_URL
export POSTGRES_URL=${server%/*}/$database STOKER_SERVICES_PREFIX=compare. STOKER_DATA_DIR=$work
ours=18080 theirs=18081 pids=()
clean_up() {
  kill ${pids[@]+"${pids[@]}"} 2>/dev/null || true
  wait 2>/dev/null || true
  psql -q "$server" -c "DROP DATABASE IF EXISTS $database WITH (FORCE)" || true
}
trap clean_up EXIT
PORT=$ours "$target/stoker" coordinator >"$work/coordinator.log" 2>&1 & pids+=($!)
PORT=0 "$target/stoker" worker --engine echo >"$work/worker.log" 2>&1 & pids+=($!)
(cd loadtest/peers/fastapi && exec "$work/venv/bin/python" -m uvicorn api:app --port $theirs --loop uvloop --http httptools \
  --log-level warning) >"$work/peer-api.log" 2>&1 & pids+=($!)
(cd loadtest/peers/fastapi && exec "$work/venv/bin/python" worker.py) >"$work/peer-worker.log" 2>&1 & pids+=($!)

load() { # PORT CLIENTS TOKENS SECONDS
  "$target/loadtest" http --url "http://127.0.0.1:$1" --route guide --model echo --check echo \
    --clients "$2" --max-tokens "$3" --duration "$4" --json
}
for port in $ours $theirs; do
  for _ in $(seq 100); do load $port 1 1 1 >/dev/null 2>&1 && break; sleep 0.3; done
done

for round in $(seq "$rounds"); do
  for spec in "1 32" "64 32" "64 1"; do
    read -r clients tokens <<<"$spec"
    a=$(load $ours "$clients" "$tokens" 8)
    b=$(load $theirs "$clients" "$tokens" 8)
    python3 - "$round" "$clients" "$tokens" "$a" "$b" <<'PY'
import json, sys
_, round_, clients, tokens, a, b = sys.argv
a, b = json.loads(a), json.loads(b)
rate = lambda r: r["requests_per_second"]
first = lambda r: r["time_to_first_token_ms"]["p50"]
print(f"round {round_}, {clients:>2} clients, {tokens:>2} tokens: "
      f"jobs/s {rate(a):7.0f} against {rate(b):6.0f} ({rate(a) / rate(b):.2f}×), "
      f"first token p50 {first(a):.2f} ms against {first(b):.2f} ms ({first(a) / first(b):.2f}×)")
PY
  done
done
