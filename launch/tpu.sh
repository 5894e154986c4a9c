#!/usr/bin/env bash
# TPU VMs and queued resources, from creation to the end of a run. `--help` says how.
set -euo pipefail

usage() {
  cat << 'END'
launch/tpu.sh COMMAND [flags] [-- COMMAND OF THE RUN]

For the Cloud TPU API, which has TPUs up to v6e. TPU7x and later: launch/gke.sh.

  create     ask for the TPU                    run      start `-- COMMAND` on every host
  install    send the commit, make the venv     logs     follow the output of one host
  status     of the TPU and of the run          kill     SIGTERM and wait, so that it saves
  delete     give the TPU back                  babysit  all of it until the run is done

Flags; each has a variable of the environment for its default:
  --name NAME           NAME          of the TPU or queued resource
  --zone ZONE           ZONE          as in us-west4-a
  --project PROJECT     PROJECT       default: gcloud's own
  --accelerator TYPE    ACCELERATOR   as in v5litepod-256, v5p-128, v6e-64; others are on GKE
  --version RUNTIME     VERSION       default: by the accelerator
  --spot                SPOT=1        cheap, and taken away at any time
  --reserved            RESERVED=1    from a reservation
  --queued              QUEUED=1      as a queued resource, which waits for capacity
  --node-count N        NODE_COUNT    slices of a multislice run; needs --queued
  --internal-ips        INTERNAL_IPS=1      no public addresses; work from the same network
  --service-account A   SERVICE_ACCOUNT     that the hosts act as
  --commit COMMIT       COMMIT        what to install; default HEAD
  --extra EXTRAS        EXTRA         extras of setup.py to install; default tpu
  --worker N, --node N  WORKER, NODE  whose output `logs` shows; default 0
  --grace SECONDS       GRACE         how long `kill` waits for the save; default 300
  -9                    kill: then kill what still runs
  --tries N             TRIES         babysit: attempts in a row without a long run; default 20
  --dry-run             print the commands, one per line, and run none
END
}

die() {
  echo "error: $1" >&2
  exit 2
}

need() { [ -n "$2" ] || die "$1 is missing; give $1 or set $3, as in $4"; }

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Seconds between looks at a TPU, and how long a run must last for an attempt to have been one.
POLL=${POLL:-60} LONG_RUN=${LONG_RUN:-1800} BACKOFF=${BACKOFF:-30} MAX_BACKOFF=${MAX_BACKOFF:-600}
NAME=${NAME:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} ACCELERATOR=${ACCELERATOR:-}
VERSION=${VERSION:-} SPOT=${SPOT:-} RESERVED=${RESERVED:-} QUEUED=${QUEUED:-}
NODE_COUNT=${NODE_COUNT:-1} INTERNAL_IPS=${INTERNAL_IPS:-} SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-}
COMMIT=${COMMIT:-HEAD} EXTRA=${EXTRA-tpu} WORKER=${WORKER:-0} NODE=${NODE:-0}
GRACE=${GRACE:-300} TRIES=${TRIES:-20} DRY='' FORCE=''
KEY=$HOME/.ssh/google_compute_engine

# The words as a shell reads them back.
quoted() {
  local word line='' quote="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//"'"/$quote}'" ;;
    esac
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# Runs a command, or with --dry-run prints it.
call() {
  if [ -n "$DRY" ]; then quoted "$@"; else "$@"; fi
}

# tpus VERB [flags]: of the one kind of resource that this TPU is.
tpus() {
  local kind=tpu-vm verb=$1
  [ -z "$QUEUED" ] || kind=queued-resources
  shift
  call gcloud compute tpus "$kind" "$verb" "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

# at WORKER NODE WORDS...: on these hosts; each word arrives as it is written here.
at() {
  local worker=$1 node=$2
  shift 2
  tpus ssh "$NAME" "--worker=$worker" ${QUEUED:+"--node=$node"} \
    ${INTERNAL_IPS:+--internal-ip} "--command=$(quoted "$@")"
}

on_host() { at "$1" "$2" bash big_vit/code/launch/host.sh "${@:3}"; }

runtime_version() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    tpu*) die "--accelerator: the Cloud TPU API has no $1, only GKE has: launch/gke.sh" ;;
    *) die "--version is missing, and $1 has no default; see the runtime versions of Cloud TPU" ;;
  esac
}

create() {
  local flags=("--accelerator-type=$ACCELERATOR")
  if [ -z "$QUEUED" ]; then
    flags+=("--version=$VERSION")
  elif [ "$NODE_COUNT" = 1 ]; then
    flags+=("--runtime-version=$VERSION" "--node-id=$NAME")
  else
    flags+=("--runtime-version=$VERSION" "--node-count=$NODE_COUNT" "--node-prefix=$NAME")
  fi
  flags+=(${SPOT:+--spot} ${RESERVED:+--reserved} ${INTERNAL_IPS:+--internal-ips})
  flags+=(${SERVICE_ACCOUNT:+"--service-account=$SERVICE_ACCOUNT"})
  # Without this scope the hosts cannot write to the bucket, whatever their account may do.
  tpus create "$NAME" "${flags[@]}" --scopes=https://www.googleapis.com/auth/cloud-platform
}

