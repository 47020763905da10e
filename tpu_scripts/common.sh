# shellcheck shell=bash
# What the scripts share: options, the env file, running or printing a command, reaching every host. Sourced, not run.
# shellcheck disable=SC2034,SC2153 # used where this is sourced; set in the env file
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TOP=${HERE%/*}
REMOTE=jaxrl_llm # on the hosts, in the home directory, where ssh begins
DRY_RUN=false
ENV_FILE=$HERE/pod.env

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# The comment at the top of a script is its help.
help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  echo "Options: --help, --dry-run (print the commands, run none), --env FILE (default: pod.env beside this script)"
  exit 0
}

# Take the options that come first off the arguments; what is left is in REST.
options() {
  while [[ ${1:-} == -* ]]; do
    case $1 in
      --help) help ;;
      --dry-run) DRY_RUN=true ;;
      --env)
        ENV_FILE=${2:-}
        shift
        ;;
      *) die "$1: no such option; see --help" ;;
    esac
    shift
  done
  REST=("$@")
  [[ -f $ENV_FILE ]] || die "$ENV_FILE: no such file; copy $HERE/pod.env.example there and edit it"
  # shellcheck source=/dev/null
  source "$ENV_FILE"
}

# The named variables must be set in the env file.
need() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || die "$name: is not set in $ENV_FILE"
  done
}

# A word as a shell would read it back.
quoted() {
  local plain='^[A-Za-z0-9_./:=@%+,-]+$'
  if [[ $1 =~ $plain ]]; then printf '%s' "$1"; else printf "'%s'" "${1//\'/\'\\\'\'}"; fi
}

show() {
  local word line=
  for word in "$@"; do line+="$(quoted "$word") "; done
  echo "${line% }"
}

# Run a command after printing it; with --dry-run only print it.
run() {
  show "$@" >&3
  if [[ $DRY_RUN == false ]]; then "$@"; fi
}
exec 3>&1 # where commands are shown, also inside $(...)

tpu() { run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }

# The names of the slices: NAME, or NAME-0, NAME-1, ... of a multislice.
nodes() {
  local i
  if ((SLICES == 1)); then
    echo "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  fi
}

# A shell command on every host of every slice.
everywhere() {
  local node
  for node in $(nodes); do tpu tpu-vm ssh "$node" --worker=all --command="$1"; done
}

# The command that mounts NFS on a host where it is not: one that was restarted has lost it.
shared() {
  if [[ -n ${NFS:-} ]]; then echo "(mountpoint -q $MOUNT || sudo mount -t nfs $NFS $MOUNT)"; else echo true; fi
}

pod() {
  need PROJECT ZONE NAME TYPE RUNTIME QUEUED SPOT SLICES RUN_DIR
  [[ $QUEUED == true || $QUEUED == false ]] || die "QUEUED=$QUEUED: expected true or false"
  [[ $SPOT == true || $SPOT == false ]] || die "SPOT=$SPOT: expected true or false"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || die "SLICES=$SLICES: expected a number of at least 1"
  [[ -z ${NFS:-} ]] || need MOUNT
  [[ $SLICES == 1 || $QUEUED == true ]] || die "SLICES=$SLICES: multislice needs QUEUED=true"
}
