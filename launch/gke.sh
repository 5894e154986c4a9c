#!/usr/bin/env bash
# A TPU JobSet on GKE. `--dry-run` prints it; without, it goes to `kubectl apply`.
set -euo pipefail

usage() {
  cat << 'END'
launch/gke.sh [flags] -- COMMAND OF THE RUN

  --name NAME             of the JobSet
  --image IMAGE           with this repository; launch/Dockerfile makes one
  --accelerator TYPE      v4, v5e, v5p, v6e or tpu7x
  --topology AxB[xC]      of one slice, as in 16x16
  --slices N              slices of a multislice run; default 1
  --chips-per-host N      default 4, or all of a smaller topology
  --namespace NAMESPACE   default: kubectl's own
  --queue QUEUE           LocalQueue of Kueue that admits the run
  --priority CLASS        PriorityClass of the pods
  --service-account KSA   Kubernetes account that may write to the bucket; default default
  --env NAME=VALUE        for the run, repeatable; no secrets
  --secret SECRET         Secret of the namespace whose keys become variables, repeatable
  --cpu N, --memory SIZE  of each pod, as in 100 and 300Gi; default: not limited
  --shm SIZE              most shared memory for the loader, part of --memory; default: half
                          of the node's memory
  --max-restarts N        of the whole JobSet, for lost nodes; default 20
  --spot                  on Spot nodes
  --privileged            as root with all devices, where the nodes let no other user have TPUs
  --dry-run               print what would be applied, and apply nothing
END
}

die() {
  echo "error: $1" >&2
  exit 2
}

NAME='' IMAGE='' ACCELERATOR='' TOPOLOGY='' SLICES=1 CHIPS_PER_HOST='' SERVICE_ACCOUNT=default
NAMESPACE='' QUEUE='' PRIORITY='' CPU='' MEMORY='' SHM='' MAX_RESTARTS=20 SPOT='' PRIVILEGED=''
DRY='' VARIABLES=() SECRETS=()

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
    --privileged) PRIVILEGED=1 ;;
    --dry-run) DRY=1 ;;
    --name=* | --image=* | --accelerator=* | --topology=* | --slices=* | --chips-per-host=* | \
      --namespace=* | --queue=* | --priority=* | --service-account=* | --env=* | --secret=* | \
      --cpu=* | --memory=* | --shm=* | --max-restarts=*)
      set -- "${flag%%=*}" "${flag#*=}" "$@"
      ;;
    --env | --secret)
      [ $# -gt 0 ] || die "$flag needs a value"
      if [ "$flag" = --env ]; then VARIABLES+=("$1"); else SECRETS+=("$1"); fi
      shift
      ;;
    --name | --image | --accelerator | --topology | --slices | --chips-per-host | --namespace | \
      --queue | --priority | --service-account | --cpu | --memory | --shm | --max-restarts)
      [ $# -gt 0 ] || die "$flag needs a value"
      printf -v "$(tr a-z- A-Z_ <<< "${flag#--}")" %s "$1"
      shift
      ;;
    *) die "there is no flag $flag; launch/gke.sh --help lists them; a run's command follows --" ;;
  esac
done

for flag in name image accelerator topology; do
  variable=$(tr a-z- A-Z_ <<< "$flag")
  [ -n "${!variable}" ] || die "--$flag is missing; launch/gke.sh --help says what it is"
done
[ $# -gt 0 ] || die 'say what to run: launch/gke.sh [flags] -- python -m big_vit.train ...'

# The longest pod is called NAME-slice-99-9999-abcde, and a name of Kubernetes has 63 letters.
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  die "--name: '$NAME' must be up to 40 of a-z, 0-9 and -, from a letter to a letter or digit"
for flag in namespace queue priority service-account; do
  variable=$(tr a-z- A-Z_ <<< "$flag")
  [[ ${!variable} =~ ^[-.a-z0-9]*$ ]] || die "--$flag: '${!variable}' is no name of Kubernetes"
done
for secret in ${SECRETS[@]+"${SECRETS[@]}"}; do
  [[ $secret =~ ^[-.a-z0-9]+$ ]] || die "--secret: '$secret' is no name of a Secret"
done
for variable in ${VARIABLES[@]+"${VARIABLES[@]}"}; do
  [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env: '$variable' is not like NAME=VALUE"
done
for flag in cpu memory shm; do
  variable=$(tr a-z- A-Z_ <<< "$flag")
  [[ ${!variable} =~ ^([0-9]+(\.[0-9]+)?(m|[kMGTP]|[KMGTP]i)?)?$ ]] ||
    die "--$flag: '${!variable}' is no quantity of Kubernetes, such as 300Gi"
done
for flag in slices chips-per-host max-restarts; do
  variable=$(tr a-z- A-Z_ <<< "$flag")
  [[ ${!variable:-1} =~ ^(0|[1-9][0-9]{0,5})$ ]] ||
    die "--$flag must be a whole number, not '${!variable}'"
done
[ "$SLICES" != 0 ] && [ "$CHIPS_PER_HOST" != 0 ] || die '--slices and --chips-per-host are above 0'

case $ACCELERATOR in
  v4) SELECTOR=tpu-v4-podslice SIDES=3 ;;
  v5e) SELECTOR=tpu-v5-lite-podslice SIDES=2 ;;
  v5p) SELECTOR=tpu-v5p-slice SIDES=3 ;;
  v6e) SELECTOR=tpu-v6e-slice SIDES=2 ;;
  tpu7x) SELECTOR=tpu7x SIDES=3 ;;
  *) die "--accelerator: $ACCELERATOR is none of v4, v5e, v5p, v6e, tpu7x" ;;
