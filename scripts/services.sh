#!/usr/bin/env bash
# Makes sure that RabbitMQ, Redis and Postgres can be reached, and says where, as shell assignments on standard output:
#
#   eval "$(scripts/services.sh start)"
#
# What listens on AMQP_URL, REDIS_URL and POSTGRES_URL (or on the usual local ports) is used as it is. What is missing comes
# from the compose file where a Docker engine with its compose plugin runs; else from private instances of Debian's (or
# Ubuntu's) packages, on ports and in a folder of their own, which `scripts/services.sh stop` ends. Root installs packages that
# are missing; others are told (exit code 3).
#
# With SERVICES=private all three are private ones, whatever else runs; SERVICES_DIR and
# SERVICES_PORTS (the first of four) keep several sets apart. `restart NAME` kills (-9) and starts one again.
set -euo pipefail
cd "$(dirname "$0")/.."

given=" ${AMQP_URL:+amqp} ${REDIS_URL:+redis} ${POSTGRES_URL:+postgres} "
: "${AMQP_URL:=amqp://guest:guest@localhost:5672/%2f}"
: "${REDIS_URL:=redis://localhost:6379}"
: "${POSTGRES_URL:=postgres://postgres:postgres@localhost:5432/postgres}"
# Other users (rabbitmq, postgres) must be able to enter it: not below the home folder.
folder=${SERVICES_DIR:-/var/tmp/stoker-services-$(id -u)}
ports=${SERVICES_PORTS:-15670}
redis_port=$ports postgres_port=$((ports + 1)) amqp_port=$((ports + 2)) dist_port=$((ports + 3))

say() { echo "services: $*" >&2; }
fail() { say "$*"; exit 1; }

