#!/usr/bin/env bash
# A TPU JobSet on GKE. `--dry-run` prints it; without, it goes to `kubectl apply`.
set -euo pipefail

usage() {
  cat << 'END'
launch/gke.sh [flags] -- COMMAND OF THE RUN

  --name NAME             of the JobSet
  --image IMAGE           with this repository; launch/Dockerfile makes one
  --accelerator TYPE      v4, v5e, v5p or v6e
  --topology AxB[xC]      of one slice, as in 16x16
  --slices N              slices of a multislice run; default 1
  --chips-per-host N      default 4, or all of a smaller topology
  --service-account KSA   Kubernetes account that may write to the bucket; default default
  --max-restarts N        of the whole JobSet, for lost nodes; default 20
  --spot                  on Spot nodes
  --dry-run               print the JobSet and apply nothing
END
}

die() {
  echo "error: $1" >&2
  exit 2
}

NAME='' IMAGE='' ACCELERATOR='' TOPOLOGY='' SLICES=1 CHIPS_PER_HOST='' SERVICE_ACCOUNT=default
MAX_RESTARTS=20 SPOT='' DRY=''

while [ $# -gt 0 ]; do
  flag=$1
  shift
  case $flag in
    --) break ;;
    -h | --help)
      usage
      exit
      ;;
    --spot) SPOT=1 ;;
    --dry-run) DRY=1 ;;
    --name | --image | --accelerator | --topology | --slices | --chips-per-host | \
      --service-account | --max-restarts)
      [ $# -gt 0 ] || die "$flag needs a value"
      printf -v "$(tr a-z- A-Z_ <<< "${flag#--}")" %s "$1"
      shift
      ;;
    *) die "there is no flag $flag; launch/gke.sh --help lists them; a run's command follows --" ;;
  esac
done

SECRET=${BIG_VIT_SECRET:-$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n')}

for flag in name image accelerator topology; do
  variable=$(tr a-z- A-Z_ <<< "$flag")
  [ -n "${!variable}" ] || die "--$flag is missing; launch/gke.sh --help says what it is"
done
[ $# -gt 0 ] || die 'say what to run: launch/gke.sh [flags] -- python -m big_vit.train ...'

case $ACCELERATOR in
  v4) SELECTOR=tpu-v4-podslice ;;
  v5e) SELECTOR=tpu-v5-lite-podslice ;;
  v5p) SELECTOR=tpu-v5p-slice ;;
  v6e) SELECTOR=tpu-v6e-slice ;;
  *) die "--accelerator: $ACCELERATOR is none of v4, v5e, v5p, v6e" ;;
esac

CHIPS=1
for side in ${TOPOLOGY//x/ }; do
  case $side in
    *[!0-9]*) die "--topology: $TOPOLOGY is not like 4x4 or 4x4x4" ;;
  esac
  CHIPS=$((CHIPS * side))
done
[ -n "$CHIPS_PER_HOST" ] || CHIPS_PER_HOST=$((CHIPS < 4 ? CHIPS : 4))
HOSTS=$((CHIPS / CHIPS_PER_HOST))
[ $((HOSTS * CHIPS_PER_HOST)) -eq "$CHIPS" ] && [ "$HOSTS" -gt 0 ] ||
  die "--topology: $TOPOLOGY is $CHIPS chips, which hosts of $CHIPS_PER_HOST do not divide"

# JSON strings are YAML strings.
json() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

words() {
  local word
  for word; do
    # Kubernetes would put a variable of its own in place of $(NAME).
    word=${word//"\$("/"\$\$("}
    printf '              - %s\n' "$(json "$word")"
  done
}

node_selector() {
  cat << END
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $SELECTOR
              cloud.google.com/gke-tpu-topology: $(json "$TOPOLOGY")
END
  [ -n "$SPOT" ] || return 0
  cat << END
              cloud.google.com/gke-spot: "true"
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: "true"
              effect: NoSchedule
END
}

jobset() {
  cat << END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(json "$NAME")
  annotations:
    # One slice, one node pool.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
    # A mistake of the user stays one.
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $SLICES
    template:
      spec:
        completionMode: Indexed
        parallelism: $HOSTS
        completions: $HOSTS
        # One lost host loses the slice; the JobSet starts all of them again.
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: big-vit
              operator: In
              values: [2]
        template:
          spec:
            restartPolicy: Never
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            serviceAccountName: $(json "$SERVICE_ACCOUNT")
            # Long enough to save. A Spot node is gone sooner whatever stands here.
            terminationGracePeriodSeconds: 300
$(node_selector)
            containers:
            - name: big-vit
              image: $(json "$IMAGE")
              command:
              - launch/babysit
              - --
$(words "$@")
              env:
              - name: JAX_COORDINATOR_PORT
                value: "8476"
              # Who does not know it cannot join the run.
              - name: BIG_VIT_SECRET
                value: $(json "$SECRET")
              resources:
                requests:
                  google.com/tpu: $CHIPS_PER_HOST
                limits:
                  google.com/tpu: $CHIPS_PER_HOST
END
}

if [ -n "$DRY" ]; then
  jobset "$@"
elif command -v kubectl > /dev/null; then
  jobset "$@" | kubectl apply -f -
else
  die 'kubectl is not on PATH; install it (https://kubernetes.io/docs/tasks/tools), or add --dry-run'
fi