delete() { tpus delete "$NAME" ${QUEUED:+--force} --quiet; }

# gcloud makes the key and puts it on the hosts when it first connects, and talks to several
# hosts at once only through an agent that knows the key.
warm_up() {
  if [ -z "${SSH_AUTH_SOCK:-}" ]; then
    if [ -n "$DRY" ]; then
      echo "eval \"\$(ssh-agent -s)\""
    else
      eval "$(ssh-agent -s)" > /dev/null
      trap 'kill "$SSH_AGENT_PID"' EXIT
    fi
  fi
  at 0 0 true && call ssh-add "$KEY"
}

# Steps are joined by && because babysit goes on where one fails, and `set -e` then sleeps.
install() {
  local commit staged script make_secret
  commit=$(git -C "$HERE" rev-parse --short=12 --verify --quiet "$COMMIT^{commit}") ||
    die "--commit: $COMMIT is no commit of $HERE"
  if [ "$COMMIT" = HEAD ] && [ -n "$(git -C "$HERE" status --porcelain)" ]; then
    echo "WARNING: uncommitted changes are not installed, only commit $commit" >&2
  fi
  staged=${XDG_CACHE_HOME:-$HOME/.cache}/big_vit/launch/$NAME
  # The same for all hosts: who does not know it cannot join their run. It travels as a file, for
  # anyone on a machine can read the command lines of its processes.
  # shellcheck disable=SC2016
  make_secret='umask 077 && mkdir -p "$1" && rm -f "$1/big_vit.secret" && printf "%s\n" "${BIG_VIT_SECRET:-$(od -An -v -tx1 -N32 /dev/urandom | tr -d " \n")}" > "$1/big_vit.secret"'
  script='rm -rf big_vit/code.new && mkdir -p big_vit/code.new'
  script+=' && tar -xzf big_vit.tgz -C big_vit/code.new'
  script+=' && bash big_vit/code.new/launch/host.sh install "$@"'
  warm_up &&
    call bash -c "$make_secret" secret "$staged" &&
    call git -C "$HERE" archive --format=tgz "--output=$staged/big_vit.tgz" "$commit" &&
    tpus scp "$staged/big_vit.tgz" "$staged/big_vit.secret" "$NAME:" --worker=all \
      ${QUEUED:+--node=all} ${INTERNAL_IPS:+--internal-ip} &&
    call rm -f "$staged/big_vit.secret" &&
    at all all bash -c "$script" install "$commit" "$EXTRA"
}

run() {
  [ $# -gt 0 ] || die 'say what to run: launch/tpu.sh run -- python -m big_vit.train ...'
  on_host all all start "$@"
}

# By `list`, for which a TPU that is gone is an empty answer and not a failure to answer.
state() {
  local field=state
  [ -z "$QUEUED" ] || field=state.state
  tpus list "--filter=name~/$NAME\$" "--format=value($field)"
}

# if_installed COMMAND WORDS...: what each host says; `none` where nothing is installed yet.
if_installed() {
  local script='if [ -e big_vit/code/launch/host.sh ]'
  script+="; then bash big_vit/code/launch/host.sh $1 \"\$@\"; else echo none; fi"
  at all all bash -c "$script" "$@"
}

outcome() { if_installed outcome "$@"; }

# verdict TEXT: of what the hosts said, among what else they say when one logs in, that which counts
# most. One that lost the run, as by a reboot, matters more than those that wait for it.
verdict() {
  local word
  for word in other 'failed 2' 'killed 0' lost none 'failed [0-9]+' 'stopped 0' running 'done 0'; do
    if grep -m 1 -x -E "$word" <<< "$1"; then return; fi
  done
}

status() {
  local now
  now=$(state)
  echo "${now:-there is no TPU $NAME}"
  # Only these have hosts that can be asked.
  case $DRY$now in
    READY | ACTIVE | 1*) if_installed status ;;
  esac
}

note() { echo "babysit: $(date -u +%T) $1" >&2; }

# Before an attempt: gives up after --tries of them, and waits longer before each.
count_attempt() {
  failures=$((failures + 1))
  if [ "$failures" -gt "$TRIES" ]; then
    note "giving up: $TRIES attempts in a row without a run of $LONG_RUN s"
    exit 1
  fi
  if [ "$failures" -gt 1 ]; then
    note "attempt $failures in $pause s"
    sleep "$pause"
    pause=$((pause * 2 > MAX_BACKOFF ? MAX_BACKOFF : pause * 2))
  fi
}

