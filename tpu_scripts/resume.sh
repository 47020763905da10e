#!/usr/bin/env bash
# Go on after a preemption: a pod that is gone is deleted, created and installed anew, then the run is launched, which
# resumes it from its last checkpoint in RUN_DIR. A run that is alive is left alone, so this may be called again and again.
# Usage: resume.sh [options] CONFIG [KEY=VALUE ...]      the same as for launch.sh

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
pod
((${#REST[@]})) || die "no config given, such as configs/gsm8k.yaml"
same=(--env "$ENV_FILE")
if [[ $DRY_RUN == true ]]; then same+=(--dry-run); fi

if [[ $QUEUED == true ]]; then
  state=$(tpu queued-resources describe "$NAME" --format='value(state.state)' || true)
else
  state=$(tpu tpu-vm describe "$NAME" --format='value(state)' || true)
fi
case $state in
  ACTIVE | READY) ;;
  ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING | STARTING | RESTARTING | REPAIRING)
    die "$NAME is $state; wait, and call this again"
    ;;
  *) # SUSPENDED, PREEMPTED, FAILED, ...: spot nodes that were taken do not come back; empty: there is none, or a dry run
    if [[ -n $state || $DRY_RUN == true ]]; then "$HERE/delete.sh" "${same[@]}"; fi
    "$HERE/create.sh" "${same[@]}"
    "$HERE/install.sh" "${same[@]}"
    ;;
esac
"$HERE/launch.sh" "${same[@]}" "${REST[@]}"
