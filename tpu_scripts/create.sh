#!/usr/bin/env bash
# Create the pod: a TPU VM (QUEUED=false) or a queued resource (QUEUED=true), spot or not, of one or more slices.
# A queued resource is waited for until it is active; Ctrl-C stops the waiting, not the request.
# Usage: create.sh [options]

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
pod

spot=()
if [[ $SPOT == true ]]; then spot=(--spot); fi

if [[ $QUEUED == false ]]; then
  tpu tpu-vm create "$NAME" --accelerator-type="$TYPE" --version="$RUNTIME" ${spot[@]+"${spot[@]}"}
  exit
fi

if ((SLICES == 1)); then
  which=(--node-id="$NAME")
else
  which=(--node-count="$SLICES" --node-prefix="$NAME")
fi
tpu queued-resources create "$NAME" "${which[@]}" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${spot[@]+"${spot[@]}"}

while true; do
  state=$(tpu queued-resources describe "$NAME" --format='value(state.state)')
  case $DRY_RUN:$state in
    true:* | *:ACTIVE) break ;;
    *:FAILED | *:SUSPENDED | *:SUSPENDING | *:DELETING) die "$NAME is $state; see docs/tpu.md" ;;
  esac
  echo "$NAME is $state"
  sleep "${POLL_SECONDS:-30}"
done
