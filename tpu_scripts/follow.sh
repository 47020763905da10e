#!/usr/bin/env bash
# Show the log of a host as it grows (of the first one, which writes metrics; others write errors); Ctrl-C ends this only.
# Usage: follow.sh [options] [WORKER [SLICE]]

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
pod

node=$NAME
if ((SLICES > 1)); then node=$NAME-${REST[1]:-0}; fi
tpu tpu-vm ssh "$node" --worker="${REST[0]:-0}" --command="tail -n 100 -F $REMOTE/train.log"