babysit() {
  [ $# -gt 0 ] || die 'say what to run: launch/tpu.sh babysit -- python -m big_vit.train ...'
  if [ -n "$DRY" ]; then
    state && create && outcome "$@" && install && run "$@" && delete
    return
  fi
  local now said failures=0 pause=$BACKOFF silent=0 ours='' since=$SECONDS
  while true; do
    now=$(state) || now='not to be found out'
    case $now in
      READY | ACTIVE) ;;
      '')
        note 'there is no TPU: creating it'
        count_attempt
        create || note 'it was not created'
        continue
        ;;
      PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED)
        note "the TPU is $now: deleting it"
        delete || sleep "$POLL"
        continue
        ;;
      *)
        note "the state of the TPU is $now"
        sleep "$POLL"
        continue
        ;;
    esac
    # Also if some do not answer.
    said=$(outcome "$@") || true
    said=$(verdict "$said")
    case $ours$said in
      *running)
        ours=ours-
        silent=0
        if [ $((SECONDS - since)) -ge "$LONG_RUN" ]; then failures=0 pause=$BACKOFF; fi
        sleep "$POLL"
        continue
        ;;
      *'done 0')
        note 'the run is done'
        return 0
        ;;
      *other) die 'another run is active on this TPU; wait for it, or run: launch/tpu.sh kill' ;;
      # What is said of a run before ours may have been corrected since.
      'ours-failed 2')
        note 'a mistake that you must correct; see: launch/tpu.sh logs'
        return 2
        ;;
      ours-killed*)
        note 'the run was killed on purpose'
        return 1
        ;;
      *none | *lost | *failed* | *stopped* | *killed*) ;;
      *)
        silent=$((silent + 1))
        if [ "$silent" -lt 5 ]; then
          note 'no host answers'
          sleep "$POLL"
          continue
        fi
        ;;
    esac
    note "the run is ${said:-silent}: starting it"
    silent=0
    count_attempt
    # Hosts that go on without another one must end before all can meet again.
    on_host all all stop "$GRACE" -9 || true
    if install && run "$@"; then
      ours=ours- since=$SECONDS
      sleep "$POLL"
    fi
  done
}

[ $# -gt 0 ] || {
  usage
  exit 2
}
COMMAND=$1
shift
case $COMMAND in
  create | install | run | logs | status | kill | delete | babysit) ;;
  -h | --help | help)
    usage
    exit
    ;;
  *) die "there is no command $COMMAND; launch/tpu.sh --help lists them" ;;
esac

while [ $# -gt 0 ]; do
  flag=$1
  shift
  case $flag in
    --)
      break
      ;;
    --spot) SPOT=1 ;;
    --reserved) RESERVED=1 ;;
    --queued) QUEUED=1 ;;
    --internal-ips) INTERNAL_IPS=1 ;;
    --dry-run) DRY=1 ;;
    -9) FORCE=-9 ;;
    --name=* | --zone=* | --project=* | --accelerator=* | --version=* | --node-count=* | \
      --service-account=* | --commit=* | --extra=* | --worker=* | --node=* | --grace=* | \
      --tries=*)
      set -- "${flag%%=*}" "${flag#*=}" "$@"
      ;;
    --name | --zone | --project | --accelerator | --version | --node-count | \
      --service-account | --commit | --extra | --worker | --node | --grace | --tries)
      [ $# -gt 0 ] || die "$flag needs a value"
      # Not ${name^^}: the bash of a Mac is of 2007.
      printf -v "$(tr a-z- A-Z_ <<< "${flag#--}")" %s "$1"
      shift
      ;;
    *) die "there is no flag $flag; launch/tpu.sh --help lists them; a run's command follows --" ;;
  esac
done

need --name "$NAME" NAME my-tpu
need --zone "$ZONE" ZONE us-west4-a
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  die "--name: '$NAME' must be of a-z, 0-9 and -, from a letter to a letter or digit"
[[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone: '$ZONE' is not like us-west4-a"
for number in NODE_COUNT GRACE TRIES; do
  case ${!number} in
    '' | *[!0-9]* | 0) die "$number must be a whole number above 0, not '${!number}'" ;;
  esac
done
[ "$NODE_COUNT" = 1 ] || [ -n "$QUEUED" ] || die '--node-count needs --queued'
case $COMMAND in
  create | babysit)
    need --accelerator "$ACCELERATOR" ACCELERATOR v5litepod-256
    [ -z "$SPOT" ] || [ -z "$RESERVED" ] || die '--spot and --reserved exclude each other'
    [ -n "$VERSION" ] || VERSION=$(runtime_version "$ACCELERATOR")
    ;;
esac
case $COMMAND in
  run | babysit) ;;
  *) [ $# -eq 0 ] || die "$COMMAND takes no command to run" ;;
esac
if [ -z "$DRY" ] && ! command -v gcloud > /dev/null; then
  die 'gcloud is not on PATH; install it (https://cloud.google.com/sdk/docs/install), or add --dry-run'
fi

case $COMMAND in
  logs) on_host "$WORKER" "$NODE" logs ;;
  kill) on_host all all stop "$GRACE" $FORCE ;;
  *) "$COMMAND" "$@" ;;
esac
