#!/usr/bin/env bash
# Once, before the first `docker compose up`: .env out of .env.example, and secrets out of the system's randomness.
# What is there already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e .env ] || cp .env.example .env
mkdir -p data secrets
chmod 700 secrets # compose shows a container the file as it is: the folder keeps others on this machine out
for name in redis_password control_token grader_api_key grafana_password; do
  [ -s "secrets/$name" ] || { od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"secrets/$name"; echo "made secrets/$name"; }
  chmod 444 "secrets/$name"
done
echo "ready: look at .env, then docker compose up -d"
