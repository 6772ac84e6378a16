#!/usr/bin/env bash
# Real clients against a real fleet: OpenAI's Python and Node SDKs, and the guide's RabbitMQ, Postgres and HTTP classes,
# all unchanged. Starts a coordinator and two workers (a model, and the echo engine) on the configured services.
#
# The guide's classes know only the names `llm.…`: no other fleet may run on the same broker meanwhile. Where one seems to,
# nothing is touched, unless CLIENT_TESTS_PURGE=1 says that its messages may go.
set -euo pipefail
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
work=$root/.data/client-tests
mkdir -p "$work"

: "${AMQP_URL:=amqp://guest:guest@localhost:5672/%2f}"
: "${REDIS_URL:=redis://localhost:6379}"
: "${POSTGRES_URL:=postgres://postgres:postgres@localhost:5432/postgres}"
export AMQP_URL REDIS_URL POSTGRES_URL

fail() { echo "client tests: $*" >&2; exit 1; }
install() { # COMMAND PACKAGES...
  command -v "$1" >/dev/null && return
  [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || fail "$1 is missing; install it"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${@:2}"
}
install node nodejs npm
install npm npm
(($(node -p 'process.versions.node.split(".")[0]') >= 18)) || fail "Node.js 18 or later is needed; this is $(node --version)"
install python3 python3 python3-venv

[[ -x $work/venv/bin/pip ]] || python3 -m venv "$work/venv" || { install python3-venv python3-venv; python3 -m venv "$work/venv"; }
"$work/venv/bin/pip" install -q --disable-pip-version-check -r requirements.txt
npm ci --no-audit --no-fund --loglevel=error

stoker=${FLEET_BIN:-${CARGO_TARGET_DIR:-$root/target}/debug/stoker}
[[ -x $stoker ]] || (cd "$root" && cargo build --workspace)

database=stoker_client_tests_$$
POSTGRES_URL=$(node services.mjs create "$database")
export POSTGRES_URL

# Not before the services are known to be ours: it empties the queues.
pids=()
finish() {
  for pid in ${pids[@]+"${pids[@]}"}; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  node services.mjs drop "$database" || true
}
trap finish EXIT

port=$(node services.mjs port)
export FLEET_URL=http://127.0.0.1:$port

RUST_LOG=info PORT=$port "$stoker" coordinator >"$work/coordinator.log" 2>&1 & pids+=($!)
PORT=0 "$stoker" worker >"$work/worker.log" 2>&1 & pids+=($!)
PORT=0 "$stoker" worker --engine echo >"$work/echo.log" 2>&1 & pids+=($!)

for _ in $(seq 240); do
  models=$(curl -sf "$FLEET_URL/v1/models" || true)
  [[ $models == *SmolLM2* && $models == *'"echo"'* ]] && break
  sleep 0.5
done
[[ ${models:-} == *SmolLM2* && $models == *'"echo"'* ]] || { tail "$work"/*.log >&2; fail "the fleet did not come up"; }

"$work/venv/bin/python" -m pytest -q -p no:cacheprovider .
node --test
