#!/usr/bin/env bash
# What launch/tpu.sh runs on every host of a TPU. All of it lies in ~/big_vit:
#   code/ the commit, venv/ its packages, log what the run printed, run/ pid, command, outcome,
#   secret by which the hosts know each other
set -euo pipefail

ROOT=${BIG_VIT_ROOT:-$HOME/big_vit}
RUN=$ROOT/run

die() {
  echo "error: $(hostname): $1" >&2
  exit "${2:-1}"
}

# After a reboot the same number is another process.
boot() { cat /proc/sys/kernel/random/boot_id 2> /dev/null || echo unknown; }

# The run is a session of its own, led by babysit: its id names all of the run's processes.
alive() {
  [ -s "$RUN/pid" ] && [ "$(cat "$RUN/boot")" = "$(boot)" ] &&
    ps -o stat= -s "$(cat "$RUN/pid")" | awk '!/^Z/ { lives = 1 } END { exit !lives }'
}

# Babysit says how a run ended just before it ends itself: waits for the latter.
settle() {
  local left=30
  while [ -s "$RUN/outcome" ] && alive && [ "$left" -gt 0 ]; do
    sleep 1
    left=$((left - 1))
  done
}

find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      command -v "$name"
      return
    fi
  done
  return 1
}

# make_venv FOLDER: images of TPU VMs come with Python 3.10; uv brings a newer one, without root.
make_venv() {
  local python
  if python=$(find_python); then
    "$python" -m venv "$1"
  else
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 "$1"
  fi
}

# install COMMIT EXTRA: takes over the code unpacked in code.new, and the secret from
# big_vit.secret beside them; twice is as good as once.
install() {
  local commit=$1 extra=$2 wanted
  settle
  alive && die 'a run is active; stop it first: launch/tpu.sh kill' 3
  if [ -d "$ROOT/code.new" ]; then
    rm -rf "$ROOT/code"
    mv "$ROOT/code.new" "$ROOT/code"
  fi
  cd "$ROOT/code"
  # Without requirements.txt, which is for people who work on big_vit.
  wanted=$(cat setup.py pyproject.toml <(echo "$extra") | sha256sum)
  if [ "$wanted" != "$(cat "$ROOT/venv/installed" 2> /dev/null)" ]; then
    [ -x "$ROOT/venv/bin/python" ] || make_venv "$ROOT/venv"
    "$ROOT/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --editable ".${extra:+[$extra]}"
    echo "$wanted" > "$ROOT/venv/installed"
  fi
  if [ -e "$ROOT.secret" ]; then
    chmod 600 "$ROOT.secret"
    mv "$ROOT.secret" "$ROOT/secret"
  fi
  echo "$commit" > "$ROOT/commit"
  echo "$(hostname): commit $commit, $("$ROOT/venv/bin/python" --version)"
}

# start COMMAND: detached; the same command started twice runs once, for gcloud repeats a
# command whose connection broke.
start() {
  local words
  words=$(printf '%q ' "$@")
  [ -x "$ROOT/venv/bin/python" ] || die 'not installed; run: launch/tpu.sh install'
  settle
  if alive; then
    [ "$words" = "$(cat "$RUN/command")" ] || die 'another run is active; run: launch/tpu.sh kill' 3
    echo "$(hostname): runs already"
    return
  fi
  mkdir -p "$RUN"
  rm -f "$RUN/outcome"
  echo "$words" > "$RUN/command"
  cd "$ROOT/code"
  export PATH="$ROOT/venv/bin:$PATH"
  # JAX's own default, 8482, is closed between slices by the default firewall.
  export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT:-8476}
  export BIG_VIT_SECRET_FILE=${BIG_VIT_SECRET_FILE:-$ROOT/secret}
  echo "--- $(date -u +%FT%TZ) $(hostname) commit $(cat "$ROOT/commit"): $words" >> "$ROOT/log"
  setsid "$ROOT/venv/bin/python" launch/babysit --outcome "$RUN/outcome" -- "$@" \
    < /dev/null >> "$ROOT/log" 2>&1 &
  echo $! > "$RUN/pid"
  boot > "$RUN/boot"
  echo "$(hostname): started, output in $ROOT/log"
}

# stop SECONDS [-9]: SIGTERM, which saves; with -9 what is left after SECONDS is killed.
stop() {
  local left=$1 force=${2:-} pid
  if ! alive; then
    echo "$(hostname): nothing runs"
    return
  fi
  pid=$(cat "$RUN/pid")
  kill -TERM "$pid" 2> /dev/null || true
  while alive && [ "$left" -gt 0 ]; do
    sleep 1
    left=$((left - 1))
  done
  if alive; then
    [ "$force" = -9 ] || die "still runs after $1 s; run: launch/tpu.sh kill -9" 4
    pkill -KILL -s "$pid" || true
    echo "$(hostname): killed"
  else
    echo "$(hostname): stopped"
  fi
  [ "$(newest_outcome)" = 'done 0' ] || echo 'killed 0' > "$RUN/outcome"
}

# running, none, lost (ended without a word, as after a reboot), or what babysit wrote:
# `done 0`, `stopped 0`, `failed STATUS`, or `killed 0`.
newest_outcome() {
  if alive; then
    echo running
  elif [ -s "$RUN/outcome" ]; then
    cat "$RUN/outcome"
  elif [ -s "$RUN/pid" ]; then
    echo lost
  else
    echo none
  fi
}

# outcome COMMAND: the same, but of no other command: `none`, or `other` while that runs.
outcome() {
  if [ "$(printf '%q ' "$@")" = "$(cat "$RUN/command" 2> /dev/null)" ]; then
    newest_outcome
  elif alive; then
    echo other
  else
    echo none
  fi
}

status() {
  echo "$(hostname): $(newest_outcome), commit $(cat "$ROOT/commit" 2> /dev/null || echo none): $(
    tail -n 1 "$ROOT/log" 2> /dev/null
  )"
}

logs() { exec tail -n "${1:-100}" -F "$ROOT/log"; }

case ${1:-} in
  install | start | stop | outcome | status | logs) "$@" ;;
  *) die 'usage: host.sh {install|start|stop|outcome|status|logs}' 2 ;;
esac
