#!/usr/bin/env bash
# A run on the GPUs of a SLURM cluster. `--dry-run` prints the job script; without, it goes to
# `sbatch`.
set -euo pipefail

usage() {
  cat << 'END'
launch/slurm.sh [flags] -- COMMAND OF THE RUN

  --nodes N            default 1
  --gpus-per-node N    default 8
  --time TIME          of one turn; the job queues again until the run is done; default 24:00:00
  --name NAME          default big_vit
  --partition P, --account A, --qos Q, --constraint C, --cpus-per-task N, --mem M
                       passed to sbatch
  --dry-run            print the job script and submit nothing

Run it in the repository, which every node must see, with the environment active.
END
}

die() {
  echo "error: $1" >&2
  exit 2
}

NODES=1 GPUS_PER_NODE=8 NAME=big_vit TIME=24:00:00 DRY='' PASSED=()

while [ $# -gt 0 ]; do
  flag=$1
  shift
  case $flag in
    --) break ;;
    -h | --help)
      usage
      exit
      ;;
    --dry-run) DRY=1 ;;
    --nodes | --gpus-per-node | --name | --time | --partition | --account | --qos | \
      --constraint | --cpus-per-task | --mem)
      [ $# -gt 0 ] || die "$flag needs a value"
      case $1 in
        *[!A-Za-z0-9_.:,\&\|-]*) die "$flag: '$1' has characters that a job script cannot hold" ;;
      esac
      case $flag in
        --nodes) NODES=$1 ;;
        --gpus-per-node) GPUS_PER_NODE=$1 ;;
        --name) NAME=$1 ;;
        --time) TIME=$1 ;;
        *) PASSED+=("$flag=$1") ;;
      esac
      shift
      ;;
    *) die "there is no flag $flag; launch/slurm.sh --help lists them; a run's command follows --" ;;
  esac
done

[ $# -gt 0 ] || die 'say what to run: launch/slurm.sh [flags] -- python -m big_vit.train ...'
for number in NODES GPUS_PER_NODE; do
  case ${!number} in
    '' | *[!0-9]* | 0) die "$number must be a whole number above 0, not '${!number}'" ;;
  esac
done

job() {
  cat << END
#!/bin/bash
#SBATCH --job-name=$NAME
#SBATCH --nodes=$NODES
# A process for each GPU: under SLURM, JAX gives each process the device of its local number.
# Hence no --gpus-per-task, which would hide the others and leave most numbers without device.
#SBATCH --ntasks-per-node=$GPUS_PER_NODE
#SBATCH --gpus-per-node=$GPUS_PER_NODE
#SBATCH --time=$TIME
$(for flag in ${PASSED[@]+"${PASSED[@]}"}; do echo "#SBATCH $flag"; done)
# To this script, two minutes before the time is over. Not TERM, which scancel sends as well:
# a job that was cancelled must not queue again.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

END
  cat << 'END'
# Who does not know it cannot join the run; srun hands it to the tasks.
export BIG_VIT_SECRET=${BIG_VIT_SECRET:-$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n')}
time_is_over= interrupted=
# Through Slurm: an srun that gets TERM itself kills its tasks before they have saved.
trap 'interrupted=1; time_is_over=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# Slurm has sent it to the tasks as well, and they may need this script's srun while they save.
trap 'interrupted=1' TERM
END
  printf 'srun --label --kill-on-bad-exit=1 launch/babysit --'
  printf ' %q' "$@"
  cat << 'END'
 &
step=$!

# A trap cuts `wait` short.
while true; do
  wait "$step"
  status=$?
  [ -n "$interrupted" ] || break
  interrupted=
done

# Done at the last moment, it ends again at once; nothing is lost by queueing it.
if [ -n "$time_is_over" ] && [ "$status" -eq 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
END
}

if [ -n "$DRY" ]; then
  job "$@"
elif command -v sbatch > /dev/null; then
  job "$@" | sbatch
else
  die 'sbatch is not on PATH; work on a login node of the cluster, or add --dry-run'
fi
