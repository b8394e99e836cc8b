#!/bin/sh
# Start the store, or with `check` say whether it answers. The password goes in by standard input and environment, so
# that no list of processes shows it. Valkey or Redis, whichever the image has.
set -eu
password=$(cat /run/secrets/redis_password)
find_program() { command -v "valkey-$1" >/dev/null && echo "valkey-$1" || echo "redis-$1"; }

if [ "${1:-}" = check ]; then
  [ "$(REDISCLI_AUTH=$password "$(find_program cli)" --no-auth-warning ping)" = PONG ]
  exit
fi

exec docker-entrypoint.sh "$(find_program server)" - <<CONF
dir /data
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
tcp-keepalive 60
requirepass $password
CONF
