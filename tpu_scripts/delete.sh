#!/usr/bin/env bash
# Delete the pod and whatever is on its own disks. RUN_DIR on a shared file system stays.
# Usage: delete.sh [options]

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
pod

if [[ $QUEUED == true ]]; then
  tpu queued-resources delete "$NAME" --force --quiet
else
  tpu tpu-vm delete "$NAME" --quiet
fi