esac

[[ $TOPOLOGY =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})+$ ]] ||
  die "--topology: $TOPOLOGY is not like 4x4 or 4x4x4"
CHIPS=1 found=0
for side in ${TOPOLOGY//x/ }; do
  CHIPS=$((CHIPS * side)) found=$((found + 1))
done
[ "$found" = "$SIDES" ] || die "--topology: $TOPOLOGY has $found sides, one of $ACCELERATOR $SIDES"
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
  text=${text//$'\r'/\\r}
  printf '"%s"' "$text"
}

# The same where Kubernetes would put a variable of its own in place of $(NAME).
literal() {
  local text=$1
  json "${text//"\$("/"\$\$("}"
}

# field KEY VALUE: a line of YAML, where there is a value. It keeps the indentation of KEY.
field() { [ -z "$2" ] || printf '%s: %s\n' "$1" "$(json "$2")"; }

words() {
  local word
  for word; do printf '              - %s\n' "$(literal "$word")"; done
}

environment() {
  local variable
  for variable in ${VARIABLES[@]+"${VARIABLES[@]}"}; do
    printf '              - name: %s\n                value: %s\n' \
      "${variable%%=*}" "$(literal "${variable#*=}")"
  done
  [ ${#SECRETS[@]} -eq 0 ] || echo '              envFrom:'
  for variable in ${SECRETS[@]+"${SECRETS[@]}"}; do
    printf '              - secretRef:\n                  name: %s\n' "$(json "$variable")"
  done
}

security() {
  # Never more than the image's own user has, unless that is asked for.
  if [ -n "$PRIVILEGED" ]; then
    printf '%s\n' '                privileged: true' '                runAsUser: 0'
  else
    echo '                allowPrivilegeEscalation: false'
  fi
}

resources() {
  local kind
  for kind in requests limits; do
    printf '                %s:\n                  google.com/tpu: %s\n' "$kind" "$CHIPS_PER_HOST"
    field '                  cpu' "$CPU"
    field '                  memory' "$MEMORY"
  done
}

spot() {
  [ -n "$SPOT" ] || return 0
  cat << 'END'
              cloud.google.com/gke-spot: "true"
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: "true"
              effect: NoSchedule
END
}

# By it the pods know each other. Not in the JobSet, which more people may read than Secrets.
secret() {
  local value=${BIG_VIT_SECRET:-$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n')}
  cat << END
apiVersion: v1
kind: Secret
metadata:
  name: $(json "$NAME")
$(field '  namespace' "$NAMESPACE")
stringData:
  secret: $(json "$value")
---
END
}

jobset() {
  cat << END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(json "$NAME")
$(field '  namespace' "$NAMESPACE")
$([ -z "$QUEUE" ] || echo '  labels:')
$(field '    kueue.x-k8s.io/queue-name' "$QUEUE")
  annotations:
    # One slice, one node pool.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
    # A mistake of the user stays one.
    - name: mistake
      action: FailJobSet
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
$(field '            priorityClassName' "$PRIORITY")
            # Long enough to save. A Spot node is gone sooner whatever stands here.
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $SELECTOR
              cloud.google.com/gke-tpu-topology: $(json "$TOPOLOGY")
$(spot)
            volumes:
            # Loader processes hand over batches in shared memory, of which a pod has 64 MiB.
            - name: shm
              emptyDir:
                medium: Memory
$(field '                sizeLimit' "$SHM")
            containers:
            - name: big-vit
              image: $(json "$IMAGE")
              command:
              - launch/babysit
              # A pod that saved because its node goes away has not done its work.
              - --if-stopped=75
              - --
$(words "$@")
              env:
              - name: JAX_COORDINATOR_PORT
                value: "8476"
              # Who does not know it cannot join the run.
              - name: BIG_VIT_SECRET
                valueFrom:
                  secretKeyRef:
                    name: $(json "$NAME")
                    key: secret
$(environment)
              volumeMounts:
              - name: shm
                mountPath: /dev/shm
              securityContext:
$(security)
              resources:
$(resources)
END
}

# What was left out leaves an empty line.
manifest() { { secret && jobset "$@"; } | sed '/^$/d'; }

if [ -n "$DRY" ]; then
  manifest "$@"
elif command -v kubectl > /dev/null; then
  manifest "$@" | kubectl apply -f -
else
  die 'kubectl is not on PATH; install it (https://kubernetes.io/docs/tasks/tools), or add --dry-run'
fi
