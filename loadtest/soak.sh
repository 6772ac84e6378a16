#!/usr/bin/env bash
# A fleet under load, with and without deaths: two coordinators and three workers on the real services, 32 streaming
# clients. Then the same while a worker is killed (-9) and replaced every 15 seconds. Fails unless every request was
# answered with the right text and has exactly one usage row.
#
#   loadtest/soak.sh [SECONDS] [ENGINE]      ENGINE: echo (default), or a model's file or name
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60} engine=${2:-echo}
eval "$(scripts/services.sh start)"
cargo build -q --release -p stoker -p loadtest
target=${CARGO_TARGET_DIR:-target}/release
work=$PWD/.data/soak
rm -rf "$work"; mkdir -p "$work"

# Queues, keys and tables of its own, and no answers from the cache: every text has to be made.
database=stoker_soak_$$
psql -q "$POSTGRES_URL" -c "CREATE DATABASE $database"
server=$POSTGRES_URL
POSTGRES_URL=${server%/*}/$database
export AMQP_URL REDIS_URL POSTGRES_URL STOKER_SERVICES_PREFIX=soak$$. LLM_CACHING=false
pids=() workers=()
clean_up() {
  kill -9 "${pids[@]}" "${workers[@]}" 2>/dev/null || true
  wait 2>/dev/null || true
  psql -q "$server" -c "DROP DATABASE IF EXISTS $database WITH (FORCE)" || true
}
trap clean_up EXIT

if [[ $engine == echo ]]; then
  options=(--engine echo --echo-tokens 64 --echo-delay-ms 20) load=(--model echo --check echo)
else
  options=(--model "$engine" --threads 1) load=(--check same)
fi
worker() { PORT=0 "$target/stoker" worker "${options[@]}" >>"$work/worker-$1.log" 2>&1 & workers[$1]=$!; }
urls=()
for i in 0 1; do
  PORT=$((18090 + i)) "$target/stoker" coordinator >"$work/coordinator-$i.log" 2>&1 & pids+=($!)
  urls+=(--url "http://127.0.0.1:$((18090 + i))")
done
for i in 0 1 2; do worker $i; done
for i in 0 1; do
  for _ in $(seq 120); do
    models=$(curl -fs "http://127.0.0.1:$((18090 + i))/v1/models" || true)
    [[ $models == *'"id"'* ]] && break
    sleep 0.5
  done
done

run() { # NAME
  "$target/loadtest" http "${urls[@]}" --clients 32 --duration "$seconds" --max-tokens 64 --ids "$work/$1.ids" "${load[@]}" |
    tee "$work/$1.txt"
}
count() { # NAME: one usage row for each answered job, no more
  sleep 2 # outcomes are committed behind the stream's end
  sed -i 's/^chatcmpl-//' "$work/$1.ids"
  psql -q "$POSTGRES_URL" -c "CREATE TABLE ids_$1 (id text)" -c "\copy ids_$1 FROM '$work/$1.ids'"
  read -r answered with_row rows < <(psql -qtA -F ' ' "$POSTGRES_URL" -c "
    SELECT count(*), count(r.n), coalesce(sum(r.n), 0) FROM ids_$1 i
    LEFT JOIN (SELECT job_id, count(*) n FROM llm_requests GROUP BY job_id) r ON r.job_id = i.id")
  echo "$1: $answered answered, $with_row of them with a usage row, $rows rows"
  ((answered > 0 && answered == with_row && answered == rows))
}

echo "== $seconds s, 2 coordinators, 3 workers, engine $engine"
run calm
count calm
echo "== the same, a worker killed and replaced every 15 s"
run killed & loader=$!
round=0
while sleep 15 && kill -0 $loader 2>/dev/null; do
  victim=$((round++ % 3))
  kill -9 "${workers[$victim]}"; wait "${workers[$victim]}" 2>/dev/null || true
  worker $victim
  echo "killed and replaced worker $victim"
done
wait $loader
count killed