# Whether something listens at the (first) address of a URL.
listens() { # URL DEFAULT_PORT
  local rest=${1%%,*}
  rest=${rest#*://}; rest=${rest##*@}; rest=${rest%%/*}; rest=${rest%%\?*}
  local host=${rest%%:*} port=$2
  [[ $rest == *:* ]] && port=${rest##*:}
  timeout 2 bash -c "exec 3<>/dev/tcp/$host/$port" 2>/dev/null
}

wait_for() { # NAME URL DEFAULT_PORT
  for _ in $(seq 120); do listens "$2" "$3" && return; sleep 0.5; done
  fail "$1 did not come up; see $folder"
}

# Runs a command as a service's own user when we are root (Postgres refuses root), else as ourselves.
as() { # USER COMMAND...
  local user=$1; shift
  if [[ $(id -u) == 0 ]]; then runuser -u "$user" -- "$@"; else "$@"; fi
}

own() { # USER FOLDER
  mkdir -p "$2"
  if [[ $(id -u) == 0 ]]; then chown -R "$1" "$2"; fi
}

need() { # PACKAGE FILE-OR-COMMAND
  if command -v "$2" >/dev/null || compgen -G "$2" >/dev/null; then return; fi
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    say "installing $1"
    apt-get update -qq >&2
    # Should the package start an instance of its own, ours still has other ports and folders.
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >&2
  else
    say "$1 is not installed: install it, start a Docker engine, or set AMQP_URL, REDIS_URL and POSTGRES_URL"
    exit 3
  fi
}

# Whether the compose file can be used: the engine's client is often installed without the plugin.
has_compose() { docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; }

private_redis() {
  need redis-server redis-server
  mkdir -p "$folder/redis"
  redis-server --port $redis_port --bind 127.0.0.1 --save "" --appendonly no --daemonize yes \
    --dir "$folder/redis" --pidfile "$folder/redis/pid" --logfile "$folder/redis/log" >&2
  REDIS_URL=redis://localhost:$redis_port
  wait_for Redis "$REDIS_URL" $redis_port
}

private_postgres() {
  need postgresql '/usr/lib/postgresql/*/bin/postgres'
  local bin data=$folder/postgres/data
  bin=$(dirname "$(compgen -G '/usr/lib/postgresql/*/bin/postgres' | sort -V | tail -n 1)")
  own postgres "$folder/postgres"
  [[ -e $data/PG_VERSION ]] || as postgres "$bin/initdb" -D "$data" -U postgres -A trust >&2
  as postgres "$bin/pg_ctl" -D "$data" -l "$folder/postgres/log" -w \
    -o "-p $postgres_port -c listen_addresses=127.0.0.1 -c unix_socket_directories=$folder/postgres" start >&2
  POSTGRES_URL=postgres://postgres@localhost:$postgres_port/postgres
}

private_rabbitmq() {
  need rabbitmq-server /usr/lib/rabbitmq/bin/rabbitmq-server
  local home=$folder/rabbitmq
  own rabbitmq "$home"
  echo '[].' >"$home/plugins"
  echo "listeners.tcp.1 = 127.0.0.1:$amqp_port" >"$home/rabbitmq.conf"
  : >"$home/env.conf"
  # The script in /usr/sbin insists on the system's own places; this one takes ours.
  as rabbitmq env HOME="$home" RABBITMQ_NODENAME=stoker-$amqp_port@localhost \
    RABBITMQ_CONF_ENV_FILE="$home/env.conf" RABBITMQ_CONFIG_FILE="$home/rabbitmq.conf" RABBITMQ_DIST_PORT=$dist_port RABBITMQ_MNESIA_BASE="$home/mnesia" \
    RABBITMQ_LOG_BASE="$home/log" RABBITMQ_ENABLED_PLUGINS_FILE="$home/plugins" RABBITMQ_PID_FILE="$home/pid" \
    setsid /usr/lib/rabbitmq/bin/rabbitmq-server >"$home/out" 2>&1 </dev/null &
  AMQP_URL=amqp://guest:guest@localhost:$amqp_port/%2f
  wait_for RabbitMQ "$AMQP_URL" $amqp_port
  sleep 2 # the port opens a little before logins are taken
}

# Private instances of an earlier call are used again, unless the caller has said what to use instead: a package that an
# earlier call installed may have started an instance of its own, which does not let us in.
reuse() {
  local amqp=amqp://guest:guest@localhost:$amqp_port/%2f redis=redis://localhost:$redis_port
  local postgres=postgres://postgres@localhost:$postgres_port/postgres
  [[ $given == *" amqp "* ]] && listens "$AMQP_URL" 5672 || ! listens "$amqp" $amqp_port || AMQP_URL=$amqp
  [[ $given == *" redis "* ]] && listens "$REDIS_URL" 6379 || ! listens "$redis" $redis_port || REDIS_URL=$redis
  [[ $given == *" postgres "* ]] && listens "$POSTGRES_URL" 5432 || ! listens "$postgres" $postgres_port || POSTGRES_URL=$postgres
}

# Whether Postgres is there, and lets us in, as far as that can be told without its client.
has_postgres() {
  listens "$POSTGRES_URL" 5432 || return 1
  ! command -v psql >/dev/null || timeout 10 psql "$POSTGRES_URL" -qtc 'SELECT 1' >/dev/null 2>&1 && return
  [[ $given != *" postgres "* ]] || fail "Postgres at POSTGRES_URL does not let us in"
  return 1
}

start() {
  local missing=()
  if [[ ${SERVICES:-} == private ]]; then
    AMQP_URL=amqp://localhost:1 REDIS_URL=redis://localhost:1 POSTGRES_URL=postgres://localhost:1/none
  fi
  reuse
  listens "$AMQP_URL" 5672 || missing+=(rabbitmq)
  listens "$REDIS_URL" 6379 || missing+=(redis)
  has_postgres || missing+=(postgres)
  if ((${#missing[@]})) && [[ ${SERVICES:-} != private ]] && has_compose; then
    say "starting ${missing[*]} with Docker"
    docker compose up -d --wait "${missing[@]}" >&2
    for s in "${missing[@]}"; do
      case $s in
        rabbitmq) AMQP_URL=amqp://guest:guest@localhost:5672/%2f ;;
        redis) REDIS_URL=redis://localhost:6379 ;;
        postgres) POSTGRES_URL=postgres://postgres:postgres@localhost:5432/postgres ;;
      esac
    done
    missing=()
  fi
  # Written like this because Bash before 4.4, macOS's, takes an empty array for an unset variable.
  for s in ${missing[@]+"${missing[@]}"}; do
    say "starting a private $s in $folder"
    mkdir -p "$folder"
    "private_$s"
  done
  printf 'export AMQP_URL=%q REDIS_URL=%q POSTGRES_URL=%q\n' "$AMQP_URL" "$REDIS_URL" "$POSTGRES_URL"
}

pid_of() { # NAME
  local file program pid
  case $1 in
    redis) file=redis/pid program=redis-server ;;
    rabbitmq) file=rabbitmq/pid program=beam.smp ;;
    postgres) file=postgres/data/postmaster.pid program=postgres ;;
  esac
  { read -r pid <"$folder/$file"; } 2>/dev/null || [[ -n ${pid:-} ]] || return 1
  # A file may outlive its process, and the number be another's by now.
  [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$program" ]] && echo "$pid"
}

end() { # NAME SIGNAL
  local pid
  pid=$(pid_of "$1") || return 0
  kill "-$2" "$pid" 2>/dev/null || return 0
  for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
}

stop() { for s in redis rabbitmq postgres; do end $s TERM; done; }

restart() { # NAME
  # Postgres ends its sessions at once (SIGQUIT) and recovers from its log; a SIGKILL would orphan its children.
  if [[ $1 == postgres ]]; then end postgres QUIT; else end "$1" KILL; fi
  "private_$1"
}

case ${1:-start} in
  start) start ;;
  stop) stop ;;
  restart) restart "$2" ;;
  *) fail "usage: scripts/services.sh start | stop | restart redis|rabbitmq|postgres" ;;
esac
