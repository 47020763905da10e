#!/usr/bin/env bash
# Copy the results of the run (config, metrics, samples, tensorboard, exported model; no checkpoints) into a directory here.
# Usage: fetch.sh [options] DIRECTORY

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
pod
((${#REST[@]} == 1)) || die "expected one directory to copy to"
to=${REST[0]}

node=$(nodes | head -n 1)
tpu tpu-vm ssh "$node" --worker=0 --command="tar -czf results.tar.gz -C $(quoted "$RUN_DIR") --exclude=./checkpoints . || [ \$? = 1 ]" # 1: a file grew meanwhile
run mkdir -p "$to"
tpu tpu-vm scp "$node:results.tar.gz" "$to/results.tar.gz" --worker=0
run tar -xzf "$to/results.tar.gz" -C "$to"
run rm "$to/results.tar.gz"
